"""What all kernels here share: whether they can run at all, and the sizes of their blocks."""

from __future__ import annotations

from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl

from sae.kernels.base import CannotRun

MIN_CAPABILITY = (8, 0)


def require(device: torch.device, dtype: torch.dtype) -> None:
    """Refuses what the kernels cannot work on.

    Raises:
        CannotRun: no CUDA device, one that is too old, or weights that are not float32.
    """
    if dtype != torch.float32:
        raise CannotRun(f"they keep weights in torch.float32, not {dtype}; use train.kernels torch")
    if interpreted():
        return
    if device.type != "cuda" or not torch.cuda.is_available():
        raise CannotRun(f"they need a CUDA device, not {device}; use train.device cuda, or train.kernels auto")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        has, needs = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
        raise CannotRun(f"they need compute capability {needs}, and {device} has {has}; use train.kernels torch")
    problem = trial(device)
    if problem:
        raise CannotRun(
            f"triton cannot compile or start them on {device} ({problem}); it needs a C compiler, Python's headers and "
            "a driver that is not too old; use train.kernels torch"
        )


@triton.jit
@no_type_check
def _one(place):
    tl.store(place, 1)


@cache
def trial(device: torch.device) -> str:
    """What goes wrong when the smallest kernel is compiled and started there; empty where nothing does. A machine may
    lack what triton needs, and would say so in the first step."""
    try:
        with torch.cuda.device(device):
            place = torch.zeros(1, dtype=torch.int32, device=device)
            _one[(1,)](place, num_warps=1)
            return "" if int(place) == 1 else "it computes nothing"
    except Exception as error:  # what triton raises is of many kinds
        return (str(error).strip().splitlines() or [type(error).__name__])[0]


def interpreted() -> bool:
    """Whether kernels run on the CPU, one instruction after another (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def power(n: int) -> int:
    """The smallest power of two that is at least n: blocks have such sizes."""
    return 1 << max(n - 1, 0).bit_length()


def rows_at_once(n_rows: int, width: int, entries: int = 2048) -> int:
    """Rows that a program takes, so that it holds at most about `entries` numbers; a power of two."""
    room = max(entries // width, 1)
    return min(1 << (room.bit_length() - 1), power(n_rows))


def warps(entries: int) -> int:
    """Warps for a program that holds so many numbers."""
    return min(max(entries // 1024, 8), 32) if entries >= 4096 else 4 if entries >= 512 else 2
