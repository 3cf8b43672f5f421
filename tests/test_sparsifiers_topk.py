"""Multi-TopK: one loss of two readings. The engine against autograd, autograd against the definition."""

import copy

import pytest
import torch
from test_engine import (
    BATCH,
    D_IN,
    D_SAE,
    RATE,
    UNIT,
    batches,
    both_decoders,
    close,
    every_kernel,
    make_engine,
    make_sae,
    same_terms,
    with_unit,
)

from sae import UsageError
from sae.config import parse_config
from sae.optim import Now

DEAD = torch.tensor([2, 60, 64, 69])


@every_kernel
@both_decoders
def test_the_objective_is_the_one_of_the_paper(unit_norm, kernels, precision):
    """(L(k) + L(multi_k) / 8) 8/9: its gradient in b_dec holds the residuals of both readings, nothing else does."""
    made = make_sae("topk", unit_norm, multi_k=11, aux_coefficient=0.0, tied_bias=False)
    x, engine = batches(1)[0], make_engine("topk", made, kernels, precision)
    pre = (x / UNIT - made.centre) @ made.encoder.T + made.b_enc
    residuals = []
    for k in (5, 11):
        kept = torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
        residuals.append((pre.relu() * kept) @ made.W_dec + made.b_dec - x / UNIT)
    losses = [residual.square().sum(dim=1).mean() for residual in residuals]
    expected = 2 * (8 * residuals[0] + residuals[1]).detach().mean(dim=0) / 9
    terms = with_unit(engine)(x, Now.at(1, RATE, 1.0), DEAD[:0])
    torch.testing.assert_close(terms.mse, losses[0].detach())
    torch.testing.assert_close(terms.error, (8 * losses[0] + losses[1]).detach() / 9)
    close(engine.state.first["b_dec"] / 0.1, expected, 1e-10)


@every_kernel
@both_decoders
@pytest.mark.parametrize("dead", [[], DEAD.tolist()], ids=["alive", "aux"])
def test_steps_are_those_of_the_objective(dead, unit_norm, kernels, precision):
    sae, dead = make_sae("topk", unit_norm, multi_k=11), torch.tensor(dead, dtype=torch.int64)
    names = ((kernels, precision), ("reference", "fp32"))
    engines = [make_engine("topk", copy.deepcopy(sae), *pair) for pair in names]
    engines[0]._by_autograd = None  # to call it would fail
    engines[1].by_autograd = True
    for number, x in enumerate(batches(5), 1):
        ours, theirs = (with_unit(engine)(x, Now.at(number, RATE, 1.0), dead) for engine in engines)
        same_terms(ours, theirs)
        assert (ours.auxiliary > 0) == bool(len(dead))
    for (name, weight), (_, expected) in zip(*(engine.state.weights() for engine in engines), strict=True):
        close(weight, expected, 1e-9, name)
    for name in ("silent_samples", "window_firing"):
        assert torch.equal(getattr(engines[0].state, name), getattr(engines[1].state, name))


def test_only_the_k_largest_count_as_firing():
    made = make_sae("topk", multi_k=40)
    engine = make_engine("topk", made)
    x = batches(1)[0]
    codes = made.sparsifier(made.pre_latents(x / UNIT))
    assert codes.values.shape == (BATCH, 5)
    terms = with_unit(engine)(x, Now.at(1, RATE, 1.0), DEAD)
    assert terms.l0 == codes.counts.sum() / BATCH
    assert torch.equal(engine.state.window_firing, codes.firing())
    assert torch.equal(made.sparsifier.select(made.pre_latents(x)).values, made.sparsifier(made.pre_latents(x)).values)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"multi_k": 5}, "multi_k must lie above k=5 and be at most d_sae=70, got 5; 4 k is usual"),
        ({"multi_k": 71}, "multi_k must lie above k=5 and be at most d_sae=70, got 71"),
        ({"multi_k": 20, "k_start": 30}, "multi_k must lie above k_start=30 and be at most d_sae=70, got 20"),
        (
            {"multi_k": 20, "prefixes": [5, 70]},
            "multi_k=20 and prefixes both read the codes several times",
        ),
        ({"k_start": 4}, "k_start must lie in k=5..d_sae=70, got 4"),
        ({"k_start": 71}, "k_start must lie in k=5..d_sae=70, got 71"),
        ({"k": 71}, "k must lie in 1..d_sae=70, got 71; lower k or raise d_sae"),
    ],
)
def test_bad_options(options, told):
    with pytest.raises(UsageError, match=told):
        parse_config({"sae": {"kind": "topk", "d_sae": D_SAE, "k": 5} | options})


def test_codes_stay_a_prefix_of_the_wider_reading():
    """Trained so, the SAE still reconstructs when it is read with more latents than it was told."""
    fvu = {}
    stream = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=stream, dtype=torch.float64), dim=1)
    for multi_k in (None, 20):
        made = make_sae("topk", multi_k=multi_k)
        made.initialise_(torch.zeros(D_IN), torch.Generator().manual_seed(0))
        engine = make_engine("topk", made)
        for number in range(1, 400):
            strengths = torch.rand(64, D_SAE, generator=stream, dtype=torch.float64)
            x = (strengths * (torch.rand(64, D_SAE, generator=stream) < 0.06)) @ directions
            engine.step(x, 1.0, Now.at(number, RATE, 1.0), DEAD[:0])
        values, indices = made.pre_latents(x).topk(20, dim=1)
        x_hat = made.b_dec + torch.einsum("bk,bkd->bd", values.relu(), made.W_dec[indices])
        fvu[multi_k] = float((x - x_hat.detach()).square().sum() / x.square().sum())
    assert fvu[20] < 0.7 * fvu[None]
