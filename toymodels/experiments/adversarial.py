"""Row 15: superposition makes adversarial examples.

A hundred features in twenty dimensions share directions, so that a step along one of them moves the read-outs of
many others. With K = W Wᵀ a step δ moves what the ReLU is given by δK. Uniform superposition is nearly a tight frame,
K ≈ (1/D*) · projection with 1/D* = ‖W‖_F²/m features per dimension, and |relu(a) − relu(b)| ≤ |a − b|: a step within
‖δ‖ ≤ ε moves the outputs by up to about ε/D*. Without superposition K = 1 and the worst step costs ε².

    vulnerability = (E max_{‖δ‖ ≤ ε} ‖y(x + δ) − x‖² − E ‖y(x) − x‖²) / (the same for the m = n model)

The target stays x, and ε = 0.1 √(E‖x‖²) = 0.1 √(np/3): a tenth of the rms norm of the inputs, the same for every
input of a sparsity. What the model drops anyway is loss before the attack and after it, so that the rise is compared.
Two attackers: one chooses a step for each input (`worst_steps`); the other, as in the paper, takes for all inputs the
single one of the steps ±K_i/‖K_i‖, the fastest that raises or lowers output i, which does most harm.

Measured with --fast over seeds 0 ... 4, mean ± sd; the targets lie more than 5 sd away. Vulnerability at S = 0, .9,
.95 and .99: .993 ± .009, 18.9 ± .3, 25.0 ± .6, 11.3 ± .5; with one step for all inputs at S = .9: 3.72 ± .07. Rank
correlation with 1/D*: .929 in every seed, the last sparsity being out of order: there most outputs rest silent behind
negative biases, which absorb small steps. The worst m = n model up to S = .95: 1.036 ± .011 times ε².
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from toymodels import geometry, plots
from toymodels.experiments.base import Claims, Context, Experiment, Outcome, Picture
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.training import train
from toymodels.worlds import ToyRecipe

N_FEATURES, D_HIDDEN = 100, 20
INVERSE_DENSITIES_FAST = (1.0, 1.6, 2.0, 3.0, 4.5, 10.0, 20.0, 100.0)
INVERSE_DENSITIES = (1.0, 1.3, 1.6, 2.0, 2.5, 3.0, 4.5, 7.0, 10.0, 20.0, 40.0, 100.0)
N_STEPS, BATCH, N_INPUTS = 1000, 256, 256
WIDE_BATCH, WIDE_LR = 128, 1e-2
RELATIVE_EPS = 0.1
EXAMPLE = ("x", "step", "y", "y_attacked")
Steps = Float[Tensor, "n_instances batch n_features"]


def losses(
    model: ToyModel, x: Steps, steps: Float[Tensor, "n_instances #batch n_features"] | float = 0.0
) -> Float[Tensor, "n_instances batch"]:
    """‖y(x + δ) − x‖² of each input."""
    return (model(x + steps) - x).square().sum(-1)


def feature_steps(model: ToyModel) -> Float[Tensor, "n_steps n_instances 1 n_features"]:
    """±K_i/‖K_i‖, the unit steps that raise or lower output i fastest (Elhage et al. 2022)."""
    raising = rearrange(geometry.unit_rows(model.W @ model.W.mT), "i k n -> k i 1 n")
    return torch.cat([raising, -raising])


@torch.no_grad()
def worst_steps(
    model: ToyModel, x: Steps, eps: Float[Tensor, " n_instances"], n_starts: int = 8, n_ascents: int = 15
) -> Steps:
    """The step δ of each input, ‖δ‖ ≤ eps, that raises ‖y(x + δ) − x‖² the most.

    It starts from the worst `n_starts` of the feature steps, which find outputs that are silent and have no gradient,
    and ascends by δ ← eps · ∇/‖∇‖, ∇ ∝ ((y − x) [y > 0]) K: the maximum over the ball of the loss made linear. Each
    ascent raises a convex loss, and this one is convex but where the output of an active feature is cut off.
    Tests judge it by brute force in two hidden dimensions; on the trained models 100 starts with 40 ascents find
    rises that are 0 to 3 % larger.
    """
    radius = rearrange(eps, "i -> i 1 1")
    starts = radius * feature_steps(model)
    harm = torch.stack([losses(model, x, step) for step in starts])
    worst, worst_loss = torch.zeros_like(x), losses(model, x)
    for choice in harm.topk(min(n_starts, len(starts)), dim=0).indices:
        step = rearrange(starts, "k i 1 n -> i k n").gather(1, choice[..., None].expand_as(x))
        for _ in range(n_ascents):
            y = model(x + step)
            loss = (y - x).square().sum(-1)
            worst = torch.where((loss > worst_loss)[..., None], step, worst)
            worst_loss = torch.maximum(loss, worst_loss)
            slope = ((y - x) * (y > 0)) @ model.W @ model.W.mT
            step = radius * geometry.unit_rows(slope)
    return worst


def run(context: Context) -> Outcome:
    """One stack of all sparsities × seeds in 20 dimensions, one of all sparsities in 100."""
    inverse = torch.tensor(context.pick(fast=INVERSE_DENSITIES_FAST, full=INVERSE_DENSITIES))
    n_seeds = context.pick(fast=2, full=5)
    context.expect(2 * N_STEPS)
    narrow = _measure(context, "narrow", D_HIDDEN, inverse, n_seeds, BATCH, None)
    wide = _measure(context, "wide", N_FEATURES, inverse, 1, WIDE_BATCH, WIDE_LR)
    vulnerability = (narrow["rise"] / wide["rise"]).mean(1)
    per_dimension = (1 / geometry.dimensions_per_feature(narrow["W"])).mean(1)
    claims = Claims("15")
    for i, p in enumerate(inverse.reciprocal().tolist()):
        if p > 0.999:
            text = "S = 0, no superposition: rise of the loss over that of the m = n model"
            claims.within("ratio_S=0", text, vulnerability[i], 1.0, 0.1, "PROPOSED")
        elif p < 0.101:
            text = f"S = {1 - p:.3g}: rise of the loss over that of the m = n model"
            claims.at_least(f"ratio_S={1 - p:.3g}", text, vulnerability[i], 5.0, "PROPOSED")
    text = "rank correlation of the vulnerability with 1/D* over the sparsities"
    claims.at_least("rank_correlation", text, float(spearmanr(vulnerability, per_dimension).statistic), 0.8, "PROPOSED")
    text = "S = 0.9: the same for one step on all inputs"
    one_for_all = (narrow["rise_one_for_all"] / wide["rise_one_for_all"]).mean(1)[(inverse - 10).abs() < 0.1]
    claims.at_least("ratio_one_for_all_S=0.9", text, one_for_all, 2.0, "PROPOSED")
    text = "worst rise of the loss of an m = n model over ε², S ≤ 0.95"
    worst = (wide["rise"] / wide["eps"].square())[inverse <= 20.5].max()
    claims.within("m=n_costs_eps_squared", text, worst, 1.0, 0.1, "PROPOSED")
    tensors: dict[str, Tensor] = {}
    conditions: dict[str, dict[str, object]] = {}
    for kind, found in (("m=20", narrow), ("m=n", wide)):
        for i, p in enumerate(inverse.reciprocal().tolist()):
            condition = f"{kind}, S={1 - p:.3f}"
            tensors |= {f"{condition}/{name}": t[i] for name, t in found.items() if name != "eps"}
            conditions[condition] = {
                "feature_prob": p,
                "d_hidden": found["W"].shape[-1],
                "n_steps": N_STEPS,
                "batch_size": BATCH if kind == "m=20" else WIDE_BATCH,
                "eps": float(found["eps"][i]),
                "features_per_dimension": float((1 / geometry.dimensions_per_feature(found["W"][i])).mean()),
            }
    return Outcome(claims.made, tensors, conditions, n_seeds)


def _measure(
    context: Context, kind: str, d_hidden: int, inverse: Tensor, n_seeds: int, batch_size: int, lr: float | None
) -> dict[str, Tensor]:
    """Trains a stack and attacks it; everything is [n_sparsities, n_seeds, ...] but eps [n_sparsities, 1]."""
    probs = (1 / inverse).repeat_interleave(n_seeds)[:, None]
    features = Features(N_FEATURES, probs)
    model = ToyModel(N_FEATURES, d_hidden, len(probs), generator=context.stream(kind, "weights"))
    stream = context.stream(kind, "batches")
    train(model, features, N_STEPS, batch_size, lr, generator=stream, progress=context.tick)
    x = features.sample_dense(N_INPUTS, context.stream(kind, "inputs"), len(probs))
    eps = RELATIVE_EPS * (N_FEATURES * probs.squeeze(1) / 3).sqrt()
    with torch.no_grad():
        for_each = worst_steps(model, x, eps)
        for_all = torch.stack([losses(model, x, eps[:, None, None] * step).mean(1) for step in feature_steps(model)])
        clean = losses(model, x).mean(1)
        rises = losses(model, x, for_each) - losses(model, x)
        chosen = rises.where(losses(model, x) < clean[:, None] / 10, 0).argmax(1)
        example = (t[range(len(t)), chosen] for t in (x, for_each, model(x), model(x + for_each)))
        found = {
            "W": model.W.detach(),
            "b": model.b.detach(),
            "clean": clean,
            "rise": rises.mean(1),
            "rise_one_for_all": for_all.amax(0) - clean,
        }
        found |= {f"example_{name}": t for name, t in zip(EXAMPLE, example, strict=True)}
    found = {name: rearrange(t, "(p s) ... -> p s ...", s=n_seeds) for name, t in found.items()}
    return found | {"eps": eps[::n_seeds, None]}


def draw(outcome: Outcome) -> Sequence[Picture]:
    """Vulnerability and features per dimension over the sparsity, and what an attack looks like."""
    figure, axes = plots.figure(1, 2, width=10.5, height=4.2, width_ratios=(1.15, 1))
    narrow = [name for name in outcome.conditions if name.startswith("m=20")]
    wide = [name for name in outcome.conditions if name.startswith("m=n")]
    inverse = [1 / outcome.conditions[name]["feature_prob"] for name in narrow]

    def curve(names: Sequence[str], tensor: str) -> list[float]:
        """In units of eps², the mean over seeds."""
        return [
            float(outcome.tensors[f"{name}/{tensor}"].mean()) / outcome.conditions[name]["eps"] ** 2 for name in names
        ]

    gains = [float(torch.linalg.matrix_norm(outcome.tensors[f"{name}/W"], 2).pow(4).mean()) for name in narrow]
    per_dimension = [outcome.conditions[name]["features_per_dimension"] for name in narrow]
    ax = axes[0, 0]
    ax.plot(inverse, gains, "--", color=plots.MUTED, linewidth=1.2, label="largest gain squared, λ²")
    ax.plot(inverse, curve(narrow, "rise"), "o-", color=plots.SERIES[1], label="vulnerability, a step for each input")
    one_for_all = curve(narrow, "rise_one_for_all")
    ax.plot(inverse, one_for_all, "s-", color=plots.SERIES[3], label="vulnerability, one step for all inputs")
    ax.plot(inverse, per_dimension, "-", color=plots.SERIES[0], linewidth=2.6, label="features per dimension, 1/D*")
    ax.plot(inverse, curve(wide, "rise"), "o-", color=plots.SERIES[6], label="no superposition, m = n", markersize=3.5)
    ax.set(xscale="log", yscale="log", xlabel="1/(1 − S)", ylabel="rise of the loss / ε²,  and 1/D*", ylim=(0.85, 90))
    for set_ticks, ticks in ((ax.set_xticks, (1, 3, 10, 30, 100)), (ax.set_yticks, (1, 2, 5, 10, 20, 50))):
        set_ticks(ticks, map(str, ticks))
        set_ticks((), minor=True)
    ax.set(title="Features per dimension make a network vulnerable")
    ax.legend(loc="upper left")

    condition = min(narrow, key=lambda name: abs(outcome.conditions[name]["feature_prob"] - 0.05))
    x, step, y, attacked = (outcome.tensors[f"{condition}/example_{name}"][0] for name in EXAMPLE)
    ax = axes[0, 1]
    rows = {"the input": x, "the attack": step, "the output": y, "the output\nunder attack": attacked}
    colours = [plots.INK if value > 0 else plots.SERIES[1] for value in x]
    for row, values in enumerate(rows.values()):
        ax.bar(range(N_FEATURES), values, bottom=-1.4 * row, color=colours, width=0.9)
        ax.axhline(-1.4 * row, color=plots.RULE, linewidth=0.8, zorder=0)
    ax.set(yticks=[0.2 - 1.4 * row for row in range(len(rows))], yticklabels=rows, xticks=[], xlim=(-2, N_FEATURES + 1))
    ax.set(xlabel="the 100 features", title="An adversarial example, S = 0.95")
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    caption = (
        "Left: how much the worst perturbation of norm ε, a tenth of the inputs' rms norm, raises the loss, in units "
        "of ε², which is what it costs a network that need not superpose. In 20 dimensions the price grows with the "
        "number of features that share each of them, about as its square when the step may suit the input "
        "(λ: largest eigenvalue of WWᵀ), until at the highest sparsity most outputs rest silent behind negative "
        "biases that absorb small steps. Right: a step that is hardly seen in the input makes the network report "
        "features that are not there (orange)."
    )
    return [Picture("adversarial", figure, caption)]


EXPERIMENT = Experiment(
    name="adversarial",
    row="15",
    title="Adversarial examples",
    claim="Superposition makes a network vulnerable: a small step costs many times what it costs without.",
    reference="Elhage et al. 2022, Relationship to Adversarial Robustness",
    seconds=19,
    run=run,
    draw=draw,
    recipe=ToyRecipe(n_features=N_FEATURES, d_hidden=D_HIDDEN, feature_prob=0.1, n_steps=N_STEPS),
)
