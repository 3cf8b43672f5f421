"""Row 12: architectures that avoid superposition, and what it costs.

Twenty features at S = 0.9, of importance 0.9^i, in ten hidden units. Purity is a property of a basis: a linear hidden
layer has none, as W R with any rotation R computes the same, and its purity says nothing. The baseline is therefore
h = relu(xW), y = relu(hWᵀ + b), whose units mean something and are mixed nonetheless. Against it, at the same sizes:

    L1 on h    + λ Σ_k |h_k|           what one unit says costs less than what several say
    L1 on W    + λ Σ |W|               so do the weights
    top-k      all but the k largest h_k are cut off, and with them what interferes
    SoLU       h = a softmax(a), a = xW: the largest unit suppresses the others
    m = n      room; with a linear hidden layer, as only its interference Σ_{j≠i} (Ŵ_i · W_j)² is claimed

A unit says φ(W_i)_k of feature i alone (`ToyModel.directions`): purity_k = max_i |φ(W_i)_k| / Σ_i |φ(W_i)_k|. A unit
that fires (h_k > 0.01) on fewer than 0.1 % of the inputs is dead, and its purity is 0. The purity of the weights,
|W_ik| for |φ(W_i)_k|, is lower, because it counts what inhibits a unit against it.

L1 on h needs tied weights: free ones would shrink h and read it louder. SoLU needs free ones, because softmax is sharp
only where a is large: what enters must be on a larger scale than what leaves. Its baseline is the ReLU network with
read-out weights of its own and of the same start, W times the scale and W_out over it. From an ordinary start SoLU is
nearly linear, and as mixed as its baseline; and where what its units say is pure, its weights are not.

Measured with --fast over seeds 0 ... 5, mean ± sd; the targets lie at least 4 sd away. Rise of the purity, and loss
over that of the baseline: L1 on h .53 ± .04 at 1.36 ± .04; L1 on W .78 ± .02 at 1.52 ± .10; top-k .77 ± .01 at
2.50 ± .09; SoLU .42 ± .02 at 2.12 ± .22, and .012 ± .003 from an ordinary start. Rise of the weights' purity: L1 on W
.84 ± .02; top-k .51 ± .02. Interference: below 10⁻⁵ with m = n, 1.01 ± .01 with half the room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toymodels import geometry, plots
from toymodels.experiments.base import Claim, Claims, Context, Experiment, Outcome, Picture
from toymodels.features import Features
from toymodels.models import HiddenActivation, ToyModel
from toymodels.training import Objective, train
from toymodels.worlds import ToyRecipe, falling_importance

N_FEATURES, D_HIDDEN, FEATURE_PROB = 20, 10, 0.1
IMPORTANCE = [0.9**i for i in range(N_FEATURES)]
N_STEPS, BATCH, LR, N_INPUTS = 1000, 128, 1e-2, 2048
FIRES, ALIVE = 0.01, 1e-3
AVOIDING = {
    "L1 on h": ("L1 on h, 0.1", "ReLU", 2.0),
    "L1 on W": ("L1 on W, 0.004", "ReLU", 2.0),
    "top-k": ("top-k, 1", "ReLU", 3.5),
    "SoLU": ("SoLU, 30", "untied ReLU, 30", 4.0),
}
"""Of each architecture: the condition that the claims are about, its baseline, and the most that it may cost."""


@dataclass(frozen=True)
class Architecture:
    """A stack of `settings` × seeds: what the setting is depends on the kind."""

    kind: str
    settings: tuple[float, ...] = (0.0,)
    hidden: HiddenActivation = "relu"
    d_hidden: int = D_HIDDEN
    k: int | None = None
    objective: Callable[[Tensor], Objective] = lambda _: Objective()
    """From the setting of each instance."""
    scaled: bool = False
    """Whether the setting is the scale of W at the start, with read-out weights of its own."""

    @property
    def conditions(self) -> list[str]:
        if self.k is not None:
            return [f"{self.kind}, {self.k}"]
        return [f"{self.kind}, {setting:g}" for setting in self.settings] if self.settings != (0.0,) else [self.kind]


def architectures(context: Context) -> list[Architecture]:
    """All of them; the claims' own settings are in the reduced grids too."""
    on_hidden = context.pick(fast=(0.03, 0.1), full=(0.01, 0.03, 0.06, 0.1, 0.15, 0.2))
    on_weights = context.pick(fast=(0.001, 0.004, 0.01), full=(0.0003, 0.001, 0.002, 0.004, 0.006, 0.01))
    scales = context.pick(fast=(1.0, 30.0), full=(1.0, 3.0, 10.0, 30.0))
    return [
        Architecture("ReLU"),
        Architecture("linear", hidden="linear"),
        Architecture("m = n", hidden="linear", d_hidden=N_FEATURES),
        Architecture("L1 on h", on_hidden, objective=lambda c: Objective(l1_hidden=c)),
        Architecture("L1 on W", on_weights, objective=lambda c: Objective(l1_weights=c)),
        *(Architecture("top-k", hidden="topk", k=k) for k in context.pick(fast=(1, 2), full=(1, 2, 3, 4, 6))),
        Architecture("untied ReLU", scales, scaled=True),
        Architecture("SoLU", scales, hidden="solu", scaled=True),
    ]


