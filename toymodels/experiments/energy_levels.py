"""Row 8: learning jumps from one energy level to the next.

A model settles in one arrangement of its features, then some of them move quickly to another dimensionality, and
the loss falls with them. A jump is a change of D_i by more than .15 within 5 % of the run, counted once, in the window
in which it is largest. It falls together with the loss if its window is among the tenth of the windows of that model
with the largest drop. Where the two have nothing to do with one another, a tenth of the jumps do; how far luck goes
is told by turning the drops of each model around in a circle by a random amount.

Most jumps happen in the first 400 steps: the directions start at random, and D_i with them, until the features have
grown. Those jumps coincide with the steepest fall of the loss whatever comes later, so that the later ones are judged
by themselves, against windows that begin after step 400 as well.

The target is ours. Measured with 20 models on each of the seeds 0 to 4: of 100 to 125 jumps a share of .983 (sd .012)
falls together with the loss, of the 14 to 37 later ones .981 (sd .043), where luck gives .10 and at most .5 to .8 in
1999 shifts. Shorter runs have fewer late jumps: 7 to 23 in 6000 steps, 1 in 20 models in 2500.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from toymodels import geometry, plots
from toymodels.experiments.base import Claims, Context, Experiment, Outcome, Picture
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.training import train, weighted_error
from toymodels.worlds import ToyRecipe

N_FEATURES, D_HIDDEN, FEATURE_PROB = 12, 3, 0.1
N_STEPS, BATCH, LR, INIT_SD, EVERY = 8000, 256, 1e-3, 0.05, 20
SPAN = N_STEPS // EVERY // 20
"""Snapshots in 5 % of the run."""
FORMED = 400 // EVERY
"""Snapshot at which the features have grown."""
JUMP, TOP = 0.15, 0.9
N_EVALUATION, N_SHIFTS = 1024, 1999
CONDITION = f"p={FEATURE_PROB}"


class Jumps(NamedTuple):
    """Where features jump and losses drop; a window starts at each snapshot."""

    jumps: Bool[Tensor, "n_windows n_instances n_features"]
    top: Bool[Tensor, "n_windows n_instances"]
    """The windows with the largest drops of the loss."""

    @property
    def share(self) -> Float[Tensor, ""]:
        """The share of the jumps that lie in top windows."""
        return (self.jumps & self.top[..., None]).sum() / self.jumps.sum()

    def shifted(self, n_shifts: int, stream: torch.Generator) -> Float[Tensor, " n_shifts"]:
        """The same share after the windows of each instance were turned around in a circle, by random amounts."""
        n_windows, n_instances = self.top.shape
        window = torch.arange(n_windows)
        counts, top = self.jumps.sum(2).double(), self.top.double()
        # Row s: the jumps of each instance that meet a top window when the drops come s windows later.
        met = torch.stack([(counts * top[(window - shift) % n_windows]).sum(0) for shift in range(n_windows)])
        shifts = torch.randint(n_windows, (n_shifts, n_instances), generator=stream)
        return met.gather(0, shifts).sum(1) / counts.sum()


def find_jumps(
    D: Float[Tensor, "n_snapshots n_instances n_features"],
    loss: Float[Tensor, "n_snapshots n_instances"],
    span: int = SPAN,
) -> Jumps:
    """The jumps of D over `span` snapshots, and the windows in which the loss drops most.

    Overlapping windows see the same jump: it counts in the one where it is largest.
    """
    change = rearrange((D[span:] - D[:-span]).abs(), "t i f -> i f t")
    largest = F.max_pool1d(change, 2 * span - 1, stride=1, padding=span - 1)
    jumps = rearrange((change > JUMP) & (change == largest), "i f t -> t i f")
    drop = loss[:-span] - loss[span:]
    return Jumps(jumps, drop >= drop.quantile(TOP, dim=0))


def most_spread(found: Jumps) -> int:
    """The instance with the longest time from its first jump to its last, which is the easiest to look at."""
    jumps = found.jumps.any(2).int()
    last = len(jumps) - 1 - jumps.flip(0).argmax(0)
    return int(((last - jumps.argmax(0)) * jumps.any(0)).argmax())


@torch.no_grad()
def losses_on(
    x: Float[Tensor, "batch n_features"],
    W: Float[Tensor, "n_snapshots n_instances n_features d_hidden"],
    b: Float[Tensor, "n_snapshots n_instances n_features"],
) -> Float[Tensor, "n_snapshots n_instances"]:
    """L of every snapshot on the same batch, so that a drop is not the noise of the batches."""
    model = ToyModel(W.shape[2], W.shape[3], W.shape[1], generator=torch.Generator())
    x, importance = x.expand(W.shape[1], *x.shape), torch.ones(x.shape[1])
    losses = []
    for model.W.data, model.b.data in zip(W, b, strict=True):
        losses.append(weighted_error(x, model(x), importance))
    return torch.stack(losses)


def run(context: Context) -> Outcome:
    """One stack of models, and what their features do through training."""
    n_seeds = context.pick(fast=20, full=100)
    context.expect(N_STEPS)
    model = ToyModel(N_FEATURES, D_HIDDEN, n_seeds, init_sd=INIT_SD, generator=context.stream("weights"))
    features = Features(N_FEATURES, FEATURE_PROB)
    biases = [model.b.detach().clone()]

    def progress(step: int, losses: Tensor) -> None:
        context.tick()
        if (step + 1) % EVERY == 0:  # after this step W is a snapshot
            biases.append(model.b.detach().clone())

    training = train(
        model,
        features,
        N_STEPS,
        BATCH,
        LR,
        generator=context.stream("batches"),
        schedule="constant",
        snapshot_every=EVERY,
        progress=progress,
    )
    D = geometry.feature_dimensionality(training.snapshots)
    x = features.sample_dense(N_EVALUATION, context.stream("evaluation"))
    loss = losses_on(x, training.snapshots, torch.stack(biases))
    later = find_jumps(D[FORMED:], loss[FORMED:])
    claims = Claims("8")
    for name, when, found in (("all", "", find_jumps(D, loss)), ("later", " after step 400", later)):
        text = f"jumps of D_i{when} that lie in the tenth of windows with the largest drops of the loss"
        claims.at_least(f"share_{name}", text, found.share, 0.8, "PROPOSED")
        # A run without jumps has no share (nan), and beats nothing.
        luck = (~(found.shifted(N_SHIFTS, context.stream("shifts", name)) < found.share)).sum()
        text = f"p-value of that share{when}, against drops shifted in a circle"
        claims.at_most(f"p_value_{name}", text, (1 + luck) / (1 + N_SHIFTS), 0.01, "PROPOSED")
    tensors = {"W": model.W, "b": model.b, "D": D, "loss": loss}
    facts = {
        "feature_prob": FEATURE_PROB,
        "n_steps": N_STEPS,
        "batch_size": BATCH,
        "lr": LR,
        "snapshot_every": EVERY,
        "shown": most_spread(later),
    }
    return Outcome(
        claims.made, {f"{CONDITION}/{k}": v.detach() for k, v in tensors.items()}, {CONDITION: facts}, n_seeds
    )


def draw(outcome: Outcome) -> Sequence[Picture]:
    """D_i above the loss, in the model whose jumps lie farthest apart."""
    facts = outcome.conditions[CONDITION]
    D, loss = outcome.tensors[f"{CONDITION}/D"], outcome.tensors[f"{CONDITION}/loss"]
    shown = int(str(facts["shown"]))
    windows, _, features = find_jumps(D[FORMED:], loss[FORMED:]).jumps[:, [shown]].nonzero(as_tuple=True)
    D, loss = D[:, shown], loss[:, shown]
    steps = torch.arange(len(D)) * EVERY
    figure, ((above,), (below,)) = plots.figure(2, 1, width=9, height=6.6, sharex=True, height_ratios=(3, 2))
    jumping = features.unique().tolist()
    for feature in range(D.shape[1]):
        moves = feature in jumping
        colour = plots.SERIES[jumping.index(feature) % len(plots.SERIES)] if moves else "#c3cad1"
        above.plot(steps, D[:, feature], color=colour, linewidth=1.8 if moves else 1.2, zorder=2 if moves else 1)
    marked = torch.zeros(len(steps), dtype=torch.bool)
    for window, feature in zip((windows + FORMED).tolist(), features.tolist(), strict=True):
        span = slice(window, window + SPAN + 1)
        above.plot(steps[span], D[span, feature], color=plots.INK, linewidth=5, alpha=0.25, solid_capstyle="round")
        marked[span] = True
    for ax in (above, below):
        whole = ax.get_xaxis_transform()
        ax.fill_between(steps, 0, 1, where=marked, transform=whole, color=plots.RULE, alpha=0.5, zorder=0, linewidth=0)
    below.plot(steps, loss, color=plots.INK)
    late = loss[FORMED:]
    shown_steps = min(N_STEPS, max([N_STEPS // 2, *(steps[marked] + N_STEPS // 20).tolist()]))
    below.set(ylim=(float(late.min()) - 0.002, float(late.max()) + 0.004), xlim=(0, shown_steps))
    below.set(xlabel="training step", ylabel="loss on a fixed batch")
    above.set(ylim=(-0.02, 0.7), ylabel="dimensionality of a feature, $D_i$")
    caption = (
        f"{D_HIDDEN} dimensions, {N_FEATURES} features, constant learning rate; the model whose jumps lie farthest "
        "apart. Above: the dimensionality of each feature; those that jump after step 400, by more than .15 within 5 % "
        "of the run, are coloured, and that part of the run is marked. "
        f"Below: the loss falls in the same windows. The run goes on to step {N_STEPS}."
    )
    return [Picture("energy_levels", figure, caption)]


EXPERIMENT = Experiment(
    name="energy_levels",
    row="8",
    title="Learning by jumps",
    claim="Features jump from one dimensionality to another, and the loss drops as they do.",
    reference="Elhage et al. 2022, Superposition and Learning Dynamics",
    seconds=16,
    run=run,
    draw=draw,
    recipe=ToyRecipe(N_FEATURES, D_HIDDEN, FEATURE_PROB),
)
