"""One pass over the decoder rows of each sample: reconstruction, residual, loss, and the gradients in all codes.

A program holds one sample. Its decoder rows come from memory once; the code gradients find them in the cache.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sae.kernels.base import Codes, Decoded
from sae.kernels.triton.launch import power, warps

# Numbers of decoder rows that a program loads at a time.
AT_ONCE = 4096


@triton.jit
@no_type_check
def _decode(
    offsets,
    latents,
    values,
    levels,
    W_dec,
    norms,
    target,
    cost,
    weights,
    gradient,
    code_gradients,
    squares,
    losses,
    sums,
    batch,
    d,
    n_levels,
    reading,
    HAS_LEVELS: tl.constexpr,
    DETACHED: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    WHOLE: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    inside = columns < d
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    residual = -tl.load(target + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    charged = tl.zeros([K], tl.float32)
    for first in range(begin, end, K):
        slots = first + tl.arange(0, K)
        there = slots < end
        z = tl.load(values + slots, mask=there, other=0.0)
        j = tl.load(latents + slots, mask=there, other=0).to(tl.int64)
        read = (there & (z != 0))[:, None] & inside[None, :]
        rows = tl.load(W_dec + j[:, None] * d + columns[None, :], mask=read, other=0.0).to(tl.float32)
        residual += tl.sum(z[:, None] * rows, axis=0)
        if HAS_NORMS:
            charged += z * tl.load(norms + j, mask=there, other=0.0)
        else:
            charged += z
    tl.store(sums + row, tl.sum(charged, axis=0))
    price = tl.load(cost)
    g, of_last = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    loss = tl.zeros([1], tl.float32)
    # From the last reading, which takes all slots, back to the first: each takes its level's slots out again.
    for back in range(n_levels):
        level = n_levels - 1 - back
        weight = tl.load(weights + level)
        square = tl.sum(residual * residual, axis=0)
        loss += weight * square
        if level == reading:
            tl.store(squares + row, square)
        own = (2.0 / batch * weight) * residual
        if DETACHED:
            g = own + of_last
            of_last = tl.where(back == 0, own, of_last)
        else:
            g += own
        tl.store(gradient + (level * batch + row) * d + columns, g, mask=inside)
        for first in range(begin, end, K):
            slots = first + tl.arange(0, K)
            there = slots < end
            if HAS_LEVELS:
                there = there & (tl.load(levels + slots, mask=there, other=-1) == level)
            z = tl.load(values + slots, mask=there, other=0.0)
            j = tl.load(latents + slots, mask=there, other=0).to(tl.int64)
            live = there
            if not WHOLE:
                live = there & (z > 0)
            rows = tl.load(
                W_dec + j[:, None] * d + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            through = tl.sum(rows * g[None, :], axis=1)
            if HAS_NORMS:
                through += price * tl.load(norms + j, mask=there, other=0.0)
            else:
                through += price
            tl.store(code_gradients + slots, tl.where(live, through, 0.0), mask=there)
            if HAS_LEVELS:
                residual -= tl.sum(z[:, None] * rows, axis=0)
    tl.store(losses + row + tl.arange(0, 1), loss)


def decode(
    codes: Codes,
    W_dec: Float[Tensor, "d_sae d"],
    norms: Float[Tensor, " d_sae"] | None,
    target: Float[Tensor, "batch d"],
    cost: Float[Tensor, ""],
    weights: Float[Tensor, " n_levels"],
    out: Decoded,
) -> None:
    """Fills `out`; slots that no row owns keep what they hold."""
    batch, d = target.shape
    width = power(d)
    at_once = max(min(AT_ONCE // width, 32), 1)
    n_levels = len(codes.weights)
    _decode[(batch,)](
        *(codes.offsets, codes.latents, codes.values, codes.values if codes.levels is None else codes.levels),
        *(W_dec, W_dec if norms is None else norms, target, cost, weights),
        *(out.gradient, out.code_gradients, out.squares, out.losses, out.code_sums),
        *(batch, d, n_levels, codes.reading % n_levels),
        HAS_LEVELS=codes.levels is not None,
        DETACHED=codes.detached,
        HAS_NORMS=norms is not None,
        WHOLE=codes.pre_latents is not None,
        D=width,
        K=at_once,
        num_warps=warps(width * at_once),
    )
