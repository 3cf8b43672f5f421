"""Adam (Kingma & Ba 2015) on the device: nothing that changes from step to step is known only to the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Now(NamedTuple):
    """What depends on the number t of a step, from 1: the learning rate, 1 - beta^t for both moments, the share of a
    sparsity penalty that is charged by then, and t."""

    rate: Float[Tensor, ""]
    correction1: Float[Tensor, ""]
    correction2: Float[Tensor, ""]
    sparsity: Float[Tensor, ""]
    step: Float[Tensor, ""]

    @classmethod
    def at(cls, step: int, rate: float, sparsity: float) -> Now:
        """On the CPU, in float64."""
        return cls(*torch.tensor(row(step, rate, sparsity), dtype=torch.float64))


def row(step: int, rate: float, sparsity: float) -> tuple[float, float, float, float, float]:
    """The numbers in `Now`. 1 - .999^t is small at first, and would lose its digits if float32 computed it."""
    return rate, 1 - BETA1**step, 1 - BETA2**step, sparsity, float(step)


def adam_(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, now: Now) -> None:
    """m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  w -= rate (m / c1) / (sqrt(v / c2) + eps)."""
    first.lerp_(gradient, 1 - BETA1)
    second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    size = (second / now.correction2).sqrt_().add_(EPSILON)
    weight.sub_((first / size).mul_(now.rate / now.correction1))
