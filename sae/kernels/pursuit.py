"""Matching pursuit (Mallat & Zhang 1993) in torch operations: the steps forward in two ways, and the way back.

    r_0 = x,   j_t = argmax_j r_{t-1} . w_j,   z_t = max(0, r_{t-1} . w_{j_t}),   r_t = r_{t-1} - z_t w_{j_t}

Rows w_j have norm 1. A row of x without a positive correlation left stays as it is: its other slots are empty.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.kernels.base import Codes, Decoded, State

# Entries of the Gram matrix, at most: 1 GiB in float32.
GRAM_ENTRIES = 2**28


class Unrolled(NamedTuple):
    """The gradient after it went back through the steps, for `invert` and `update_`.

    gradient: first the `batch` rows that b_dec gets; then, step after step, what each slot gives its decoder row.
    codes: 1 in the slots that count, at the level of their rows. What a latent got in several steps of a sample lies in
    the first of them, so that it counts once.
    """

    gradient: Float[Tensor, "steps_and_1_x_batch d"]
    codes: Codes


def gram_pays(batch: int, d_sae: int, k: int) -> bool:
    """Whether W_dec W_dec^T, F^2 d once, costs less than the k - 1 products B F d that it saves, and fits."""
    return d_sae < (k - 1) * batch and d_sae**2 <= GRAM_ENTRIES


def by_products(x: Float[Tensor, "batch d"], W_dec: Float[Tensor, "d_sae d"], k: int) -> Codes:
    """Correlates the residual with all rows in every step. Autograd goes through it."""
    residual, latents, values = x, [], []
    for _ in range(k):
        residual, latent, value = _step(residual, W_dec, (residual @ W_dec.T).detach())
        latents.append(latent)
        values.append(value)
    return _codes(latents, values)


def by_gram(x: Float[Tensor, "batch d"], W_dec: Float[Tensor, "d_sae d"], k: int) -> Codes:
    """Correlates once, and follows what each step takes away: r_t W^T = r_{t-1} W^T - z_t (W W^T)_{j_t}."""
    gram, correlations, residual, latents, values = W_dec @ W_dec.T, x @ W_dec.T, x, [], []
    for _ in range(k):
        residual, latent, value = _step(residual, W_dec, correlations)
        correlations.addcmul_(value[:, None], gram[latent], value=-1)
        latents.append(latent)
        values.append(value)
    return _codes(latents, values)


def unroll(codes: Codes, decoded: Decoded, x: Float[Tensor, "batch d"], state: State) -> Unrolled:
    """Back through the steps, t = k..1, from the gradients l_t in each code (0 in empty slots) and q in x_hat:

        g_t = l_t - h . w_{j_t},   row_t = z_t (q - h) + g_t r_{t-1},   h <- h + g_t w_{j_t}

    with h the gradient in r_t, 0 behind the last step. What is left of h in the end is the gradient in x.
    """
    batch = len(x)
    latents, z, through = (t.view(batch, -1) for t in (codes.latents.long(), codes.values, decoded.code_gradients))
    k = z.shape[1]
    levels = torch.zeros_like(latents) if codes.levels is None else codes.levels.view(batch, k).long()
    own = decoded.gradient.view(len(codes.weights), batch, -1)
    samples = torch.arange(batch, device=x.device)
    residual = x - (z[:, :, None] * state.W_dec[latents]).sum(dim=1)
    back, rows = torch.zeros_like(x), x.new_zeros(batch, k, x.shape[1])
    for t in reversed(range(k)):
        row, value = state.W_dec[latents[:, t]], z[:, t, None]
        residual = residual + value * row
        g = (through[:, t, None] - (back * row).sum(dim=1, keepdim=True)) * (value > 0)
        rows[:, t] = value * (own[levels[:, t], samples] - back) + g * residual
        back = back + g * row
    first, fires = first_slots(latents, z > 0)
    rows = torch.zeros_like(rows).scatter_add_(1, first[:, :, None].expand_as(rows), rows)
    offset = own[0] - back if state.tied else own[0]
    gradient = torch.cat([offset[None], rows.transpose(0, 1)]).flatten(0, 1)
    return Unrolled(gradient, stepped(codes, fires.to(z.dtype).flatten(), k))


def stepped(codes: Codes, fires: Float[Tensor, " slots"], k: int) -> Codes:
    """Codes of 1 whose rows lie step after step, behind those of b_dec."""
    levels = torch.arange(1, k + 1, device=fires.device, dtype=torch.int32).repeat(len(codes.offsets) - 1)
    return Codes(codes.offsets, codes.latents, fires, levels=levels, weights=(1 / (k + 1),) * (k + 1))


def first_slots(
    latents: Int[Tensor, "batch k"], fires: Bool[Tensor, "batch k"]
) -> tuple[Int[Tensor, "batch k"], Bool[Tensor, "batch k"]]:
    """For each slot the first slot of its row in which its latent fires, and whether it is that one."""
    same = (latents[:, :, None] == latents[:, None, :]) & fires[:, None, :]
    first = same.int().argmax(dim=2)
    return first, fires & (first == torch.arange(latents.shape[1], device=latents.device))


def _step(residual: Tensor, W_dec: Tensor, correlations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    latent = correlations.argmax(dim=1)
    row = W_dec[latent]
    value = (residual * row).sum(dim=1).relu()
    return residual - value[:, None] * row, latent, value


def _codes(latents: list[Tensor], values: list[Tensor]) -> Codes:
    slots = torch.stack(latents, dim=1)
    batch, k = slots.shape
    offsets = torch.arange(batch + 1, device=slots.device) * k
    return Codes(offsets, slots.flatten(), torch.stack(values, dim=1).flatten())
