"""The codes in the order of latents, without atomics: a stable sort, and sums for latents that fire often."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.kernels.base import Buffers, Codes
from sae.kernels.triton.launch import power, warps

# Entries of one latent that are summed by a program of their own, and how many such sums there may be.
CHUNK = 128
MAX_CHUNKS = 8192
# Numbers of rows that a program loads at a time.
AT_ONCE = 4096
# Rows at most: twice as many of 128 numbers do not fit in registers.
MOST_ROWS = 16
# Values of a latent that are read at a time.
BY_LATENT = 128


class Plan(NamedTuple):
    """Latent j owns the entries from offsets[j] to offsets[j + 1]; empty slots come last, and nobody owns them.

    `rows` are those of x, `decoder_rows` those of the gradient in x_hat, which has a block of rows for each level.
    """

    offsets: Int[Tensor, " d_sae_plus_1"]
    owners: Int[Tensor, " slots"]
    rows: Int[Tensor, " slots"]
    decoder_rows: Int[Tensor, " slots"]
    codes: Float[Tensor, " slots"]
    gradients: Float[Tensor, " slots"]
    firing: Int[Tensor, " d_sae"]

    @property
    def n_codes(self) -> Tensor:
        """How many fire, in all."""
        return self.firing.sum()


class Chunks(NamedTuple):
    """Sums over `size` entries each: of z g, of g_z x, of g_z and of z. Only those inside one latent's entries are
    made; its owner adds them."""

    size: int
    encoder: Float[Tensor, "n d_in"]
    W_dec: Float[Tensor, "n d_out"]
    scalars: Float[Tensor, "n 2"]


def invert(codes: Codes, code_gradients: Float[Tensor, " slots"], d_sae: int) -> Plan:
    """A slot is empty where it neither fires nor has a gradient."""
    owners, order, offsets = _sorted(codes.latents, (codes.values == 0) & (code_gradients == 0), d_sae)
    rows = _rows_of_slots(codes)
    decoder_rows = rows if codes.levels is None else codes.levels * (len(codes.offsets) - 1) + rows
    values = codes.values[order]
    fired = F.pad((values > 0).cumsum(0, dtype=torch.int32), (1, 0))
    firing = fired.index_select(0, offsets).diff().long()
    return Plan(offsets, owners, rows[order], decoder_rows[order], values, code_gradients[order], firing)


def _sorted(
    latents: Int[Tensor, " slots"], empty: Bool[Tensor, " slots"], d_sae: int
) -> tuple[Int[Tensor, " slots"], Int[Tensor, " slots"], Int[Tensor, " d_sae_plus_1"]]:
    """Latents in their order, the slots in it, and where each latent's begin; empty slots come last."""
    owners, order = torch.sort(latents.to(torch.int32).masked_fill(empty, d_sae), stable=True)
    numbers = torch.arange(d_sae + 1, dtype=torch.int32, device=owners.device)
    return owners, order, torch.searchsorted(owners, numbers, out_int32=True)


def by_latent(latents: Int[Tensor, " slots"], values: Float[Tensor, " slots"], d_sae: int) -> Float[Tensor, " d_sae"]:
    """The sum of each latent's values, in the order of slots."""
    _, order, offsets = _sorted(latents, values == 0, d_sae)
    out = values.new_empty(d_sae)
    _sum_by_latent[(d_sae,)](offsets, order, values, out, BLOCK=BY_LATENT, num_warps=warps(BY_LATENT))
    return out


