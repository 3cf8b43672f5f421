"""The largest pre-latents of a whole batch fire."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sae.codes import SparseCodes, cut_between, kth_largest
from sae.kernels import Codes, Kernels, Scores
from sae.sparsifiers.budget import Budget, BudgetConfig


class BatchTopKConfig(BudgetConfig):
    """BatchTopK SAE (Bussmann et al. 2024)."""

    kind: Literal["batchtopk"] = "batchtopk"
    k: float = Field(gt=0)
    """Mean number of latents that fire for one activation; may be fractional."""

    def build(self) -> BatchTopK:
        return BatchTopK(self.k, self.k_start, self.k_anneal_fraction, self.refine)


class BatchTopK(Budget):
    """In training the batch's round(k * batch) largest positive pre-latents fire, wherever they are.

    Inference must not depend on a sample's neighbours: a latent fires when pre > threshold, and the threshold is
    calibrated on held-out data so that the mean L0 is min(k, mean number of positive pre-latents).
    """

    passes_pre_latents = raises_dead = True
    threshold: Float[Tensor, ""]

    def __init__(
        self, k: float, k_start: float | None = None, k_anneal_fraction: float = 0.1, refine: float = 0.0
    ) -> None:
        super().__init__(k, k_start, k_anneal_fraction, refine)
        self.register_buffer("threshold", torch.tensor(torch.nan))

    def choose(self, kernels: Kernels, scores: Scores) -> Codes | None:
        return kernels.batch_top_k(scores, self._n_codes(len(scores.x)))

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        n = min(self._n_codes(len(pre_latents)), pre_latents.numel())
        cut = kth_largest(rearrange(pre_latents.detach(), "b f -> (b f)"), n)
        fires = (pre_latents >= cut) & (pre_latents > 0)
        # Not padded: the host would have to wait for the number of those that fire.
        return SparseCodes(pre_latents.masked_fill(~fires, 0), None, pre_latents.shape[1])

    def edge(self, pre_latents: Float[Tensor, "batch d_sae"]) -> tuple[Tensor, Tensor]:
        if bool(self.threshold.isnan()):
            raise ValueError("BatchTopK has no inference threshold yet; calibrate it on held-out activations first")
        return self.threshold, pre_latents

    def calibrate_(self, batches: Iterable[Float[Tensor, "batch d_sae"]], n_samples: int) -> None:
        n = max(round(self.k * n_samples), 1)
        self.threshold.fill_(cut_between((pre[pre > 0] for pre in batches), n, 0.0))

    def rescale_(self, scale: float) -> None:
        self.threshold.mul_(scale)
        if self.first is not None:
            self.first.rescale_(scale)

    def _n_codes(self, batch: int) -> int:
        return max(round(self.k * batch), 1)
