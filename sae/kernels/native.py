"""The stages of a training step on a CPU in C, from `native.c`: decoder, gradients and update, behind `selection`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import losses
from sae.kernels import base, pursuit
from sae.kernels.base import Change, Codes, Decoded, DenseCodes, DenseStep, Rows, Scalar, State, blocks
from sae.kernels.plain import rows_of_plan
from sae.kernels.reference import Reference
from sae.kernels.selection import Selection
from sae.kernels.small import is_small, relu_step
from sae.optim import BETA1, BETA2, EPSILON, Now

# As in native_amx_dense.h: samples of a chunk.
DENSE_ROWS = 128
# Latents whose contributions to b_dec one thread sums, in order.
BLOCK = 64


class Plan(NamedTuple):
    """The codes in the order of latents: latent j owns the entries from offsets[j] to offsets[j + 1].

    `rows` are those of x, `decoder_rows` those of the gradient in x_hat, which has a block of rows for each level.
    """

    offsets: Int[Tensor, " d_sae_plus_1"]
    rows: Int[Tensor, " slots"]
    decoder_rows: Int[Tensor, " slots"]
    codes: Float[Tensor, " slots"]
    gradients: Float[Tensor, " slots"]
    n_codes: Int[Tensor, ""]


class DensePlan(NamedTuple):
    """What a dense step left for the update: addresses, to which its buffers must still belong."""

    address: Int[Tensor, " bytes"]
    n_codes: Int[Tensor, ""]


class Native(Selection):
    """The fast version for CPUs."""

    name = "native"

    # -------------------------------------------------------------------------------------- decoder, gradients

    def decode(self, codes: Codes, state: State, target: Tensor, cost: Scalar) -> Decoded:
        (batch, d_out), n_levels, codes = target.shape, len(codes.weights), _as_c(codes)
        gradient = self._buffer("gradient", (n_levels * batch, d_out))
        code_gradients = self._buffer("code_gradients", codes.values.shape)
        squares, sums = self._buffer("squares", (batch,)), self._buffer("sums", (batch,))
        shared = (
            *(int(codes.pre_latents is not None), state.W_dec, target, state.charged_norms, float(cost), 2 / batch),
            *(batch, d_out, gradient, code_gradients, squares),
        )
        if codes.levels is None:
            losses = squares
            self._call("decode", *codes[:3], *shared, sums)
        else:
            losses, weights = self._buffer("losses", (batch,)), torch.tensor(codes.weights, dtype=self.dtype)
            readings = (codes.levels, weights, n_levels, codes.reading % n_levels, int(codes.detached))
            self._call("decode_levels", *codes[:3], *readings, *shared, losses, sums)
        return Decoded(squares, losses, sums, gradient, code_gradients)

    def pursue(self, x: Tensor, W_dec: Tensor, k: int) -> Codes:
        batch, d_sae = len(x), len(W_dec)
        if not pursuit.gram_pays(batch, d_sae, k):
            return pursuit.by_products(x, W_dec, k)
        gram = torch.mm(W_dec, W_dec.T, out=self._buffer("gram", (d_sae, d_sae)))
        latents, values = self._slots("codes", batch * k)
        for rows in blocks(batch, d_sae, base.BLOCK_ENTRIES):
            part, slots = x[rows], slice(rows.start * k, rows.stop * k)
            correlations = self._buffer("scores_fp32", (len(part), d_sae))
            torch.mm(part, W_dec.T, out=correlations)
            sizes = (len(part), d_sae, x.shape[1], k)
            self._call("pursue", correlations, gram, part, W_dec, *sizes, latents[slots], values[slots])
        return Codes(torch.arange(0, batch * k + 1, k), latents, values)

    def unroll(self, codes: Codes, decoded: Decoded, x: Tensor, state: State) -> pursuit.Unrolled:
        (batch, d), codes = x.shape, _as_c(codes)
        k = len(codes.values) // batch
        gradient = self._buffer("unrolled", ((k + 1) * batch, d))
        fires = self._buffer("fires", codes.values.shape)
        flows = (codes.levels, decoded.code_gradients, decoded.gradient)
        self._call("unroll", *codes[1:3], *flows, x, state.W_dec, int(state.tied), batch, d, k, gradient, fires)
        return pursuit.Unrolled(gradient, pursuit.stepped(codes, fires, k))

    def invert(self, codes: Codes, code_gradients: Tensor, d_sae: int) -> Plan:
        n, batch, codes = codes.values.shape[0], codes.offsets.shape[0] - 1, _as_c(codes)
        offsets = self._buffer("latent_offsets", (d_sae + 1,), torch.int32)
        rows, values = self._slots("plan", n)
        gradients = self._buffer("plan_gradients", (n,))
        decoder_rows = rows if codes.levels is None else self._buffer("plan_decoder_rows", (n,), torch.int32)
        counts = self._buffer("thread_counts", (torch.get_num_threads(), d_sae), torch.int32)
        given = (*codes[:3], code_gradients, codes.levels, batch, d_sae, counts)
        fired = self._call("invert", *given, offsets, rows, decoder_rows, values, gradients)
        return Plan(offsets, rows, decoder_rows, values, gradients, torch.tensor(fired))

    def by_latent(self, latents: Tensor, values: Tensor, d_sae: int) -> Tensor:
        return values.new_zeros(d_sae).index_add_(0, latents, values)

    def relu(self, x: Tensor, state: State) -> DenseCodes:
        batch, d_sae = len(x), len(state.b_enc)
        z = torch.mm(x, state.encoder.T, out=self._buffer("scores_fp32", (batch, d_sae)))
        counts = self._buffer("thread_counts", (torch.get_num_threads(), d_sae), torch.int32)
        firing, sums = self._buffer("firing", (d_sae,), torch.int32), self._buffer("sums", (batch,))
        self._call("relu_", z, state.b_enc, state.charged_norms, batch, d_sae, counts, firing, sums)
        return DenseCodes(z, firing, sums)

    def relu_backward(self, gradient: Tensor, codes: DenseCodes, state: State, cost: Scalar) -> tuple[Tensor, Tensor]:
        batch, d_sae = gradient.shape
        blocks = self._buffer("relu_blocks", (-(-batch // 64), d_sae))
        bias_gradient = self._buffer("bias_gradient", (d_sae,))
        norms = state.charged_norms
        self._call("relu_backward_", gradient, codes.values, norms, float(cost), batch, d_sae, blocks, bias_gradient)
        return gradient, bias_gradient

    def dense_step(self, x: Tensor, state: State, target: Tensor, cost: Scalar) -> DenseStep | None:
        if target is not x:
            return None
        if self._tiles:
            return self._dense_step_of_tiles(x, state, float(cost))
        if self.precision == "bf16" or not is_small(state.encoder):
            return None
        gradient, firing = self._buffer("gradient", x.shape), self._buffer("firing", state.b_enc.shape, torch.int32)
        given = ((state.encoder, state.b_enc, state.W_dec), state.charged_norms, float(cost), 0, gradient, firing)
        rows, totals = relu_step(self._call, self._buffer, "dense", x, None, *given)
        return DenseStep(Rows(None, *rows), gradient, firing, totals[0], totals[1])

    def _dense_step_of_tiles(self, x: Tensor, state: State, cost: float) -> DenseStep:
        (batch, d_in), d_sae, buffer = x.shape, len(state.b_enc), self._buffer
        gradient, firing = buffer("gradient", x.shape), buffer("firing", (d_sae,), torch.int32)
        scratch = buffer("dense_tiles", (self._call("dense_scratch", batch, d_sae, d_in),), torch.bfloat16)
        n_chunks = -(-batch // DENSE_ROWS)
        sums, squares = buffer("dense_sums", (n_chunks, 2, d_sae)), buffer("squares_64", (n_chunks,), torch.float64)
        plan, totals = buffer("dense_plan", (256,), torch.uint8), buffer("totals", (2,))
        given = (x, self._encoder_tiles(state), state.b_enc, state.W_dec, state.charged_norms, cost, 2 / batch)
        filled = (scratch, sums, squares, gradient, firing, totals, plan)
        self._call("dense_step", *given, batch, d_sae, d_in, *filled)
        return DenseStep(None, gradient, firing, totals[0], totals[1], DensePlan(plan, firing.sum()))

    def gradient_rows(
        self, state: State, x: Tensor, gradient: Tensor, plan: Plan | DensePlan | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        if plan is None:
            return Reference().gradient_rows(state, x, gradient, None)
        if isinstance(plan, Plan):
            return rows_of_plan(state, x, gradient, plan, int(plan.offsets[-1]))
        rows = torch.empty_like(state.encoder), torch.empty_like(state.W_dec), torch.empty_like(state.b_enc)
        sums, fires = torch.empty_like(state.b_enc), torch.empty_like(state.b_enc)
        self._call("dense_gradients", plan.address, *rows, sums, fires)
        return rows, sums, fires.long()

    def aux_k(
        self, gradient: Tensor, x: Tensor, encoder: Tensor, b_enc: Tensor, W_dec: Tensor, k: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        if not is_small(encoder) or encoder.shape != W_dec.shape:
            return losses.aux_k(gradient, x, encoder, b_enc, W_dec, k)
        firing = self._buffer("aux_firing", b_enc.shape, torch.int32)
        given = ((encoder, b_enc, W_dec), None, 0.0, k, None, firing)
        rows, totals = relu_step(self._call, self._buffer, "aux", x, gradient, *given)
        return totals[0] / x.shape[0], rows

    # -------------------------------------------------------------------------------------------------- update

    def update_(self, state: State, now: Now, change: Change) -> None:
        x, gradient, plan, extra, firing, cost, pull, n_samples = change
        batch, d_in = x.shape
        d_sae, d_out = state.W_dec.shape
        adam = (*map(float, now[:3]), BETA1, 1 - BETA1, BETA2, 1 - BETA2, EPSILON)
        blocks = self._buffer("blocks", (-(-d_sae // BLOCK), d_in)) if state.tied else None
        extra_of, extra_latents, n_extra = None, None, 0
        if extra is not None and extra.latents is not None:
            extra_of, n_extra = self._buffer("extra_of", (d_sae,), torch.int32), extra.latents.shape[0]
            extra_latents = extra.latents.to(torch.int64)
        if firing is not None:
            firing = firing.to(torch.int32)
        first, second, kept = state.first, state.second, self._buffer.kept
        self._call(
            "update",
            *(d_sae, d_in, d_out, BLOCK),
            *(plan[:-1] if isinstance(plan, Plan) else [None] * 5),
            *(x, gradient, plan.address if isinstance(plan, DensePlan) else None, extra_of, extra_latents, n_extra),
            *([t.contiguous() for t in extra[1:]] if extra else (None, None, None)),
            *(*adam, int(state.unit_norm), float(cost), pull),
            *(state.encoder, first.get("encoder"), second.get("encoder"), state.scales.get("encoder")),
            *(state.W_dec, first["W_dec"], second["W_dec"], state.scales.get("W_dec"), int(now.step)),
            *(state.b_enc, first["b_enc"], second["b_enc"]),
            *(kept.get("encoder_rounded"), kept.get("encoder_tiles"), state.norms, kept.get("encoder_norms")),
            *(state.silent_samples, state.window_firing, firing, n_samples or batch, blocks),
        )
        moments = (first["b_dec"], second["b_dec"])
        n_blocks = 0 if blocks is None else blocks.shape[0]
        self._call("update_b_dec", gradient, blocks, batch, n_blocks, d_out, *adam, state.b_dec, *moments)


def _as_c(codes: Codes) -> Codes:
    """In the types of native.c; its own codes have them already."""
    own = codes.offsets.dtype == torch.int64 and codes.latents.dtype == torch.int32
    if own and codes.levels is None and codes.values.is_contiguous():
        return codes
    levels = None if codes.levels is None else codes.levels.to(torch.int32)
    return codes._replace(
        offsets=codes.offsets.to(torch.int64),
        latents=codes.latents.to(torch.int32),
        values=codes.values.contiguous(),
        levels=levels,
    )
