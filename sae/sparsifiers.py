"""From pre-activations to sparse codes. One class an idea; everything else about an SAE is shared.

To add one, subclass `SAEConfig` (its options, under a `kind`) and `Sparsifier` (the selection, and a penalty if it
has one). `docs/sparsifiers.md` walks through an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sae import losses
from sae.codes import SparseCodes
from sae.config import SAEConfig

# A batch of codes is sparse when less than this share of them fires.
SPARSE_SHARE = 1 / 20


class Sparsifier(nn.Module, ABC):
    """Chooses which latents fire. State that inference needs (a threshold) is a buffer and is saved with the SAE."""

    passes_pre_latents = False
    """Codes equal the pre-latents wherever they fire: where they come padded, their gradients stay sparse."""

    @abstractmethod
    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        """Codes to train on: differentiable in the pre-latents that were chosen."""

    def select(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        """Codes for inference, each row on its own. The same as in training unless a sparsifier says otherwise."""
        return self(pre_latents)

    def penalty(self, codes: SparseCodes, W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, ""] | None:
        """What sparsity costs, for sparsifiers that pay for it in the loss."""
        return None

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

    passes_pre_latents = True

    def __init__(self, l1_coefficient: float) -> None:
        super().__init__()
        self.l1_coefficient = l1_coefficient

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        full = SparseCodes(pre_latents.relu(), None, pre_latents.shape[1])
        if pre_latents.device.type != "cpu":
            return full
        # On a CPU padded codes win as soon as few fire. What fires decides, so that a run stays reproducible.
        few = float(full.values.sign().sum()) < SPARSE_SHARE * pre_latents.numel()
        return SparseCodes.where(pre_latents > 0, pre_latents) if few else full

    def select(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        return SparseCodes.where(pre_latents > 0, pre_latents)

    def penalty(self, codes: SparseCodes, W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, ""]:
        return self.l1_coefficient * losses.l1(codes, W_dec)


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

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        fires = pre_latents >= self._cut(pre_latents.detach())
        if pre_latents.device.type != "cpu":
            # To pad them the host would have to wait for their number.
            return SparseCodes(pre_latents.masked_fill(~fires, 0), None, pre_latents.shape[1])
        return SparseCodes.where(fires, pre_latents)

    def select(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        if bool(self.threshold.isnan()):
            raise ValueError("BatchTopK has no inference threshold yet; calibrate it on held-out activations first")
        return SparseCodes.where(pre_latents > self.threshold, pre_latents)

    def calibrate_(self, batches: Iterable[Float[Tensor, "batch d_sae"]], n_samples: int) -> None:
        n = max(round(self.k * n_samples), 1)
        largest = self.threshold.new_zeros(n + 1)
        for pre_latents in batches:
            candidates = torch.cat([largest, pre_latents[pre_latents > largest.min()]])
            largest = candidates.topk(n + 1).values
        # Strictly above: half-way between the last pre-latent that fires and the first that does not.
        self.threshold.copy_((largest[-2] + largest[-1]) / 2)

    def rescale_(self, scale: float) -> None:
        self.threshold.mul_(scale)

    def _cut(self, pre_latents: Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
        """The value of the last pre-latent that fires; positive, as codes are."""
        n = min(max(round(self.k * len(pre_latents)), 1), pre_latents.numel())
        return kth_largest(rearrange(pre_latents, "b f -> (b f)"), n).clamp_min(torch.finfo(torch.float32).tiny)


def kth_largest(values: Float[Tensor, " n"], k: int) -> Float[Tensor, ""]:
    """The k-th largest value. NumPy's vectorised partition finds it 8 times faster than torch does on a CPU.

    Every 16th value gives a bound that the k largest most likely exceed; when they do, only those are partitioned.
    """
    if values.device.type != "cpu":
        return values.topk(k, sorted=False).values.min()
    candidates = values.numpy()
    sample, rank = candidates[::16], k // 12 + 16
    if rank < len(sample):
        above = candidates[candidates >= np.partition(sample, -rank)[-rank]]
        candidates = above if len(above) >= k else candidates
    return values.new_tensor(np.partition(candidates, -k)[-k])


def require_k_fits(k: int | float, d_sae: int) -> None:
    """Refuses to select more latents than there are."""
    if k > d_sae:
        raise ValueError(f"k must lie in 1..d_sae={d_sae}, got {k}; lower k or raise d_sae")
