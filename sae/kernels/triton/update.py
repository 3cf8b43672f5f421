"""The row-owner update: one visit to each latent's rows does all that changes them.

Both weight gradients are summed over the latent's codes, the decoder's is projected, Adam moves the rows, the decoder
row gets norm 1 again, the encoder's rounded copy is written, and counters count. A program owns a few latents, one
after the other, and sums what they give b_dec; no two programs write the same memory.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.base import Buffers, Change, State
from sae.kernels.triton.index import Plan, at_once, gather, sum_chunks
from sae.kernels.triton.launch import power, warps
from sae.kernels.triton.moments import keep, moments_of, read
from sae.optim import BETA1, BETA2, EPSILON

B1, B2, EPS = tl.constexpr(BETA1), tl.constexpr(BETA2), tl.constexpr(EPSILON)
# Below this norm a decoder row has no direction.
LEAST_NORM = tl.constexpr(1e-12)
# Latents that a program owns, where there are enough of them to give each processor programs.
GROUP, MIN_PROGRAMS = 8, 1024


@triton.jit
@no_type_check
def adam(weight, gradient, first, second, rate, correction1, correction2):
    """The weight and its moments after a step, as `sae.optim.adam_` has them."""
    first = B1 * first + (1 - B1) * gradient
    second = B2 * second + (1 - B2) * gradient * gradient
    return weight - rate * (first / correction1) / (tl.sqrt(second / correction2) + EPS), first, second


@triton.jit
@no_type_check
def summed(
    j,
    offsets,
    rows,
    decoder_rows,
    codes,
    through,
    chunks_encoder,
    chunks_decoder,
    chunks_scalars,
    x,
    gradient,
    d_in,
    d_out,
    CHUNK: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    K: tl.constexpr,
):
    """What latent j's entries give its encoder row, decoder row and bias, and the sum of its codes."""
    inputs, outputs = tl.arange(0, D_IN), tl.arange(0, D_OUT)
    g_encoder, g_decoder = tl.zeros([D_IN], tl.float32), tl.zeros([D_OUT], tl.float32)
    g_bias, codes_sum = 0.0, 0.0
    begin, end = tl.load(offsets + j).to(tl.int64), tl.load(offsets + j + 1).to(tl.int64)
    # Whole chunks between `one` and `two` are summed already.
    one, two = (begin + CHUNK - 1) // CHUNK, end // CHUNK
    before = tl.where(one < two, one * CHUNK, end)
    after = tl.where(one < two, two * CHUNK, end)
    g_encoder, g_decoder, g_bias, codes_sum = gather(
        *(begin, before, rows, decoder_rows, codes, through, x, gradient, d_in, d_out),
        *(g_encoder, g_decoder, g_bias, codes_sum, D_IN, D_OUT, K),
    )
    for chunk in range(one, two):
        g_encoder += tl.load(chunks_encoder + chunk * d_in + inputs, mask=inputs < d_in, other=0.0)
        g_decoder += tl.load(chunks_decoder + chunk * d_out + outputs, mask=outputs < d_out, other=0.0)
        g_bias += tl.load(chunks_scalars + 2 * chunk)
        codes_sum += tl.load(chunks_scalars + 2 * chunk + 1)
    return gather(
        *(after, end, rows, decoder_rows, codes, through, x, gradient, d_in, d_out),
        *(g_encoder, g_decoder, g_bias, codes_sum, D_IN, D_OUT, K),
    )


@triton.jit
@no_type_check
def _gradient_rows(
    offsets,
    rows,
    decoder_rows,
    codes,
    through,
    chunks_encoder,
    chunks_decoder,
    chunks_scalars,
    x,
    gradient,
    of_encoder,
    of_decoder,
    of_bias,
    sums,
    d_in,
    d_out,
    CHUNK: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    K: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64)
    inputs, outputs = tl.arange(0, D_IN), tl.arange(0, D_OUT)
    g_encoder, g_decoder, g_bias, codes_sum = summed(
        *(j, offsets, rows, decoder_rows, codes, through, chunks_encoder, chunks_decoder, chunks_scalars),
        *(x, gradient, d_in, d_out, CHUNK, D_IN, D_OUT, K),
    )
    tl.store(of_encoder + j * d_in + inputs, g_encoder, mask=inputs < d_in)
    tl.store(of_decoder + j * d_out + outputs, g_decoder, mask=outputs < d_out)
    tl.store(of_bias + j, g_bias)
    tl.store(sums + j, codes_sum)


