"""Sparsity that is paid for: a coefficient that is given, or one that follows until the L0 is what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sae.codes import SparseCodes, kth_largest
from sae.config import SAEConfig
from sae.kernels import Scalar
from sae.sparsifiers.base import Sparsifier

logger = logging.getLogger("sae")

# How much of the error in log L0 a step adds to log lambda. An SAE answers within some hundred steps; a control that is
# faster than that swings.
RATE = 0.003
# A threshold can take codes away and add none: training aims this much above, and the threshold brings it down.
AIM = 1.01
# How far a final L0 may be off before a line says so.
TOLERANCE = 0.02


class PenalisedConfig(SAEConfig):
    """What kinds that pay for their codes have in common."""

    l1_coefficient: float = Field(default=0.1, ge=0)
    """lambda of the penalty; where `l0` is given, what it starts from."""
    l0: float | None = Field(default=None, gt=0)
    """Mean number of latents to fire for one activation: lambda follows until they do. Default: lambda stays."""

    @model_validator(mode="after")
    def _l0_can_be_met(self) -> PenalisedConfig:
        if self.l0 is not None and self.l0 > self.d_sae:
            raise ValueError(f"l0 must lie in 0..d_sae={self.d_sae}, got {self.l0:g}; lower l0 or raise d_sae")
        if self.l0 is not None and not self.l1_coefficient:
            raise ValueError(
                f"l1_coefficient must be above 0 where l0={self.l0:g} is asked for, got 0: it is multiplied until the "
                "L0 is met; leave it out, or drop l0"
            )
        return self


class Control(nn.Module):
    """lambda, led by feedback to a mean L0. After each step, with the share of the penalty that is charged by then,

        log lambda += RATE * share * clip(log(L0 / (AIM l0)), -1, 1).

    All of it stays on the device, and is saved with the SAE.
    """

    coefficient: Float[Tensor, ""]

    def __init__(self, start: float, l0: float) -> None:
        super().__init__()
        self.l0 = l0
        self.register_buffer("coefficient", torch.tensor(start))

    def observe_(self, l0: Float[Tensor, ""], share: Scalar) -> None:
        """Learns the mean L0 of a step."""
        error = (l0 / (AIM * self.l0)).log().clamp(-1, 1)
        self.coefficient.mul_((error * share * RATE).exp())


class Penalised(Sparsifier):
    """A sparsifier with a coefficient; where an L0 is asked for, `Control` leads it, and a latent must exceed a
    threshold at inference, which is calibrated so that the L0 holds on held-out data."""

    control: Control | None
    threshold: Float[Tensor, ""] | None

    def __init__(self, l1_coefficient: float, l0: float | None = None) -> None:
        super().__init__()
        self.l1_coefficient = l1_coefficient
        self.control = None if l0 is None else Control(l1_coefficient, l0)
        self.register_buffer("threshold", None if l0 is None else torch.tensor(0.0))

    @property
    def coefficient(self) -> Scalar:
        return self.l1_coefficient if self.control is None else self.control.coefficient

    @property
    def least(self) -> Scalar:
        """What a pre-latent must exceed to fire at inference."""
        return 0.0 if self.threshold is None else self.threshold

    def observe_(self, l0: Float[Tensor, ""], share: Scalar) -> None:
        if self.control is not None:
            self.control.observe_(l0, share)

    def details(self) -> dict[str, Scalar]:
        return {} if self.control is None else {"l1_coefficient": self.coefficient}

    def select(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        return SparseCodes.where(pre_latents > self.least, pre_latents)

    def calibrate_(self, batches: Iterable[Float[Tensor, "batch d_sae"]], n_samples: int) -> None:
        if self.control is None or self.threshold is None:
            return
        l0 = self.control.l0
        threshold, reached = threshold_of(map(self._scores, batches), l0, n_samples)
        if reached < (1 - TOLERANCE) * l0:
            logger.warning(
                "the L0 is %.4g on held-out data, not %.4g as asked for: lambda was still on its way at %.3g; train "
                "longer, or start from that l1_coefficient",
                reached,
                l0,
                float(self.control.coefficient),
            )
        self.threshold.fill_(threshold)

    def _scores(self, pre_latents: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """What must exceed the threshold for a latent to fire; above 0 where it fires in training."""
        return pre_latents

    def rescale_(self, scale: float) -> None:
        if self.threshold is not None:
            self.threshold.mul_(scale)


def threshold_of(batches: Iterable[Float[Tensor, "batch d_sae"]], l0: float, n_samples: int) -> tuple[float, float]:
    """The threshold that round(l0 n_samples) of the scores exceed, and the mean L0 that it gives.

    Only scores above 0 count: where there are fewer, the threshold is 0.
    """
    n = max(round(l0 * n_samples), 1)
    kept, least, n_positive = [torch.zeros(n + 1)], 0.0, 0
    for scores in batches:
        n_positive += int((scores > 0).sum())
        kept.append(scores[scores > least])
        if sum(map(len, kept)) > 4 * n:  # ordering costs more than keeping
            kept = [torch.cat(kept).topk(n + 1, sorted=False).values]
            least = float(kept[0].min())
    last, first_silent = (float(kth_largest(torch.cat(kept), rank)) for rank in (n, n + 1))
    # Strictly above: half-way between the last score that fires and the first that does not.
    return (last + first_silent) / 2, min(n, n_positive) / n_samples
