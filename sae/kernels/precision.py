"""In what numbers the products are computed. Weights, moments and thresholds are float32 whatever is chosen here."""

from __future__ import annotations

import threading
from typing import Literal, NamedTuple

import torch

Precision = Literal["fp32", "bf16", "exact"]
"""fp32; bf16 products; or `exact`: bf16 only screens, and what it may have confused is computed again in fp32."""


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 products are fast there. On CPUs they need AMX; elsewhere they are emulated, and slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


class _Inside(NamedTuple):
    """Steps that are under way, and the settings that they found: of a CPU, of CUDA."""

    steps: int
    before: tuple[str, str]


_lock = threading.Lock()
_inside = _Inside(0, ("", ""))


class products:
    """Within it, float32 products on a CPU go through its bf16 units, unless precision forbids; on CUDA they never go
    through TF32.

    The setting is the process's. Threads may be within at the same time if they ask for the same: the last restores it.
    A class, as it is entered in every step: a generator takes three times as long.
    """

    def __init__(self, precision: Precision) -> None:
        self.wanted = ("bf16" if precision == "bf16" else "ieee", "ieee")

    def __enter__(self) -> None:
        global _inside  # noqa: PLW0603 - as the setting is
        with _lock:
            now = _settings()
            assert now == self.wanted or not _inside.steps, "threads disagree on the precision of products"
            if now != self.wanted:
                _set(self.wanted)
            _inside = _Inside(_inside.steps + 1, _inside.before if _inside.steps else now)

    def __exit__(self, *error: object) -> None:
        global _inside  # noqa: PLW0603 - as the setting is
        with _lock:
            _inside = _Inside(_inside.steps - 1, _inside.before)
            if not _inside.steps and _inside.before != self.wanted:
                _set(_inside.before)


def _settings() -> tuple[str, str]:
    """How float32 products are computed: on a CPU, on CUDA."""
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return cpu.fp32_precision, cuda.fp32_precision


def _set(settings: tuple[str, str]) -> None:
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    cpu.fp32_precision, cuda.fp32_precision = settings


def slack(d_in: int) -> float:
    """c in |bf16 product - exact product| <= c |x| |w|.

    bf16 rounds to nearest with relative error at most u = 2^-8: once for x, once for w, once for the result (which is
    at most |x| |w|), and sums in float32 add d_in 2^-24. By Cauchy-Schwarz sum |x_i w_i| <= |x| |w|, so that
    c = (1 + u)^3 - 1 + 2 d_in 2^-24.
    """
    return (1 + 2**-8) ** 3 - 1 + 2 * d_in * 2**-24
