"""The k largest pre-latents of each activation fire."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sae.codes import SparseCodes
from sae.config import SAEConfig
from sae.kernels import Codes, Kernels, Scores
from sae.sparsifiers.base import Sparsifier


class TopKConfig(SAEConfig):
    """TopK SAE (Gao et al. 2024)."""

    kind: Literal["topk"] = "topk"
    k: int = Field(gt=0)
    """Most latents that fire for one activation."""
    aux_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of AuxK, the loss that revives dead latents (0 turns it off)."""

    @model_validator(mode="after")
    def _k_fits(self) -> TopKConfig:
        require_k_fits(self.k, self.d_sae)
        return self

    def build(self) -> TopK:
        return TopK(self.k)


class TopK(Sparsifier):
    """z = max(0, pre) on each row's k largest pre-latents, 0 elsewhere."""

    passes_pre_latents = True

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def choose(self, kernels: Kernels, scores: Scores) -> Codes | None:
        return kernels.top_k(scores, self.k)

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        scores, indices = pre_latents.topk(self.k, dim=1, sorted=False)
        return SparseCodes(scores.relu(), indices, pre_latents.shape[1])


def require_k_fits(k: int | float, d_sae: int) -> None:
    """Refuses to select more latents than there are."""
    if k > d_sae:
        raise ValueError(f"k must lie in 1..d_sae={d_sae}, got {k}; lower k or raise d_sae")
