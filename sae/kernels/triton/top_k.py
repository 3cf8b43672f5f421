"""Exact top-k, pruned by tile maxima: of a row, only the k tiles with the largest maxima are read a second time.

The k-th largest maximum is a bound that k entries reach, so that whatever exceeds it lies in a tile whose maximum does:
in one of the k. Entries that tie go in the order of latents. Values are compared as the bits of max(0, value), which
order as the numbers do.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.triton.launch import power, rows_at_once, warps

# Tiles that many codes are looked for in are small, so that a program can hold all of the chosen ones.
CANDIDATES = 8192
TILES = (64, 32, 16)
# A program that computes maxima holds so many pre-latents.
BLOCK = 2048


def tile_of(k: int) -> int | None:
    """Latents in a tile where k are wanted; None: more than these kernels are made for."""
    return next((tile for tile in TILES if power(k) * tile <= CANDIDATES), None)


@triton.jit
@no_type_check
def keys_of(values):
    """Bits of max(0, value): integers >= 0 that order as the values; NaN counts as 0."""
    positive = tl.where(values > 0, values, 0.0)
    return positive.to(tl.int32, bitcast=True)


@triton.jit
@no_type_check
def nth_largest(keys, n, ROWS: tl.constexpr):
    """Of each row of keys >= 0 the n-th largest, a bit at a time; empty places hold -1."""
    cut = tl.zeros([ROWS], tl.int32)
    for bit in range(31):
        trial = cut + (1 << (30 - bit))
        reach = tl.sum((keys >= trial[:, None]).to(tl.int32), axis=1)
        cut = tl.where(reach >= n, trial, cut)
    return cut


@triton.jit
@no_type_check
def chosen(keys, n, ROWS: tl.constexpr):
    """Which n of each row are the largest (of those that tie, the first), and the place of each among them."""
    cut = nth_largest(keys, n, ROWS)[:, None]
    above, equal = keys > cut, keys == cut
    left = n - tl.sum(above.to(tl.int32), axis=1)
    first = tl.cumsum(equal.to(tl.int32), axis=1) <= left[:, None]
    taken = above | (equal & first)
    return taken, tl.cumsum(taken.to(tl.int32), axis=1) - 1


@triton.jit
@no_type_check
def _maxima(
    product, bias, maxima, batch, d_sae, n_tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (rows < batch)[:, None] & (columns < d_sae)[None, :]
    scores = tl.load(product + rows[:, None] * d_sae + columns[None, :], mask=there, other=0.0).to(tl.float32)
    scores += tl.load(bias + columns, mask=columns < d_sae, other=0.0)[None, :]
    keys = tl.where(there, keys_of(scores), -1)
    largest = tl.max(tl.reshape(keys, (ROWS, COLUMNS // TILE, TILE)), axis=2)
    tiles = tl.program_id(1) * (COLUMNS // TILE) + tl.arange(0, COLUMNS // TILE)
    inside = (rows < batch)[:, None] & (tiles < n_tiles)[None, :]
    tl.store(maxima + rows[:, None] * n_tiles + tiles[None, :], largest, mask=inside)


@triton.jit
@no_type_check
def _choose_tiles(maxima, winners, batch, n_tiles, n_wanted, ROWS: tl.constexpr, N_TILES: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tiles = tl.arange(0, N_TILES)
    there = (rows < batch)[:, None] & (tiles < n_tiles)[None, :]
    keys = tl.load(maxima + rows[:, None] * n_tiles + tiles[None, :], mask=there, other=-1)
    taken, place = chosen(keys, n_wanted, ROWS)
    which = tl.broadcast_to(tiles[None, :], (ROWS, N_TILES))
    tl.store(winners + rows[:, None] * n_wanted + place, which, mask=taken & there)


@triton.jit
@no_type_check
def _pick(
    product,
    bias,
    winners,
    latents,
    values,
    batch,
    d_sae,
    n_winners,
    k,
    ROWS: tl.constexpr,
    N_WINNERS: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entries = tl.arange(0, N_WINNERS * TILE)
    number, within = entries // TILE, entries % TILE
    known = (rows < batch)[:, None] & (number < n_winners)[None, :]
    tile = tl.load(winners + rows[:, None] * n_winners + number[None, :], mask=known, other=0)
    columns = tile * TILE + within[None, :]
    there = known & (columns < d_sae)
    scores = tl.load(product + rows[:, None] * d_sae + columns, mask=there, other=0.0).to(tl.float32)
    scores += tl.load(bias + columns, mask=there, other=0.0)
    taken, place = chosen(tl.where(there, keys_of(scores), -1), k, ROWS)
    slots = rows[:, None] * k + place
    tl.store(latents + slots, columns, mask=taken & there)
    # NaN is not above 0, and must not be lost where it is chosen.
    tl.store(values + slots, tl.where(scores <= 0, 0.0, scores), mask=taken & there)


def tile_maxima(
    product: Float[Tensor, "batch d_sae"], bias: Float[Tensor, " d_sae"], tile: int, out: Int[Tensor, "batch tiles"]
) -> None:
    """max over each tile of latents of max(0, product + bias), as bits."""
    batch, d_sae = product.shape
    columns = max(min(power(d_sae), BLOCK), tile)
    rows = rows_at_once(batch, columns, BLOCK)
    grid = (triton.cdiv(batch, rows), triton.cdiv(d_sae, columns))
    sizes = (batch, d_sae, out.shape[1])
    _maxima[grid](product, bias, out, *sizes, ROWS=rows, COLUMNS=columns, TILE=tile, num_warps=warps(rows * columns))


def largest_of_rows(
    product: Float[Tensor, "batch d_sae"],
    bias: Float[Tensor, " d_sae"],
    maxima: Int[Tensor, "batch tiles"],
    tile: int,
    k: int,
    winners: Int[Tensor, "batch n_winners"],
    latents: Int[Tensor, " slots"],
    values: Float[Tensor, " slots"],
) -> None:
    """Each row's k largest max(0, product + bias), in k slots a row."""
    (batch, d_sae), n_tiles = product.shape, maxima.shape[1]
    tile_maxima(product, bias, tile, maxima)
    n_winners, width = winners.shape[1], power(n_tiles)
    rows = rows_at_once(batch, width)
    grid = (triton.cdiv(batch, rows),)
    _choose_tiles[grid](
        maxima, winners, batch, n_tiles, n_winners, ROWS=rows, N_TILES=width, num_warps=warps(rows * width)
    )
    width = power(n_winners) * tile
    rows = rows_at_once(batch, width)
    grid = (triton.cdiv(batch, rows),)
    sizes = (batch, d_sae, n_winners, k)
    constants = {"ROWS": rows, "N_WINNERS": width // tile, "TILE": tile, "num_warps": warps(rows * width)}
    _pick[grid](product, bias, winners, latents, values, *sizes, **constants)


def rows_slots(batch: int, k: int, device: torch.device) -> Int[Tensor, " batch_plus_1"]:
    """Where the slots of each row begin, k a row."""
    return torch.arange(0, batch * k + 1, k, dtype=torch.int64, device=device)
