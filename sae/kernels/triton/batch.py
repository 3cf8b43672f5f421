"""The n largest pre-latents of a whole batch (BatchTopK), in n slots that rows share: no data changes their number.

The n tiles with the largest maxima hold the n largest entries, as of these each lies in a tile whose maximum it does
not exceed; only those tiles are read again. The n-th largest of a list of keys is found by counting keys by their
highest 8 bits, then by the next 8, the next 8 and the last 7, as a histogram costs what its bins do. Counts are
integers, so that their order does not matter. Of those that tie at the cut the first are taken: exactly n are.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.base import Buffers
from sae.kernels.triton.index import at_once
from sae.kernels.triton.launch import power, warps
from sae.kernels.triton.top_k import TILES, keys_of, tile_maxima

# Bits of a key that are told apart in each pass, from the highest; the sign is always 0.
PASSES = (8, 8, 8, 7)
# Entries that a program reads at a time, and how often at most; there should be so many programs.
BLOCK = 2048
MOST_BLOCKS = 8
MIN_PROGRAMS = 1024
TILE = min(TILES)
# Where products are rounded, so many times n candidates are scored again. Of a normal distribution's tail these reach
# 2 % below the cut, which is several times what bf16 can be off by.
CANDIDATES = 1.25


class Kept(NamedTuple):
    """Row b owns the slots from offsets[b] to offsets[b + 1]; empty ones have the key 0."""

    offsets: Int[Tensor, " batch_plus_1"]
    columns: Int[Tensor, " slots"]
    keys: Int[Tensor, " slots"]

    @property
    def values(self) -> Float[Tensor, " slots"]:
        """The numbers whose bits the keys are."""
        return self.keys.view(torch.float32)


@triton.jit
@no_type_check
def counted(keys, prefix, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """Of the keys that begin with `prefix`, how many go on with which bits; -1 >> n stays -1, and is no prefix."""
    wanted = ((keys >> SHIFT) // BINS == prefix) & (keys >= 0)
    return tl.histogram(tl.where(wanted, (keys >> SHIFT) % BINS, 0), BINS, wanted)


@triton.jit
@no_type_check
def next_digits(found, prefix, n, BINS: tl.constexpr):
    """`prefix` and the next bits of the n-th largest key, from what was counted; and its rank among those with both."""
    digits = tl.arange(0, BINS)
    at_least = tl.sum(found, axis=0) - tl.cumsum(found, axis=0) + found
    digit = tl.max(tl.where(at_least >= n, digits, 0), axis=0)
    return prefix * BINS + digit, n - tl.sum(tl.where(digits > digit, found, 0), axis=0)


@triton.jit
@no_type_check
def _histogram(
    keys, search, counts, size, SHIFT: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    prefix = tl.load(search)
    found = tl.zeros([BINS], tl.int32)
    for number in range(BLOCKS):
        at = (tl.program_id(0).to(tl.int64) * BLOCKS + number) * BLOCK + tl.arange(0, BLOCK)
        found += counted(tl.load(keys + at, mask=at < size, other=-1), prefix, SHIFT, BINS)
    tl.atomic_add(counts + tl.arange(0, BINS), found, mask=found > 0, sem="relaxed")


@triton.jit
@no_type_check
def _descend(search, counts, BINS: tl.constexpr):
    places = counts + tl.arange(0, BINS)
    prefix, n = next_digits(tl.load(places), tl.load(search), tl.load(search + 1), BINS)
    tl.store(search, prefix)
    tl.store(search + 1, n)
    tl.store(places, tl.zeros([BINS], tl.int32))  # for the next pass


@triton.jit
@no_type_check
def _count(keys, cut, starts, above, equal, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    key = tl.load(cut)
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    n_above, n_equal = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        given = tl.load(keys + at, mask=at < end, other=-1)
        n_above += (given > key).to(tl.int32)
        n_equal += (given == key).to(tl.int32)
    tl.store(above + row, tl.sum(n_above, axis=0))
    tl.store(equal + row, tl.sum(n_equal, axis=0))


@triton.jit
@no_type_check
def _quota(above, equal, cut, rows, batch, before):
    """How many above the cut each row has, and how many of those equal to it are its own; `before` lie in rows before.
    A cut of 0 has nothing positive at it."""
    n_above = tl.load(above + rows, mask=rows < batch, other=0)
    n_equal = tl.load(equal + rows, mask=rows < batch, other=0)
    left = tl.load(cut + 1) - before - (tl.cumsum(n_equal, axis=0) - n_equal)
    own = tl.where(tl.load(cut) > 0, tl.minimum(tl.maximum(left, 0), n_equal), 0)
    return n_above, own, before + tl.sum(n_equal, axis=0)


@triton.jit
@no_type_check
def _share(above, equal, cut, offsets, quota, batch, n, BLOCK: tl.constexpr):
    """Where each row's slots begin. What is left of the n slots is shared out, and stays empty."""
    before, owned = 0, 0
    for start in range(0, batch, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        n_above, own, before = _quota(above, equal, cut, rows, batch, before)
        tl.store(quota + rows, own, mask=rows < batch)
        owned += tl.sum(n_above + own, axis=0)
    each, more = (n - owned) // batch, (n - owned) % batch
    before, place = 0, 0
    tl.store(offsets, 0)
    for start in range(0, batch, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        n_above, own, before = _quota(above, equal, cut, rows, batch, before)
        slots = tl.where(rows < batch, n_above + own + each + (rows < more).to(tl.int32), 0)
        tl.store(offsets + rows + 1, (place + tl.cumsum(slots, axis=0)).to(tl.int64), mask=rows < batch)
        place += tl.sum(slots, axis=0)


@triton.jit
@no_type_check
def _write(
    keys,
    columns,
    cut,
    starts,
    offsets,
    quota,
    kept_columns,
    kept_keys,
    NAMED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    key = tl.load(cut)
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    place, left = tl.load(offsets + row), tl.load(quota + row)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        given = tl.load(keys + at, mask=at < end, other=-1)
        equal = given == key
        taken = (given > key) | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= left))
        slots = place + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        if NAMED:
            which = tl.load(columns + at // TILE, mask=taken, other=0) * TILE + (at % TILE).to(tl.int32)
        else:
            which = (at - begin).to(tl.int32)
        tl.store(kept_columns + slots, which, mask=taken)
        tl.store(kept_keys + slots, given, mask=taken)
        place += tl.sum(taken.to(tl.int32), axis=0)
        left -= tl.sum(equal.to(tl.int32), axis=0)


@triton.jit
@no_type_check
def _read_tiles(product, bias, offsets, tiles, keys, d_sae, TILE: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, TILE)[None, :]
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    for first in range(begin, end, K):
        slots = first + tl.arange(0, K)
        tile = tl.load(tiles + slots, mask=slots < end, other=-1)[:, None]
        columns = tile * TILE + within
        there = (tile >= 0) & (columns < d_sae)
        scores = tl.load(product + row * d_sae + columns, mask=there, other=0.0).to(tl.float32)
        scores += tl.load(bias + columns, mask=there, other=0.0)
        read = tl.where(there, keys_of(scores), -1)
        tl.store(keys + slots[:, None] * TILE + within, read, mask=(slots < end)[:, None])


@triton.jit
@no_type_check
def _rescore(x, encoder, bias, offsets, latents, keys, d, D: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    inputs = tl.arange(0, D)
    own = tl.load(x + row * d + inputs, mask=inputs < d, other=0.0)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    for first in range(begin, end, K):
        slots = first + tl.arange(0, K)
        fires = (slots < end) & (tl.load(keys + slots, mask=slots < end, other=0) > 0)
        j = tl.load(latents + slots, mask=fires, other=0).to(tl.int64)
        wanted = fires[:, None] & (inputs < d)[None, :]
        rows = tl.load(encoder + j[:, None] * d + inputs[None, :], mask=wanted, other=0.0)
        score = tl.sum(rows * own[None, :], axis=1) + tl.load(bias + j, mask=fires, other=0.0)
        tl.store(keys + slots, keys_of(score), mask=fires)


def batch_largest(
    product: Float[Tensor, "batch d_sae"], bias: Float[Tensor, " d_sae"], n: int, buffer: Buffers
) -> Kept:
    """The batch's n largest max(0, product + bias), those that are positive."""
    batch, d_sae = product.shape
    n_tiles = -(-d_sae // TILE)
    maxima = buffer("maxima", (batch, n_tiles), torch.int32)
    tile_maxima(product, bias, TILE, maxima)
    starts = torch.arange(0, batch * n_tiles + 1, n_tiles, device=product.device)
    tiles = largest(maxima.view(-1), None, starts, min(n, maxima.numel()), buffer, "tiles", empty=-1)
    keys = buffer("tile_keys", (len(tiles.keys) * TILE,), torch.int32)
    rows = max(BLOCK // TILE // 4, 1)
    constants = {"TILE": TILE, "K": rows, "num_warps": warps(rows * TILE)}
    _read_tiles[(batch,)](product, bias, tiles.offsets, tiles.columns, keys, d_sae, **constants)
    return largest(keys, tiles.columns, tiles.offsets * TILE, n, buffer, "latents", tile=TILE)


def rescored(
    kept: Kept,
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    n: int,
    buffer: Buffers,
) -> Kept:
    """The n largest of what was kept, by pre-latents that are computed again in float32: x . W_enc_j + b_enc_j."""
    (batch, d), width = x.shape, power(x.shape[1])
    rows = at_once(d, d)
    constants = {"D": width, "K": rows, "num_warps": warps(width * rows)}
    _rescore[(batch,)](x, encoder, bias, kept.offsets, kept.columns, kept.keys, d, **constants)
    return largest(kept.keys, kept.columns, kept.offsets, n, buffer, "best")


def largest(
    keys: Int[Tensor, " entries"],
    columns: Int[Tensor, " tiles"] | None,
    starts: Int[Tensor, " batch_plus_1"],
    n: int,
    buffer: Buffers,
    name: str,
    tile: int = 1,
    empty: int = 0,
) -> Kept:
    """The n largest keys above 0 of all rows, in n slots; row b owns the entries from starts[b] to starts[b + 1].

    An entry is known by its place in its row; where `columns` are given, by that in tile `columns[entry // tile]`.
    """
    batch = len(starts) - 1
    cut = nth_largest(keys, n, buffer, name)
    above, equal, quota = (buffer(part, (batch,), torch.int32) for part in ("above", "equal", "quota"))
    offsets = buffer(f"{name}_offsets", (batch + 1,), torch.int64)
    kept = Kept(offsets, *(buffer(f"{name}_{part}", (n,), torch.int32) for part in ("columns", "keys")))
    kept.columns.fill_(empty)
    kept.keys.zero_()
    block = min(power(-(-len(keys) // batch)), BLOCK)
    _count[(batch,)](keys, cut, starts, above, equal, BLOCK=block, num_warps=warps(block))
    rows = min(power(batch), BLOCK)
    _share[(1,)](above, equal, cut, offsets, quota, batch, n, BLOCK=rows, num_warps=warps(rows))
    given = (keys, cut if columns is None else columns, cut, starts, offsets, quota, kept.columns, kept.keys)
    _write[(batch,)](*given, NAMED=columns is not None, TILE=tile, BLOCK=block, num_warps=warps(block))
    return kept


def nth_largest(keys: Int[Tensor, " entries"], n: int, buffer: Buffers, name: str) -> Int[Tensor, "2"]:
    """The n-th largest key (0 where there are fewer), and how many of those that equal it belong to the n largest."""
    search = buffer(f"search_{name}", (2,), torch.int32)
    search[:1].zero_()
    search[1:].fill_(n)  # not search[1] = n, which copies a number of the host and waits for it
    counts = buffer("counts", (2 ** max(PASSES),), torch.int32).zero_()
    block = min(BLOCK, power(len(keys)))
    blocks = min(power(triton.cdiv(len(keys), block * MIN_PROGRAMS)), MOST_BLOCKS)
    grid, shift = (triton.cdiv(len(keys), block * blocks),), 31
    for bits in PASSES:
        shift -= bits
        constants = {"SHIFT": shift, "BINS": 2**bits, "BLOCK": block, "BLOCKS": blocks, "num_warps": 8}
        _histogram[grid](keys, search, counts, len(keys), **constants)
        _descend[(1,)](search, counts, BINS=2**bits, num_warps=4)
    return search