@triton.jit
@no_type_check
def _sum_by_latent(offsets, order, values, out, BLOCK: tl.constexpr):
    j = tl.program_id(0)
    begin, end = tl.load(offsets + j), tl.load(offsets + j + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        slots = first + tl.arange(0, BLOCK)
        place = tl.load(order + slots, mask=slots < end, other=0)
        total += tl.load(values + place, mask=slots < end, other=0.0)
    tl.store(out + j, tl.sum(total, axis=0))


def _rows_of_slots(codes: Codes) -> Int[Tensor, " slots"]:
    """The sample of each slot; of slots that no row owns, the last."""
    slots = torch.arange(len(codes.values), device=codes.values.device)
    return torch.bucketize(slots, codes.offsets[1:-1].contiguous(), right=True)


@triton.jit
@no_type_check
def gather(
    begin,
    end,
    rows,
    decoder_rows,
    codes,
    through,
    x,
    gradient,
    d_in,
    d_out,
    of_encoder,
    of_decoder,
    of_bias,
    of_codes,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    K: tl.constexpr,
):
    """Adds what the entries from `begin` to `end` give their latent."""
    inputs, outputs = tl.arange(0, D_IN), tl.arange(0, D_OUT)
    for first in range(begin, end, K):
        entries = first + tl.arange(0, K)
        there = entries < end
        z = tl.load(codes + entries, mask=there, other=0.0)
        g_z = tl.load(through + entries, mask=there, other=0.0)
        row = tl.load(rows + entries, mask=there, other=0).to(tl.int64)
        decoder_row = tl.load(decoder_rows + entries, mask=there, other=0).to(tl.int64)
        wanted = (there & (g_z != 0))[:, None] & (inputs < d_in)[None, :]
        of_x = tl.load(x + row[:, None] * d_in + inputs[None, :], mask=wanted, other=0.0).to(tl.float32)
        of_encoder += tl.sum(g_z[:, None] * of_x, axis=0)
        wanted = (there & (z != 0))[:, None] & (outputs < d_out)[None, :]
        of_g = tl.load(gradient + decoder_row[:, None] * d_out + outputs[None, :], mask=wanted, other=0.0)
        of_decoder += tl.sum(z[:, None] * of_g, axis=0)
        of_bias += tl.sum(g_z, axis=0)
        of_codes += tl.sum(z, axis=0)
    return of_encoder, of_decoder, of_bias, of_codes


@triton.jit
@no_type_check
def _sum_chunks(
    owners,
    rows,
    decoder_rows,
    codes,
    through,
    x,
    gradient,
    sum_encoder,
    sum_decoder,
    scalars,
    d_in,
    d_out,
    d_sae,
    CHUNK: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    K: tl.constexpr,
):
    chunk = tl.program_id(0)
    begin = chunk * CHUNK
    owner = tl.load(owners + begin)
    if (owner == tl.load(owners + begin + CHUNK - 1)) & (owner < d_sae):
        of_encoder, of_decoder = tl.zeros([D_IN], tl.float32), tl.zeros([D_OUT], tl.float32)
        of_bias, of_codes = 0.0, 0.0
        of_encoder, of_decoder, of_bias, of_codes = gather(
            *(begin, begin + CHUNK, rows, decoder_rows, codes, through, x, gradient, d_in, d_out),
            *(of_encoder, of_decoder, of_bias, of_codes, D_IN, D_OUT, K),
        )
        inputs, outputs = tl.arange(0, D_IN), tl.arange(0, D_OUT)
        place = chunk.to(tl.int64)
        tl.store(sum_encoder + place * d_in + inputs, of_encoder, mask=inputs < d_in)
        tl.store(sum_decoder + place * d_out + outputs, of_decoder, mask=outputs < d_out)
        tl.store(scalars + 2 * chunk, of_bias)
        tl.store(scalars + 2 * chunk + 1, of_codes)


def at_once(d_in: int, d_out: int) -> int:
    """Entries whose rows a program loads together."""
    return max(min(AT_ONCE // power(max(d_in, d_out)), MOST_ROWS), 1)


def sum_chunks(
    plan: Plan, x: Float[Tensor, "batch d_in"], gradient: Float[Tensor, "rows d_out"], d_sae: int, buffer: Buffers
) -> Chunks:
    """The sums of all chunks that lie inside one latent's entries, so that no program has many to add alone."""
    (d_in, d_out), n = (x.shape[1], gradient.shape[1]), len(plan.owners)
    size = max(CHUNK, power(-(-n // MAX_CHUNKS)))
    n_chunks = n // size
    out = Chunks(
        size,
        buffer("chunks_encoder", (n_chunks, d_in)),
        buffer("chunks_W_dec", (n_chunks, d_out)),
        buffer("chunks_scalars", (n_chunks, 2)),
    )
    if n_chunks:
        entries = at_once(d_in, d_out)
        width = power(max(d_in, d_out)) * entries
        _sum_chunks[(n_chunks,)](
            *(*plan[1:6], x, gradient, *out[1:], d_in, d_out, d_sae),
            CHUNK=size,
            D_IN=power(d_in),
            D_OUT=power(d_out),
            K=entries,
            num_warps=warps(width),
        )
    return out
