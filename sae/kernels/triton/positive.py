"""All positive pre-latents, in as many slots as there are: they are counted first, and then written in order."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.triton.launch import power, rows_at_once, warps

# Entries that a program reads at a time.
BLOCK = 2048


@triton.jit
@no_type_check
def _scores(product, bias, rows, columns, batch, d_sae):
    """Pre-latents of some columns of some rows; 0 where nothing is."""
    there = (rows < batch)[:, None] & (columns < d_sae)
    scores = tl.load(product + rows[:, None] * d_sae + columns, mask=there, other=0.0).to(tl.float32)
    return tl.where(there, scores + tl.load(bias + columns, mask=columns < d_sae, other=0.0), 0.0)


@triton.jit
@no_type_check
def _count_positive(product, bias, counts, batch, d_sae, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    found = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, d_sae, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS))[None, :]
        found += (_scores(product, bias, rows, columns, batch, d_sae) > 0).to(tl.int32)
    tl.store(counts + rows, tl.sum(found, axis=1), mask=rows < batch)


@triton.jit
@no_type_check
def _write_positive(
    product,
    bias,
    given,
    offsets,
    latents,
    values,
    batch,
    d_sae,
    n_slots,
    GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.load(offsets + rows, mask=rows < batch, other=0)
    for start in range(0, d_sae, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS))[None, :]
        scores = _scores(product, bias, rows, columns, batch, d_sae)
        fires = scores > 0
        slots = place[:, None] + tl.cumsum(fires.to(tl.int32), axis=1) - 1
        fits = fires & (slots < n_slots)
        tl.store(latents + slots, tl.broadcast_to(columns, (ROWS, COLUMNS)), mask=fits)
        if GIVEN:
            scores = tl.load(given + rows[:, None] * d_sae + columns, mask=fits, other=0.0)
        tl.store(values + slots, scores, mask=fits)
        place += tl.sum(fires.to(tl.int32), axis=1)


def count(product: Float[Tensor, "batch d_sae"], bias: Float[Tensor, " d_sae"], counts: Int[Tensor, " batch"]) -> None:
    """How many of each row's product + bias are positive."""
    batch, d_sae = product.shape
    grid, constants = _by_rows(batch, d_sae)
    _count_positive[grid](product, bias, counts, batch, d_sae, **constants)


def write(
    product: Float[Tensor, "batch d_sae"],
    bias: Float[Tensor, " d_sae"],
    offsets: Int[Tensor, " rows"],
    latents: Int[Tensor, " slots"],
    values: Float[Tensor, " slots"],
    given: Float[Tensor, "batch d_sae"] | None = None,
) -> None:
    """Writes them (or what is `given` in their places), row b's from slot offsets[b] on, where they fit."""
    batch, d_sae = product.shape
    grid, constants = _by_rows(batch, d_sae)
    sizes, has = (batch, d_sae, len(values)), given is not None
    places = (product if given is None else given, offsets, latents, values)
    _write_positive[grid](product, bias, *places, *sizes, GIVEN=has, **constants)


def _by_rows(batch: int, d_sae: int) -> tuple[tuple[int], dict[str, int]]:
    columns = min(power(d_sae), BLOCK)
    rows = rows_at_once(batch, columns)
    return (triton.cdiv(batch, rows),), {"ROWS": rows, "COLUMNS": columns, "num_warps": warps(rows * columns)}
