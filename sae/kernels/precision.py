"""In what numbers the products are computed. Weights, moments and thresholds are float32 whatever is chosen here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "exact"]
"""fp32; bf16 products; or `exact`: bf16 only screens, and what it may have confused is computed again in fp32."""


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 products are fast there. On CPUs they need AMX; elsewhere they are emulated, and slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Within it, float32 products on a CPU go through its bf16 units, unless precision forbids."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if precision == "bf16" else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def slack(d_in: int) -> float:
    """c in |bf16 product - exact product| <= c |x| |w|.

    bf16 rounds to nearest with relative error at most u = 2^-8: once for x, once for w, once for the result (which is
    at most |x| |w|), and sums in float32 add d_in 2^-24. By Cauchy-Schwarz sum |x_i w_i| <= |x| |w|, so that
    c = (1 + u)^3 - 1 + 2 d_in 2^-24.
    """
    return (1 + 2**-8) ** 3 - 1 + 2 * d_in * 2**-24
