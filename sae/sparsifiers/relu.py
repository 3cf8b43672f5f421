"""All positive pre-latents fire, and pay for it."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sae.codes import SparseCodes
from sae.config import SAEConfig
from sae.kernels import Codes, Kernels, Scores, capacity
from sae.sparsifiers.base import Sparsifier


class ReLUConfig(SAEConfig):
    """L1-penalised SAE (Bricken et al. 2023)."""

    kind: Literal["relu"] = "relu"
    l1_coefficient: float = Field(default=0.1, ge=0)
    """lambda of lambda * sum_j z_j |W_dec_j| / sqrt(s)."""

    def build(self) -> ReLU:
        return ReLU(self.l1_coefficient)


class ReLU(Sparsifier):
    """z = max(0, pre), with the penalty lambda * sum_j z_j |W_dec_j|."""

    passes_pre_latents = passes_positive = True

    def __init__(self, l1_coefficient: float) -> None:
        super().__init__()
        self.l1_coefficient = l1_coefficient

    def choose(self, kernels: Kernels, scores: Scores) -> Codes | None:
        batch, d_sae = scores.shape
        return kernels.positive(scores, capacity(batch, d_sae, kernels.precision))

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        return SparseCodes(pre_latents.relu(), None, pre_latents.shape[1])

    def select(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        return SparseCodes.where(pre_latents > 0, pre_latents)
