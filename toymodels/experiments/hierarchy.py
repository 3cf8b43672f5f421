"""Row 18: a parent and its children keep out of each other's way.

Children fire only where their parent does, so that a family is active all at once and interference inside of it
would be paid for in every such row; between families it is paid for only where two of them happen to meet. At
n = 2m every feature needs an antipode, and where siblings are free to fire together it is found in another family:
parent and children are an orthogonal basis. Exclusive siblings are never active together; they may be antipodal to
one another at no cost, and many are, while their parent stays near to orthogonal. The control fires each feature as
often, but independently of the others: its antipodes are anywhere.

PROPOSED, calibrated over seeds 0 to 4, 10 models of each kind at each, which are averaged (mean, sd over seeds):
                                              free siblings    exclusive        control
    rms cosine of all pairs in a family       .062 ± .015      .32 ± .01        .27 ± .03
    rms cosine of parent and child            .047 ± .014      .098 ± .005      .26 ± .04
    mean cosine of siblings                   .032 ± .011      −.269 ± .014     −.07 ± .02
So it is where there is room: at n = 4m, 256 features in 64 dimensions, nothing is orthogonal any more, and the rms
cosine of a child with its parent is .08 to .13 (feature_prob .1 to .2) where that of all pairs is .12.

The recipe is a forest of three generations, 1 + 3 + 9 features to a tree: n_roots = n / 13, rounded up. At n = 256 and
feature_prob .15 there are 20 roots, 60 children at .0225 and 176 grandchildren at .0034; 4.9 features fire in a row,
and all of them are represented.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from toymodels import geometry, plots
from toymodels.co_firing import Tree
from toymodels.experiments.base import Claims, Context, Experiment, Outcome, Picture
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.training import train
from toymodels.worlds import ToyRecipe

N_FEATURES, D_HIDDEN, N_ROOTS, BRANCHING, PROB = 16, 8, 4, 3, 0.25
N_STEPS, BATCH = 1500, 256
KINDS = {
    "free siblings": "Siblings free to fire together",
    "exclusive siblings": "Exclusive siblings",
    "independent features": "Control: no hierarchy, same rates",
}
PAIRS = ("parent and child", "siblings", "other families", "a family")


def run(context: Context) -> Outcome:
    """A stack of seeds for each kind of family."""
    n_seeds = context.pick(fast=10, full=40)
    context.expect(len(KINDS) * N_STEPS)
    tree = Tree(N_ROOTS, BRANCHING)
    pairs = kinship(tree)
    claims, rms, mean = Claims("18"), {}, {}
    tensors: dict[str, Tensor] = {}
    conditions: dict[str, dict[str, object]] = {}
    for kind in KINDS:
        features = Features(N_FEATURES, PROB, co_firing=Tree(N_ROOTS, BRANCHING, kind == "exclusive siblings"))
        if kind == "independent features":
            features = Features(N_FEATURES, features.probs)
        model = ToyModel(N_FEATURES, D_HIDDEN, n_seeds, generator=context.stream("weights", kind))
        training = train(
            model, features, N_STEPS, BATCH, generator=context.stream("batches", kind), progress=context.tick
        )
        W = model.W.detach()
        cosines = geometry.cosines(W)
        rms[kind] = {name: cosines[:, among].square().mean().sqrt() for name, among in pairs.items()}
        mean[kind] = {name: cosines[:, among].mean() for name, among in pairs.items()}
        tensors |= {f"{kind}/W": W, f"{kind}/b": model.b.detach(), f"{kind}/losses": training.final_losses}
        conditions[kind] = {
            "feature_prob": features.probs.tolist(),
            "parents": [-1] * N_FEATURES if kind == "independent features" else tree.parents(N_FEATURES),
            "n_steps": N_STEPS,
            "batch_size": BATCH,
            "best": training.best,
            "represented": float(geometry.represented(W).sum(1).float().mean()),
            "rms_cosine": {name: float(value) for name, value in rms[kind].items()},
            "mean_cosine": {name: float(value) for name, value in mean[kind].items()},
        }
    free, exclusive, control = (rms[kind] for kind in KINDS)
    inside, lineage = "rms cosine inside a family", "rms cosine of parent and child"
    claims.at_most("free_family", f"{inside}, siblings free", free["a family"], 0.12, "PROPOSED")
    claims.at_least("control_family", f"{inside}, had it no hierarchy", control["a family"], 0.14, "PROPOSED")
    claims.at_most(
        "exclusive_parent", f"{lineage}, siblings exclusive", exclusive["parent and child"], 0.14, "PROPOSED"
    )
    siblings = mean["exclusive siblings"]["siblings"]
    claims.at_most("exclusive_siblings", "mean cosine of exclusive siblings", siblings, -0.17, "PROPOSED")
    return Outcome(claims.made, tensors, conditions, n_seeds)


def kinship(tree: Tree) -> dict[str, Bool[Tensor, "n n"]]:
    """Which pairs i ≠ j are parent and child, which siblings, which neither, and which one of the first two."""
    parent = torch.tensor(tree.parents(N_FEATURES))
    mine = parent[:, None] == torch.arange(N_FEATURES)
    lineage = mine | mine.T
    siblings = (parent[:, None] == parent) & (parent >= 0)
    siblings.fill_diagonal_(False)
    others = ~(lineage | siblings | torch.eye(N_FEATURES, dtype=torch.bool))
    return dict(zip(PAIRS, (lineage, siblings, others, lineage | siblings), strict=True))


def families_in_order(cosines: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Rows and columns reordered: each root is followed by its children."""
    parents = Tree(N_ROOTS, BRANCHING).parents(N_FEATURES)
    order = sorted(range(N_FEATURES), key=lambda i: (i if parents[i] < 0 else parents[i], i))
    return cosines[order][:, order]


