"""Codes that are selected twice: what the second selection reads, and what flows back to the first.

    z_0 = select(x W_enc + b_enc) r_0 = target - z_0 W_dec              their residual x_1 = x + eta r_0 z   =
    select(x_1 W_enc + b_enc)       the codes

Let g be the gradient in each code of z, so that h = g W_enc^T is that in x_1. Then z_0 W_dec has the gradient
q = -eta h, its codes have q W_dec^T where they fire, and b_dec has the sum of q beside its own. Both selections move
the same weights, as if they were the codes of two batches: z of x_1, with the gradient of x_hat in its decoder rows,
and z_0 of x, with q.

A proximal step between two selections is the idea of Gregor & LeCun 2010, "Learning Fast Approximations of Sparse
Coding": the second selection sees each latent's pre-latent without most of what other latents explain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae.kernels import Buffers, Codes, Kernels, State


class First(NamedTuple):
    """The first selection of a batch."""

    codes: Codes
    x: Float[Tensor, "twice_batch d"]
    """What was read: x_1, and behind it x."""


class Twice(NamedTuple):
    """Both selections as the codes of one batch of twice the size: the second one's rows, then the first one's."""

    x: Float[Tensor, "twice_batch d"]
    gradient: Float[Tensor, "levels_x_twice_batch d"]
    codes: Codes
    code_gradients: Float[Tensor, " slots"]


class Refinement:
    """The second selection of an engine's steps; `rate` is eta, 0 where there is none."""

    def __init__(self, rate: float, buffer: Buffers) -> None:
        self.rate, self.buffer = rate, buffer
        self.cut = 0.0
        """From where the second selection's search begins, as the kernels' own is of the first."""

    def again(
        self,
        kernels: Kernels,
        state: State,
        codes: Codes,
        x: Float[Tensor, "batch d"],
        target: Float[Tensor, "batch d"],
        choose: Callable[[Tensor], Codes | None],
    ) -> tuple[First, Codes | None]:
        """From the first codes, which the kernels overwrite as they select again, to the second ones."""
        batch, d = x.shape
        both = self.buffer("refined", (2 * batch, d))
        left = kernels.decode(codes, state, target, 0.0).gradient  # -2 r_0 / batch
        torch.add(x, left, alpha=-self.rate * batch / 2, out=both[:batch])
        both[batch:] = x
        kept = codes._replace(offsets=codes.offsets.clone(), latents=codes.latents.clone(), values=codes.values.clone())
        kernels.cut, self.cut = self.cut, kernels.cut
        codes_again = choose(both[:batch])
        kernels.cut, self.cut = self.cut, kernels.cut
        return First(kept, both), codes_again

    def back(
        self,
        kernels: Kernels,
        state: State,
        first: First,
        codes: Codes,
        code_gradients: Float[Tensor, " slots"],
        gradient: Float[Tensor, "levels_x_batch d"],
    ) -> Twice:
        """From the gradients of the second selection to those of both."""
        batch, n_levels = len(first.x) // 2, len(codes.weights)
        whole = self.buffer("refined_gradient", (n_levels, 2 * batch, gradient.shape[1]))
        whole[:, :batch] = gradient.view(n_levels, batch, -1)
        whole[1:, batch:].zero_()  # the first selection is read once
        n_codes = len(codes.values)
        both_gradients = code_gradients.new_empty(n_codes + len(first.codes.values))
        both_gradients[:n_codes] = code_gradients  # the kernels' own memory, as `gradient` is
        h = F.embedding_bag(
            codes.latents,
            state.encoder,
            codes.offsets.to(codes.latents.dtype),
            mode="sum",
            per_sample_weights=both_gradients[:n_codes],
            include_last_offset=True,
        )
        # A decoder's pass over codes of 0 gives -2 wanted / batch, which is q for this, and q W_dec^T in every slot.
        nothing = torch.zeros_like(first.codes.values)
        wanted = h.mul_(self.rate * batch / 2)
        returned = kernels.decode(first.codes._replace(values=nothing, pre_latents=nothing), state, wanted, 0.0)
        whole[0, batch:] = returned.gradient
        torch.mul(returned.code_gradients, first.codes.values > 0, out=both_gradients[n_codes:])
        levels = None
        if codes.levels is not None:
            levels = torch.cat([codes.levels, codes.levels.new_zeros(len(first.codes.latents))])
        both = codes._replace(
            offsets=torch.cat([codes.offsets, first.codes.offsets[1:] + n_codes]),
            latents=torch.cat([codes.latents, first.codes.latents]),
            values=torch.cat([codes.values, first.codes.values]),
            levels=levels,
        )
        return Twice(first.x, whole.flatten(0, 1), both, both_gradients)
