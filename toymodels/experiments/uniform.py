"""Row 5: superposition of equal features, one sparsity at a time.

All features are equally important and equally likely; only the sparsity S changes. (a) The dimensions that a feature
gets, D* = m / ‖W‖_F², fall from 1 (the dense model keeps m directions) to a plateau at 1/2, where almost every
dimension holds an antipodal pair, and from there steadily. (b) Feature by feature, D_i sticks to few values.
(c) Nothing is wasted: Σ_i D_i = m.

Training. A pair more or less is worth little loss, and how many there are on the plateau depends on how far training
went. With n = 200 and m = 20 at 3, a model soon holds 19 pairs, and pools the other 162 features in the last dimension
(D* = .505); much later the noise of the batches makes the 20th pair (D* = .492, and a lower loss). No model of 10 did
so in 2000 steps, 3 of 5 in 6000 of half the batch. At 3.5 models differ: 4 of 48
after 1200 to 2000 steps, and 6 of 30 in other runs, had D* from .480 to .489 with all 20 pairs or on their way to them,
the others .493 to .504; what is measured there is the median of five. Towards the dense end the loss is nearly flat,
and a rate of 5e-3 is too slow: at 1.6, Σ_i D_i is 19.94 after 3000 steps, and 19.97 with 1e-2. The dense model needs
the smaller rate (19.99, not 19.95).

At 1.6 the features with D_i near 2/3 are no triangles: no two have a cosine near −1/2. Each shares its direction with
many of the 180 features of norm .25, and D_i scatters from .60 to .72; hence a tolerance of .05 around 2/3, where 1/2
has .02. The share of the represented near 2/3 was .75 to 1 in 18 models. Shares near 1/2: .91 to 1 at 2 (mean .96, sd
.03, 16 models), .95 to 1 at 2.5 (mean .99, sd .02, 12 models), 1 at 3. Mixed, at 4.5, is where no .04 of D_i holds
nearly all of them: the largest such share was .51 to .79 (mean .63, sd .1; of two models here), and is 1 at 3.
D* at 6 is the mean of several models (.316, sd .0035 for one).

With n = 400 and m = 30, D* is .322 at 6 and .219 at 10 (sd .004 for one model of either, at any rate from 2.5e-3 to
5e-3), hence their numbers there. At 1.8, between two arrangements, Σ_i D_i ends at 29.946 to 29.960, on the edge of
the tolerance, after 6000 steps as after 8000: not a point of the grid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from toymodels import geometry, plots
from toymodels.experiments.base import Claim, Claims, Context, Experiment, Outcome, Picture
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.training import train
from toymodels.worlds import ToyRecipe

BATCH = 512


class Group(NamedTuple):
    """Models that are trained as one stack."""

    density_inverses: tuple[float, ...]
    """1/(1−S) of each."""
    n_steps: int
    lr: float


FAST = (
    Group((1.6, 2, 2.5), 3000, 1e-2),
    Group((3,), 2000, 5e-3),
    Group((3.5,) * 5, 1500, 5e-3),
    Group((1, 4.5, 4.5, 6, 6, 6, 10, 20, 40), 3000, 5e-3),
)
FULL = (
    Group((1.6, 1.6, 2, 2.25, 2.5), 8000, 1e-2),
    Group((1, 3, *[3.5] * 5), 3000, 5e-3),
    Group((2.75, 3.25, 4, 4.5, 4.5, 5, *[6] * 6, 8, *[10] * 4, 14, 20, 28, 40), 4500, 5e-3),
)
DIMENSIONS_PER_FEATURE = {
    1: (1.0, 0.02),
    2.5: (0.505, 0.01),
    3: (0.505, 0.01),
    3.5: (0.505, 0.01),
    6: (0.317, 0.01),
    10: (0.215, 0.01),
    20: (0.136, 0.01),
    40: (0.088, 0.01),
}
"""1/(1−S) → D* and its tolerance; those from 10 on are ours."""
LADDER = {
    "1, alone": 1.0,
    "3/4, tetrahedron": 3 / 4,
    "2/3, triangle": 2 / 3,
    "1/2, digon": 1 / 2,
    "2/5, pentagon": 2 / 5,
    "3/8, antiprism": 3 / 8,
}
"""D_i of exact polytopes."""


def run(context: Context) -> Outcome:
    """Every sparsity, as three stacks."""
    n, m = context.pick(fast=(200, 20), full=(400, 30))
    groups = context.pick(fast=FAST, full=FULL)
    context.expect(sum(group.n_steps for group in groups))
    tensors: dict[str, Tensor] = {}
    conditions: dict[str, dict[str, object]] = {}
    for number, (inverses, n_steps, lr) in enumerate(groups):
        inverse = torch.tensor(inverses)
        model = ToyModel(n, m, len(inverse), generator=context.stream("weights", number))
        features = Features(n, (1 / inverse)[:, None])
        stream = context.stream("batches", number)
        training = train(model, features, n_steps, BATCH, lr, generator=stream, progress=context.tick)
        for value in dict.fromkeys(inverses):
            chosen, condition = inverse == value, f"density_inverse={value:g}"
            tensors[f"{condition}/W"] = model.W.detach()[chosen]
            tensors[f"{condition}/b"] = model.b.detach()[chosen]
            tensors[f"{condition}/losses"] = training.final_losses[chosen]
            conditions[condition] = {
                "density_inverse": value,
                "feature_prob": 1 / value,
                "n_steps": n_steps,
                "batch_size": BATCH,
                "lr": lr,
            }
    conditions = dict(sorted(conditions.items(), key=lambda item: float(str(item[1]["density_inverse"]))))
    weights = {float(str(facts["density_inverse"])): tensors[f"{name}/W"] for name, facts in conditions.items()}
    return Outcome([*dimensions(weights), *clusters(weights), *capacities(weights)], tensors, conditions, 1)


Weights = dict[float, Float[Tensor, "n_instances n_features d_hidden"]]
"""1/(1−S) → W."""


def dimensions(weights: Weights) -> Sequence[Claim]:
    """5a: D* against 1/(1−S), the median over the models of a sparsity."""
    claims = Claims("5a")
    measured = {inverse: geometry.dimensions_per_feature(W).quantile(0.5) for inverse, W in weights.items()}
    for inverse, (target, tolerance) in DIMENSIONS_PER_FEATURE.items():
        name, text = f"dimensions_per_feature_at_{inverse:g}", f"D* at 1/(1−S) = {inverse:g}, median of the models"
        claims.within(name, text, measured[inverse], target, tolerance, "RUN")
    return claims.made


def share_near(W: Float[Tensor, "n_instances n_features d_hidden"], value: float, tolerance: float) -> float:
    """The share of the represented features, of all instances, whose D_i lies within `tolerance` of `value`."""
    D = geometry.feature_dimensionality(W)[geometry.represented(W)]
    return float(((D - value).abs() < tolerance).float().mean())


def largest_share(W: Float[Tensor, "n_features d_hidden"], tolerance: float) -> Float[Tensor, ""]:
    """The largest share of the represented features whose D_i lie within `tolerance` of that of one of them."""
    D = geometry.feature_dimensionality(W)[geometry.represented(W)]
    return ((D[:, None] - D).abs() < tolerance).float().mean(1).max()


def clusters(weights: Weights) -> Sequence[Claim]:
    """5b: where the D_i of the represented features lie."""
    claims = Claims("5b")
    text = "share of the represented with |D_i − {}| < {} at 1/(1−S) = {:g}"
    claims.at_least(
        "share_two_thirds", text.format("2/3", ".05", 1.6), share_near(weights[1.6], 2 / 3, 0.05), 0.61, "RUN"
    )
    half = {inverse: share_near(weights[inverse], 1 / 2, 0.02) for inverse in (2, 2.5, 3)}
    for inverse in (2, 2.5):
        claims.at_least(f"share_half_at_{inverse}", text.format("1/2", ".02", inverse), half[inverse], 0.75, "PROPOSED")
    claims.at_least("share_half_at_3", text.format("1/2", ".02", 3), half[3], 0.95, "RUN")
    largest = sum(float(largest_share(W, 0.02)) for W in weights[4.5]) / len(weights[4.5])
    text = "mixed at 1/(1−S) = 4.5: the largest share within .02 of that of one feature"
    claims.at_most("largest_share_at_4.5", text, largest, 0.9, "PROPOSED")
    return claims.made


def capacities(weights: Weights) -> Sequence[Claim]:
    """5c: Σ_i D_i, the mean over the instances of a sparsity."""
    claims = Claims("5c")
    for inverse, W in weights.items():
        total = geometry.capacity(W).mean()
        claims.within(f"capacity_at_{inverse:g}", f"Σ D_i at 1/(1−S) = {inverse:g}", total, W.shape[-1], 0.05, "RUN")
    return claims.made


def draw(outcome: Outcome) -> Sequence[Picture]:
    """D* and D_i against 1/(1−S), and how the features of three sparsities see one another."""
    facts = outcome.conditions
    weights = {float(str(facts[name]["density_inverse"])): outcome.tensors[f"{name}/W"] for name in facts}
    return [draw_dimensions(weights), draw_cosines({inverse: weights[inverse][0] for inverse in (3.0, 4.5, 10.0)})]


def draw_dimensions(weights: Weights) -> Picture:
    """D* above, every D_i below, over the same sparsities."""
    figure, ((above,), (below,)) = plots.figure(2, 1, width=9, height=8, sharex=True, height_ratios=(2, 3))
    n, m = weights[3.0].shape[1:]
    measured = {inverse: geometry.dimensions_per_feature(W) for inverse, W in weights.items()}
    for level, text in ((1, "a dimension for each: D* = 1"), (1 / 2, "a dimension for two: D* = 1/2")):
        above.axhline(level, color=plots.RULE, zorder=0)
        above.annotate(text, (41, level), (0, 4), textcoords="offset points", ha="right", color=plots.MUTED)
    above.plot(list(measured), [float(values.mean()) for values in measured.values()], color=plots.SERIES[0])
    for inverse, values in measured.items():
        above.plot([inverse] * len(values), values, "o", color=plots.SERIES[0])
    above.set(ylim=(0, 1.12), yticks=[0, 0.25, 0.5, 0.75, 1], ylabel="dimensions per feature, D*")
    for inverse, W in weights.items():
        D, chosen = geometry.feature_dimensionality(W[0]), geometry.represented(W[0])
        places = inverse * torch.linspace(-0.045, 0.045, n).exp()
        below.plot(places[~chosen], D[~chosen], "o", color="#c3cad1", markersize=1.8, markeredgewidth=0)
        below.plot(places[chosen], D[chosen], "o", color=plots.SERIES[0], markersize=3.6, markeredgewidth=0, alpha=0.8)
    for text, level in LADDER.items():
        below.axhline(level, color=plots.RULE, linewidth=0.8, zorder=0)
        lift = {"2/5, pentagon": 3, "3/8, antiprism": -3}.get(text, 0)
        beside = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
        below.annotate(text, (46, level), (4, lift), color=plots.MUTED, fontsize=9.5, **beside)
    below.set(xscale="log", xlim=(0.9, 46), ylim=(0, 1.04))
    below.set(xlabel="1 / (1 − S), one over the probability of a feature", ylabel="dimensionality of a feature, $D_i$")
    ticks = [inverse for inverse in weights if inverse in (1, 1.6, 2, 2.5, 3, 3.5, 4.5, 6, 10, 20, 40)]
    below.set_xticks(ticks, [f"{inverse:g}" for inverse in ticks])
    below.minorticks_off()
    caption = (
        f"{n} equal features in {m} dimensions. Above: D* = m / Σ ‖W_i‖² is 1 for dense features, whose m directions "
        "are mixtures of all of them, rests at 1/2, where they form antipodal pairs, and then falls. Below: the "
        "dimensionality of every feature, blue where it is represented (‖W_i‖ > 0.5), with lines where exact polytopes "
        "lie; beyond the pairs features interfere with many others, and slide down. At every sparsity they add up to m."
    )
    return Picture("uniform", figure, caption)


def draw_cosines(weights: dict[float, Float[Tensor, "n_features d_hidden"]]) -> Picture:
    """Cosines between represented features, the members of a polytope side by side."""
    figure, axes = plots.figure(1, len(weights), width=10, height=3.9)
    for ax, (inverse, W) in zip(axes[0], weights.items(), strict=True):
        groups = sorted(geometry.polytopes(W, threshold=0.2), key=lambda group: len(group.features))
        order = [feature for group in groups for feature in group.features]
        image = plots.matrix(ax, geometry.cosines(W[order]).numpy(), title=f"1 / (1 − S) = {inverse:g}")
        ax.set_xlabel(described(groups))
    bar = figure.colorbar(image, ax=list(axes[0]), shrink=0.82, fraction=0.02, pad=0.01, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["−1", "0", "1"])
    bar.set_label("cosine")
    bar.outline.set_visible(False)
    caption = (
        "Cosines between the represented features, those of one polytope side by side. On the plateau every feature "
        "has one partner, its opposite; at 4.5 pairs give way to larger polytopes; at 10 every feature interferes "
        "with many others."
    )
    return Picture("cosines", figure, caption)


def described(groups: Sequence[geometry.Polytope]) -> str:
    """How many there are of each kind: "12 × digon, 3 × pentagon"."""
    kinds = Counter(f"group of {len(group.features)}" if group.kind == "other" else group.kind for group in groups)
    return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())


EXPERIMENT = Experiment(
    name="uniform",
    row="5",
    title="The geometry of uniform superposition",
    claim="As features become sparser they share dimensions, and rest where two share one, as antipodal pairs.",
    reference="Elhage et al. 2022, The Geometry of Superposition",
    seconds=57,
    run=run,
    draw=draw,
    recipe=ToyRecipe(n_features=200, d_hidden=20, feature_prob=0.1),
)
