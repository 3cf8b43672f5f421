"""Row 1: two features share one dimension as an antipodal pair.

One dimension holds two sparse features when they point opposite ways: the ReLU cuts what either says to the other.
Not every start gets there, so that the claim is about the best of the seeds; how often they do is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toymodels import plots
from toymodels.experiments.base import Claims, Context, Experiment, Outcome, Picture
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.training import train
from toymodels.worlds import ToyRecipe

N_SEEDS, N_STEPS, BATCH = 20, 1000, 512
PROBS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5)


def run(context: Context) -> Outcome:
    """One stack: 20 seeds at each of six sparsities."""
    context.expect(N_STEPS)
    probs = torch.tensor(PROBS).repeat_interleave(N_SEEDS)[:, None]
    model = ToyModel(2, 1, len(probs), generator=context.stream("weights"))
    training = train(
        model, Features(2, probs), N_STEPS, BATCH, generator=context.stream("batches"), progress=context.tick
    )
    claims = Claims("1")
    tensors: dict[str, Tensor] = {}
    conditions: dict[str, dict[str, Any]] = {}
    for p, W, b, losses in zip(
        PROBS, *(t.split(N_SEEDS) for t in (model.W, model.b, training.final_losses)), strict=True
    ):
        condition, best = f"p={p}", int(losses.argmin())
        weights = W.detach().squeeze(2)
        antipodal = (weights.prod(1) < 0) & (weights.abs() > 0.5).all(1)
        pair = weights[best]
        claims.equals(f"best_signs_{condition}", f"{condition}: product of signs", pair.sign().prod(), -1, "RUN")
        for name, size in (("smaller", pair.abs().min()), ("larger", pair.abs().max())):
            claims.within(f"best_{name}_{condition}", f"{condition}: the {name} |w|", size, 1.0, 0.1, "RUN")
        tensors |= {f"{condition}/W": W, f"{condition}/b": b, f"{condition}/losses": losses}
        conditions[condition] = {
            "feature_prob": p,
            "n_steps": N_STEPS,
            "batch_size": BATCH,
            "best": best,
            "success_rate": float(antipodal.float().mean()),
        }
    return Outcome(claims.made, tensors, conditions, N_SEEDS)


def draw(outcome: Outcome) -> Sequence[Picture]:
    """Each seed's two weights, and how often they are antipodal."""
    figure, axes = plots.figure(1, len(PROBS), width=10, height=2.4, sharey=True)
    for ax, (condition, facts) in zip(axes[0], outcome.conditions.items(), strict=True):
        W = outcome.tensors[f"{condition}/W"].detach().squeeze(2)
        W = W * torch.where(W[:, :1] >= 0, 1, -1)
        ax.axhline(0, color=plots.RULE, zorder=0)
        for i in range(2):
            ax.plot(range(len(W)), W[:, i], "o", color=plots.SERIES[i], markersize=4, alpha=0.8)
        ax.set(title=f"p = {facts['feature_prob']}: {facts['success_rate']:.0%}", xticks=[], xlabel="seeds")
    axes[0, 0].set(ylabel="weight")
    caption = (
        "Two features (blue, orange) in one dimension, 20 seeds at each probability p of a feature. A seed that "
        "finds the superposition has its two weights at +1 and −1; the others read one feature and confuse "
        "the other with it. Percentages say how many seeds find it."
    )
    return [Picture("antipodal", figure, caption)]


EXPERIMENT = Experiment(
    name="antipodal",
    row="1",
    title="An antipodal pair",
    claim="Two sparse features share one dimension by pointing in opposite directions, in the best of the seeds.",
    reference="Elhage et al. 2022, section 2",
    seconds=7,
    run=run,
    draw=draw,
    recipe=ToyRecipe(n_features=2, d_hidden=1, feature_prob=0.1, n_steps=N_STEPS),
)
