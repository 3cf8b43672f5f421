"""What the hardware can do at best, measured: a product at the encoder's shape, and moving memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sae.bench.machine import UNKNOWN_CACHE_BYTES, last_cache_bytes, synchroniser
from sae.bench.shapes import Shape

REPEATS = 5
# A repeat lasts about this long, so that the clock's grain and a short pause do not count.
REPEAT_SECONDS = 0.05
# A CPU without bf16 units takes many seconds for one product: once is enough then.
LONG_SECONDS = 2.0


@dataclass(frozen=True)
class Ceiling:
    """A rate that nothing on this machine exceeds: the best of a few repeats."""

    what: str
    shape: str
    unit: str
    rates: list[float]
    """One value a repeat."""

    @property
    def rate(self) -> float:
        return max(self.rates)


def rates(work: int, run: Callable[[], object], synchronise: Callable[[], object], repeats: int) -> list[float]:
    """`work` per second of `run`, in units of 1e9, after one run that does not count."""

    def seconds(n: int) -> float:
        synchronise()
        began = time.perf_counter()
        for _ in range(n):
            run()
        synchronise()
        return max(time.perf_counter() - began, 1e-9) / n

    seconds(1)
    once = seconds(1)
    if once > LONG_SECONDS:
        return [work / once / 1e9]
    n = max(1, round(REPEAT_SECONDS / once))
    return [work / seconds(n) / 1e9 for _ in range(repeats)]


def products(shapes: Sequence[Shape], device: str, repeats: int = REPEATS) -> list[Ceiling]:
    """x @ W.T of x [batch, d_in] and W [d_sae, d_in], into memory that is there already."""
    found = []
    before = torch.get_float32_matmul_precision()
    for shape in shapes:
        for dtype, precision in ((torch.float32, "highest"), (torch.float32, "medium"), (torch.bfloat16, "highest")):
            x = torch.randn(shape.batch, shape.d_in, device=device, dtype=dtype)
            W = torch.randn(shape.d_sae, shape.d_in, device=device, dtype=dtype)
            out = torch.empty(shape.batch, shape.d_sae, device=device, dtype=dtype)
            torch.set_float32_matmul_precision(precision)
            try:
                product = partial(torch.mm, x, W.T, out=out)
                measured = rates(shape.product_flops, product, synchroniser(device), repeats)
            finally:
                torch.set_float32_matmul_precision(before)
            name = str(dtype).removeprefix("torch.") + (" (medium)" if precision == "medium" else "")
            found.append(Ceiling(f"product {name}", shape.name, "GFLOP/s", measured))
    return found


def streams(device: str, n_bytes: int | None = None, repeats: int = REPEATS) -> list[Ceiling]:
    """Copy a = b and triad a = b + s c, counted as 2 and 3 transfers; each array is 4 times the last cache."""
    n = (n_bytes or max(4 * (last_cache_bytes() or UNKNOWN_CACHE_BYTES), 2**27)) // 4
    a, b, c = (torch.ones(n, device=device) for _ in range(3))
    wait = synchroniser(device)
    size = f"{4 * n / 2**20:.0f} MiB"
    return [
        Ceiling("copy", size, "GB/s", rates(2 * 4 * n, lambda: a.copy_(b), wait, repeats)),
        Ceiling("triad", size, "GB/s", rates(3 * 4 * n, lambda: torch.add(b, c, alpha=3.0, out=a), wait, repeats)),
    ]
