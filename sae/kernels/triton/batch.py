"""Codes of a whole batch that share their slots: the n largest by a radix histogram, or all that are positive.

The n-th largest key is found by counting keys by their highest 11 bits, then by the next 10, then by the last 10. Only
tiles whose maximum reaches the n-th largest of all maxima are read for that. Counts are integers, so that their order
does not matter. Of those that tie at the cut the first fire: exactly n do, in slots whose number no data changes.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.base import Buffers
from sae.kernels.triton.launch import power, rows_at_once, warps
from sae.kernels.triton.top_k import keys_of

# Bits of a key that are told apart in each pass, from the highest; the sign is always 0.
PASSES = (11, 10, 10)
# Entries that a program reads at a time, and how often.
BLOCK = 2048
BLOCKS = 8


class Pruned(NamedTuple):
    """Maxima of tiles, and the least that one must reach to be read."""

    maxima: Int[Tensor, "batch tiles"]
    tile: int
    least: Int[Tensor, "2"]


@triton.jit
@no_type_check
def _entries(
    product, bias, maxima, least, row, columns, there, d_sae, n_tiles, PRUNED: tl.constexpr, TILE: tl.constexpr
):
    """Keys and values of some columns of some rows; -1 where nothing is, or nothing that could win."""
    if PRUNED:
        largest = tl.load(maxima + row * n_tiles + columns // TILE, mask=there, other=-1)
        there = there & (largest >= tl.load(least))
    scores = tl.load(product + row * d_sae + columns, mask=there, other=0.0).to(tl.float32)
    scores += tl.load(bias + columns, mask=there, other=0.0)
    return tl.where(there, keys_of(scores), -1), scores


@triton.jit
@no_type_check
def _histogram(
    product,
    bias,
    maxima,
    least,
    search,
    counts,
    size,
    d_sae,
    n_tiles,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    KEYS: tl.constexpr,
    PRUNED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    prefix = tl.load(search)
    found = tl.zeros([BINS], tl.int32)
    for number in range(BLOCKS):
        at = (tl.program_id(0).to(tl.int64) * BLOCKS + number) * BLOCK + tl.arange(0, BLOCK)
        there = at < size
        if KEYS:  # the matrix holds keys already
            keys = tl.load(product + at, mask=there, other=-1)
        else:
            row, columns = at // d_sae, at % d_sae
            keys, _ = _entries(
                product, bias, maxima, least, row, columns, there, d_sae, n_tiles, PRUNED=PRUNED, TILE=TILE
            )
        # Of the keys that begin as the one looked for, the next bits; -1 >> n stays -1, and is no prefix.
        wanted = ((keys >> SHIFT) // BINS == prefix) & (keys >= 0)
        digit = tl.where(wanted, (keys >> SHIFT) % BINS, 0)
        found += tl.histogram(digit, BINS, wanted)
    tl.atomic_add(counts + tl.arange(0, BINS), found, sem="relaxed")


@triton.jit
@no_type_check
def _descend(search, counts, BINS: tl.constexpr):
    """The next bits of the n-th largest key, from how many keys have which; and its rank among those."""
    prefix, n = tl.load(search), tl.load(search + 1)
    digits = tl.arange(0, BINS)
    found = tl.load(counts + digits)
    at_least = tl.sum(found, axis=0) - tl.cumsum(found, axis=0) + found
    digit = tl.max(tl.where(at_least >= n, digits, 0), axis=0)
    above = tl.sum(tl.where(digits > digit, found, 0), axis=0)
    tl.store(search, prefix * BINS + digit)
    tl.store(search + 1, n - above)
    tl.store(counts + digits, tl.zeros([BINS], tl.int32))  # for the next pass


@triton.jit
@no_type_check
def _count(
    product,
    bias,
    maxima,
    cut,
    above,
    equal,
    batch,
    d_sae,
    n_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRUNED: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    key = tl.load(cut)
    n_above, n_equal = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    for start in range(0, d_sae, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS))[None, :]
        there = (rows < batch)[:, None] & (columns < d_sae)
        keys, _ = _entries(
            product, bias, maxima, cut, rows[:, None], columns, there, d_sae, n_tiles, PRUNED=PRUNED, TILE=TILE
        )
        n_above += tl.sum((keys > key).to(tl.int32), axis=1)
        n_equal += tl.sum((keys == key).to(tl.int32), axis=1)
    tl.store(above + rows, n_above, mask=rows < batch)
    tl.store(equal + rows, n_equal, mask=rows < batch)


@triton.jit
@no_type_check
def _write(
    product,
    bias,
    maxima,
    cut,
    offsets,
    quota,
    latents,
    values,
    batch,
    d_sae,
    n_tiles,
    n_slots,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRUNED: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    key = tl.load(cut)
    place = tl.load(offsets + rows, mask=rows < batch, other=0)
    left = tl.load(quota + rows, mask=rows < batch, other=0)
    for start in range(0, d_sae, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS))[None, :]
        there = (rows < batch)[:, None] & (columns < d_sae)
        keys, scores = _entries(
            product, bias, maxima, cut, rows[:, None], columns, there, d_sae, n_tiles, PRUNED=PRUNED, TILE=TILE
        )
        equal = keys == key
        first = tl.cumsum(equal.to(tl.int32), axis=1) <= left[:, None]
        taken = (keys > key) | (equal & first)
        slots = place[:, None] + tl.cumsum(taken.to(tl.int32), axis=1) - 1
        fits = taken & (slots < n_slots)
        which = tl.broadcast_to(columns, (ROWS, COLUMNS))
        tl.store(latents + slots, which, mask=fits)
        tl.store(values + slots, scores, mask=fits)
        place += tl.sum(taken.to(tl.int32), axis=1)
        left -= tl.sum(equal.to(tl.int32), axis=1)


def nth_largest(
    product: Tensor, bias: Float[Tensor, " d_sae"], n: int, pruned: Pruned | None, buffer: Buffers
) -> Int[Tensor, "2"]:
    """The n-th largest key of a matrix, and how many of those that equal it belong to the n largest.

    Where the matrix holds integers, these are the keys themselves.
    """
    are_keys = product.dtype == torch.int32
    name = "maxima" if are_keys else "batch"
    search = buffer(f"search_{name}", (2,), torch.int32)
    search[0] = 0
    search[1] = n
    counts = buffer("counts", (2 ** max(PASSES),), torch.int32).zero_()
    maxima, tile, least = (search, 1, search) if pruned is None else pruned
    block = min(BLOCK, power(product.numel()))
    grid = (triton.cdiv(product.numel(), block * BLOCKS),)
    shift = 31
    for bits in PASSES:
        shift -= bits
        _histogram[grid](
            *(product, bias, maxima, least, search, counts, product.numel(), product.shape[1], maxima.shape[-1]),
            SHIFT=shift,
            BINS=2**bits,
            KEYS=are_keys,
            PRUNED=pruned is not None,
            TILE=tile,
            BLOCK=block,
            BLOCKS=BLOCKS,
            num_warps=8,
        )
        _descend[(1,)](search, counts, BINS=2**bits, num_warps=4)
    return search


def count(
    product: Float[Tensor, "batch d_sae"],
    bias: Float[Tensor, " d_sae"],
    cut: Int[Tensor, "2"],
    pruned: Pruned | None,
    buffer: Buffers,
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """How many keys of each row lie above the cut, and how many are equal to it."""
    (batch, d_sae), maxima = product.shape, cut if pruned is None else pruned.maxima
    above, equal = (buffer(name, (batch,), torch.int32) for name in ("above", "equal"))
    sizes = (batch, d_sae, maxima.shape[-1])
    grid, constants = _by_rows(batch, d_sae, pruned)
    _count[grid](product, bias, maxima, cut, above, equal, *sizes, **constants)
    return above, equal


def write(
    product: Float[Tensor, "batch d_sae"],
    bias: Float[Tensor, " d_sae"],
    cut: Int[Tensor, "2"],
    pruned: Pruned | None,
    offsets: Int[Tensor, " batch_plus_1"],
    quota: Int[Tensor, " batch"],
    latents: Int[Tensor, " slots"],
    values: Float[Tensor, " slots"],
) -> None:
    """Writes those above the cut, and of those equal to it the first `quota` of each row, where they fit."""
    (batch, d_sae), maxima = product.shape, cut if pruned is None else pruned.maxima
    sizes = (batch, d_sae, maxima.shape[-1], len(values))
    grid, constants = _by_rows(batch, d_sae, pruned)
    _write[grid](product, bias, maxima, cut, offsets, quota, latents, values, *sizes, **constants)


def _by_rows(batch: int, d_sae: int, pruned: Pruned | None) -> tuple[tuple[int], dict[str, int | bool]]:
    columns = min(power(d_sae), BLOCK)
    rows = rows_at_once(batch, columns)
    tile = 1 if pruned is None else pruned.tile
    constants = {"ROWS": rows, "COLUMNS": columns, "PRUNED": pruned is not None, "TILE": tile}
    return (triton.cdiv(batch, rows),), constants | {"num_warps": warps(rows * columns)}
