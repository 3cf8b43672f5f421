"""What an SAE accepts. Shapes are checked here by the SAE itself, as users run without jaxtyping."""

import inspect

import numpy as np
import pytest
import torch

import sae
from sae import SAE, SAEConfig, UsageError

encode = inspect.unwrap(SAE.encode)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((3, 4), np.float32), TypeError, r"must be a tensor, got ndarray; pass torch.from_numpy\(x\)"),
        ([[0.0] * 4] * 3, TypeError, r"must be a tensor, got list; pass torch.tensor\(x\)"),
        (torch.zeros(3, 5), ValueError, r"must be \[batch, d_in=4\], got \[3, 5\]; this SAE reads another width"),
        (torch.zeros(2, 3, 4), ValueError, r"got \[2, 3, 4\]; flatten the leading axes first"),
        (torch.zeros(4), ValueError, r"got \[4\]; pass one row as x\[None\]"),
    ],
)
def test_what_cannot_be_encoded_is_named(x, error, message):
    model = SAE(4, SAEConfig.of_kind({"kind": "topk", "d_sae": 8, "k": 2}))
    with pytest.raises(error, match=message) as raised:
        encode(model, x)
    assert "\n" not in str(raised.value)


# What a user does with codes


def test_a_matrix_of_codes_decodes_as_the_codes_do(tmp_path):
    for options in ({"kind": "topk", "k": 3}, {"kind": "skip_transcoder", "k": 3}):
        model = SAE(6, SAEConfig.of_kind({"d_sae": 24} | options)).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        x = torch.randn(2, 5, 6)
        flat = x.flatten(0, 1)
        codes = model.encode(flat)
        torch.testing.assert_close(model.decode(codes.dense(), flat), model.decode(codes, flat))
        without = codes.dense()
        without[:, int(codes.firing().argmax())] = 0
        assert not torch.equal(model.decode(without, flat), model(flat))
        # More axes, as a hook on a language model sees them.
        torch.testing.assert_close(model(x), model(flat).view(2, 5, 6))
        torch.testing.assert_close(model.decode(codes.dense().view(2, 5, 24), x), model(x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_told(tmp_path):
    SAE(6, SAEConfig.of_kind({"d_sae": 24, "kind": "topk", "k": 3})).save(tmp_path)
    with pytest.raises(UsageError, match="device 'cuda' cannot be used"):
        sae.load(tmp_path, device="cuda")


def test_what_is_printed_is_short_and_says_what_it_is():
    model = SAE(6, SAEConfig.of_kind({"d_sae": 24, "kind": "topk", "k": 3}))
    model.b_enc.data.fill_(1.0)
    assert repr(model).startswith("SAE(\n  kind=topk, d_in=6, d_sae=24")
    assert repr(model.encode(torch.randn(4, 6))) == "SparseCodes(shape=(4, 24), mean L0 3, torch.float32 on cpu)"
    assert "L0 0" in repr(model.encode(torch.randn(0, 6)))


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu", "gated", "jumprelu", "matching_pursuit", "refined"])
def test_no_rows_have_no_codes(kind):
    options = {"l0": 2} if kind in ("relu", "gated", "jumprelu") else {"k": 2}
    model = SAE(5, SAEConfig.of_kind({"kind": kind, "d_sae": 8} | options))
    for name, buffer in model.named_buffers():
        if "threshold" in name:
            buffer.fill_(0.1)
    model.eval().requires_grad_(False)
    assert model.encode(torch.zeros(0, 5)).dense().shape == (0, 8)
    assert model(torch.zeros(0, 5)).shape == (0, 5)


def test_a_mean_far_larger_than_what_varies_leaves_the_codes_as_they_are():
    """Folded into the bias, it would drown them in the rounding of x W_enc."""
    model = SAE(64, SAEConfig.of_kind({"kind": "topk", "d_sae": 256, "k": 4}))
    stream = torch.Generator().manual_seed(0)
    mean = 1e5 * torch.randn(64, generator=stream)
    model.initialise_(mean, stream)
    model.requires_grad_(False)
    x = (torch.randn(500, 64, generator=stream) + mean).float()
    exact = (x.double() - model.b_dec.double()) @ model.W_enc.double()
    chosen = torch.zeros_like(exact).scatter(1, exact.topk(4).indices, 1.0).bool()
    assert float(((model.encode(x).dense() > 0) == chosen).all(dim=1).float().mean()) > 0.99
    torch.testing.assert_close(model.pre_latents(x).double(), exact, rtol=1e-5, atol=1e-5)
