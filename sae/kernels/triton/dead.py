"""AuxK over the compacted columns of dead latents: dense products, and each row's k largest kept in place.

Many of few are kept (k is half of d_in), so that a sparse gather would read far more than a product does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sae.kernels.triton.batch import counted, next_digits
from sae.kernels.triton.launch import power
from sae.kernels.triton.top_k import keys_of

# Entries that a program reads at a time; a wider row is read again in each pass, from the cache.
BLOCK = 4096


@triton.jit
@no_type_check
def _narrowed(scores, bias, row, n_columns, prefix, n, SHIFT: tl.constexpr, BINS: tl.constexpr, COLUMNS: tl.constexpr):
    """The next bits of the row's n-th largest key, and its rank among the keys that begin with them."""
    found = tl.zeros([BINS], tl.int32)
    for start in range(0, n_columns, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        there = columns < n_columns
        z = tl.load(scores + row * n_columns + columns, mask=there, other=0.0)
        key = tl.where(there, keys_of(z + tl.load(bias + columns, mask=there, other=0.0)), -1)
        found += counted(key, prefix, SHIFT, BINS)
    return next_digits(found, prefix, n, BINS)


@triton.jit
@no_type_check
def _keep_largest(scores, bias, n_columns, k, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cut, n = _narrowed(scores, bias, row, n_columns, 0, k, 23, 256, COLUMNS)
    cut, n = _narrowed(scores, bias, row, n_columns, cut, n, 15, 256, COLUMNS)
    cut, n = _narrowed(scores, bias, row, n_columns, cut, n, 7, 256, COLUMNS)
    cut, n = _narrowed(scores, bias, row, n_columns, cut, n, 0, 128, COLUMNS)
    for start in range(0, n_columns, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        there = columns < n_columns
        at = scores + row * n_columns + columns
        z = tl.load(at, mask=there, other=0.0)
        z += tl.load(bias + columns, mask=there, other=0.0)
        tl.store(at, tl.where(keys_of(z) >= cut, tl.where(z <= 0, 0.0, z), 0.0), mask=there)


def keep_largest_(scores: Float[Tensor, "batch n"], bias: Float[Tensor, " n"], k: int) -> None:
    """max(0, scores + bias) where it is among the k largest of its row, or ties with the least of them; else 0."""
    batch, n_columns = scores.shape
    columns = min(power(n_columns), BLOCK)
    _keep_largest[(batch,)](scores, bias, n_columns, k, COLUMNS=columns, num_warps=max(columns // 256, 2))


def aux_k(
    gradient: Float[Tensor, "batch d"],
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "n_dead d_in"],
    b_enc: Float[Tensor, " n_dead"],
    W_dec: Float[Tensor, "n_dead d"],
    k: int,
    product: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Float[Tensor, ""], tuple[Tensor, Tensor, Tensor]]:
    """`losses.aux_k`, whose products are computed by `product`."""
    batch = len(x)
    scores = product(x, encoder.T)
    keep_largest_(scores, b_enc, min(k, scores.shape[1]))
    g_sketch = product(scores, W_dec).mul_(2 / batch).add_(gradient)
    value = torch.linalg.vector_norm(g_sketch).square() * (batch / 4)
    through = product(g_sketch, W_dec.T).masked_fill_(scores <= 0, 0)
    return value, (product(through.T, x), product(scores.T, g_sketch), through.sum(dim=0))
