"""The latents fire one after another, each for what the previous ones left unexplained."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sae.codes import SparseCodes
from sae.config import SAEConfig
from sae.kernels import pursuit
from sae.sparsifiers.base import Sparsifier
from sae.sparsifiers.budget import require_k_fits


class MatchingPursuitConfig(SAEConfig):
    """MP-SAE (Costa et al. 2025, section 4; matching pursuit: Mallat & Zhang 1993)."""

    # Without an encoder that has to follow, larger steps are better. At 1, 8, 16 and 24: FVU .0671, .0558, .0531 and
    # .0532 on the toy model of 256 features, .0829, .0798, .0780 and .0772 on the Zipf set of docs/performance.md; on
    # synth1k, 600,000 samples, .146, .0221, .0207 and .0200, and MCC .688, .703 and .726 from 8 on.
    lr_factor: ClassVar[float] = 20.0
    serves_as_base: ClassVar[bool] = False

    kind: Literal["matching_pursuit"] = "matching_pursuit"
    k: int = Field(gt=0)
    """Steps of the pursuit: the most latents that fire for one activation."""

    @model_validator(mode="after")
    def _fits(self) -> MatchingPursuitConfig:
        require_k_fits(self.k, self.d_sae)
        if not self.unit_norm_decoder:
            raise ValueError(
                "matching_pursuit subtracts (r . w) w, which needs |w| = 1, got unit_norm_decoder false; leave it on"
            )
        if not self.tied_init:
            raise ValueError("matching_pursuit encodes with its decoder rows, got tied_init false; leave it on")
        return self

    def build(self) -> MatchingPursuit:
        return MatchingPursuit(self.k)


class MatchingPursuit(Sparsifier):
    """z_t = r_{t-1} . w_j on the row j that the residual correlates with most, r_t = r_{t-1} - z_t w_j; k times.

    A latent that fires again adds to its code. The encoder is W_dec^T, and b_enc stays 0.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.pursuit_steps = k

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        raise TypeError("matching pursuit reads activations and W_dec, not pre-latents; call pursue, or SAE.encode")

    def pursue(self, x: Float[Tensor, "batch d"], W_dec: Float[Tensor, "d_sae d"]) -> SparseCodes:
        codes = pursuit.by_products(x, W_dec, self.pursuit_steps)
        latents, values = (slots.view(len(x), self.pursuit_steps) for slots in (codes.latents, codes.values))
        first, _ = pursuit.first_slots(latents, values > 0)
        return SparseCodes(values.new_zeros(values.shape).scatter_add(1, first, values), latents, len(W_dec))