def measure(context: Context, architecture: Architecture, n_seeds: int) -> dict[str, Tensor]:
    """Trains the stack; everything is [n_settings * n_seeds, ...]."""
    setting = torch.tensor(architecture.settings).repeat_interleave(n_seeds)
    names = (architecture.kind, architecture.k or 0)
    features = Features(N_FEATURES, FEATURE_PROB, IMPORTANCE)
    sizes = (N_FEATURES, architecture.d_hidden, len(setting))
    kind = {"hidden_activation": architecture.hidden, "k": architecture.k, "tied": not architecture.scaled}
    model = ToyModel(*sizes, generator=context.stream(*names, "weights"), **kind)  # type: ignore[arg-type]
    if architecture.scaled:
        with torch.no_grad():
            model.W_out.copy_(model.W.mT / setting[:, None, None])
            model.W.mul_(setting[:, None, None])
    objective, stream = architecture.objective(setting), context.stream(*names, "batches")
    training = train(model, features, N_STEPS, BATCH, LR, generator=stream, objective=objective, progress=context.tick)
    with torch.no_grad():
        hidden = model.hidden(features.sample_dense(N_INPUTS, context.stream(*names, "inputs"), len(setting)))
        alive = (hidden > FIRES).float().mean(1) > ALIVE
        answers = model.directions()
    return {
        "W": model.W.detach(),
        "W_out": model.W_out.detach().contiguous(),
        "b": model.b.detach(),
        "losses": training.final_losses,
        "purity": (geometry.purity_weights(answers) * alive).mean(1),
        "purity_of_weights": (geometry.purity_weights(model.W.detach()) * alive).mean(1),
        "dead": (~alive).sum(1).float(),
        "interference": geometry.interference(model.W.detach()).mean(1),
        "answers": answers.clone(),  # of a linear layer they are W itself
    }


def run(context: Context) -> Outcome:
    """Nine stacks or so, one for each architecture and k."""
    n_seeds, todo = context.pick(fast=3, full=10), architectures(context)
    context.expect(N_STEPS * len(todo))
    tensors: dict[str, Tensor] = {}
    conditions: dict[str, dict[str, object]] = {}
    training = {"feature_prob": FEATURE_PROB, "n_steps": N_STEPS, "batch_size": BATCH, "lr": LR}
    for architecture in todo:
        found = measure(context, architecture, n_seeds)
        for i, condition in enumerate(architecture.conditions):
            tensors |= {f"{condition}/{name}": t[i * n_seeds : (i + 1) * n_seeds] for name, t in found.items()}
            conditions[condition] = training | {
                "kind": architecture.kind,
                "setting": architecture.k or architecture.settings[i],
                "hidden_activation": architecture.hidden,
                "d_hidden": architecture.d_hidden,
            }
    return Outcome(_claims(tensors), tensors, conditions, n_seeds)


def _claims(tensors: Mapping[str, Tensor]) -> Sequence[Claim]:
    """Purity against that of the matched baseline, and what it costs."""
    claims = Claims("12")

    def mean(condition: str, measure: str) -> float:
        return float(tensors[f"{condition}/{measure}"].mean())

    def rise(measure: str, condition: str, baseline: str) -> float:
        return mean(condition, measure) - mean(baseline, measure)

    for kind, (condition, baseline, cost) in AVOIDING.items():
        key = kind.replace(" ", "_")
        times = mean(condition, "losses") / mean(baseline, "losses")
        text = f"{condition}: rise of the purity, at {times:.1f} × the loss of {baseline}"
        claims.at_least(f"purity_{key}", text, rise("purity", condition, baseline), 0.15, "PROPOSED")
        claims.at_most(f"loss_{key}", f"{condition}: its loss over that of {baseline}", times, cost, "PROPOSED")
    for kind in ("L1 on W", "top-k"):
        condition, baseline, _ = AVOIDING[kind]
        higher = rise("purity_of_weights", condition, baseline)
        text = f"{condition}: rise of the purity of the weights"
        claims.at_least(f"purity_of_weights_{kind.replace(' ', '_')}", text, higher, 0.15, "PROPOSED")
    higher = rise("purity", "SoLU, 1", "untied ReLU, 1")
    claims.at_most("purity_SoLU_unscaled", "SoLU from an ordinary start: rise of the purity", higher, 0.15, "PROPOSED")
    best = tensors["m = n/interference"][tensors["m = n/losses"].argmin()]
    claims.at_most("interference_m=n", "m = n, best seed: mean interference of a feature", best, 0.01, "PROPOSED")
    without_room = mean("linear", "interference")
    claims.at_least("interference_m<n", "m = n/2, linear: the same, mean of the seeds", without_room, 0.5, "PROPOSED")
    return claims.made


