"""Codes read several times (Matryoshka, Multi-TopK), gradients in silent codes, targets of a width of their own.

The reference against autograd, the other kernels against the reference, in float64 at odd sizes.
"""

import copy

import pytest
import torch
from torch import Tensor

from sae.kernels import Change, Codes, State
from sae.kernels.native import Native
from sae.kernels.plain import Plain
from sae.kernels.reference import Reference, dense
from sae.optim import Now

WEIGHTS = (0.2, 0.5, 0.3)
SIZES = [(1, 1, 1, 1, 1), (5, 7, 3, 2, 2), (37, 13, 21, 61, 6), (5, 65, 70, 257, 31)]  # batch, d_in, d_out, d_sae, k
every_size = pytest.mark.parametrize(("batch", "d_in", "d_out", "d_sae", "k"), SIZES)
both_norms = pytest.mark.parametrize("unit_norm", [True, False])


def make(name: str) -> Native | Plain:
    return Native(torch.float64, "fp32") if name == "native" else Plain("fp32")


def close(ours: Tensor, theirs: Tensor) -> None:
    size = float(theirs.abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=1e-10 * size)


def problem(batch: int, d_in: int, d_out: int, d_sae: int, k: int, unit_norm: bool) -> tuple[Tensor, Tensor, State]:
    stream = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream, dtype=torch.float64)

    weights = {"encoder": normal(d_sae, d_in), "W_dec": normal(d_sae, d_out)}
    weights |= {"b_enc": normal(d_sae), "b_dec": normal(d_out)}
    if unit_norm:
        weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
    return normal(batch, d_in), normal(batch, d_out), State.of(weights, unit_norm, tied=False)


def codes_of(x: Tensor, state: State, k: int, whole: bool, n_levels: int = 3) -> Codes:
    """TopK's, with empty slots (or, where all slots are whole, silent ones) and a level for each slot."""
    judge = Reference()
    codes = judge.top_k(judge.scores(x, state), k)
    codes.values[::5] = 0
    levels = torch.randint(n_levels, codes.latents.shape, generator=torch.Generator().manual_seed(1))
    return codes._replace(pre_latents=codes.values - 0.1 if whole else None, levels=levels, weights=WEIGHTS[:n_levels])


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@both_norms
@every_size
def test_the_reference_against_autograd(whole, detached, unit_norm, batch, d_in, d_out, d_sae, k):
    x, target, state = problem(batch, d_in, d_out, d_sae, k, unit_norm)
    codes = codes_of(x, state, k, whole)._replace(detached=detached)
    decoded = Reference().decode(codes, state, target, 0.3)
    values, W_dec = codes.values.clone().requires_grad_(), state.W_dec.clone().requires_grad_()
    offset = torch.zeros(d_out, dtype=torch.float64, requires_grad=True)
    norms = torch.ones(d_sae).double() if unit_norm else state.W_dec.norm(dim=1)
    loss, left, by_reading = target.new_zeros(()), target, []
    for level, weight in enumerate(WEIGHTS):
        if detached and 0 < level < len(WEIGHTS) - 1:
            left = left.detach() - dense(codes._replace(values=values * (codes.levels == level)), d_sae) @ W_dec
        else:
            left = target - dense(codes._replace(values=values * (codes.levels <= level)), d_sae) @ W_dec - offset
        squares = left.square().sum(dim=1)
        loss = loss + weight * squares.mean()
        by_reading.append(squares.detach())
    sums = dense(codes._replace(values=values), d_sae) @ norms
    (loss + 0.3 * sums.sum()).backward()
    close(decoded.losses.mean(), loss.detach())
    for reading in (0, 1, 2, -1):
        read = Reference().decode(codes._replace(reading=reading), state, target, 0.3)
        close(read.squares, by_reading[reading])
    close(decoded.code_sums, sums.detach())
    close(decoded.code_gradients, values.grad if whole else values.grad * (codes.values > 0))
    close(decoded.gradient[:batch].sum(dim=0), offset.grad)
    plan = Reference().invert(codes, decoded.code_gradients, d_sae)
    close(plan.codes.T @ decoded.gradient, W_dec.grad)


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("whole", [True, False])
@both_norms
@every_size
def test_decode(name, whole, unit_norm, batch, d_in, d_out, d_sae, k):
    x, target, state = problem(batch, d_in, d_out, d_sae, k, unit_norm)
    kernels = make(name)
    read = codes_of(x, state, k, whole)
    others = ({"reading": 0}, {"reading": 1}, {"detached": True}, {"levels": None, "weights": (1.0,)})
    for codes in (read, *(read._replace(**other) for other in others)):
        theirs = Reference().decode(codes, state, target, 0.3)
        for field, ours, other in zip(theirs._fields, kernels.decode(codes, state, target, 0.3), theirs, strict=True):
            assert ours.shape == other.shape, field
            close(ours, other)


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("n_levels", [1, 3])
@both_norms
@every_size
def test_update(name, n_levels, unit_norm, batch, d_in, d_out, d_sae, k):
    x, target, state = problem(batch, d_in, d_out, d_sae, k, unit_norm)
    x[batch // 2] = 0
    judged, judge, kernels = copy.deepcopy(state), Reference(), make(name)
    pull = torch.linspace(-1, 1, d_sae, dtype=torch.float64)
    for number in (1, 2):
        codes = codes_of(x, state, k, True, n_levels)
        gradient = torch.cat([target * (n + 1) for n in range(n_levels)])
        # Silent codes may have a gradient, and codes that fire may have none.
        through = torch.linspace(-1, 1, len(codes.values), dtype=torch.float64)
        through[::3] = 0
        fires = (dense(codes, d_sae) > 0).sum(dim=0)
        before = judged.window_firing.clone()
        for own, by in ((state, kernels), (judged, judge)):
            plan = by.invert(codes, through, d_sae)
            assert plan.n_codes == fires.sum()
            by.update_(own, Now.at(number, 0.01, 1.0), Change(x, gradient, plan=plan, cost=0.2, pull=pull))
        assert torch.equal(judged.window_firing - before, fires)
        for field, weight in state.weights():
            close(weight, getattr(judged, field))
            close(state.second[field], judged.second[field])
        close(state.first["b_dec"], judged.first["b_dec"])
        assert torch.equal(state.silent_samples, judged.silent_samples)
        assert torch.equal(state.window_firing, judged.window_firing)
    close(judged.first["b_dec"], (0.1 * 0.9 + 0.1) * target.sum(dim=0))  # nothing comes through an encoder
