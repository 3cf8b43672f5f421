"""Row 8: learning jumps from one energy level to the next."""

from __future__ import annotations

from collections.abc import Sequence

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
"""Snapshot from which a change of D_i is no longer the end of the random start."""
JUMP, TOP = 0.15, 0.9
N_EVALUATION, N_SHIFTS = 1024, 1999


def run(context: Context) -> Outcome:
    """One stack of seeds; their losses on one large sample, so that a drop is not the noise of the batches."""
    n_seeds = context.pick(fast=20, full=100)
    context.expect(N_STEPS)
    model = ToyModel(N_FEATURES, D_HIDDEN, n_seeds, init_sd=INIT_SD, generator=context.stream("weights"))
    features = Features(N_FEATURES, FEATURE_PROB)
    biases = [model.b.detach().clone()]

    def progress(step: int, losses: Tensor) -> None:
        context.tick()
        if (step + 1) % EVERY == 0:
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
    W, b = training.snapshots, torch.stack(biases)
    x = features.sample_dense(N_EVALUATION, context.stream("evaluation"))
    loss = torch.stack([loss_on(x, *weights) for weights in zip(W, b, strict=True)])
    D = geometry.feature_dimensionality(W)
    import time
    torch.save((D,loss),f"/tmp/uni/energy_{context.seed}.pt")
    claims = Claims("8")
    return Outcome(claims.made, {}, {}, n_seeds)


def loss_on(
    x: Float[Tensor, "batch n_features"],
    W: Float[Tensor, "n_instances n_features d_hidden"],
    b: Float[Tensor, "n_instances n_features"],
) -> Float[Tensor, " n_instances"]:
    """L on the same sample for every instance."""
    y = torch.baddbmm(rearrange(b, "i n -> i 1 n"), (x @ W), W.mT).relu_()
    return weighted_error(x[None], y, torch.ones(x.shape[1]))


def draw(outcome: Outcome) -> Sequence[Picture]:
    return []


EXPERIMENT = Experiment("energy_levels", "8", "t", "c", "r", 10, run, draw, ToyRecipe(N_FEATURES, D_HIDDEN, FEATURE_PROB))
