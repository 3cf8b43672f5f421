"""All positive pre-latents fire, under a penalty."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sae.codes import SparseCodes
from sae.kernels import Codes, Kernels, Scores, capacity
from sae.sparsifiers.control import Penalised, PenalisedConfig


class ReLUConfig(PenalisedConfig):
    """L1-penalised SAE (Bricken et al. 2023)."""

    kind: Literal["relu"] = "relu"
    weight_by_decoder_norm: bool = True
    """Charge lambda * sum_j z_j |W_dec_j| (Conerly et al. 2024); off: lambda * sum_j z_j."""

    def build(self) -> ReLU:
        return ReLU(self.l1_coefficient, self.l0, self.weight_by_decoder_norm)


class ReLU(Penalised):
    """z = max(0, pre), with the penalty lambda * sum_j z_j |W_dec_j|, or lambda * sum_j z_j."""

    passes_pre_latents = passes_positive = True

    def __init__(self, l1_coefficient: float, l0: float | None = None, weighted: bool = True) -> None:
        super().__init__(l1_coefficient, l0)
        self.weighted = weighted

    def choose(self, kernels: Kernels, scores: Scores) -> Codes | None:
        return positive(kernels, scores)

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        return SparseCodes(pre_latents.relu(), None, pre_latents.shape[1])


def positive(kernels: Kernels, scores: Scores) -> Codes | None:
    """All positive pre-latents, where they are few enough to count as sparse."""
    return kernels.positive(scores, capacity(scores))
