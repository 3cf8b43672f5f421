"""Rows 2a and 2b: five features in two dimensions make a square, then a pentagon.

Two features in opposite directions hardly disturb each other: the ReLU cuts the negative half of what either says
to the other. So a square stores four features at 90°, and drops the fifth. A pentagon stores all five, but
neighbours at 72° overlap by cos 72° = .31, which a negative bias cuts off at some cost to each feature. Dropping a
feature costs the same at every sparsity, overlaps cost less the rarer two features fire together: the exact losses
cross at S = .775. Square and pentagon remain local minima on the other's side, so that claims about single
sparsities are about the best run, by its exact expected loss.

With dense features nothing can be shared: of falling importances, the first two get a dimension each.

How sure the counts of runs are: of 1024 runs at S = .99 (1000 × 1024), 2 ended as a square; of 512 at .95 none
(1500 × 512), but 3 of 128 had not arrived after 1000 × 512. Dense pairs take long, the second and the third feature
turn slowly: of 256 runs 9, 2, 0 had not arrived after 3000, 4000, 5000 steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10, pi
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toymodels import plots, theory
from toymodels.experiments.base import Claim, Claims, Context, Experiment, Outcome, Picture
from toymodels.features import Features
from toymodels.geometry import cosines, feature_dimensionality, norms, represented
from toymodels.models import ToyModel
from toymodels.training import train
from toymodels.worlds import ToyRecipe

N, M, INIT_SD, DEGREES = 5, 2, 0.4, 6.0
NAMES = {3: "triangle", 4: "square", 5: "pentagon"}
N_SEEDS = 16
SURE = {0.5: 12, 0.7: 8, 0.8: 16, 0.9: 8, 0.999: 8}
"""Sparsity → runs of which the best is sure to be the best there is: .45, .8, .38, .8 and .5 of the runs find it."""
RANGE = "I=1, S=0.955…0.99"
THEORY = {"square": (0.5, 4), "pentagon": (0.3, 5)}
"""Polygon → the largest p at which it is followed, and its number of vertices."""
QUADRATURE = (12, 8, 6, 4)


def name(base: float, sparsity: float) -> str:
    """A condition: importances I_i = base^i, at this sparsity."""
    return f"I={'1' if base == 1 else f'{base}^i'}, S={sparsity:g}"


def angle_gaps(W: Float[Tensor, "n_features 2"]) -> Float[Tensor, " n_features"]:
    """Degrees from each direction to the next, all the way round: they sum to 360."""
    angles = torch.atan2(W[:, 1], W[:, 0]).rad2deg().sort().values
    return torch.cat([angles.diff(), angles[:1] + 360 - angles[-1:]])


def farthest(values: Tensor, target: float) -> Tensor:
    """Of all the values, the one farthest from the target: a claim about it is one about each."""
    return values.flatten()[(values - target).abs().argmax()]


def polygon(W: Float[Tensor, "n_features 2"]) -> str:
    """What the represented features form: a regular polygon, an orthogonal pair, or something else."""
    kept = W[represented(W)]
    if len(kept) == 2 and cosines(kept)[0, 1].abs() < 0.1:
        return "orthogonal pair"
    n = len(kept)
    regular = n in NAMES and (angle_gaps(kept) - 360 / n).abs().max() <= DEGREES
    return NAMES[n] if regular else "other"


def regular_polygon(n: int, radius: float) -> Float[Tensor, "5 2"]:
    """n features on the corners of a regular polygon, the others at 0."""
    angles = torch.arange(n, dtype=torch.float64) * (2 * pi / n)
    W = torch.zeros(N, M, dtype=torch.float64)
    W[:n] = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
    return W


def run(context: Context) -> Outcome:
    """Three stacks, by how long their sparsity must be trained; then the exact losses of two polygons."""
    some = context.pick(fast=5, full=N_SEEDS)
    middle = context.pick(fast=SURE, full=dict.fromkeys((0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.999), 2 * N_SEEDS))
    dense = {name(1.0, 0.0): (1.0, [0.0] * 2), name(0.9, 0.0): (0.9, [0.0] * N_SEEDS)}
    sparse = {name(1.0, s): (1.0, [s] * n_runs) for s, n_runs in middle.items()}
    sparse |= {name(0.9, s): (0.9, [s] * some) for s in sorted({*middle, 0.95})}
    spread = [0.955 + 0.005 * i for i in range(N_SEEDS // 2)]
    pentagons = {name(1.0, 0.95): (1.0, [0.95] * (N_SEEDS // 2)), RANGE: (1.0, spread)}
    stacks = (("dense", dense, 6000, 512), ("sparse", sparse, 1000, 512), ("pentagons", pentagons, 1500, 1024))
    context.expect(sum(n_steps for _, _, n_steps, _ in stacks))
    tensors: dict[str, Tensor] = {}
    conditions: dict[str, dict[str, Any]] = {}
    for stream, stack, n_steps, batch_size in stacks:
        p = torch.tensor([[1 - s] for _, runs in stack.values() for s in runs], dtype=torch.float64)
        importance = torch.tensor([[base**i for i in range(N)] for base, runs in stack.values() for _ in runs])
        model = ToyModel(N, M, len(p), init_sd=INIT_SD, generator=context.stream("weights", stream))
        batches = context.stream("batches", stream)
        train(model, Features(N, p, importance), n_steps, batch_size, generator=batches, progress=context.tick)
        trained = (model.W.detach(), model.b.detach())
        exact = theory.expected_loss(*trained, p, importance, QUADRATURE)
        sizes = [len(runs) for _, runs in stack.values()]
        parts = zip(*(t.split(sizes) for t in (*trained, exact, p, importance)), strict=True)
        for condition, (W, b, losses, probs, importances) in zip(stack, parts, strict=True):
            shapes = [polygon(w) for w in W]
            tensors |= {f"{condition}/W": W, f"{condition}/b": b, f"{condition}/losses": losses}
            conditions[condition] = {
                "feature_prob": [round(float(one), 6) for one in probs] if condition == RANGE else float(probs[0]),
                "importance": importances[0].tolist(),
                "n_steps": n_steps,
                "batch_size": batch_size,
                "best": int(losses.argmin()),
                "shapes": {shape: shapes.count(shape) for shape in sorted(set(shapes))},
            }
    claims = [*pentagon_claims(tensors, conditions), *polygon_claims(tensors, conditions)]
    return Outcome(claims, tensors | exact_losses(), conditions, N_SEEDS)


def exact_losses() -> dict[str, Tensor]:
    """Where square and pentagon end when the exact expected loss is followed downhill, for equal importances."""
    found: dict[str, Tensor] = {}
    for shape, (largest, n) in THEORY.items():
        p = torch.logspace(log10(largest), -3, 25, dtype=torch.float64)
        starts = regular_polygon(n, 1.0).expand(len(p), N, M)
        minimum = theory.minimise(starts, torch.zeros(len(p), N), p[:, None], points=QUADRATURE, tolerance=1e-9)
        assert all(polygon(W) == shape for W in minimum.W)
        found |= {f"theory/{shape}_p": p, f"theory/{shape}_loss": minimum.loss}
    return found


def pentagon_claims(tensors: Mapping[str, Tensor], conditions: Mapping[str, Mapping[str, Any]]) -> Sequence[Claim]:
    """2a: every run at S = .95, and the shape of every run up to .99."""
    claims = Claims("2a")
    W, b = (tensors[f"{name(1.0, 0.95)}/{part}"] for part in ("W", "b"))
    gaps = torch.stack([angle_gaps(w) for w in W])
    for key, what, values, target, tolerance in (
        ("angle_gap", "the angle between neighbours", gaps, 72.0, DEGREES),
        ("norm", "the norm ‖W_i‖", norms(W), 1.13, 0.05),
        ("dimensionality", "the dimensionality D_i", feature_dimensionality(W), 0.4, 0.01),
        ("bias", "the bias b_i", b, -0.245, 0.03),
    ):
        text = f"S = 0.95: {what} farthest from {target:g} in {len(W)} runs"
        claims.within(key, text, farthest(values, target), target, tolerance, "RUN")
    n_pentagons = sum(conditions[at]["shapes"].get("pentagon", 0) for at in (name(1.0, 0.95), RANGE))
    claims.equals("pentagons", f"pentagons in {N_SEEDS} runs at S = 0.95 to 0.99", n_pentagons, N_SEEDS, "RUN")
    return claims.made


def polygon_claims(tensors: Mapping[str, Tensor], conditions: Mapping[str, Mapping[str, Any]]) -> Sequence[Claim]:
    """2b: the best run at each sparsity, and dense features of falling importance."""
    claims = Claims("2b")
    for sparsity, n, angle in ((0.5, 4, 90.0), (0.7, 4, 90.0), *((s, 5, 72.0) for s in (0.8, 0.9, 0.95, 0.999))):
        condition = name(1.0, sparsity)
        best = tensors[f"{condition}/W"][conditions[condition]["best"]]
        kept = best[represented(best)]
        claims.equals(f"represented_S={sparsity}", f"S = {sparsity}: features represented", len(kept), n, "RUN")
        text = f"S = {sparsity}: the angle between neighbours farthest from {angle:g}°"
        claims.within(f"angle_gap_S={sparsity}", text, farthest(angle_gaps(kept), angle), angle, DEGREES, "RUN")
        if n < N:
            text = f"S = {sparsity}: norm of the dropped feature"
            claims.at_most(f"dropped_S={sparsity}", text, norms(best).min(), 0.1, "RUN")
    pairs = conditions[name(0.9, 0.0)]["shapes"].get("orthogonal pair", 0)
    claims.equals("orthogonal_pairs", f"I = 0.9^i, S = 0: orthogonal pairs in {N_SEEDS} runs", pairs, N_SEEDS, "RUN")
    return claims.made


def draw(outcome: Outcome) -> Sequence[Picture]:
    """The best run's features as arrows, from dense to sparse; then what square and pentagon cost."""
    return [arrows(outcome), costs(outcome)]