@triton.jit
@no_type_check
def _update(
    offsets,
    rows,
    decoder_rows,
    codes,
    through,
    chunks_encoder,
    chunks_decoder,
    chunks_scalars,
    x,
    gradient,
    extra_of,
    extra_encoder,
    extra_decoder,
    extra_bias,
    now,
    cost,
    pull,
    encoder,
    encoder_first,
    encoder_second,
    encoder_scales,
    W_dec,
    W_dec_first,
    W_dec_second,
    W_dec_scales,
    b_enc,
    b_enc_first,
    b_enc_second,
    rounded,
    norms,
    silent,
    window,
    firing,
    to_b_dec,
    batch,
    d_in,
    d_out,
    d_sae,
    PLANNED: tl.constexpr,
    EXTRA: tl.constexpr,
    PULL: tl.constexpr,
    COUNTED: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    ENCODER: tl.constexpr,
    ROUNDED: tl.constexpr,
    TIED: tl.constexpr,
    SMALL: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    K: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    inputs, outputs = tl.arange(0, D_IN), tl.arange(0, D_OUT)
    has_in, has_out = inputs < d_in, outputs < d_out
    rate, correction1, correction2 = tl.load(now), tl.load(now + 1), tl.load(now + 2)
    price, step = tl.load(cost), tl.load(now + 3).to(tl.uint32)
    of_b_dec = tl.zeros([D_IN], tl.float32)
    # j is an int64, as everything that a place is computed from must be.
    for j in range(program * GROUP, tl.minimum(program * GROUP + GROUP, d_sae)):
        # Loads stand as early as registers allow: memory answers while other things are summed.
        at = j * d_out + outputs
        row = tl.load(W_dec + at, mask=has_out, other=0.0)
        first, second = read(W_dec_first, W_dec_second, W_dec_scales, j, at, has_out, SMALL)
        g_encoder, g_decoder = tl.zeros([D_IN], tl.float32), tl.zeros([D_OUT], tl.float32)
        g_bias, codes_sum = 0.0, 0.0
        if PLANNED:
            g_encoder, g_decoder, g_bias, codes_sum = summed(
                *(j, offsets, rows, decoder_rows, codes, through, chunks_encoder, chunks_decoder, chunks_scalars),
                *(x, gradient, d_in, d_out, CHUNK, D_IN, D_OUT, K),
            )
        if EXTRA:
            place = tl.load(extra_of + j)
            given = place < d_sae
            g_encoder += tl.load(extra_encoder + place * d_in + inputs, mask=has_in & given, other=0.0)
            g_decoder += tl.load(extra_decoder + place * d_out + outputs, mask=has_out & given, other=0.0)
            g_bias += tl.load(extra_bias + place, mask=given, other=0.0)

        if ENCODER:
            at_in = j * d_in + inputs
            row_in = tl.load(encoder + at_in, mask=has_in, other=0.0)
            first_in, second_in = read(encoder_first, encoder_second, encoder_scales, j, at_in, has_in, SMALL)
        if UNIT_NORM:
            g_decoder -= tl.sum(g_decoder * row, axis=0) * row
        else:
            along = price * codes_sum
            if PULL:
                along += tl.load(pull + j)
            g_decoder += along / tl.maximum(tl.load(norms + j), LEAST_NORM) * row
        row, first, second = adam(row, g_decoder, first, second, rate, correction1, correction2)
        norm = tl.sqrt(tl.sum(row * row, axis=0))
        if UNIT_NORM:
            row = row / tl.maximum(norm, LEAST_NORM)
        else:
            tl.store(norms + j, norm)
        tl.store(W_dec + at, row, mask=has_out)
        keep(W_dec_first, W_dec_second, W_dec_scales, j, at, has_out, first, second, 2 * step, SMALL)

        if ENCODER:
            if TIED:
                of_b_dec += g_bias * row_in
            row, first, second = adam(row_in, g_encoder, first_in, second_in, rate, correction1, correction2)
            tl.store(encoder + at_in, row, mask=has_in)
            keep(encoder_first, encoder_second, encoder_scales, j, at_in, has_in, first, second, 2 * step + 1, SMALL)
            if ROUNDED:
                tl.store(rounded + at_in, row.to(rounded.dtype.element_ty), mask=has_in)

        bias, first, second = tl.load(b_enc + j), tl.load(b_enc_first + j), tl.load(b_enc_second + j)
        bias, first, second = adam(bias, g_bias, first, second, rate, correction1, correction2)
        tl.store(b_enc + j, bias)
        tl.store(b_enc_first + j, first)
        tl.store(b_enc_second + j, second)

        fires = tl.load(firing + j) if COUNTED else 0
        tl.store(silent + j, tl.where(fires > 0, 0, tl.load(silent + j) + batch))
        tl.store(window + j, tl.load(window + j) + fires)
    if TIED:
        tl.store(to_b_dec + program * d_in + inputs, of_b_dec, mask=has_in)


def gradient_rows(
    plan: Plan, x: Float[Tensor, "batch d_in"], gradient: Float[Tensor, "rows d_out"], d_sae: int, buffer: Buffers
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Gradients of encoder, decoder and bias from the codes, and the sum of each latent's codes; in new memory."""
    d_in, d_out = x.shape[1], gradient.shape[1]
    out = [x.new_empty(d_sae, d_in), x.new_empty(d_sae, d_out), x.new_empty(d_sae), x.new_empty(d_sae)]
    chunks, entries = sum_chunks(plan, x, gradient, d_sae, buffer), at_once(d_in, d_out)
    _gradient_rows[(d_sae,)](
        *(plan.offsets, *plan[2:6], *chunks[1:], x, gradient, *out, d_in, d_out),
        CHUNK=chunks.size,
        D_IN=power(d_in),
        D_OUT=power(d_out),
        K=entries,
        num_warps=warps(power(max(d_in, d_out)) * entries),
    )
    g_encoder, g_decoder, g_bias, sums = out
    return (g_encoder, g_decoder, g_bias), sums


def update_rows(
    state: State,
    now: Float[Tensor, "4"],
    change: Change,
    rounded: Float[Tensor, "d_sae d_in"] | None,
    buffer: Buffers,
) -> Float[Tensor, " d_in"] | None:
    """Changes all but b_dec; returns what the encoder sends back to b_dec, sum_j g_bias_j W_enc_j, where it is tied.

    `now` has the learning rate, both of Adam's corrections and the number of the step. The change's cost is on the
    device, and it says the number of samples.
    """
    x, gradient, plan, extra, firing, cost, pull, n_samples = change
    (d_sae, d_out), d_in = state.W_dec.shape, x.shape[1]
    own = "encoder" in state.first  # else it is W_dec
    group = min(power(triton.cdiv(d_sae, MIN_PROGRAMS)), GROUP)
    n_programs = triton.cdiv(d_sae, group)
    to_b_dec = buffer("to_b_dec", (n_programs, d_in)) if state.tied else None
    chunks = None if plan is None else sum_chunks(plan, x, gradient, d_sae, buffer)
    extra_of = None if extra is None else _places(extra.latents, d_sae, buffer)
    fires = firing if firing is not None or plan is None else plan.firing
    entries = at_once(d_in, d_out)
    nothing = x  # in place of what is not there, and not read

    def or_nothing(*tensors: Tensor | None) -> list[Tensor]:
        return [nothing if tensor is None else tensor for tensor in tensors]

    _update[(n_programs,)](
        *or_nothing(*((None,) * 5 if plan is None else (plan.offsets, *plan[2:6]))),
        *or_nothing(*((None,) * 3 if chunks is None else chunks[1:])),
        *(x, gradient),
        *or_nothing(extra_of, *((None,) * 3 if extra is None else (part.contiguous() for part in extra[1:]))),
        *(now, cost, nothing if pull is None else pull),
        *or_nothing(state.encoder, *moments_of(state, "encoder"), state.W_dec, *moments_of(state, "W_dec")),
        *(state.b_enc, state.first["b_enc"], state.second["b_enc"]),
        *or_nothing(rounded, state.norms),
        *(state.silent_samples, state.window_firing),
        *or_nothing(fires, to_b_dec),
        *(n_samples, d_in, d_out, d_sae),
        PLANNED=plan is not None,
        EXTRA=extra is not None,
        PULL=pull is not None,
        COUNTED=fires is not None,
        UNIT_NORM=state.unit_norm,
        ENCODER=own,
        ROUNDED=rounded is not None,
        TIED=to_b_dec is not None,
        SMALL=bool(state.scales),
        CHUNK=chunks.size if chunks is not None else 1,
        GROUP=group,
        D_IN=power(d_in),
        D_OUT=power(d_out),
        K=entries,
        num_warps=warps(power(max(d_in, d_out)) * entries),
    )
    return None if to_b_dec is None else to_b_dec.sum(dim=0)


def _places(latents: Int[Tensor, " n"] | None, d_sae: int, buffer: Buffers) -> Int[Tensor, " d_sae"]:
    """Where each latent stands in a list (of all where there is none), d_sae where it does not. Of one that stands
    there twice, the first place: what a list is filled up with comes last, and has no gradient."""
    places = buffer("places", (d_sae,), torch.int64)
    if latents is None:
        return torch.arange(d_sae, out=places)
    numbers = torch.arange(len(latents), device=latents.device)
    return places.fill_(d_sae).scatter_reduce_(0, latents, numbers, "amin")
