"""A ReLU's step while most latents fire, for kernels without their own dense step: five dense products."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.gradients import inner_product_
from sae.kernels import Buffers, DenseStep, Kernels, Rows, Scalar, State, base, blocks


def dense_by_blocks(
    kernels: Kernels,
    state: State,
    buffer: Buffers,
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    cost: Scalar,
) -> DenseStep:
    """z = max(0, pre), a block of rows at a time; `cost` is what a unit of z |W_dec_j| is charged."""
    rows = Rows(None, buffer("encoder", state.encoder.shape), buffer("W_dec", state.W_dec.shape), x.new_zeros(0))
    gradient, squares, code_sum = buffer("gradient", target.shape), x.new_zeros(()), x.new_zeros(())
    bias, charged = torch.zeros_like(state.b_enc), torch.zeros_like(state.b_enc)
    firing = torch.zeros_like(state.silent_samples)
    for block in blocks(len(x), len(state.b_enc), base.DENSE_BLOCK_ENTRIES):
        part, add = x[block], block.start > 0
        z = kernels.relu(part, state)
        residual = torch.mm(z.values, state.W_dec, out=gradient[block]).sub_(target[block])
        squares += residual.square().sum()
        own = residual.mul_(2 / len(x))
        through = torch.mm(own, state.W_dec.T, out=buffer("through", tuple(z.values.shape)))
        masked, g_bias = kernels.relu_backward(through, z, state, cost)
        inner_product_(rows.encoder, masked, part, add)
        inner_product_(rows.W_dec, z.values, own, add)
        bias += g_bias
        firing += z.firing
        code_sum += z.code_sums.sum()
        if state.charged_norms is not None:
            charged += z.values.sum(dim=0)
    if state.charged_norms is not None:
        rows.W_dec.addcmul_((cost * charged / state.norms.clamp_min(1e-12))[:, None], state.W_dec)
    return DenseStep(rows._replace(b_enc=bias), gradient, firing, squares, code_sum)