def arrows(outcome: Outcome) -> Picture:
    """Elhage et al. 2022, section 2: a row for each importance, a column for each sparsity."""
    shown = [s for s in (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.999) if name(1.0, s) in outcome.conditions]
    figure, axes = plots.figure(2, len(shown), width=10, height=3.5)
    for row, (base, label) in zip(axes, ((1.0, "I = 1"), (0.9, "I = 0.9$^i$")), strict=True):
        for ax, sparsity in zip(row, shown, strict=True):
            condition = name(base, sparsity)
            W = outcome.tensors[f"{condition}/W"][outcome.conditions[condition]["best"]]
            plots.vectors(ax, W[represented(W)].numpy(), [plots.SERIES[i] for i in represented(W).nonzero()[:, 0]])
            dropped = W[~represented(W)].T.numpy()
            ax.plot(*dropped, "o", color=plots.MUTED, markerfacecolor="white", markersize=5, zorder=3)
            ax.set_xlabel(polygon(W).replace("other", "no polygon"), color=plots.MUTED, fontsize=9.5)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8, fontsize=11.5)
    for ax, sparsity in zip(axes[0], shown, strict=True):
        ax.set_title(f"S = {sparsity:g}", loc="center")
    caption = (
        "Five features in two dimensions, from dense (left) to sparse: a coloured line is the direction of a feature, "
        "an open dot one that is hardly represented. A square of four gives way to a pentagon of all five. Below, "
        "importance falls in the order blue, orange, green, purple, ochre: dense, the first two get a dimension each. "
        "The best run at each sparsity S."
    )
    return Picture("polygons", figure, caption)


