"""Row 3: the sparser the features, the more of them a model stores; and the same in compressed sensing.

Twenty features of falling importance in five dimensions. Dense features are read back by five dimensions, one for
each of the most important. Features that rarely fire together can share: the count of those represented grows to
more than twice the dimensions, first as pairs in opposite directions, then as larger groups, while the most
important keep a dimension to themselves for long.

CALIBRATION 1

How many dimensions would be enough? An ideal reader knows the directions W and looks for the sparsest non-negative
code x with x W = h. It recovers codes of which k of n are active from m ≈ 1.1 k ln(n/k) dimensions, in a sharp
transition: the logarithm is why superposition can store many more features than dimensions. Curves for different n
and k fall on one another.

CALIBRATION 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
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
from toymodels.worlds import ToyRecipe

N, M, N_STEPS = 20, 5, 3000
IMPORTANCE = [0.7**i for i in range(N)]
DENSITIES = (1 / 20, 1 / 10)
"""k/n of the codes to recover."""
RATIOS = [0.5 + 0.1 * i for i in range(16)]
"""m / (k ln(n/k))."""
LEARNED_N, LEARNED_M, LEARNED_K = 120, 24, (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14)
N_MATRICES, N_CODES = 4, 50
"""Random matrices at each ratio, and codes to recover from each."""


def run(context: Context) -> Outcome:
    """A stack over seeds and sparsities, one for the rarest features; then recovery by sparse coding."""
    n_seeds = context.pick(fast=4, full=8)
    sparsities = context.pick(fast=(0, 0.5, 0.7, 0.9, 0.97, 0.99), full=(0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97, 0.99))
    sizes = context.pick(fast=(60, 120, 240), full=(60, 120, 240, 480))
    # A batch in which a feature does not fire teaches nothing about it: at S = .999 it is larger.
    stacks = ((sparsities, 512), ((0.999,), 4096))
    context.expect((len(stacks) + 1) * N_STEPS)
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
            condition = f"S={sparsity}"
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
    context.tick()
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
    """Recovery from random unit directions, at m closest to each ratio."""
    stream, dims = context.stream("codes", n, k), [round(ratio * k * log(n / k)) for ratio in RATIOS]
    found = [
        sum(
            recovered(unit_rows(torch.randn(n, m, generator=stream)), k, N_CODES, stream) for _ in range(N_MATRICES)
        )
        / N_MATRICES
        for m in dims
    ]
    ratios = torch.tensor(dims) / (k * log(n / k))
    return {f"recovery, n={n}, k={k}/ratio": ratios, f"recovery, n={n}, k={k}/recovered": torch.tensor(found)}
