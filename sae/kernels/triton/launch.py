"""What all kernels here share: whether they can run at all, and the sizes of their blocks."""

from __future__ import annotations

import torch
import triton

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
