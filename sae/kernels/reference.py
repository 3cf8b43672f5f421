"""The stages of a training step as plain dense products, in any dtype on any device: the judge of all other kernels.

Nothing here is fast, and nothing here is clever. What it costs is a [batch, d_sae] matrix for each thing that is
sparse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import losses
from sae.kernels import moments, pursuit
from sae.kernels.base import Change, Codes, Decoded, DenseCodes, DenseStep, Scalar, Scores, State
from sae.kernels.precision import Precision
from sae.optim import BETA1, BETA2, EPSILON, Now


class Plan(NamedTuple):
    """Codes (level after level) and their gradients as matrices, and in how many samples each latent fires."""

    codes: Float[Tensor, "levels_x_batch d_sae"]
    gradients: Float[Tensor, "batch d_sae"]
    firing: Int[Tensor, " d_sae"]

    @property
    def n_codes(self) -> Tensor:
        """How many fire, in all."""
        return self.firing.sum()


class Reference:
    """The obvious version."""

    name = "reference"
    precision: Precision = "fp32"
    cut = 0.0

    def refresh(self, state: State) -> None:
        if not state.unit_norm:
            state.norms.copy_(state.W_dec.norm(dim=1))

    def centre(self, x: Tensor, unit: float, b_dec: Tensor) -> Tensor:
        return x.to(b_dec.dtype) / unit - b_dec

    def scores(self, x: Tensor, state: State) -> Scores:
        return Scores(x, state.encoder, state.b_enc, lambda rows: x[rows] @ state.encoder.T)

    def top_k(self, scores: Scores, k: int) -> Codes:
        values, latents = scores.pre_latents().topk(k, dim=1, sorted=False)
        offsets = torch.arange(len(values) + 1, device=values.device) * k
        return Codes(offsets, latents.flatten(), values.relu().flatten())

    def batch_top_k(self, scores: Scores, n: int) -> Codes | None:
        pre = scores.pre_latents()
        cut = pre.flatten().topk(min(n, pre.numel())).values[-1]
        return _where(pre * ((pre >= cut) & (pre > 0)))

    def positive(self, scores: Scores, capacity: int) -> Codes | None:
        pre = scores.pre_latents().relu()
        return None if int((pre > 0).sum()) > capacity else _where(pre)

    def pursue(self, x: Tensor, W_dec: Tensor, k: int) -> Codes:
        return pursuit.by_products(x, W_dec, k)

    def unroll(self, codes: Codes, decoded: Decoded, x: Tensor, state: State) -> Any:
        return pursuit.unroll(codes, decoded, x, state)

    def decode(self, codes: Codes, state: State, target: Tensor, cost: Scalar) -> Decoded:
        d_sae, norms, weights = len(state.W_dec), _norms(state), codes.weights
        levels = torch.zeros_like(codes.latents) if codes.levels is None else codes.levels
        readings = [dense(codes._replace(values=codes.values * (levels <= n)), d_sae) for n in range(len(weights))]
        residuals = torch.stack([z @ state.W_dec - target for z in readings])
        squares = residuals.square().sum(dim=2)
        shares = residuals.new_tensor(weights)
        own = 2 / len(target) * shares[:, None, None] * residuals
        gradient = torch.cat([own[:-1] + own[-1:], own[-1:]]) if codes.detached else own.flip(0).cumsum(0).flip(0)
        code_gradients = gradient @ state.W_dec.T + cost * norms
        gathered = code_gradients[levels.long(), rows_of(codes), codes.latents.long()]
        if codes.pre_latents is None:
            gathered = gathered * (codes.values > 0)
        return Decoded(squares[codes.reading], shares @ squares, readings[-1] @ norms, gradient.flatten(0, 1), gathered)

    def invert(self, codes: Codes, code_gradients: Tensor, d_sae: int) -> Any:
        z = dense(codes, d_sae)
        rows = rows_of(codes) if codes.levels is None else codes.levels.long() * len(z) + rows_of(codes)
        by_level = z.new_zeros(len(codes.weights) * len(z), d_sae)
        by_level.index_put_((rows, codes.latents.long()), codes.values, accumulate=True)
        return Plan(by_level, dense(codes._replace(values=code_gradients), d_sae), (z > 0).sum(dim=0))

    def by_latent(self, latents: Tensor, values: Tensor, d_sae: int) -> Tensor:
        return values.new_zeros(d_sae).index_add_(0, latents, values)

    def relu(self, x: Tensor, state: State) -> DenseCodes:
        z = self.scores(x, state).pre_latents().relu()
        return DenseCodes(z, (z > 0).sum(dim=0), z @ _norms(state))

    def relu_backward(self, gradient: Tensor, codes: DenseCodes, state: State, cost: Scalar) -> tuple[Tensor, Tensor]:
        masked = (gradient + cost * _norms(state)) * (codes.values > 0)
        return masked, masked.sum(dim=0)

    def dense_step(self, x: Tensor, state: State, target: Tensor, cost: Scalar) -> DenseStep | None:
        return None

    def aux_k(
        self, gradient: Tensor, x: Tensor, encoder: Tensor, b_enc: Tensor, W_dec: Tensor, k: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        return losses.aux_k(gradient, x, encoder, b_enc, W_dec, k)

    def update_(self, state: State, now: Now, change: Change) -> None:
        x, gradient, plan, extra, firing, cost, pull, n_samples = change
        rows, sums, fires = self.gradient_rows(state, x, gradient, plan)
        fires = firing if firing is not None else fires
        if extra is not None:
            latents = torch.arange(len(state.b_enc), device=x.device) if extra.latents is None else extra.latents
            for total, part in zip(rows, extra[1:], strict=True):
                total.index_add_(0, latents, part)
        g_encoder, g_decoder, g_bias = rows
        if state.unit_norm:
            g_decoder -= (g_decoder * state.W_dec).sum(dim=1, keepdim=True) * state.W_dec
        else:
            along = cost * sums if pull is None else cost * sums + pull
            g_decoder += (along / state.norms.clamp_min(1e-12))[:, None] * state.W_dec
        g_b_dec = gradient[: len(x)].sum(dim=0)
        if state.tied:
            g_b_dec -= g_bias @ state.encoder
        self.adam_(state, now, {"encoder": g_encoder, "W_dec": g_decoder, "b_enc": g_bias, "b_dec": g_b_dec})
        if state.unit_norm:
            state.W_dec.div_(state.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))
        self.refresh(state)
        state.silent_samples.add_(len(x) if n_samples is None else n_samples).masked_fill_(fires > 0, 0)
        state.window_firing.add_(fires)

    def gradient_rows(
        self, state: State, x: Tensor, gradient: Tensor, plan: Any
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        if plan is None:
            zero = torch.zeros_like(state.b_enc)
            return (torch.zeros_like(state.encoder), torch.zeros_like(state.W_dec), zero.clone()), zero, zero.long()
        g_bias = plan.gradients.sum(dim=0)
        return (plan.gradients.T @ x, plan.codes.T @ gradient, g_bias), plan.codes.sum(dim=0), plan.firing

    def adam_(self, state: State, now: Now, gradients: dict[str, Tensor]) -> None:
        """Adam (Kingma & Ba 2015) with bias correction."""
        for name, weight in state.weights():
            for rows, m, v in moments.opened(state, name, now):
                g = gradients[name][rows]
                m.copy_(BETA1 * m + (1 - BETA1) * g)
                v.copy_(BETA2 * v + (1 - BETA2) * g * g)
                weight[rows].sub_(now.rate * (m / now.correction1) / ((v / now.correction2).sqrt() + EPSILON))


def rows_of(codes: Codes) -> Int[Tensor, " slots"]:
    """The sample that each slot belongs to."""
    rows = torch.arange(len(codes.offsets) - 1, device=codes.values.device)
    return rows.repeat_interleave(codes.offsets.diff(), output_size=len(codes.values))  # the size: no device is asked


def dense(codes: Codes, d_sae: int) -> Float[Tensor, "batch d_sae"]:
    """The codes (or anything that has one value a slot) as a matrix."""
    matrix = codes.values.new_zeros(len(codes.offsets) - 1, d_sae)
    return matrix.index_put_((rows_of(codes), codes.latents.long()), codes.values, accumulate=True)


def _where(values: Float[Tensor, "batch d_sae"]) -> Codes:
    rows, latents = values.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(values))
    return Codes(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), latents, values[rows, latents])


def _norms(state: State) -> Float[Tensor, " d_sae"]:
    return torch.ones_like(state.b_enc) if state.charged_norms is None else state.charged_norms
