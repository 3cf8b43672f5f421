"""The terms of the training objective: pure functions of tensors.

Activations are in units of the square root of their total variance s (see `sae.trainer`), so that each term is
free of scale: in the units of the data the objective reads

    |x - x_hat|^2 / s  +  lambda * sum_j z_j |W_dec_j| / sqrt(s)  +  alpha * |e - e_hat|^2 / s
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import SparseCodes


def nested_reconstruction(
    codes: SparseCodes,
    W_dec: Float[Tensor, "d_sae d"],
    target: Float[Tensor, "batch d"],
    levels: Int[Tensor, " d_sae"],
    weights: Sequence[float],
    detached: bool = False,
) -> Float[Tensor, ""]:
    """sum_l w_l |r_l|^2 with r_l = target - sum of z_j W_dec_j over the latents of levels up to l: those of the first
    levels alone reconstruct as well as they can.

    Matryoshka SAEs (Bussmann et al. 2025, section 3); one level is the plain reconstruction. Where they are
    `detached`, all but the last term take the levels before their own as given: r_l = constant(r_{l-1}) - own.
    """
    z, left, whole, errors = codes.dense(), target, target, []
    for level in range(len(weights)):
        own = z.masked_fill(levels != level, 0) @ W_dec
        whole = whole - own
        left = whole if level + 1 == len(weights) or not (detached and level) else left.detach() - own
        errors.append(left.square().sum(dim=1).mean())
    return torch.stack([w * error for w, error in zip(weights, errors, strict=True)]).sum()


def l1(codes: SparseCodes, W_dec: Float[Tensor, "d_sae d"], weighted: bool = True) -> Float[Tensor, ""]:
    """sum_j z_j |W_dec_j|, averaged over samples; or sum_j z_j, where it is not `weighted`.

    Weighting by the decoder's norms closes the loophole of small codes on long rows (Conerly et al. 2024,
    "Circuits Updates, April 2024"); with unit rows it is the plain L1 of Bricken et al. 2023.
    """
    per_sample = codes.weighted_sum(W_dec.norm(dim=1)) if weighted else codes.values.sum(dim=1)
    return per_sample.mean()


def aux_k(
    gradient: Float[Tensor, "batch d"],
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "n_dead d_in"],
    b_enc: Float[Tensor, " n_dead"],
    W_dec: Float[Tensor, "n_dead d"],
    k: int,
) -> tuple[Float[Tensor, ""], tuple[Tensor, Tensor, Tensor]]:
    """AuxK, and its gradients in the rows of the dead latents (encoder, W_dec, b_enc).

        |e - e_hat|^2,  e = x - x_hat,  e_hat = sum over the k largest s_j > 0 of s_j W_dec_j,  s = x W_enc + b_enc

    e is what the live latents leave over, e_hat its best sketch by dead ones; no bias, since a residual has none to
    give back. No live latent gets a gradient: e is a constant (Gao et al. 2024, appendix A.2). x is centred. Few
    latents are dead at a time, so that dense products beat k scattered reads a sample. `gradient` is 2 (x_hat - x) /
    batch, the reconstruction's own, from which both e and the gradient in e_hat are one product away.
    """
    scores = torch.addmm(b_enc, x, encoder.T).relu_()
    if k < scores.shape[1]:
        cut = scores.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        scores.masked_fill_(scores < cut, 0)
    batch = len(x)
    g_sketch = torch.addmm(gradient, scores, W_dec, alpha=2 / batch)
    value = torch.linalg.vector_norm(g_sketch).square() * (batch / 4)
    through = (g_sketch @ W_dec.T).masked_fill_(scores <= 0, 0)
    return value, (through.T @ x, scores.T @ g_sketch, through.sum(dim=0))


def total_variance(x: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """s = E|x - mean x|^2, in float64; a float64 copy of x exists in pieces alone."""
    parts = x.split(8192)
    mean = torch.stack([part.sum(dim=0, dtype=torch.float64) for part in parts]).sum(dim=0) / len(x)
    return torch.stack([(part - mean).square().sum() for part in parts]).sum() / len(x)


def geometric_median(x: Float[Tensor, "batch d"], n_steps: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d"]:
    """argmin_m sum |x - m| by Weiszfeld's iteration; unlike the mean it ignores a few huge rows."""
    median = x.double().mean(dim=0)
    for _ in range(n_steps):
        weight = 1 / (x - median).norm(dim=1, keepdim=True).clamp_min(1e-12)
        previous, median = median, (weight * x).sum(dim=0) / weight.sum()
        if torch.allclose(previous, median, rtol=0, atol=tolerance * float(median.norm())):
            break
    return median.to(x.dtype)
