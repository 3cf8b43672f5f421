"""The engine's sparse gradients against float64 autograd through dense tensors, at odd sizes."""

import pytest
import torch

from sae import losses
from sae.config import SAEConfig
from sae.model import SAE

D_IN, D_SAE, BATCH = 7, 19, 13


def make_sae(**options) -> SAE:
    sae = SAE(D_IN, SAEConfig.of_kind({"d_sae": D_SAE, **options})).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.b_enc.sub_(2.5)  # most pre-latents negative: many rows have fewer than k positives
    return sae


def reference(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x_hat and codes from the definition alone, everything dense."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    k = sae.config.k
    if sae.config.kind == "topk":
        chosen = torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
    else:
        n = round(k * len(x))
        chosen = (pre >= pre.flatten().topk(n).values.min()).to(pre)
    z = (pre * chosen).relu()
    return z @ sae.W_dec + sae.b_dec, z


@pytest.mark.parametrize("options", [{"kind": "topk", "k": 5}, {"kind": "batchtopk", "k": 2.3}])
def test_gradients_through_every_output(options):
    x = torch.randn(BATCH, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sae, judge = make_sae(**options), make_sae(**options)
    codes, x_hat = sae.reconstruct(x)
    expected_x_hat, z = reference(judge, x)
    assert (z > 0).sum(1).min() < options["k"], "the case must hold rows with fewer than k positives"
    torch.testing.assert_close(x_hat, expected_x_hat)
    torch.testing.assert_close(codes.dense(), z)

    weight = torch.linspace(-1, 2, D_SAE, dtype=torch.float64)
    (losses.reconstruction(x, x_hat) + codes.weighted_sum(weight).mean()).backward()
    (losses.reconstruction(x, expected_x_hat) + (z @ weight).mean()).backward()
    for (name, ours), (_, theirs) in zip(sae.named_parameters(), judge.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_aux_k_reaches_the_dead_latents_alone():
    x = torch.randn(BATCH, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sae = make_sae(kind="topk", k=4)
    dead = torch.tensor([2, 3, 11, 17, 18])
    _, x_hat = sae.reconstruct(x)
    loss = losses.aux_k(x - x_hat, sae.pre_latents(x, dead), sae.W_dec[dead], 3)
    loss.backward()
    live = torch.ones(D_SAE, dtype=torch.bool)
    live[dead] = False
    assert sae.W_dec.grad[live].abs().max() == 0
    assert sae.encoder.grad[live].abs().max() == 0
    assert sae.encoder.grad[dead].abs().max() > 0

    # The judge: the three largest positive pre-latents of the five, decoded without a bias.
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc)[:, dead]
    z = torch.zeros_like(pre).scatter(1, pre.topk(3).indices, pre.topk(3).values.relu())
    torch.testing.assert_close(loss, (x - x_hat.detach() - z @ sae.W_dec[dead]).square().sum(1).mean())