def costs(outcome: Outcome) -> Picture:
    """Every run with equal importances, on the exact losses of the two polygons."""
    figure, axes = plots.figure(1, 1, width=6.4, height=3.9)
    ax = axes[0, 0]
    colours = {"square": plots.SERIES[0], "pentagon": plots.SERIES[1]}
    for shape, label in (("square", "square, one dropped"), ("pentagon", "pentagon")):
        p, losses = (outcome.tensors[f"theory/{shape}_{part}"] for part in ("p", "loss"))
        share = losses / (N * theory.variance(p))
        ax.plot(1 / p, share, color=colours[shape])
        ax.text(300, share[p <= 1 / 300][0] + 0.02, label, color=colours[shape], ha="center")
    for condition, facts in outcome.conditions.items():
        p = torch.tensor(facts["feature_prob"], dtype=torch.float64)
        if facts["importance"][-1] < 1 or p.max() > 0.5:
            continue
        W, losses = (outcome.tensors[f"{condition}/{part}"] for part in ("W", "losses"))
        for w, x, share in zip(W, (1 / p).expand(len(W)), losses / (N * theory.variance(p)), strict=True):
            ax.plot(x, share, "o", color=colours.get(polygon(w), plots.MUTED), alpha=0.5, markersize=5)
    ticks = (2, 5, 10, 20, 50, 100, 1000)
    ax.set(xscale="log", ylim=(0, 0.62), xlabel="sparsity S", ylabel="loss / loss of dropping all features")
    ax.set_xticks(ticks, [f"{1 - 1 / tick:g}" for tick in ticks])
    ax.minorticks_off()
    caption = (
        "Lines: the exact loss of the best square and the best pentagon, which cross at S = .775. Dots: every trained "
        "run with equal importances, in the colour of its shape (grey: neither). Both shapes are local minima that "
        "some runs end in, but the lower one is found at every sparsity."
    )
    return Picture("polygon_losses", figure, caption)


EXPERIMENT = Experiment(
    name="polygons",
    row="2a, 2b",
    title="Squares and pentagons",
    claim="Five sparse features share two dimensions as a regular pentagon, less sparse ones as a square of four.",
    reference="Elhage et al. 2022, section 2",
    seconds=13,
    run=run,
    draw=draw,
    recipe=ToyRecipe(n_features=N, d_hidden=M, feature_prob=0.05, n_steps=1000),
)