def draw(outcome: Outcome) -> Sequence[Picture]:
    """What purity costs, and what the hidden units say."""
    return [_trade_off(outcome), _answers(outcome)]


def _trade_off(outcome: Outcome) -> Picture:
    """Purity against the loss, a line for each architecture."""
    panels = (("purity", "Purity of what the units say"), ("purity_of_weights", "Purity of their weights"))
    figure, axes = plots.figure(1, 2, width=9, height=4.2, sharey=True)
    styles = {kind: (plots.SERIES[i], "o") for i, kind in enumerate(AVOIDING)}
    styles |= {"ReLU": (plots.INK, "D"), "untied ReLU": (plots.MUTED, "D"), "linear": (plots.INK, "^")}
    for ax, (measure, label) in zip(axes[0], panels, strict=True):
        for kind, (colour, marker) in styles.items():
            named = [name for name, facts in outcome.conditions.items() if facts["kind"] == kind]
            measures = ("losses", measure, "dead")
            points = [[float(outcome.tensors[f"{name}/{shown}"].mean()) for shown in measures] for name in named]
            losses, values, _ = zip(*sorted(points), strict=True)
            ax.plot(losses, values, marker + ("-" if len(points) > 1 else ""), color=colour, linewidth=1.4, label=kind)
            for loss, value, dead in points:
                if dead >= 1:
                    ax.plot(loss, value, marker, color=colour, markerfacecolor="white")
        ax.set(xscale="log", xlabel="loss", title=label, ylim=(0, 1.03))
        ax.set_xticks((0.02, 0.05, 0.1), ("0.02", "0.05", "0.1"))
        ax.set_xticks((), minor=True)
    axes[0, 0].set(ylabel="mean purity of a hidden unit")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    caption = (
        "Mean purity of the ten hidden units against the loss, a point for each coefficient, k or scale of the start, "
        "dead units counted as 0 (hollow where there is one or more). Diamonds are the networks that nothing makes "
        "pure, the triangle one with a linear hidden layer, whose basis means nothing. The L1 penalty on the weights "
        "buys most for the least; SoLU purifies what the units say, from weights that stay mixed."
    )
    return Picture("trade_off", figure, caption)


def _answers(outcome: Outcome) -> Picture:
    """What each hidden unit says of each feature alone, as a matrix, units sorted by their favourite feature."""
    shown = ["ReLU", *(condition for condition, *_ in AVOIDING.values()), "m = n"]
    figure, axes = plots.figure(1, len(shown), width=11, height=4.1, width_ratios=[1] * 5 + [2])
    for ax, condition in zip(axes[0], shown, strict=True):
        found = {name: outcome.tensors[f"{condition}/{name}"] for name in ("losses", "purity", "interference")}
        best = int(found["losses"].argmin())
        answers = outcome.tensors[f"{condition}/answers"][best]
        largest = answers.abs().amax(0)
        answers = answers / largest.where(largest > 0, 1)
        answers = answers[:, answers.abs().argmax(0).argsort(stable=True)]
        shows = "interference" if condition == "m = n" else "purity"
        title = f"{condition.split(',')[0]}\n{shows} {found[shows][best]:.2f}\nloss {found['losses'][best]:.3f}"
        plots.matrix(ax, answers.numpy(), title=title)
        ax.set(xlabel=f"{answers.shape[1]} units")
    axes[0, 0].set(ylabel="20 features, the most important on top")
    caption = (
        "What each hidden unit (column) says of each feature (row) alone, relative to its loudest answer, in the best "
        "of the seeds; units sorted by their favourite feature. A pure unit has one dark cell. Ten pure units leave "
        "ten features out; a network with m = n leaves none and has no interference, though its basis is arbitrary."
    )
    return Picture("answers", figure, caption)


EXPERIMENT = Experiment(
    name="no_superposition",
    row="12",
    title="Avoiding superposition",
    claim="Penalties, competition or room make hidden units pure, and each has its price in the loss.",
    reference="Elhage et al. 2022, Strategic Picture; Softmax Linear Units",
    seconds=19,
    run=run,
    draw=draw,
    recipe=ToyRecipe(
        *(N_FEATURES, D_HIDDEN, FEATURE_PROB, N_STEPS, falling_importance(0.9, N_FEATURES)),
        model={"hidden_activation": "relu"},
        training={"objective": Objective(l1_hidden=0.1)},  # the cost that keeps its meaning at another sparsity
    ),
)
