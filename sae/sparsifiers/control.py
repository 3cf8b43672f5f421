"""Sparsity by a penalty: its coefficient is fixed, or adjusted until a target L0 is reached."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sae.codes import cut_between
from sae.config import SAEConfig
from sae.kernels import Scalar
from sae.sparsifiers.base import Sparsifier

logger = logging.getLogger("sae")

# What a step adds to log lambda: so much of the error in log L0, and so much of the error's change since the step
# before (an SAE answers to lambda within some hundred steps, and would swing without it).
INTEGRAL, PROPORTIONAL = 0.03, 1.0
# The first of these is limited: from far away L0 should fall slowly, as latents that are silenced before they found a
# feature seldom come back. Log lambda moves by at most REACH over a whole run, or by LEAST a step where that is more.
REACH, LEAST = 4.0, 0.001
# How far log L0 may be off at the end before a line says that a threshold makes up for it.
FAR = 0.1
# The L0 at the start: for each that is asked for; and the share of all latents, where none is.
START, START_SHARE = 2.0, 1 / 64


class PenalisedConfig(SAEConfig):
    """What kinds with a penalty have in common."""

    l1_coefficient: float = Field(default=0.1, ge=0)
    """lambda of the penalty. If `l0` is given, its initial value."""
    l0: float | None = Field(default=None, gt=0)
    """Target mean L0; lambda is adjusted during training until it is reached. Default: lambda is fixed."""

    @model_validator(mode="after")
    def _l0_can_be_met(self) -> PenalisedConfig:
        if self.l0 is not None and self.l0 >= self.d_sae:
            raise ValueError(f"l0 must lie below d_sae={self.d_sae}, got {self.l0:g}; lower l0 or raise d_sae")
        if self.l0 is not None and not self.l1_coefficient:
            raise ValueError(
                f"l1_coefficient must be above 0 where l0={self.l0:g} is requested, got 0: it is multiplied until the "
                "L0 is reached; leave it out, or drop l0"
            )
        return self


class Control(nn.Module):
    """lambda, steered by feedback to a mean L0: after each step,

        e = clip(log(L0 / l0), -1, 1),
        log lambda += share * (clip(INTEGRAL e, -limit, limit) + PROPORTIONAL (e - e_before)),

    where `share` is the share of the penalty charged by then, and limit = max(REACH / steps of the run, LEAST). All of
    it stays on the device, and is saved.
    """

    coefficient: Float[Tensor, ""]
    limit: Float[Tensor, ""]
    error: Float[Tensor, ""]

    def __init__(self, start: float, l0: float) -> None:
        super().__init__()
        self.l0 = l0
        self.register_buffer("coefficient", torch.tensor(start))
        self.register_buffer("limit", torch.tensor(LEAST))
        self.register_buffer("error", torch.tensor(1.0))  # before the first step: a run comes from above

    def look_(self, n_steps: int) -> None:
        """Learns how long the run is."""
        self.limit.fill_(max(REACH / n_steps, LEAST))

    def observe_(self, l0: Float[Tensor, ""], share: Scalar) -> None:
        """Learns the mean L0 of a step."""
        error = (l0 / self.l0).log().clamp(-1, 1)
        change = (INTEGRAL * error).clamp(-self.limit, self.limit) + PROPORTIONAL * (error - self.error)
        self.coefficient.mul_((share * change).exp())
        self.error.copy_(error)


class Penalised(Sparsifier):
    """A sparsifier with a coefficient. With a target L0, `Control` steers it, and at inference a latent must exceed a
    threshold calibrated to meet the L0 on held-out data, to the sample; training leaves little to correct, so the
    threshold is close to 0."""

    control: Control | None
    threshold: Float[Tensor, ""] | None

    def __init__(self, l1_coefficient: float, l0: float | None = None) -> None:
        super().__init__()
        self.l1_coefficient = l1_coefficient
        self.control = None if l0 is None else Control(l1_coefficient, l0)
        self.register_buffer("threshold", None if l0 is None else torch.tensor(0.0))
        self.initial_l0 = None if l0 is None else START * l0

    @property
    def coefficient(self) -> Scalar:
        return self.l1_coefficient if self.control is None else self.control.coefficient

    def start_(self, cuts: Float[Tensor, " d_sae"], b_enc: Float[Tensor, " d_sae"]) -> None:
        b_enc.sub_(cuts)

    def look_(self, step: int, next_look: int, n_steps: int) -> None:
        if self.control is not None:
            self.control.look_(n_steps)

    def observe_(self, l0: Float[Tensor, ""], sparsity: Scalar) -> None:
        if self.control is not None:
            self.control.observe_(l0, sparsity)

    def details(self) -> dict[str, Scalar]:
        return {} if self.control is None else {"l1_coefficient": self.coefficient}

    def edge(self, pre_latents: Float[Tensor, "batch d_sae"]) -> tuple[Tensor, Tensor]:
        """max(0, pre) where it exceeds the threshold; one below 0 raises all pre-latents instead."""
        if self.threshold is None:
            return pre_latents.new_zeros(()), pre_latents
        return self.threshold, pre_latents - self.threshold.clamp_max(0)

    def scores(self, pre_latents: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """What must exceed the threshold for a latent to fire; in training it must exceed 0."""
        return pre_latents

    def calibrate_(self, batches: Iterable[Float[Tensor, "batch d_sae"]], n_samples: int) -> None:
        if self.control is None or self.threshold is None:
            return
        l0 = self.control.l0
        threshold, trained = threshold_of(map(self.scores, batches), l0, n_samples)
        self.threshold.fill_(threshold)
        tell_if_far(trained, l0, f"start nearer to l1_coefficient={float(self.coefficient):.3g}")

    def rescale_(self, scale: float) -> None:
        if self.threshold is not None:
            self.threshold.mul_(scale)


def tell_if_far(trained: float, l0: float, remedy: str) -> None:
    """Logs a line if training ended more than FAR from the requested L0."""
    if abs(math.log(max(trained, 1e-9) / l0)) > FAR:
        logger.warning(
            "training ended at L0 %.4g instead of the requested %.4g; a threshold compensates, at some cost in error: "
            "train longer, or %s",
            trained,
            l0,
            remedy,
        )


def threshold_of(batches: Iterable[Float[Tensor, "batch d_sae"]], l0: float, n_samples: int) -> tuple[float, float]:
    """The threshold that round(l0 n_samples) of the scores exceed, and the mean number of scores above 0."""
    n_positive = 0

    def counted() -> Iterator[Tensor]:
        nonlocal n_positive
        for scores in batches:
            n_positive += int((scores > 0).sum())
            yield scores.flatten()

    threshold = cut_between(counted(), max(round(l0 * n_samples), 1), -torch.inf)
    return threshold, n_positive / n_samples
