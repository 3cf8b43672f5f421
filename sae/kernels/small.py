"""Steps whose matrices of weights are small: `native.c` computes their products itself, in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sae.kernels.base import SMALL_ENTRIES as ENTRIES
from sae.kernels.base import Buffers

# As in native.c: parts of a batch whose weight gradients are summed apart, and more columns than a panel has.
PARTS, PANEL = 8, 32


def is_small(weight: Tensor) -> bool:
    """Whether products with it are those of native.c."""
    return weight.numel() <= ENTRIES


def panels_of(buffer: Buffers, name: str, n: int, d: int) -> Tensor:
    """Room for the packed weights of n latents."""
    return buffer(f"{name}_panels", (2 * (n + PANEL) * d + (d + PANEL) * n,))


def relu_step(
    call: Callable[..., Any],
    buffer: Buffers,
    name: str,
    x: Tensor,
    start: Tensor | None,
    weights: tuple[Tensor, Tensor, Tensor],
    norms: Tensor | None,
    cost: float,
    k: int,
    gradient: Tensor | None,
    firing: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """`relu_step` of native.c: gradients of encoder, W_dec and b_enc, and the sums of squares and of codes.

    `gradient` and `firing` are filled; `name` tells the buffers of the results apart.
    """
    (batch, _), (n, d) = x.shape, weights[0].shape
    panels, parts = panels_of(buffer, name, n, d), buffer(f"{name}_parts", (PARTS * (2 * n * d + 3 * n + 1),))
    g_encoder, g_W_dec = (buffer(f"{name}_{side}", (n, d)) for side in ("encoder", "W_dec"))
    g_bias, totals = buffer(f"{name}_bias", (n,)), buffer(f"{name}_totals", (2,))
    given = (x, start, *weights, norms, cost, 2 / batch, k, batch, n, d)
    call("relu_step", *given, panels, parts, gradient, g_encoder, g_W_dec, g_bias, firing, totals)
    return (g_encoder, g_W_dec, g_bias), totals
