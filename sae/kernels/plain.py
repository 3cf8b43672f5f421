"""The stages of a training step in torch operations: sparse where it pays, on any device, without a compiler.

Where the host would have to wait for a GPU (to learn how many codes there are), slots stay empty or codes stay dense.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import flat_nonzero, kth_largest
from sae.kernels import moments, pursuit
from sae.kernels.base import Codes, Decoded, Scalar, Scores, State, host_sees
from sae.kernels.precision import Precision
from sae.kernels.reference import Reference, rows_of
from sae.optim import Now, adam_


class Plan(NamedTuple):
    """The codes in the order of latents: latent j owns the entries from offsets[j] to offsets[j + 1].

    `rows` are those of x, `decoder_rows` those of the gradient in x_hat, which has a block of rows for each level.
    """

    offsets: Int[Tensor, " d_sae_plus_1"]
    rows: Int[Tensor, " slots"]
    decoder_rows: Int[Tensor, " slots"]
    codes: Float[Tensor, " slots"]
    gradients: Float[Tensor, " slots"]
    firing: Int[Tensor, " d_sae"]

    @property
    def n_codes(self) -> Tensor:
        """How many fire, in all."""
        return self.firing.sum()


class Plain(Reference):
    """Sparse decoding and sparse gradients by `embedding_bag`."""

    name = "torch"

    def __init__(self, precision: Precision) -> None:
        self.precision = precision

    def scores(self, x: Tensor, state: State) -> Scores:
        if self.precision == "fp32":
            return super().scores(x, state)
        x_rounded, encoder_rounded = x.bfloat16(), state.encoder.bfloat16()
        return Scores(x, state.encoder, state.b_enc, lambda rows: x_rounded[rows] @ encoder_rounded.T)

    def batch_top_k(self, scores: Scores, n: int) -> Codes | None:
        pre = scores.pre_latents()
        if not host_sees(pre):
            return _largest(pre, n)
        cut = kth_largest(rearrange(pre, "b f -> (b f)"), min(n, pre.numel()))
        return _where(pre, pre >= cut.clamp_min(torch.finfo(pre.dtype).tiny))

    def positive(self, scores: Scores, capacity: int) -> Codes | None:
        if not host_sees(scores.x):
            return None  # how many fire is not known without asking the device
        pre = scores.pre_latents()
        codes = _where(pre, pre > 0)
        return codes if len(codes.values) <= capacity else None

    def pursue(self, x: Tensor, W_dec: Tensor, k: int) -> Codes:
        pays = pursuit.gram_pays(len(x), len(W_dec), k)
        return (pursuit.by_gram if pays else pursuit.by_products)(x, W_dec, k)

    def decode(self, codes: Codes, state: State, target: Tensor, cost: Scalar) -> Decoded:
        weights = codes.weights
        by_level = [_of_level(codes.values, codes, level) for level in range(len(weights))]
        parts = [_bags(codes.latents, state.W_dec, codes.offsets, values) for values in by_level]
        parts[0] = parts[0] - target
        residuals = list(accumulate(parts))
        charged = [r * (2 / len(target) * w) for r, w in zip(residuals, weights, strict=True)]
        if codes.detached:
            gradients = [*(own + charged[-1] for own in charged[:-1]), charged[-1]]
        else:
            gradients = list(accumulate(reversed(charged)))[::-1]
        norms = torch.ones_like(codes.values) if state.charged_norms is None else state.charged_norms[codes.latents]
        code_gradients = cost * norms
        for level, gradient in enumerate(gradients):
            code_gradients += _of_level(_along_rows(codes, state.W_dec, gradient), codes, level)
        if codes.pre_latents is None:
            code_gradients = code_gradients.masked_fill(codes.values <= 0, 0)
        squares = [r.square().sum(dim=1) for r in residuals]
        losses = torch.stack([w * square for w, square in zip(weights, squares, strict=True)]).sum(dim=0)
        sums = target.new_zeros(len(target)).index_add_(0, rows_of(codes), codes.values * norms)
        return Decoded(squares[codes.reading], losses, sums, torch.cat(gradients), code_gradients)

    def invert(self, codes: Codes, code_gradients: Tensor, d_sae: int) -> Any:
        order = _stable_order(codes.latents, d_sae)
        fires = (codes.values > 0).long()
        firing = torch.zeros(d_sae, dtype=torch.int64, device=fires.device).index_add_(0, codes.latents, fires)
        slots = torch.zeros_like(firing).index_add_(0, codes.latents, torch.ones_like(fires))
        offsets = F.pad(slots.cumsum(0), (1, 0))
        rows = rows_of(codes)
        decoder_rows = rows if codes.levels is None else codes.levels * (len(codes.offsets) - 1) + rows
        given = (rows[order], decoder_rows[order], codes.values[order], code_gradients[order])
        return Plan(offsets, *given, firing)

    def gradient_rows(
        self, state: State, x: Tensor, gradient: Tensor, plan: Any
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        if plan is None:
            return super().gradient_rows(state, x, gradient, None)
        return rows_of_plan(state, x, gradient, plan, len(plan.rows))

    def adam_(self, state: State, now: Now, gradients: dict[str, Tensor]) -> None:
        for name, weight in state.weights():
            for rows, first, second in moments.opened(state, name, now):
                adam_(weight[rows], gradients[name][rows], first, second, now)


def rows_of_plan(
    state: State, x: Tensor, gradient: Tensor, plan: Any, n: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """`Reference.gradient_rows` of any kernels' plan whose first n entries have owners."""
    d_sae = len(state.b_enc)
    owners = torch.repeat_interleave(torch.arange(d_sae, device=x.device), plan.offsets.diff(), output_size=n)
    codes, through, rows, decoder_rows = (
        part[:n] for part in (plan.codes, plan.gradients, plan.rows, plan.decoder_rows)
    )
    given = (codes, through, (codes > 0).to(x.dtype))
    sums, g_bias, firing = (x.new_zeros(d_sae).index_add_(0, owners, values) for values in given)
    offsets = plan.offsets.to(rows.dtype)
    g_encoder, g_decoder = _bags(rows, x, offsets, through), _bags(decoder_rows, gradient, offsets, codes)
    return (g_encoder, g_decoder, g_bias), sums, firing.long()