def draw(outcome: Outcome) -> Sequence[Picture]:
    """The cosines in the best model, family by family; below, those of every seed by kinship."""
    made, axes = plots.figure(2, len(KINDS), width=9.6, height=5.9, height_ratios=[1.8, 1])
    pairs = kinship(Tree(N_ROOTS, BRANCHING))
    size = 1 + BRANCHING
    for (kind, title), top, below in zip(KINDS.items(), axes[0], axes[1], strict=True):
        cosines = geometry.cosines(outcome.tensors[f"{kind}/W"])
        best = families_in_order(cosines[cast(int, outcome.conditions[kind]["best"])])
        image = plots.matrix(top, best.numpy(), title=title)
        for start in range(0, N_FEATURES, size):
            xs, ys = zip(*((start - 0.5 + x * size, start - 0.5 + y * size) for x, y in SQUARE), strict=True)
            top.plot(xs, ys, color=plots.INK, linewidth=1.0)
        centres = [start + (size - 1) / 2 for start in range(0, N_FEATURES, size)]
        top.set_xticks(centres, [f"family {number + 1}" for number in range(N_ROOTS)])
        top.tick_params(length=0)
        for place, name in enumerate(PAIRS[:3]):
            rms = cosines[:, pairs[name]].square().mean(1).sqrt()
            spread = torch.linspace(-0.18, 0.18, len(rms))
            below.plot(place + spread, rms, "o", color=plots.SERIES[place], markersize=4, alpha=0.7, markeredgewidth=0)
        below.set(xlim=(-0.5, 2.5), ylim=(0, 0.65), yticks=[0, 0.2, 0.4, 0.6])
        below.set_xticks(range(3), ["parent\nand child", "siblings", "other\nfamilies"])
        below.tick_params(axis="x", length=0)
    axes[1, 0].set(ylabel="rms cosine, a dot for each seed")
    made.colorbar(image, ax=axes[0].tolist(), label="cosine", shrink=0.7, ticks=[-1, 0, 1])
    caption = (
        f"{N_FEATURES} features in {D_HIDDEN} dimensions: {N_ROOTS} families (squares), each a parent followed by its "
        f"{BRANCHING} children. Above, the cosines between features in the model of lowest loss; below, all seeds. "
        "A family is an orthogonal basis, whose antipodes lie in other families; exclusive siblings, which never meet, "
        "also serve as each other's antipodes. Features of the same rates without a hierarchy pair up anywhere."
    )
    return [Picture("hierarchy", made, caption)]


SQUARE = ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))


def forest(n_features: int, feature_prob: float) -> Features:
    """Three generations of 1 + 3 + 9 features to a tree; feature_prob is P(feature | its parent fires)."""
    n_roots = -(-n_features // (1 + BRANCHING + BRANCHING**2))
    return Features(n_features, feature_prob, co_firing=Tree(n_roots, BRANCHING))


EXPERIMENT = Experiment(
    name="hierarchy",
    row="18",
    title="Parents and children",
    claim="Features that fire only with their parent are laid out orthogonally to it; interference goes to others.",
    reference="after Chanin et al. 2024, A is for Absorption, section 3",
    seconds=10,
    run=run,
    draw=draw,
    recipe=ToyRecipe(feature_prob=0.15, make_features=forest),
)
