"""The gradients of a step as matrices, where something must be done to them before Adam: clipping by their common
norm, summing over several parts of a batch, an exchange between processes.

A fused update never writes them to memory. It also accepts them, as rows of all latents, so every device's update
serves both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import Change, Kernels, Rows, Scalar, State

# Columns up to which a product is faster by its transpose.
NARROW = 256


class Gradients(NamedTuple):
    """Of the mean loss of `n_samples`: rows of all latents, what x_hat gives b_dec, and how often each latent fired."""

    rows: Rows
    through_x_hat: Float[Tensor, " d_out"]
    firing: Int[Tensor, " d_sae"]
    n_samples: int

    @classmethod
    def of(cls, kernels: Kernels, state: State, change: Change) -> Gradients:
        """As the update would have them: those of decoder rows of norm 1 are projected, penalties on norms are in."""
        x, gradient, plan, extra, firing, cost, pull, n_samples = change
        (g_encoder, g_decoder, g_bias), sums, fires = kernels.gradient_rows(state, x, gradient, plan)
        with_extra(Rows(None, g_encoder, g_decoder, g_bias), extra)
        if state.unit_norm:
            g_decoder -= (g_decoder * state.W_dec).sum(dim=1, keepdim=True) * state.W_dec
        else:
            along = cost * sums if pull is None else cost * sums + pull
            g_decoder += (along / state.norms.clamp_min(1e-12))[:, None] * state.W_dec
        fires = (fires if firing is None else firing).long()
        return cls(Rows(None, g_encoder, g_decoder, g_bias), gradient[: len(x)].sum(dim=0), fires, n_samples or len(x))

    def named(self, state: State) -> dict[str, Tensor]:
        """By the names of the weights that are trained. b_dec also centres the input where it is tied."""
        _, g_encoder, g_decoder, g_bias = self.rows
        g_b_dec = self.through_x_hat - g_bias @ state.encoder if state.tied else self.through_x_hat
        every = {"encoder": g_encoder, "W_dec": g_decoder, "b_enc": g_bias, "b_dec": g_b_dec}
        return {name: every[name] for name in state.first}

    def times(self, share: Scalar) -> Gradients:
        """All of them multiplied by a number, in place."""
        for part in (*self.rows[1:], self.through_x_hat):
            part.mul_(share)
        return self

    def plus(self, other: Gradients) -> Gradients:
        """Those of more samples added, in place."""
        for part, more in zip(
            (*self.rows[1:], self.through_x_hat), (*other.rows[1:], other.through_x_hat), strict=True
        ):
            part.add_(more)
        return self._replace(firing=self.firing + other.firing, n_samples=self.n_samples + other.n_samples)

    def change(self, like: Tensor) -> Change:
        """For the update, which of x wants the size alone, and of x_hat's gradient the sum."""
        rows = self.rows
        x = like.new_empty(self.n_samples, rows.encoder.shape[1])
        gradient = like.new_zeros(self.n_samples, len(self.through_x_hat))
        gradient[0] = self.through_x_hat
        return Change(x, gradient, extra=rows, firing=self.firing)


def with_extra(rows: Rows, extra: Rows | None) -> Rows:
    """Rows of all latents, with those of some (or of all) added in place."""
    if extra is not None:
        for total, part in zip(rows[1:], extra[1:], strict=True):
            if extra.latents is None:
                total.add_(part)
            else:
                total.index_add_(0, extra.latents, part)
    return rows


def clipped(kernels: Kernels, state: State, change: Change, own: Sequence[Tensor], most: float) -> Change:
    """g min(1, most / |g|), where g are all gradients together. `own` are those of further parameters, shortened in
    place. The host does not learn the norm."""
    whole = Gradients.of(kernels, state, change)
    norms = [torch.linalg.vector_norm(gradient) for gradient in (*whole.named(state).values(), *own)]
    factor = (most / torch.stack(norms).norm()).clamp_max(1)
    for gradient in own:
        gradient.mul_(factor)
    return whole.times(factor).change(change.x)


def inner_product_(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """out = left^T right, or added to it.

    The threads of a BLAS share a narrow product better by its transpose: a third of the time at 64 columns.
    """
    if right.shape[1] > NARROW:
        torch.addmm(out, left.T, right, beta=float(add), out=out)
    elif add:
        out.add_((right.T @ left).T)
    else:
        out.copy_((right.T @ left).T)
