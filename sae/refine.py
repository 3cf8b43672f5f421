"""Codes that are selected twice: what the second selection reads, and what flows back to the first.

    z_0 = select(x W_enc + b_enc)
    r_0 = target - z_0 W_dec              what these leave over
    x_1 = x + eta r_0
    z   = select(x_1 W_enc + b_enc)       the codes

Let g be the gradient in each code of z, so that h = g W_enc^T is that in x_1. Then z_0 W_dec has the gradient
q = -eta h, its codes have q W_dec^T where they fire, and b_dec has the sum of q beside its own. Both selections move
the same weights, as if they were the codes of two batches: z of x_1, with the gradient of x_hat in its decoder rows,
and z_0 of x, with q.

A proximal step between two selections is the idea of Gregor & LeCun 2010, "Learning Fast Approximations of Sparse
Coding": the second selection sees each latent's pre-latent without most of what other latents explain.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae.kernels import Codes, Kernels, State


class First(NamedTuple):
    """The first selection of a batch."""

    codes: Codes
    x: Float[Tensor, "batch d"]
    left: Float[Tensor, "batch d"]
    """What it leaves over: r_0."""
    rate: float
    """eta."""


class Twice(NamedTuple):
    """Both selections as the codes of one batch of twice the size: the second one's rows, then the first one's."""

    x: Float[Tensor, "twice_batch d"]
    gradient: Float[Tensor, "levels_x_twice_batch d"]
    codes: Codes
    code_gradients: Float[Tensor, " slots"]


def select_first(kernels: Kernels, state: State, codes: Codes, x: Tensor, target: Tensor, rate: float) -> First:
    """From the first codes, which the kernels may overwrite as soon as they select again."""
    decoded = kernels.decode(codes, state, target, 0.0)
    kept = codes._replace(offsets=codes.offsets.clone(), latents=codes.latents.clone(), values=codes.values.clone())
    return First(kept, x, decoded.gradient * (-len(x) / 2), rate)


def through_both(
    kernels: Kernels,
    state: State,
    first: First,
    codes: Codes,
    code_gradients: Float[Tensor, " slots"],
    gradient: Float[Tensor, "levels_x_batch d"],
    x: Float[Tensor, "batch d"],
) -> Twice:
    """From the gradients of the second selection, whose `x` is x_1, to those of both."""
    batch, n_levels = len(x), len(codes.weights)
    whole = gradient.new_zeros(n_levels, 2 * batch, gradient.shape[1])
    whole[:, :batch] = gradient.view(n_levels, batch, -1)
    code_gradients = code_gradients.clone()  # the kernels' own memory, as `gradient` is
    h = F.embedding_bag(
        codes.latents,
        state.encoder,
        codes.offsets.to(codes.latents.dtype),
        mode="sum",
        per_sample_weights=code_gradients,
        include_last_offset=True,
    )
    # A decoder's pass over codes of 0 gives -2 wanted / batch, which is q for this, and q W_dec^T in every slot.
    nothing = torch.zeros_like(first.codes.values)
    wanted = h * (first.rate * batch / 2)
    back = kernels.decode(first.codes._replace(values=nothing, pre_latents=nothing), state, wanted, 0.0)
    whole[0, batch:] = back.gradient
    through_first = back.code_gradients * (first.codes.values > 0)
    levels = None
    if codes.levels is not None:
        levels = torch.cat([codes.levels, codes.levels.new_zeros(len(first.codes.latents))])
    both = codes._replace(
        offsets=torch.cat([codes.offsets, first.codes.offsets[1:] + len(codes.latents)]),
        latents=torch.cat([codes.latents, first.codes.latents]),
        values=torch.cat([codes.values, first.codes.values]),
        levels=levels,
    )
    x = torch.cat([x, first.x])
    return Twice(x, whole.flatten(0, 1), both, torch.cat([code_gradients, through_first]))
