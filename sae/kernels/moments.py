"""Adam's moments in eight bits each, with a scale for each row (`train.moments: int8`).

    m_ij = s_i q_ij / 127,    sqrt(v_ij) = t_i r_ij / 255,    s_i = max_j |m_ij|,    t_i = max_j sqrt(v_ij)

q is an int8, r an uint8 of at least 1: a root that is rounded to 0 would make Adam's quotient grow without bound. A
step computes with what they stand for, and rounds anew what comes out, up or down by chance: m and sqrt(v) keep their
mean, and a change far smaller than a unit adds up over steps (rounded to the nearest, .999 v would stay v for ever).
Where a latent has no gradient, the scales alone shrink. Chance is a function of the step and the place, so that a run
repeats itself to the bit.

After Dettmers et al. 2022 (8-bit Optimizers via Block-wise Quantization). Their blocks are rows here: the latents of an
SAE have gradients of very different sizes, the entries of one row have not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.base import State
from sae.optim import Now

LARGEST_FIRST, LARGEST_ROOT = 127, 255
LEAST_SCALE = 1e-30  # below it a scale has no inverse in float32
# Salts of the hash: every matrix rounds by a chance of its own.
SALTS = {"W_dec": 0, "encoder": 1}
GOLDEN = 0x9E3779B9  # seeds are spread over the places by it
HALF = 2**31
# Entries that are unpacked at a time.
BLOCK_ENTRIES = 2**18
ALL = slice(None)


def opened(state: State, name: str, now: Now) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of a weight, and both of their moments as numbers, to be changed in place before the next is asked for."""
    if name not in state.scales:
        yield slice(None), state.first[name], state.second[name]
        return
    n, d = state.first[name].shape
    size = max(BLOCK_ENTRIES // d, 1)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        first, second = unpacked(state, name, rows)
        yield rows, first, second
        pack_(state, name, first, second, now, rows)


def unpacked(state: State, name: str, rows: slice = ALL) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"]]:
    """Both moments of a matrix whose moments have eight bits."""
    scale, scale_of_root = state.scales[name][rows].unbind(dim=1)
    root = state.second[name][rows] * (scale_of_root / LARGEST_ROOT)[:, None]
    return state.first[name][rows] * (scale / LARGEST_FIRST)[:, None], root.square_()


def pack_(
    state: State,
    name: str,
    first: Float[Tensor, "rows d"],
    second: Float[Tensor, "rows d"],
    now: Now,
    rows: slice = ALL,
) -> None:
    """Keeps these moments in eight bits."""
    root = second.sqrt()
    largest, largest_root = first.abs().amax(dim=1), root.amax(dim=1)
    state.scales[name][rows] = torch.stack([largest, largest_root], dim=1)
    place = (rows.start or 0) * first.shape[1]
    up, up_root = chance(first, 2 * now.step.long() + SALTS[name], place)
    q = up.addcmul_(first, _inverse(largest, LARGEST_FIRST)[:, None]).floor_()
    r = up_root.addcmul_(root, _inverse(largest_root, LARGEST_ROOT)[:, None]).floor_()
    state.first[name][rows] = q.clamp_(-LARGEST_FIRST, LARGEST_FIRST).to(torch.int8)
    state.second[name][rows] = r.clamp_(1, LARGEST_ROOT).to(torch.uint8)


def _inverse(scale: Float[Tensor, " d_sae"], largest: int) -> Float[Tensor, " d_sae"]:
    return torch.where(scale > LEAST_SCALE, largest / scale, 0.0)


def chance(like: Float[Tensor, "rows d"], seed: Tensor, place: int = 0) -> tuple[Tensor, Tensor]:
    """Two numbers in [0, 1) of 16 bits for each entry: a hash of the seed and of its place, which begins at `place`
    (lowbias32, C. Wellons). Whole numbers wrap, as they would without a sign."""
    start = (place + seed * GOLDEN + HALF) % (2 * HALF) - HALF
    bits = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape) + start.to(torch.int32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2 * HALF)):
        bits ^= (bits >> shift) & (2 * HALF - 1 >> shift)
        bits *= factor
    high = (bits >> 16) & 0xFFFF
    return high.to(like.dtype).div_(2**16), ((bits & 0xFFFF) ^ high).to(like.dtype).div_(2**16)
