"""A row's moments as the update reads and keeps them: as they are, or in eight bits (`sae.kernels.moments`)."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from sae.kernels import moments
from sae.kernels.base import State

FIRST, ROOT = tl.constexpr(moments.LARGEST_FIRST), tl.constexpr(moments.LARGEST_ROOT)
LEAST = tl.constexpr(moments.LEAST_SCALE)
GOLDEN = tl.constexpr(moments.GOLDEN)


def moments_of(state: State, name: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Both of a weight, and their scales."""
    return state.first.get(name), state.second.get(name), state.scales.get(name)


@triton.jit
@no_type_check
def read(first, second, scales, j, at, inside, SMALL: tl.constexpr):
    """The moments of row j, whose entries are `at`."""
    m = tl.load(first + at, mask=inside, other=0).to(tl.float32)
    v = tl.load(second + at, mask=inside, other=0).to(tl.float32)
    if SMALL:
        m = m * (tl.load(scales + 2 * j) / FIRST)
        root = v * (tl.load(scales + 2 * j + 1) / ROOT)
        v = root * root
    return m, v


@triton.jit
@no_type_check
def keep(first, second, scales, j, at, inside, m, v, seed, SMALL: tl.constexpr):
    """Writes them; those of eight bits are rounded by the chance of this seed."""
    if SMALL:
        root = tl.sqrt(v)
        largest, largest_root = tl.max(tl.abs(m), axis=0), tl.max(root, axis=0)
        tl.store(scales + 2 * j, largest)
        tl.store(scales + 2 * j + 1, largest_root)
        bits = hashed(at.to(tl.uint32) + seed.to(tl.uint32) * GOLDEN)
        up, up_root = (bits >> 16).to(tl.float32) / 65536, (bits & 0xFFFF).to(tl.float32) / 65536
        q = tl.floor(m * inverse(largest, FIRST) + up)
        r = tl.floor(root * inverse(largest_root, ROOT) + up_root)
        tl.store(first + at, tl.minimum(tl.maximum(q, -FIRST), FIRST).to(tl.int8), mask=inside)
        tl.store(second + at, tl.minimum(tl.maximum(r, 1), ROOT).to(tl.uint8), mask=inside)
    else:
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, v, mask=inside)


@triton.jit
@no_type_check
def inverse(scale, largest: tl.constexpr):
    """Units of eight bits in 1; 0 where a scale has no inverse."""
    return tl.where(scale > LEAST, largest / tl.maximum(scale, LEAST), 0.0)


@triton.jit
@no_type_check
def hashed(bits):
    """lowbias32 (C. Wellons)."""
    bits = (bits ^ (bits >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    bits = (bits ^ (bits >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return bits ^ (bits >> 16)
