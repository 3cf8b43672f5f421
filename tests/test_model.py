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
