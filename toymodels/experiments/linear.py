"""Row 2c: without the ReLU, a model keeps the most important features and drops the others.

A linear model reads y = x W Wᵀ + b. Nothing cuts off what one feature says to another, so that sharing a direction
gains exactly as much as it disturbs. What is left is principal component analysis with importances: the best matrix
of rank m keeps the m most important features, each in a dimension of its own, and pays I_i Var x_i for each of the
others, however sparse they are. The same model with a ReLU, trained beside it, stores more than m.

The expected loss of the trained weights is computed exactly, from the first two moments of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from toymodels import plots, theory
from toymodels.experiments.base import Claims, Context, Experiment, Outcome, Picture
from toymodels.features import Features
from toymodels.geometry import represented
from toymodels.models import ToyModel
from toymodels.training import train
from toymodels.worlds import ToyRecipe, falling_importance

N, N_STEPS, BATCH = 10, 3000, 512
INIT_SD = N**-0.5
IMPORTANCE = [0.7**i for i in range(N)]
TRAINING = {"importance": IMPORTANCE, "n_steps": N_STEPS, "batch_size": BATCH}
PROBS = (1.0, 0.3, 0.1, 0.01)
SPARSE, SHOWN = PROBS[-1], 5
"""p and d_hidden of the two models whose matrices are drawn."""


def expected_loss(
    W: Float[Tensor, "*stack n_features d_hidden"], b: Float[Tensor, "*stack n_features"], p: Tensor
) -> Float[Tensor, "*stack"]:
    """E Σ_i I_i (x_i − (x W Wᵀ + b)_i)² of y = x W Wᵀ + b, exactly.

    With A = 1 − W Wᵀ and independent features, the error of output i has the mean Σ_j E[x_j] A_ji − b_i and the
    variance Σ_j Var[x_j] A_ji². All have E x = p/2.
    """
    W, b, p = W.double(), b.double(), p.double().expand_as(b)
    A = torch.eye(W.shape[-2], dtype=W.dtype) - W @ W.mT
    mean = einsum(p / 2, A, "... j, ... j i -> ... i") - b
    variance = einsum(theory.variance(p), A.square(), "... j, ... j i -> ... i")
    return ((mean.square() + variance) * torch.tensor(IMPORTANCE, dtype=W.dtype)).sum(-1)


def run(context: Context) -> Outcome:
    """A stack of seeds at each p for each number of dimensions; then one of models with a ReLU."""
    n_seeds, n_relu = context.pick(fast=3, full=8), context.pick(fast=3, full=8)
    dims = context.pick(fast=(2, SHOWN), full=(1, 2, 3, SHOWN))
    context.expect((len(dims) + 1) * N_STEPS)
    claims = Claims("2c")
    tensors: dict[str, Tensor] = {}
    conditions: dict[str, dict[str, Any]] = {}
    for m in dims:
        p = torch.tensor(PROBS, dtype=torch.float64).repeat_interleave(n_seeds)[:, None]
        model = ToyModel(N, m, len(p), "linear", init_sd=INIT_SD, generator=context.stream("weights", m))
        features = Features(N, p, IMPORTANCE)
        train(model, features, N_STEPS, BATCH, generator=context.stream("batches", m), progress=context.tick)
        W, b = model.W.detach(), model.b.detach()
        losses = expected_loss(W, b, p)
        ratios = losses / theory.linear_loss(torch.tensor(IMPORTANCE), p, m)
        claims.equals(
            f"kept_m={m}",
            f"m = {m}: runs of {len(p)} that keep the {m} most important features and no other",
            (represented(W) == (torch.arange(N) < m)).all(1).sum(),
            len(p),
            "DERIVED",
        )
        worst = ratios[(ratios - 1).abs().argmax()]
        text = f"m = {m}: loss / Σ_(i>m) I_i (p/3 − p²/4), of the run farthest from 1"
        claims.within(f"loss_m={m}", text, worst, 1.0, 0.02, "DERIVED")
        for prob, *parts in zip(PROBS, *(t.split(n_seeds) for t in (W, b, losses)), strict=True):
            condition = f"linear, m={m}, p={prob}"
            tensors |= {f"{condition}/{key}": part for key, part in zip(("W", "b", "losses"), parts, strict=True)}
            conditions[condition] = {"activation": "linear", "d_hidden": m, "feature_prob": prob} | TRAINING
            conditions[condition]["best"] = int(parts[2].argmin())
    model = ToyModel(N, SHOWN, n_relu, init_sd=INIT_SD, generator=context.stream("weights", "relu"))
    features = Features(N, SPARSE, IMPORTANCE)
    training = train(
        model, features, N_STEPS, BATCH, generator=context.stream("batches", "relu"), progress=context.tick
    )
    W, condition = model.W.detach(), f"ReLU, m={SHOWN}, p={SPARSE}"
    tensors |= {f"{condition}/W": W, f"{condition}/b": model.b.detach(), f"{condition}/losses": training.final_losses}
    conditions[condition] = {"activation": "relu", "d_hidden": SHOWN, "feature_prob": SPARSE} | TRAINING
    conditions[condition]["best"] = training.best
    return Outcome(claims.made, tensors, conditions, n_seeds)


def draw(outcome: Outcome) -> Sequence[Picture]:
    """What the trained models lose, on theory; then what reads what, without a ReLU and with one."""
    figure, axes = plots.figure(1, 3, width=10, height=3.3, width_ratios=(1.25, 1, 1))
    losses, *matrices = axes[0]
    dims = sorted({facts["d_hidden"] for facts in outcome.conditions.values()})
    at = torch.logspace(-2.2, 0, 60, dtype=torch.float64)
    for colour, m in zip(plots.SERIES, dims, strict=False):
        least = theory.linear_loss(torch.tensor(IMPORTANCE).expand(len(at), N), at[:, None], m)
        losses.plot(at, least, color=colour)
        losses.text(0.04, 1.25 * least[at < 0.04][-1], f"m = {m}", color=colour, ha="right", va="bottom")
        for p in PROBS:
            runs = outcome.tensors[f"linear, m={m}, p={p}/losses"]
            losses.plot([p] * len(runs), runs, "o", color=colour, alpha=0.6)
    losses.set(xscale="log", yscale="log", xlabel="feature probability p = 1 − S", ylabel="expected loss")
    for ax, activation, title in zip(matrices, ("linear", "ReLU"), ("linear output", "ReLU output"), strict=True):
        condition = f"{activation}, m={SHOWN}, p={SPARSE}"
        W = outcome.tensors[f"{condition}/W"][outcome.conditions[condition]["best"]]
        image = plots.matrix(ax, (W @ W.T).numpy(), title=title)
        ax.set_xlabel("feature, most important first")
    figure.colorbar(image, ax=matrices, shrink=0.8, ticks=(-1, 0, 1)).ax.set_title("W$_i$ · W$_j$", fontsize=9.5, pad=8)
    caption = (
        f"Left: the loss of linear models of m dimensions, trained (dots) and Σ_(i>m) I_i (p/3 − p²/4) (lines). Right: "
        f"ten features in m = {SHOWN} dimensions at p = {SPARSE}. Without a ReLU the five most important features are "
        "stored, each alone, and the others are dropped; with one, more features than dimensions are stored, at the "
        "price of interference off the diagonal."
    )
    return [Picture("linear", figure, caption)]


EXPERIMENT = Experiment(
    name="linear",
    row="2c",
    title="A linear model never superposes",
    claim="Without a ReLU a model stores only as many features as it has dimensions: the most important ones.",
    reference="Elhage et al. 2022, section 2",
    seconds=11,
    run=run,
    draw=draw,
    recipe=ToyRecipe(N, SHOWN, 0.1, N_STEPS, falling_importance(0.7, N), model={"activation": "linear"}),
)
