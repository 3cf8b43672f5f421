"""Associative memory as superposition: T values under T keys, all in one matrix.

    W = Σ_i v_i k_iᵀ        W k_j = v_j + Σ_{i≠j} ⟨k_i, k_j⟩ v_i

Random unit keys in d dimensions overlap by 1/√d, so that a recall is its value plus a noise (T − 1)/d times as
strong (Kohonen 1972; Anderson 1972). Rows are keys and values; a leading axis holds memories side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import nan, sqrt

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from toymodels.errors import UsageError
from toymodels.geometry import unit_rows
from toymodels.optim import AdamW
from toymodels.residual import exactly_active, random_directions
from toymodels.training import SCHEDULES


def random_pairs(
    n_pairs: int, width: int, n_active: int, n_instances: int, generator: torch.Generator
) -> tuple[Float[Tensor, "n_instances n_pairs width"], Float[Tensor, "n_instances n_pairs width"]]:
    """Random keys, and values with n_active positive entries each, 0 elsewhere; all are unit vectors."""
    keys = random_directions(n_pairs, width, n_instances, generator)
    return keys, unit_rows(exactly_active(n_active, width, n_pairs, n_instances, generator).dense())


@dataclass(frozen=True, eq=False)
class MatrixMemory:
    """Recalls W k + b, or relu(W k + b)."""

    W: Float[Tensor, "n_instances d_value d_key"]
    b: Float[Tensor, "n_instances d_value"]
    rectified: bool = False

    def __call__(self, keys: Float[Tensor, "n_instances n_keys d_key"]) -> Float[Tensor, "n_instances n_keys d_value"]:
        """What is recalled under each key."""
        recalled = torch.baddbmm(rearrange(self.b, "i v -> i 1 v"), keys, self.W.mT)
        return recalled.relu_() if self.rectified else recalled


def hebbian(
    keys: Float[Tensor, "n_instances n_pairs d_key"], values: Float[Tensor, "n_instances n_pairs d_value"]
) -> MatrixMemory:
    """W = Σ_i v_i k_iᵀ."""
    return MatrixMemory(values.mT @ keys, values.new_zeros(values.shape[0], values.shape[2]))


@torch.no_grad()
def train_memory(
    keys: Float[Tensor, "n_instances n_pairs d_key"],
    values: Float[Tensor, "n_instances n_pairs d_value"],
    *,
    rectified: bool = False,
    n_steps: int = 400,
    lr: float = 0.05,
    progress: Callable[[], None] | None = None,
) -> MatrixMemory:
    """Minimises the mean over the pairs of ‖y_j − v_j‖², where y_j is what is recalled under k_j.

        y = W k                 r = 2 (y − v)/T
        y = relu(W k + b)       r = 2 (y − v)/T where y > 0, else 0; dL/db = Σ_j r_j; if rectified
        dL/dW = Σ_j r_j k_jᵀ

    Adam with a cosine to 0, all pairs in every step, from W = Σ v kᵀ · d/(T + d).

    Raises:
        UsageError: n_steps below 1.
    """
    if n_steps < 1:
        raise UsageError(f"n_steps must be at least 1, got {n_steps}")
    n_pairs, d_key = keys.shape[1:]
    start = hebbian(keys, values)
    memory = MatrixMemory(start.W * (d_key / (n_pairs + d_key)), start.b, rectified)
    trained = [memory.W, memory.b] if rectified else [memory.W]
    optimizer = AdamW(trained, weight_decay=0.0)
    for step in range(n_steps):
        y = memory(keys)
        r = (y - values).mul_(2 / n_pairs)
        if rectified:
            r.mul_(y > 0)
        gradients = [r.mT @ keys, r.sum(1)] if rectified else [r.mT @ keys]
        optimizer.step(gradients, lr * SCHEDULES["cosine"](step / n_steps))
        if progress is not None:
            progress()
    return memory


def softmax_recall(
    queries: Float[Tensor, "n_instances n_queries d_key"],
    keys: Float[Tensor, "n_instances n_pairs d_key"],
    values: Float[Tensor, "n_instances n_pairs d_value"],
    sharpness: float | None = None,
) -> Float[Tensor, "n_instances n_queries d_value"]:
    """Σ_i softmax_i(β ⟨k_i, q⟩) v_i, β = √d by default: attention, a modern Hopfield network (Ramsauer et al. 2021).

    It chooses among the keys before the values are added up, for which it must keep both: 2Td numbers, not d².
    """
    beta = sqrt(keys.shape[2]) if sharpness is None else sharpness
    return torch.softmax(beta * queries @ keys.mT, dim=-1) @ values


def relative_noise(
    recalled: Float[Tensor, "n_instances n_pairs d_value"], values: Float[Tensor, "n_instances n_pairs d_value"]
) -> Float[Tensor, " n_instances"]:
    """Σ‖y − c v‖² / Σ‖c v‖² with the gain c = Σ⟨y, v⟩/Σ‖v‖² that leaves least: a memory may recall faintly."""
    power = values.square().sum((1, 2))
    gain = (recalled * values).sum((1, 2)) / power
    return recalled.square().sum((1, 2)) / (gain.square() * power) - 1


def fraction_recalled(
    recalled: Float[Tensor, "n_instances n_pairs d_value"], values: Float[Tensor, "n_instances n_pairs d_value"]
) -> Float[Tensor, " n_instances"]:
    """How many recalls are nearest to their own value, of all values; these are unit vectors."""
    nearest = (recalled @ values.mT).argmax(-1)
    return (nearest == torch.arange(values.shape[1], device=values.device)).float().mean(-1)


def knee(loads: Sequence[float | int], fractions: Sequence[float], level: float = 0.5) -> float:
    """The load at which a falling fraction first passes `level`, on straight lines between the points.

    nan if it never does.
    """
    for (x0, y0), (x1, y1) in pairwise(zip(loads, fractions, strict=True)):
        if y0 >= level > y1:
            return x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
    return nan