def _largest(pre: Float[Tensor, "batch d_sae"], n: int) -> Codes:
    """The n largest, those that are positive, in n slots whatever they are: no size depends on the data."""
    values, positions = pre.flatten().topk(min(n, pre.numel()), sorted=False)
    positions, order = positions.sort()
    rows = torch.arange(len(pre) + 1, device=pre.device) * pre.shape[1]
    return Codes(torch.searchsorted(positions, rows), positions % pre.shape[1], values[order].relu())


def _where(values: Tensor, fires: Tensor) -> Codes:
    positions = flat_nonzero(fires)
    rows = positions // fires.shape[1]
    counts = torch.bincount(rows, minlength=len(fires))
    return Codes(F.pad(counts.cumsum(0), (1, 0)), positions - rows * fires.shape[1], values.flatten()[positions])


def _bags(indices: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _along_rows(codes: Codes, W_dec: Tensor, gradient: Tensor) -> Tensor:
    """gradient[row of slot] . W_dec[latent of slot]: a weighted bag's gradient in its weights."""
    weights = codes.values.clone().requires_grad_()
    with torch.enable_grad():
        _bags(codes.latents, W_dec, codes.offsets, weights).backward(gradient)
    assert weights.grad is not None
    return weights.grad


def _of_level(values: Tensor, codes: Codes, level: int) -> Tensor:
    """The values of the slots of one level, 0 in the others."""
    return values if codes.levels is None else values * (codes.levels == level)


def _stable_order(latents: Int[Tensor, " n"], d_sae: int) -> Int[Tensor, " n"]:
    if host_sees(latents) and d_sae <= 2**15:
        # NumPy sorts 16-bit integers by radix, 15 times faster than torch sorts 64-bit ones.
        return torch.from_numpy(np.argsort(latents.numpy().astype(np.int16), kind="stable"))
    return latents.argsort(stable=True)
