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
from contextlib import contextmanager

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
_LOW = 0xFFFFFFFF


@contextmanager
def opened(state: State, name: str, now: Now) -> Iterator[tuple[Tensor, Tensor]]:
    """Both moments of a weight as numbers, to be changed in place."""
    if name not in state.scales:
        yield state.first[name], state.second[name]
        return
    first, second = unpacked(state, name)
    yield first, second
    pack_(state, name, first, second, now)


def unpacked(state: State, name: str) -> tuple[Float[Tensor, "d_sae d"], Float[Tensor, "d_sae d"]]:
    """Both moments of a weight, whatever they are kept as."""
    first, second = state.first[name], state.second[name]
    if name not in state.scales:
        return first, second
    scale, scale_of_root = state.scales[name].unbind(dim=1)
    root = second * (scale_of_root / LARGEST_ROOT)[:, None]
    return first * (scale / LARGEST_FIRST)[:, None], root.square_()


def pack_(state: State, name: str, first: Float[Tensor, "d_sae d"], second: Float[Tensor, "d_sae d"], now: Now) -> None:
    """Keeps these moments in eight bits."""
    root = second.sqrt()
    largest, largest_root = first.abs().amax(dim=1), root.amax(dim=1)
    state.scales[name].copy_(torch.stack([largest, largest_root], dim=1))
    up, up_root = chance(first, 2 * now.step.long() + SALTS[name])
    q = (first * _inverse(largest, LARGEST_FIRST)[:, None] + up).floor_()
    r = (root * _inverse(largest_root, LARGEST_ROOT)[:, None] + up_root).floor_()
    state.first[name].copy_(q.clamp_(-LARGEST_FIRST, LARGEST_FIRST))
    state.second[name].copy_(r.clamp_(1, LARGEST_ROOT))


def _inverse(scale: Float[Tensor, " d_sae"], largest: int) -> Float[Tensor, " d_sae"]:
    return torch.where(scale > LEAST_SCALE, largest / scale, 0.0)


def chance(like: Float[Tensor, "d_sae d"], seed: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers in [0, 1) of 16 bits for each entry: a hash of its place and the seed (lowbias32, C. Wellons)."""
    place = torch.arange(like.numel(), device=like.device).view(like.shape)
    bits = (place + seed * GOLDEN) & _LOW
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _LOW
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & _LOW
    bits ^= bits >> 16
    return (bits >> 16).to(like.dtype) / 2**16, (bits & 0xFFFF).to(like.dtype) / 2**16
