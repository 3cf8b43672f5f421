"""All positive pre-latents fire, under a penalty that moves from an L1 norm towards a count."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sae.codes import SparseCodes
from sae.kernels import Codes, Kernels, Scalar, Scores
from sae.sparsifiers.base import Decode, Error, Flow, Objective
from sae.sparsifiers.control import START_SHARE, Penalised, PenalisedConfig
from sae.sparsifiers.relu import positive

# The slope of z^p has no bound at 0: codes below this size, in units of the root of the total variance, are pushed no
# harder than one of this size.
FLOOR = 1e-2


class PAnnealingConfig(PenalisedConfig):
    """p-annealing SAE (Karvonen et al. 2024, section 3.2)."""

    kind: Literal["p_annealing"] = "p_annealing"
    p_end: float = Field(default=0.2, gt=0, le=1)
    """Final value of p."""
    anneal_start: float = Field(default=0.1, ge=0, le=1)
    """Fraction of the run during which p stays at 1."""
    anneal_end: float = Field(default=0.7, ge=0, le=1)
    """Fraction of the run after which p stays at `p_end`."""

    # The penalty silences many latents for good: on the Zipf set, at L0 2.1, 53 % of them without AuxK, 3 % with it;
    # MCC .195 and .307, FVU .538 and .544.
    aux_coefficient: float = Field(default=1.0, ge=0)
    """Weight of AuxK, the loss that revives dead latents (0 turns it off)."""

    @model_validator(mode="after")
    def _a_start_before_its_end(self) -> PAnnealingConfig:
        if self.anneal_start >= self.anneal_end:
            raise ValueError(
                f"anneal_start must be below anneal_end={self.anneal_end:g}, got {self.anneal_start:g}; lower it, or "
                "raise anneal_end"
            )
        return self

    def build(self) -> PAnnealing:
        return PAnnealing(self)


class PAnnealing(Penalised):
    """z = max(0, pre), with the penalty lambda sum_j ((z_j |W_dec_j| + f)^p - f^p), where p falls from 1 to p_end.

    f is the small FLOOR. Whenever p changes, lambda is multiplied by sum z^(old p) / sum z^(new p) over the last
    batches, so that the penalty keeps its size (Karvonen et al. 2024, section 3.2).
    """

    passes_pre_latents = raises_dead = True
    exponents: Float[Tensor, " 2"]
    scale: Float[Tensor, ""]
    sums: Float[Tensor, " 2"]

    added_up = ("sums",)

    def __init__(self, config: PAnnealingConfig) -> None:
        super().__init__(config.l1_coefficient, config.l0)
        self.initial_l0 = self.initial_l0 or START_SHARE * config.d_sae
        self.start, self.end, self.p_end = config.anneal_start, config.anneal_end, config.p_end
        self.register_buffer("exponents", torch.ones(2))  # p as it is, and as it will be after the next look
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("sums", torch.zeros(2))  # of both powers, since the last look

    @property
    def coefficient(self) -> Scalar:
        return super().coefficient * self.scale

    def p(self, done: float) -> float:
        """p after this fraction of the run."""
        annealed = (done - self.start) / (self.end - self.start)
        return 1 - (1 - self.p_end) * min(max(annealed, 0.0), 1.0)

    def look_(self, step: int, next_look: int, n_steps: int) -> None:
        super().look_(step, next_look, n_steps)
        ratio = self.sums[0] / self.sums[1]
        self.scale.mul_(torch.where(self.sums[1] > 0, ratio, 1.0))
        self.sums.zero_()
        self.exponents.copy_(torch.tensor([self.p(at / n_steps) for at in (step, next_look)], dtype=torch.float64))

    def details(self) -> dict[str, Scalar]:
        return {"l1_coefficient": self.coefficient, "p": self.exponents[0]}

    def choose(self, kernels: Kernels, scores: Scores) -> Codes | None:
        return positive(kernels, scores)

    def differentiate(self, codes: Codes, decode: Decode, sparsity: Scalar) -> Flow:
        decoded, z = decode(codes, 0.0), codes.values
        norms = decode.norms
        charged = z if norms is None else z * norms[codes.latents]
        weight = self.charge(sparsity) / len(decoded.squares)
        raised = charged + FLOOR
        power, then = (raised.pow(p) for p in self.exponents)
        penalty = self._note(power, then)
        slopes = power.div_(raised).mul_(weight * self.exponents[0]).masked_fill_(z <= 0, 0)
        pull = None
        if norms is not None:
            pull = decode.by_latent(codes.latents, slopes * z)
            slopes *= norms[codes.latents]
        return Flow(decoded, slopes.add_(decoded.code_gradients), decoded.losses.mean(), weight * penalty, pull=pull)

    def objective(self, pre_latents: Float[Tensor, "batch d_sae"], W_dec: Tensor, error: Error) -> Objective:
        codes = self(pre_latents)
        raised = codes.values * W_dec.norm(dim=1) + FLOOR
        penalty = self._note(*(raised.pow(p) for p in self.exponents))
        return Objective(codes, error(codes, W_dec), self.coefficient * penalty / len(pre_latents))

    def _note(self, power: Tensor, then: Tensor) -> Tensor:
        """sum ((z + f)^p - f^p); recorded for the next look, together with the sum for the next p."""
        both = zip((power, then), self.exponents, strict=True)
        sums = torch.stack([(raised - FLOOR**p).sum() for raised, p in both])
        self.sums += sums.detach()
        return sums[0]

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        return SparseCodes(pre_latents.relu(), None, pre_latents.shape[1])
