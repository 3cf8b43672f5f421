"""From pre-activations to sparse codes. One class an idea; everything else about an SAE is shared.

To add one, subclass `SAEConfig` (its options, under a `kind`) and `Sparsifier` (the selection, and a penalty if it
has one). `docs/sparsifiers.md` walks through an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sae import losses
from sae.codes import SparseCodes, kth_largest
from sae.config import SAEConfig
from sae.kernels import Codes, Kernels, Scores, capacity


class Sparsifier(nn.Module, ABC):
    """Chooses which latents fire. State that inference needs (a threshold) is a buffer and is saved with the SAE."""

    passes_pre_latents = False
    """Codes equal the pre-latents wherever they fire: the engine then needs no gradient of the selection."""
    passes_positive = False
    """Codes are max(0, pre): while many fire, the engine computes them as a matrix."""
    l1_coefficient = 0.0
    """lambda of the penalty lambda * sum_j z_j |W_dec_j|."""

    @abstractmethod
    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        """Codes to train on: differentiable in the pre-latents that were chosen."""

    def select(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        """Codes for inference, each row on its own. The same as in training unless a sparsifier says otherwise."""
        return self(pre_latents)

    def choose(self, kernels: Kernels, scores: Scores) -> Codes | None:
        """Codes to train on, without a gradient, where `passes_pre_latents`; None: too many fire to be sparse."""
        if not self.passes_pre_latents:
            return None
        codes = self(scores.pre_latents())
        if codes.indices is None:
            return None
        batch, k_cap = codes.values.shape
        offsets = torch.arange(0, batch * k_cap + 1, k_cap, device=codes.values.device)
        return Codes(offsets, codes.indices.flatten(), codes.values.flatten())

    def penalty(self, codes: SparseCodes, W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, ""] | None:
        """What sparsity costs, for sparsifiers that pay for it in the loss.

        Where a subclass has its own, steps go by autograd.
        """
        return self.l1_coefficient * losses.l1(codes, W_dec) if self.l1_coefficient else None

    def calibrate_(self, batches: Iterable[Float[Tensor, "batch d_sae"]], n_samples: int) -> None:
        """Fits what inference needs on the pre-latents of n_samples held-out activations, once training is over."""

    def rescale_(self, scale: float) -> None:
        """Follows the SAE when pre-latents are multiplied by `scale` (thresholds are in their units)."""


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


class BatchTopKConfig(SAEConfig):
    """BatchTopK SAE (Bussmann et al. 2024)."""

    kind: Literal["batchtopk"] = "batchtopk"
    k: float = Field(gt=0)
    """Mean number of latents that fire for one activation; may be fractional."""
    aux_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of AuxK, the loss that revives dead latents (0 turns it off)."""

    @model_validator(mode="after")
    def _k_fits(self) -> BatchTopKConfig:
        require_k_fits(self.k, self.d_sae)
        return self

    def build(self) -> BatchTopK:
        return BatchTopK(self.k)


class BatchTopK(Sparsifier):
    """In training the batch's round(k * batch) largest positive pre-latents fire, wherever they are.

    Inference must not depend on a sample's neighbours: a latent fires when pre > threshold, and the threshold is
    calibrated on held-out data so that the mean L0 is min(k, mean number of positive pre-latents).
    """

    passes_pre_latents = True
    threshold: Float[Tensor, ""]

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("threshold", torch.tensor(torch.nan))

    def choose(self, kernels: Kernels, scores: Scores) -> Codes | None:
        return kernels.batch_top_k(scores, self._n_codes(len(scores.x)))

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        n = min(self._n_codes(len(pre_latents)), pre_latents.numel())
        cut = kth_largest(rearrange(pre_latents.detach(), "b f -> (b f)"), n)
        fires = (pre_latents >= cut) & (pre_latents > 0)
        # Not padded: the host would have to wait for the number of those that fire.
        return SparseCodes(pre_latents.masked_fill(~fires, 0), None, pre_latents.shape[1])

    def select(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        if bool(self.threshold.isnan()):
            raise ValueError("BatchTopK has no inference threshold yet; calibrate it on held-out activations first")
        return SparseCodes.where(pre_latents > self.threshold, pre_latents)

    def calibrate_(self, batches: Iterable[Float[Tensor, "batch d_sae"]], n_samples: int) -> None:
        n = max(round(self.k * n_samples), 1)
        kept, least = [self.threshold.new_zeros(n + 1)], 0.0
        for pre_latents in batches:
            kept.append(pre_latents[pre_latents > least])
            if sum(map(len, kept)) > 4 * n:  # ordering costs more than keeping
                kept = [torch.cat(kept).topk(n + 1, sorted=False).values]
                least = float(kept[0].min())
        last, first_silent = (float(kth_largest(torch.cat(kept), rank)) for rank in (n, n + 1))
        # Strictly above: half-way between the last pre-latent that fires and the first that does not.
        self.threshold.fill_((last + first_silent) / 2)

    def rescale_(self, scale: float) -> None:
        self.threshold.mul_(scale)

    def _n_codes(self, batch: int) -> int:
        return max(round(self.k * batch), 1)


def require_k_fits(k: int | float, d_sae: int) -> None:
    """Refuses to select more latents than there are."""
    if k > d_sae:
        raise ValueError(f"k must lie in 1..d_sae={d_sae}, got {k}; lower k or raise d_sae")
