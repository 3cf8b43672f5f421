"""x_hat of padded codes: k decoder rows a sample, and nothing else."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.triton.index import at_once
from sae.kernels.triton.launch import power, warps


@triton.jit
@no_type_check
def _reconstruct(values, latents, W_dec, out, k, d, D: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    x_hat = tl.zeros([D], tl.float32)
    for first in range(0, k, K):
        slots = first + tl.arange(0, K)
        z = tl.load(values + row * k + slots, mask=slots < k, other=0.0)
        j = tl.load(latents + row * k + slots, mask=slots < k, other=0).to(tl.int64)
        read = (z != 0)[:, None] & (columns < d)[None, :]
        x_hat += tl.sum(z[:, None] * tl.load(W_dec + j[:, None] * d + columns[None, :], mask=read, other=0.0), axis=0)
    tl.store(out + row * d + columns, x_hat, mask=columns < d)


def reconstruct(
    values: Float[Tensor, "batch k"], latents: Int[Tensor, "batch k"], W_dec: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "batch d"]:
    """sum_j z_j W_dec_j."""
    (batch, k), d = values.shape, W_dec.shape[1]
    out = torch.empty(batch, d, dtype=values.dtype, device=values.device)
    width, rows = power(d), at_once(d, d)
    given = (values.contiguous(), latents.contiguous(), W_dec.contiguous())
    _reconstruct[(batch,)](*given, out, k, d, D=width, K=rows, num_warps=warps(width * rows))
    return out
