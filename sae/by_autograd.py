"""A step's gradients where the engine does not know them: for any differentiable sparsifier."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae import losses
from sae.codes import SparseCodes
from sae.kernels import Rows, Scalar, State
from sae.levels import Levels
from sae.model import SAE


class Differentiated(NamedTuple):
    """A batch's codes and what they were selected from, the loss, and its gradients.

    `gradient` is that in x_hat, as b_dec takes part in it: in both of them, where codes are selected twice.
    """

    codes: SparseCodes
    read: Float[Tensor, "batch d_in"]
    error: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    gradient: Float[Tensor, "batch d_out"]
    rows: Rows


def differentiated(
    sae: SAE, state: State, levels: Levels, x: Tensor, target: Tensor, sparsity: Scalar
) -> Differentiated:
    """The sparsifier's objective on centred activations, its penalty times `sparsity`, and their gradients."""
    sparsifier = sae.sparsifier
    leaves = [weight.detach().requires_grad_() for weight in (state.encoder, state.W_dec, state.b_enc)]
    encoder, W_dec, b_enc = leaves
    offset = torch.zeros_like(target).requires_grad_()  # its gradient is that of x_hat

    def error(codes: SparseCodes, W_dec: Tensor) -> Tensor:
        wanted = target - (offset if W_dec.requires_grad else offset.detach())
        return losses.nested_reconstruction(codes, W_dec, wanted, levels.of, levels.weights, levels.detached)

    with torch.enable_grad():
        read = x
        if sparsifier.refine and sparsifier.first is not None:
            first = sparsifier.first(x @ encoder.T + b_enc)
            read = x + sparsifier.refine * (target - offset - first.decode(W_dec))
        codes, errors, penalty = sparsifier.objective(read @ encoder.T + b_enc, W_dec, error)
        (errors if penalty is None else errors + penalty * sparsity).backward()
    assert offset.grad is not None
    charged = x.new_zeros(()) if penalty is None else penalty.detach() * sparsity
    rows = Rows(None, *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves))
    return Differentiated(codes, read.detach(), errors.detach(), charged, offset.grad, rows)
