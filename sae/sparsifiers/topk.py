"""The k largest pre-latents of each activation fire."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sae.codes import SparseCodes
from sae.kernels import Codes, Kernels, Scores
from sae.sparsifiers.base import Error, Objective
from sae.sparsifiers.budget import Budget, BudgetConfig

# L(k) + L(multi_k) / 8, as shares of one loss.
MULTI_WEIGHTS = (8 / 9, 1 / 9)


class TopKConfig(BudgetConfig):
    """TopK SAE (Gao et al. 2024)."""

    kind: Literal["topk"] = "topk"
    k: int = Field(gt=0)
    """Most latents that fire for one activation."""
    multi_k: int | None = Field(default=None, gt=0)
    """Multi-TopK: the loss includes, at 1/8 of the weight, the reconstruction from this many latents; default off."""

    @model_validator(mode="after")
    def _multi_k_fits(self) -> TopKConfig:
        if self.multi_k is None:
            return self
        largest = max(self.k, self.k_start or 0)
        if not largest < self.multi_k <= self.d_sae:
            raise ValueError(
                f"multi_k must lie above k{'_start' * (largest > self.k)}={largest:g} and be at most "
                f"d_sae={self.d_sae}, got {self.multi_k}; 4 k is usual"
            )
        if len(self.widths) > 1:
            raise ValueError(f"multi_k={self.multi_k} and prefixes both read the codes several times; leave one out")
        if self.refine:
            raise ValueError(f"multi_k={self.multi_k} and refine={self.refine:g} do not go together; leave one out")
        return self

    def build(self) -> TopK:
        own = (self.k, self.k_start, self.k_anneal_fraction)
        return TopK(*own, self.refine) if self.multi_k is None else MultiTopK(*own, multi_k=self.multi_k)


class TopK(Budget):
    """z = max(0, pre) on each row's k largest pre-latents, 0 elsewhere."""

    passes_pre_latents = True
    k: int

    def allowed(self, k: float) -> int:
        return round(k)

    def choose(self, kernels: Kernels, scores: Scores) -> Codes | None:
        return kernels.top_k(scores, self.k)

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        return _largest(pre_latents, self.k)

    def infer(self, kernels: Any, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        values, latents = kernels.encode_top_k(pre_latents, self.k)
        return SparseCodes(values, latents, pre_latents.shape[1])


class MultiTopK(TopK):
    """TopK whose loss is 8/9 L(k) + 1/9 L(multi_k), so that more latents than fire reconstruct well, too.

    Gao et al. 2024, section 5.3 (progressive recovery): L(k) + L(4k) / 8, here divided by 9/8 so that the loss keeps
    its size. The second reading has all multi_k slots, the first the k largest of them; only these count as firing.
    """

    by_autograd = False  # the levels of its codes say what `objective` does

    def __init__(self, k: int, k_start: float | None, k_anneal_fraction: float, *, multi_k: int) -> None:
        super().__init__(k, k_start, k_anneal_fraction)
        self.multi_k = multi_k

    def choose(self, kernels: Kernels, scores: Scores) -> Codes | None:
        codes = kernels.top_k(scores, self.multi_k)
        values = codes.values.view(-1, self.multi_k)
        levels = torch.ones(values.shape, dtype=torch.int32, device=values.device)
        levels.scatter_(1, values.topk(self.k, dim=1, sorted=False).indices, 0)
        return codes._replace(levels=levels.flatten(), weights=MULTI_WEIGHTS, reading=0)

    def objective(self, pre_latents: Float[Tensor, "batch d_sae"], W_dec: Tensor, error: Error) -> Objective:
        codes = self(pre_latents)
        errors = (error(codes, W_dec), error(_largest(pre_latents, self.multi_k), W_dec))
        return Objective(codes, MULTI_WEIGHTS[0] * errors[0] + MULTI_WEIGHTS[1] * errors[1], None)


def _largest(pre_latents: Float[Tensor, "batch d_sae"], k: int) -> SparseCodes:
    scores, indices = pre_latents.topk(k, dim=1, sorted=False)
    return SparseCodes(scores.relu(), indices, pre_latents.shape[1])
