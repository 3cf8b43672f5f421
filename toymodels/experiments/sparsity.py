"""Row 3: the sparser the features, the more of them a model stores; and the same in compressed sensing.

Twenty features of falling importance in five dimensions. Dense features are read back by five dimensions, one for
each of the most important. Features that rarely fire together can share: the count of those represented grows to
more than twice the dimensions, first as pairs in opposite directions, then as larger groups; the most
important are the last to share.

Counts of single runs at neighbouring sparsities overlap, so that the claims are about means over four runs. Over
seeds 0 to 4 these never fell from one sparsity to the next; the smallest growth beyond S = 0.5 was 0.75, and at
S = 0.999 they were 13.2 (sd 0.7).

How many dimensions would be enough? An ideal reader knows the directions W and looks for the sparsest non-negative
code x with x W = h. It recovers codes of which k of n are active from m ≈ 1.1 k ln(n/k) dimensions, in a sharp
transition: the logarithm is why superposition can store many more features than dimensions. Curves for different n
and k nearly fall on one another.

Over the same seeds, half of the codes were recovered at m / (k ln(n/k)) = 1.049 (sd 0.003, mean over n and k; 1.07
with the larger n of a full run), 1.113 (sd 0.009) from learned directions; curves differed by 0.16 (sd 0.02). A linear
read-out of the codes needs m = n, at least four times as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, nan
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toymodels import plots
from toymodels.experiments.base import Claim, Claims, Context, Experiment, Outcome, Picture
from toymodels.features import Features
from toymodels.geometry import interference, norms, represented, unit_rows
from toymodels.models import ToyModel
from toymodels.sparse_coding import sparse_code
from toymodels.training import train, weighted_error
from toymodels.worlds import ToyRecipe, falling_importance

N, M, N_STEPS = 20, 5, 3000
IMPORTANCE = [0.7**i for i in range(N)]
DENSITIES = (1 / 20, 1 / 10)
"""k/n of the codes to recover."""
RATIOS = [0.6 + 0.1 * i for i in range(11)]
"""m / (k ln(n/k))."""
N_MATRICES, N_CODES = 4, 40
"""Random matrices at each ratio, and codes to recover from each."""
LEARNED = ToyRecipe(n_features=120, d_hidden=24, feature_prob=0.015, n_steps=1500)
LEARNED_K = (14, 12, 10, 9, 8, 7, 6, 5, 4)


def run(context: Context) -> Outcome:
    """A stack over seeds and sparsities, one for the rarest features; then recovery by sparse coding."""
    n_seeds = context.pick(fast=4, full=8)
    sparsities = context.pick(fast=(0.0, 0.5, 0.7, 0.9, 0.97, 0.99), full=(0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97, 0.99))
    sizes = context.pick(fast=(60, 120), full=(60, 120, 240))
    # A batch in which a feature does not fire teaches nothing about it: at S = .999 it is larger.
    stacks = ((sparsities, 512), ((0.999,), 4096))
    context.expect(len(stacks) * N_STEPS + LEARNED.n_steps)
    tensors: dict[str, Tensor] = {}
    conditions: dict[str, dict[str, Any]] = {}
    for stack, batch_size in stacks:
        p = 1 - torch.tensor(stack, dtype=torch.float64).repeat_interleave(n_seeds)[:, None]
        model = ToyModel(N, M, len(p), generator=context.stream("weights", batch_size))
        features = Features(N, p if len(stack) > 1 else 1 - stack[0], IMPORTANCE)
        batches = context.stream("batches", batch_size)
        train(model, features, N_STEPS, batch_size, generator=batches, progress=context.tick)
        parts = zip(stack, model.W.detach().split(n_seeds), model.b.detach().split(n_seeds), strict=True)
        for sparsity, W, b in parts:
            condition = f"S={sparsity:g}"
            losses = loss_on_same(W, b, 1 - sparsity, context.stream("test", condition))
            tensors |= {f"{condition}/W": W, f"{condition}/b": b, f"{condition}/losses": losses}
            conditions[condition] = {
                "feature_prob": round(1 - sparsity, 6),
                "importance": IMPORTANCE,
                "n_steps": N_STEPS,
                "batch_size": batch_size,
                "best": int(losses.argmin()),
                "represented": represented(W).sum(1).tolist(),
            }
    for n in sizes:
        for density in DENSITIES:
            tensors |= recovery_curve(n, round(density * n), context)
    tensors |= learned_curve(context)
    return Outcome([*count_claims(conditions), *recovery_claims(tensors)], tensors, conditions, n_seeds)


@torch.no_grad()
def loss_on_same(
    W: Float[Tensor, "n_seeds n m"], b: Float[Tensor, "n_seeds n"], p: float, stream: torch.Generator
) -> Float[Tensor, " n_seeds"]:
    """The loss of each seed on the same 50 000 rows in which something fires: which is best is no matter of luck."""
    firing = 1 - (1 - p) ** N
    x = Features(N, p).sample_dense(int(50_000 / firing), stream)
    x = x[x.any(1)]
    importance = torch.tensor(IMPORTANCE)
    losses = [weighted_error(x[None], torch.relu(x @ w @ w.T + c)[None], importance) for w, c in zip(W, b, strict=True)]
    return torch.cat(losses) * firing


def recovered(W: Float[Tensor, "n m"], k: int, n_codes: int, stream: torch.Generator) -> float:
    """The part of codes x, with k of n features at U[0, 1], that sparse coding finds from h = x W to within 2 %."""
    active = torch.rand(n_codes, len(W), generator=stream).topk(k).indices
    x = torch.zeros(n_codes, len(W)).scatter(1, active, torch.rand(n_codes, k, generator=stream))
    error = sparse_code(x @ W, W, penalty=1e-4, tolerance=1e-5) - x
    return float((norms(error) < 0.02 * norms(x)).float().mean())


def recovery_curve(n: int, k: int, context: Context) -> dict[str, Tensor]:
    """Recovery from random unit directions, at the m closest to each ratio."""
    stream, scale = context.stream("codes", n, k), k * log(n / k)
    found = torch.zeros(len(RATIOS))
    dims = [round(ratio * scale) for ratio in RATIOS]
    for i, m in enumerate(dims):
        for _ in range(N_MATRICES):
            W = unit_rows(torch.randn(n, m, generator=stream))
            found[i] += recovered(W, k, N_CODES, stream) / N_MATRICES
    return {f"random, n={n}, k={k}/ratio": torch.tensor(dims) / scale, f"random, n={n}, k={k}/recovered": found}


def learned_curve(context: Context) -> dict[str, Tensor]:
    """Recovery from the directions that a toy model of equal importances learned, at one m and several k."""
    n, m = LEARNED.n_features, LEARNED.d_hidden
    model = ToyModel(n, m, generator=context.stream("weights", "learned"))
    batches = context.stream("batches", "learned")
    train(model, LEARNED.features, LEARNED.n_steps, generator=batches, progress=context.tick)
    stream = context.stream("codes", "learned")
    found = [recovered(model.W.detach()[0], k, N_MATRICES * N_CODES, stream) for k in LEARNED_K]
    ratios = [m / (k * log(n / k)) for k in LEARNED_K]
    curve = {"ratio": torch.tensor(ratios), "recovered": torch.tensor(found), "W": model.W.detach()}
    return {f"learned, n={n}, m={m}/{key}": tensor for key, tensor in curve.items()}


def half(ratio: Float[Tensor, " points"], found: Float[Tensor, " points"]) -> float:
    """Where the line through the points first reaches 50 %; nan if it never does."""
    above = (found >= 0.5).nonzero()
    if not len(above) or above[0] == 0:
        return nan
    i = int(above[0])
    part = (0.5 - found[i - 1]) / (found[i] - found[i - 1])
    return float(torch.lerp(ratio[i - 1], ratio[i], part))


def count_claims(conditions: Mapping[str, Mapping[str, Any]]) -> Sequence[Claim]:
    """How many features are represented at each sparsity."""
    claims = Claims("3")
    counts = torch.tensor([facts["represented"] for facts in conditions.values()], dtype=torch.float64)
    dense = counts[0, conditions["S=0"]["best"]]
    claims.equals("represented_dense", "S = 0: features represented by the best run", dense, M, "PROPOSED")
    text = "the least growth of the mean number represented, from one sparsity to the next"
    claims.at_least("smallest_growth", text, counts.mean(1).diff().min(), 0, "PROPOSED")
    text = f"S = 0.999: features represented in {M} dimensions, mean over runs"
    claims.at_least("represented_sparse", text, counts[-1].mean(), 2 * M, "PROPOSED")
    return claims.made


def recovery_claims(tensors: Mapping[str, Tensor]) -> Sequence[Claim]:
    """Where half of the codes are recovered."""
    claims = Claims("3")
    halves = {
        curve: half(tensors[f"{curve}/ratio"], tensors[f"{curve}/recovered"])
        for curve in (name.removesuffix("/ratio") for name in tensors if name.endswith("/ratio"))
    }
    random = torch.tensor([ratio for curve, ratio in halves.items() if curve.startswith("random")])
    text = "m / (k ln(n/k)) at which half of the codes are recovered from random directions, mean over n and k"
    claims.within("transition", text, random.mean(), 1.06, 0.1, "PROPOSED")
    text = "the largest less the smallest of these ratios"
    claims.at_most("transition_spread", text, random.max() - random.min(), 0.3, "PROPOSED")
    learned = next(ratio for curve, ratio in halves.items() if curve.startswith("learned"))
    text = "the same ratio for the directions that a toy model learned"
    claims.within("transition_learned", text, learned, 1.11, 0.1, "PROPOSED")
    return claims.made


def draw(outcome: Outcome) -> Sequence[Picture]:
    """What is stored at each sparsity; then how many dimensions are enough."""
    return [storage(outcome), recovery(outcome)]


def storage(outcome: Outcome) -> Picture:
    """Elhage et al. 2022, section 2: W Wᵀ above, norms coloured by superposition below."""
    shown = [c for c in outcome.conditions if c not in ("S=0.3", "S=0.8")]
    figure, axes = plots.figure(2, len(shown), width=10, height=2.9, height_ratios=(1.35, 1), sharex=True)
    for (top, bottom), condition in zip(axes.T, shown, strict=True):
        facts = outcome.conditions[condition]
        W = outcome.tensors[f"{condition}/W"][facts["best"]]
        image = plots.matrix(top, (W @ W.T).numpy())
        top.set_title(condition.replace("=", " = "), loc="center")
        scale = plots.norms_and_interference(bottom, norms(W).numpy(), interference(W).numpy())
        bottom.axhline(0.5, color=plots.MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        bottom.set_xlabel(f"{facts['represented'][facts['best']]} of {N}", color=plots.MUTED)
        if bottom is not axes[1, 0]:
            bottom.set(yticks=[])
            bottom.spines["left"].set_visible(False)
    axes[0, 0].set_ylabel("W$_i$ · W$_j$")
    axes[1, 0].set_ylabel("norm of W$_i$")
    figure.colorbar(image, ax=axes[0], ticks=(-1, 0, 1), aspect=9, shrink=0.72)
    figure.colorbar(scale, ax=axes[1], ticks=(0, 1), aspect=8).ax.set_yticklabels(["alone", "shared"])
    caption = (
        f"{N} features of importance 0.7^i in {M} dimensions, the most important first, from dense (left) to "
        "sparse. Above, what each feature reads of each other; below, their norms, coloured by how much of the others "
        "lies along them, Σ_(j≠i) (Ŵ_i · W_j)². The number stored (norm above 0.5, dashed) grows with sparsity."
    )
    return Picture("sparsity", figure, caption)


def recovery(outcome: Outcome) -> Picture:
    """The transition of compressed sensing, on its own axis."""
    figure, axes = plots.figure(1, 1, width=6.4, height=3.8)
    ax = axes[0, 0]
    curves = [name.removesuffix("/ratio") for name in outcome.tensors if name.endswith("/ratio")]
    ax.axhline(0.5, color=plots.RULE, linewidth=0.8, zorder=0)
    for colour, curve in zip(plots.SERIES, curves, strict=False):
        marker, line = ("s", "--") if curve.startswith("learned") else ("o", "-")
        ax.plot(
            *(outcome.tensors[f"{curve}/{part}"] for part in ("ratio", "recovered")),
            marker=marker,
            linestyle=line,
            color=colour,
            markersize=4,
            label=curve.replace("=", " = "),
        )
    ax.set(xlabel="m / (k ln(n/k))", ylabel="codes recovered", ylim=(-0.03, 1.03))
    ax.set_yticks((0, 0.5, 1), ("0 %", "50 %", "100 %"))
    ax.legend(loc="lower right")
    caption = (
        "Codes of which k of n features are active, recovered by non-negative sparse coding from m dimensions. "
        "Measured in k ln(n/k), the number of dimensions at which half of them are recovered is between .95 and 1.15 "
        "for all of these sizes, and for the directions that a toy model learned."
    )
    return Picture("recovery", figure, caption)


EXPERIMENT = Experiment(
    name="sparsity",
    row="3",
    title="Sparsity makes superposition",
    claim="The sparser the features, the more are stored; sparse codes can be recovered from few dimensions.",
    reference="Elhage et al. 2022, section 2; Donoho & Tanner 2005",
    seconds=32,
    run=run,
    draw=draw,
    recipe=ToyRecipe(N, M, 0.03, N_STEPS, falling_importance(0.7, N)),
)
