"""Row 6: as one feature grows rarer, a pentagon collapses into two digons.

Five features in two dimensions make a pentagon when they are alike. Let feature 0 fire with probability ρp, the
others with p. Two arrangements are minima of the expected loss: a pentagon, bent around feature 0, and two orthogonal
digons of the others, which leave feature 0 out at a cost of ρp/3 − (ρp)²/4. Their losses cross at ρ* < 1, where the
two are still far from each other: what is best jumps, and a trained model stays in whichever it has fallen into.

The digons do not interfere with each other, nor with a feature that is dropped: they are those of two features in
one dimension. 24 random starts at .8 ρ* and 1.2 ρ* of each p ended no lower than the better of the two.

Calibration, seeds 0–5 reduced and 0–1 full: the best run had the shape of the lower curve at every ρ further than
.05 from ρ*, and lay at most .505 % above it (sd .0005 %). That excess is (ρp)²/4: theory has the output of a dropped
feature at its mean, in trained models it is silent (b_0 ≤ 0, where the ReLU passes no gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import torch
from jaxtyping import Float
from torch import Tensor

from toymodels import geometry, plots, theory
from toymodels.experiments.base import Claims, Context, Experiment, Outcome, Picture
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.training import train
from toymodels.worlds import ToyRecipe

N_STEPS, BATCH = 1000, 512
TARGETS = {0.01: 0.156, 0.03: 0.211, 0.05: 0.267, 0.10: 0.424, 0.15: 0.602}
"""ρ* for each p of the other features."""
BETWEEN = (0.005, 0.02, 0.075, 0.125, 0.175, 0.2)
"""Further p at which ρ* is drawn."""
TRAINED_PROB = 0.05
CLEAR = 0.05
"""How far ρ must be from ρ* for the trained shape to be held to the theory."""
FINE = (24, 16, 12, 10)
"""Points of the losses that ρ* is read from. The weights are those at the minima of theory.POINTS, where the loss is
flat: the minima of FINE itself move ρ* by 1e-8. (24, 20, 16, 14) points move it by 3e-6; the bisection ends at 1e-4."""
SHAPES = ("two digons", "pentagon", "other")
COLOURS = (plots.SERIES[1], plots.SERIES[0], plots.MUTED)


def probs(p: Float[Tensor, " cells"], rho: Float[Tensor, " cells"]) -> Float[Tensor, "cells 5"]:
    """(ρp, p, p, p, p)."""
    return torch.stack([rho * p, p, p, p, p], dim=1)


def two_digons(
    p: Float[Tensor, " cells"], rho: Float[Tensor, " cells"], points: tuple[int, ...] = theory.POINTS
) -> theory.Minimum:
    """The optimal digons of features 1, 2 and 3, 4; feature 0 is dropped, its output at its mean."""
    pair = torch.tensor([[1.0], [-1.0]]).expand(len(p), 2, 1)
    digon = theory.minimise(pair, torch.zeros(len(p), 2), p[:, None])
    W = torch.zeros(len(p), 5, 2, dtype=torch.float64)
    W[:, 1:3, :1] = W[:, 3:5, 1:] = digon.W
    b = torch.cat([(rho * p / 2)[:, None], digon.b, digon.b], dim=1)
    return theory.Minimum(W, b, theory.expected_loss(W, b, probs(p, rho), points=points))


def crossing(p: Float[Tensor, " cells"]) -> tuple[Float[Tensor, " cells"], theory.Minimum]:
    """ρ* where the loss curves cross, by bisection, and the pentagon there.

    Each pentagon is sought from the last one that won, so that its arrangement is followed as ρ falls.
    """
    angles = torch.arange(5, dtype=torch.float64) * (2 * pi / 5)
    W = 1.1 * torch.stack([angles.cos(), angles.sin()], dim=1).expand(len(p), 5, 2)
    b = torch.full((len(p), 5), -0.2, dtype=torch.float64)
    low, high = torch.zeros_like(p), torch.ones_like(p)
    digons = two_digons(p, high, FINE)
    for _ in range(12):
        rho = (low + high) / 2
        pentagon = theory.minimise(W, b, probs(p, rho), tolerance=1e-7)
        loss = theory.expected_loss(pentagon.W, pentagon.b, probs(p, rho), points=FINE)
        # What the digons lose on features 1 to 4 does not depend on ρ.
        wins = loss < digons.loss - theory.variance(p) + theory.variance(rho * p)
        low, high = torch.where(wins, low, rho), torch.where(wins, rho, high)
        W, b = torch.where(wins[:, None, None], pentagon.W, W), torch.where(wins[:, None], pentagon.b, b)
    rho = (low + high) / 2
    return rho, theory.minimise(W, b, probs(p, rho))


def shape(W: Float[Tensor, "5 2"]) -> int:
    """An index of SHAPES, from the angles between neighbours: all above 50° in a pentagon, 90 ± 15° in two digons."""
    kept = geometry.represented(W)
    angles = torch.atan2(*W[kept].unbind(1)).rad2deg().sort().values
    gaps = torch.cat([angles.diff(), 360 + angles[:1] - angles[-1:]])
    if kept.all() and gaps.min() > 50:
        return 1
    return 0 if kept.tolist() == [False] + [True] * 4 and (gaps - 90).abs().max() < 15 else 2


def run(context: Context) -> Outcome:
    """The crossings for every p; then one stack for a single p, over ρ × seeds."""
    n_rho, n_seeds = context.pick(fast=(10, 10), full=(20, 24))
    context.expect(N_STEPS)
    claims = Claims("6")
    p = torch.tensor([*TARGETS, *BETWEEN], dtype=torch.float64)
    rho_star, pentagon = crossing(p)
    digons = two_digons(p, rho_star)
    for given, measured in zip(TARGETS, rho_star, strict=False):
        text = f"p = {given:g}: ρ* where the pentagon and the two digons lose equally"
        claims.within(f"rho_star_p={given:g}", text, measured, TARGETS[given], 0.01, "EXACT")

    chosen = list(TARGETS).index(TRAINED_PROB)
    start = pentagon.W[chosen], pentagon.b[chosen]
    rho = torch.linspace(1 / n_rho, 1, n_rho, dtype=torch.float64)
    fine = torch.linspace(0.02, 1, 50, dtype=torch.float64)
    both = torch.cat([rho, fine])
    same = torch.full_like(both, TRAINED_PROB)
    bent = theory.minimise(start[0].expand(len(both), 5, 2), start[1].expand(len(both), 5), probs(same, both))
    curves = torch.stack([two_digons(same, both).loss, bent.loss])
    exists = geometry.represented(bent.W[n_rho:]).all(1)  # at small ρ no pentagon is left

    each = probs(same[:n_rho], rho).repeat_interleave(n_seeds, 0)
    model = ToyModel(5, 2, len(each), generator=context.stream("weights"))
    train(model, Features(5, each), N_STEPS, BATCH, generator=context.stream("batches"), progress=context.tick)
    W, b = model.W.detach(), model.b.detach()
    losses = theory.expected_loss(W, b, each).view(n_rho, n_seeds)
    shapes = torch.tensor([shape(w) for w in W]).view(n_rho, n_seeds)
    lowest, best = losses.min(1)
    clear = (rho - rho_star[chosen]).abs() > CLEAR
    as_predicted = shapes.gather(1, best[:, None])[:, 0] == (rho > rho_star[chosen])
    text = f"p = {TRAINED_PROB}: share of the ρ, away from ρ*, at which the best run has the shape of the lower curve"
    claims.equals("best_runs_as_predicted", text, as_predicted[clear].float().mean(), 1, "PROPOSED")
    text = f"p = {TRAINED_PROB}: how far the best run lies above the lower curve, at most"
    excess = (lowest / curves[:, :n_rho].amin(0) - 1)[clear].max()
    claims.at_most("excess_of_best_runs", text, excess, 0.01, "PROPOSED")

    tensors = {
        "theory/p": p,
        "theory/rho_star": rho_star,
        "theory/pentagon_W": pentagon.W,
        "theory/pentagon_b": pentagon.b,
        "theory/digons_W": digons.W,
        "theory/digons_b": digons.b,
        "curves/rho": fine,
        "curves/two_digons": curves[0, n_rho:],
        "curves/pentagon_rho": fine[exists],
        "curves/pentagon": curves[1, n_rho:][exists],
        "trained/W": W,
        "trained/b": b,
        "trained/feature_prob": each,
        "trained/rho": rho,
        "trained/losses": losses,
        "trained/shapes": shapes,
    }
    facts = {"feature_prob": TRAINED_PROB, "n_steps": N_STEPS, "batch_size": BATCH, "shapes": list(SHAPES)}
    return Outcome(claims.made, tensors, {"trained": facts}, n_seeds)


def one_rarer(n_features: int, feature_prob: float) -> Features:
    """Feature 0 half as likely as the others."""
    return Features(n_features, [0.5 * feature_prob] + [feature_prob] * (n_features - 1))


def draw(outcome: Outcome) -> Sequence[Picture]:
    """Both loss curves with every trained run on them; and ρ* against p."""
    return [_losses(outcome), _crossings(outcome)]


def _losses(outcome: Outcome) -> Picture:
    """The familiar figure: two curves that cross, between the two shapes."""
    tensors = outcome.tensors
    figure, axes = plots.figure(1, 3, width=10, height=3.8, width_ratios=[1, 3, 1])
    left, ax, right = axes[0]
    chosen = list(TARGETS).index(TRAINED_PROB)
    ax.plot(tensors["curves/rho"], tensors["curves/two_digons"], color=COLOURS[0])
    ax.plot(tensors["curves/pentagon_rho"], tensors["curves/pentagon"], color=COLOURS[1])
    for kind, colour in enumerate(COLOURS):
        cell, seed = (tensors["trained/shapes"] == kind).nonzero().unbind(1)
        points = tensors["trained/rho"][cell], tensors["trained/losses"][cell, seed]
        ax.plot(*points, "o", color=colour, markersize=6, markerfacecolor="none")
    rho_star = float(tensors["theory/rho_star"][chosen])
    W, b = (tensors[f"theory/digons_{name}"][chosen] for name in ("W", "b"))
    crossing_at = float(theory.expected_loss(W, b, TRAINED_PROB * torch.tensor([rho_star, 1, 1, 1, 1])))
    ax.plot([rho_star] * 2, [0, crossing_at], color=plots.MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    ax.text(rho_star + 0.015, 0.0005, f"ρ* = {rho_star:.3f}")
    ax.text(0.71, 0.0142, "two digons", color=COLOURS[0], ha="right")
    ax.text(0.76, 0.0068, "pentagon", color=COLOURS[1])
    ax.set(xlabel="relative density ρ of feature 0", ylabel="expected loss", xlim=(0, 1.03), ylim=(0, 0.0185))
    ax.set_yticks([0, 0.005, 0.01, 0.015])
    for axis, name, title in ((left, "digons", "two digons"), (right, "pentagon", "pentagon")):
        # Feature 0 comes last, so that it is seen where it is dropped; the others are alike.
        arrows = tensors[f"theory/{name}_W"][chosen].roll(-1, 0).numpy()
        plots.vectors(axis, arrows, (*[plots.INK] * 4, plots.SERIES[2]))
        axis.set_title(f"{title} at ρ*", loc="center")
    caption = (
        "Five features in two dimensions: feature 0 (green) fires with probability ρp, the others with "
        f"p = {TRAINED_PROB}. Lines: the expected loss of the best two digons, and of the best pentagon as far as "
        "there is one. Circles: trained models, every seed; each settles into one or the other, on both sides "
        "of ρ* (grey: neither yet)."
    )
    return Picture("loss_curves", figure, caption)


def _crossings(outcome: Outcome) -> Picture:
    """ρ* against p, and what is best on either side of it."""
    p, rho_star = (outcome.tensors[f"theory/{name}"] for name in ("p", "rho_star"))
    order = p.argsort()
    x, y = p[order].numpy(), rho_star[order].numpy()
    figure, axes = plots.figure(width=5.6, height=3.8)
    ax = axes[0, 0]
    ax.fill_between(x, y, 1, color=COLOURS[1], alpha=0.1, linewidth=0)
    ax.fill_between(x, 0, y, color=COLOURS[0], alpha=0.1, linewidth=0)
    ax.plot(x, y, color=plots.INK)
    ax.plot(p[: len(TARGETS)], rho_star[: len(TARGETS)], "o", color=plots.INK)
    ax.text(0.06, 0.7, "pentagon", color=COLOURS[1])
    ax.text(0.12, 0.2, "two digons", color=COLOURS[0])
    ax.set(xlabel="density p = 1 − S of the other features", ylabel="relative density ρ of feature 0")
    ax.set(xlim=(x[0], x[-1]), ylim=(0, 1), xticks=[0.01, 0.05, 0.1, 0.15, 0.2])
    caption = (
        "The best arrangement; the line is ρ*. The denser the features are, the less feature 0 may fall behind "
        "before the pentagon gives way."
    )
    return Picture("critical_density", figure, caption)


EXPERIMENT = Experiment(
    name="pentagon_to_digons",
    row="6",
    title="From a pentagon to two digons",
    claim="As one of five features grows rarer, the best arrangement jumps from a pentagon to two digons without it.",
    reference="Elhage et al. 2022, The Geometry of Superposition",
    seconds=7,
    run=run,
    draw=draw,
    recipe=ToyRecipe(5, 2, TRAINED_PROB, N_STEPS, one_rarer),
)
