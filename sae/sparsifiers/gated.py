"""A gate decides which latents fire; separate magnitudes say how strongly."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.codes import SparseCodes
from sae.kernels import Codes, Kernels, Scalar, Scores
from sae.sparsifiers.base import Decode, Error, Flow, Objective
from sae.sparsifiers.control import START_SHARE, Penalised, PenalisedConfig
from sae.sparsifiers.relu import positive


class GatedConfig(PenalisedConfig):
    """Gated SAE (Rajamanoharan et al. 2024a, section 3.2)."""

    kind: Literal["gated"] = "gated"
    # The paper centres by b_dec, which both reconstructions then pull at. A centre that stays is better: at L0 2.6 on
    # the toy model of 256 features FVU .064 -> .053, MCC .973 -> .991; on docs/performance.md's Zipf set .178 -> .176.
    tied_bias: bool = False

    def build(self) -> Gated:
        return Gated(self.d_sae, self.l1_coefficient, self.l0)


class Gated(Penalised):
    """z_j = max(0, exp(r_j) pi_j + c_j) where the gate pi_j > 0, else 0; pi are the pre-latents.

        loss = |x_hat - x|^2  +  lambda sum_j max(0, pi_j) |W_dec_j|  +  |max(0, pi) W_frozen + b_frozen - x|^2

    The penalty shrinks only the gate, so magnitudes are free of it. The last term, under a frozen decoder, trains the
    gate as a detector, since the step from pi to "fires" has no gradient.

    This is the family of the paper's tied weights, W_mag = exp(r_mag) W_gate, in terms of the gate's pre-activation:
    b_gate is b_enc, and b_mag = c_mag + exp(r_mag) b_gate (equations 6 to 8).
    """

    def __init__(self, d_sae: int, l1_coefficient: float, l0: float | None = None) -> None:
        super().__init__(l1_coefficient, l0)
        self.initial_l0 = self.initial_l0 or START_SHARE * d_sae
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.c_mag = nn.Parameter(torch.zeros(d_sae))

    @torch.no_grad()
    def renew_(self, latents: Int[Tensor, " n"]) -> None:
        self.r_mag.index_fill_(0, latents, 0)
        self.c_mag.index_fill_(0, latents, 0)

    def choose(self, kernels: Kernels, scores: Scores) -> Codes | None:
        gate = positive(kernels, scores)
        if gate is None:
            return None
        magnitudes = self.c_mag.detach()[gate.latents].addcmul_(self._gains(gate), gate.values).relu_()
        magnitudes.masked_fill_(gate.values <= 0, 0)  # empty slots, where kernels leave some
        return gate._replace(values=magnitudes, pre_latents=gate.values)

    def differentiate(self, codes: Codes, decode: Decode, sparsity: Scalar) -> Flow:
        gate = codes.pre_latents
        assert gate is not None
        weight = self.charge(sparsity)
        cost = weight / (len(codes.offsets) - 1)
        through_gate = decode(codes._replace(values=gate), cost)
        penalty, error = weight * through_gate.code_sums.mean(), through_gate.losses.mean()
        gradients = through_gate.code_gradients.clone()  # kernels decode again into the same memory

        decoded = decode(codes, 0.0)
        own = decoded.code_gradients * (codes.values > 0)
        through = own * self._gains(codes)
        self.c_mag.grad = decode.by_latent(codes.latents, own)
        self.r_mag.grad = decode.by_latent(codes.latents, through * gate)
        pull = None if decode.norms is None else cost * decode.by_latent(codes.latents, gate)
        return Flow(decoded, gradients.add_(through), error + decoded.losses.mean(), penalty, pull=pull)

    def objective(self, pre_latents: Float[Tensor, "batch d_sae"], W_dec: Tensor, error: Error) -> Objective:
        codes, gate = self(pre_latents), SparseCodes(pre_latents.relu(), None, pre_latents.shape[1])
        errors = error(codes, W_dec) + error(gate, W_dec.detach())
        return Objective(codes, errors, self.penalty(gate, W_dec))

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        return SparseCodes(self._magnitudes(pre_latents) * (pre_latents > 0), None, pre_latents.shape[1])

    def edge(self, pre_latents: Float[Tensor, "batch d_sae"]) -> tuple[Tensor, Tensor]:
        least = pre_latents.new_zeros(()) if self.threshold is None else self.threshold
        return least, self._magnitudes(pre_latents)

    def scores(self, pre_latents: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        return pre_latents.masked_fill(self._magnitudes(pre_latents) <= 0, -torch.inf)

    def rescale_(self, scale: float) -> None:
        super().rescale_(scale)
        self.c_mag.mul_(scale)

    def _magnitudes(self, pre_latents: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """Of all latents, regardless of their gates."""
        return (pre_latents * self.r_mag.exp() + self.c_mag).relu()

    def _gains(self, codes: Codes) -> Float[Tensor, " slots"]:
        """exp(r) of each slot's latent."""
        return self.r_mag.detach().exp()[codes.latents]
