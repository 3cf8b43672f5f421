"""Row 4: a phase diagram of superposition.

One feature more than there are dimensions; the last is r times as important as each of the others. It may be
dropped, have a dimension to itself or share one. Which of these loses least changes abruptly with r and with how
often features fire, because sharing costs p² (both must fire) and dropping costs p; trained models follow.

A feature's fate is read from D_i, the share of a dimension that it has to itself, and not from ‖W_i‖: 0 is dropped,
1 is a dimension of its own, and whatever lies between is superposition. Theory compares minima of the expected loss,
reached from each arrangement; 48 random starts at each of 88 points of the n = 3 diagram found nothing lower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toymodels import geometry, plots, theory
from toymodels.experiments.base import Claims, Context, Experiment, Outcome, Picture
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.training import train
from toymodels.worlds import ToyRecipe

N_STEPS, BATCH = 800, 256
REFINED = 3
"""The theory is drawn on a grid this much finer than the trained one."""
POINTS = (12, 6)
"""Quadrature of the whole diagram; the critical probabilities are computed with more."""
DROPPED, DEDICATED = 0.15, 0.85
"""D of the last feature below which it is dropped, above which it has a dimension to itself."""
FATES = ("not represented", "in superposition", "dimension of its own")

SHARED = {
    2: [[[1], [-1]]],
    3: [
        [[1, 0], [0, 1], [0, -1]],
        [[0, 1], [0, -1], [1, 0]],
        [[0.87, -0.5], [-0.87, -0.5], [0, 1]],
    ],
}
"""Starts for n features in n − 1 dimensions: the last two antipodal, the first two, a triangle."""
TARGETS = {2: {0.2: 0.2956, 5.0: 0.2956, 0.5: 0.4845, 2.0: 0.4845}, 3: {0.5: 0.482}}
"""Critical p of n features at relative importance r."""


def importance(r: Float[Tensor, " cells"], n: int) -> Float[Tensor, "cells n"]:
    """(1, ..., 1, r)."""
    return torch.cat([torch.ones(len(r), n - 1, dtype=r.dtype), r[:, None]], dim=1)


def shared(n: int, p: Tensor, r: Tensor, points: tuple[int, ...] = theory.POINTS) -> theory.Minimum:
    """The best arrangement in superposition, for each p and r [cells].

    Where there is none any more, the descent ends in one that drops a feature.
    """
    W = torch.tensor(SHARED[n], dtype=torch.float64)[:, None].expand(-1, len(p), -1, -1)
    b = torch.zeros(W.shape[:-1])
    found = theory.minimise(W, b, p[:, None], importance(r, n), points=points, tolerance=1e-7)
    best = found.loss.argmin(0), torch.arange(len(p))
    return theory.Minimum(found.W[best], found.b[best], found.loss[best])


def dropped(n: int, p: Float[Tensor, " cells"], r: Float[Tensor, " cells"]) -> Float[Tensor, " cells"]:
    """The loss of the n − 1 most important features in a dimension each, which is that of a linear model."""
    return theory.linear_loss(importance(r, n), p[:, None], n - 1)


def critical(n: int, r: Float[Tensor, " ratios"]) -> Float[Tensor, " ratios"]:
    """The p below which superposition loses less than dropping a feature, by bisection."""
    low, high = torch.zeros_like(r), torch.ones_like(r)
    for _ in range(14):
        p = (low + high) / 2
        shares = shared(n, p, r).loss < dropped(n, p, r) - 1e-9
        low, high = torch.where(shares, p, low), torch.where(shares, high, p)
    return (low + high) / 2


def optimum(n: int, p: Float[Tensor, " cells"], r: Float[Tensor, " cells"]) -> Float[Tensor, "cells n d_hidden"]:
    """The W of least expected loss."""
    found = shared(n, p, r, POINTS)
    kept = torch.eye(n, dtype=torch.float64)
    alone = torch.where(r[:, None, None] < 1, kept[:, : n - 1], kept[:, 1:])
    return torch.where((found.loss < dropped(n, p, r) - 1e-9)[:, None, None], found.W, alone)


def fate(W: Float[Tensor, "cells n d_hidden"]) -> Int[Tensor, " cells"]:
    """What becomes of the last feature, as an index of FATES."""
    return torch.bucketize(geometry.feature_dimensionality(W)[:, -1].contiguous(), torch.tensor([DROPPED, DEDICATED], dtype=W.dtype))


def grid(side: int) -> tuple[Float[Tensor, " cells"], Float[Tensor, " cells"]]:
    """p from .01 to 1 and r from .1 to 10: the middles of side × side cells, in logarithms."""
    middles = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    p, r = torch.meshgrid(10 ** (2 * middles - 2), 10 ** (2 * middles - 1), indexing="ij")
    return p.flatten(), r.flatten()


def run(context: Context) -> Outcome:
    """One stack for each n: every cell of the (p, r) grid × seeds, of which the best counts."""
    side, n_seeds = context.pick(fast=(12, 8), full=(24, 20))
    context.expect(2 * N_STEPS)
    made, tensors, conditions = [], {}, {}
    for n, row in ((2, "4a"), (3, "4b")):
        claims, condition = Claims(row), f"n={n} m={n - 1}"
        ratios = torch.tensor(list(TARGETS[n]), dtype=torch.float64)
        tolerance = 0.005 if n == 2 else 0.01
        for r, p in zip(ratios, critical(n, ratios), strict=True):
            text = f"{condition}, r = {r:g}: p below which superposition is the global minimum"
            claims.within(f"critical_p_n={n}_r={r:g}", text, p, TARGETS[n][float(r)], tolerance, "EXACT")
        if n == 3:
            (W,) = optimum(n, p[None] - 0.005, r[None])
            text = f"{condition}, r = {r:g}, p = {p - 0.005:.3f}: cosine of features 2 and 3"
            claims.within("cosine_below_critical_p", text, geometry.cosines(W)[1, 2], -1, 0.01, "EXACT")

        p, r = grid(side)
        p_all, r_all = p.repeat_interleave(n_seeds), r.repeat_interleave(n_seeds)
        model = ToyModel(n, n - 1, len(p_all), generator=context.stream("weights", n))
        features = Features(n, p_all[:, None], importance(r_all, n))
        stream = context.stream("batches", n)
        train(model, features, N_STEPS, BATCH, generator=stream, progress=context.tick)
        W, b = model.W.detach(), model.b.detach()
        losses = theory.expected_loss(W, b, p_all[:, None], importance(r_all, n), POINTS)
        best = losses.view(-1, n_seeds).argmin(1) + n_seeds * torch.arange(len(p))
        trained = fate(W[best]).view(side, side)
        W_theory = optimum(n, *grid(REFINED * side))
        predicted = fate(W_theory).view(side, REFINED, side, REFINED).transpose(1, 2).flatten(2)
        inside = (predicted == predicted[..., :1]).all(2)
        agrees = trained == predicted[..., REFINED**2 // 2]
        print(condition, "inside", float(agrees[inside].float().mean()), "all", float(agrees.float().mean()), int(inside.sum()))
        text = f"{condition}: trained cells that agree with theory, of those which no boundary crosses"
        claims.at_least(f"agreement_n={n}", text, agrees[inside].float().mean(), 0.9, "PROPOSED")
        tensors |= {
            f"{condition}/W": W,
            f"{condition}/b": b,
            f"{condition}/losses": losses,
            f"{condition}/feature_prob": p_all,
            f"{condition}/relative_importance": r_all,
            f"{condition}/best": best,
            f"{condition}/W_theory": W_theory,
        }
        conditions[condition] = {
            "n_steps": N_STEPS,
            "batch_size": BATCH,
            "side": side,
            "agreement_everywhere": float(agrees.float().mean()),
        }
        made += claims.made
    return Outcome(made, tensors, conditions, n_seeds)
def draw(outcome): return []
EXPERIMENT = Experiment(
    name="phase_diagram",
    row="4",
    title="A phase diagram",
    claim="Whether a feature is dropped, shares a dimension or has its own changes abruptly with sparsity and importance.",
    reference="Elhage et al. 2022, Superposition as a Phase Change",
    seconds=25,
    run=run,
    draw=draw,
    recipe=ToyRecipe(n_features=3, d_hidden=2, feature_prob=0.1, n_steps=N_STEPS),
)
