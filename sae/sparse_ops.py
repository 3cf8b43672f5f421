"""Products with sparse codes whose gradients stay sparse.

Autograd would give the encoder a dense [batch, d_sae] gradient that is zero nearly everywhere. Here both weight
gradients are sums over the few codes that fire, read off one inverted index: which samples fired each latent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import SparseCodes, flat_nonzero


class Entries(NamedTuple):
    """Where padded codes hold something, in order of sample, and the inverted index: the same in order of latent.

    Entry e lies in slot `slots[e]` of the flattened [batch, k_cap] slots. Sample b owns the entries from
    `row_offsets[b]` to `row_offsets[b + 1]`; latent j owns `by_latent[latent_offsets[j] : latent_offsets[j + 1]]`.
    """

    slots: Int[Tensor, " nnz"]
    rows: Int[Tensor, " nnz"]
    latents: Int[Tensor, " nnz"]
    row_offsets: Int[Tensor, " batch_plus_1"]
    by_latent: Int[Tensor, " nnz"]
    latent_offsets: Int[Tensor, " d_sae_plus_1"]

    @classmethod
    def of(cls, codes: SparseCodes) -> Entries:
        assert codes.indices is not None, "full codes need no index"
        values, k_cap = codes.values, codes.values.shape[1]
        if values.device.type == "cpu":
            slots = flat_nonzero(values > 0)
        else:
            # Every slot, empty ones too: their number is known without asking the device.
            slots = torch.arange(values.numel(), device=values.device)
        rows, latents = slots // k_cap, codes.indices.flatten()[slots]
        return cls(
            slots,
            rows,
            latents,
            _offsets(rows, len(values)),
            _stable_order(latents, codes.d_sae),
            _offsets(latents, codes.d_sae),
        )

    def rows_per_latent(self, weights: Float[Tensor, " nnz"], x: Float[Tensor, "batch d"]) -> Float[Tensor, "d_sae d"]:
        """sum over the entries e of latent j of weights[e] x[row of e]: a latent's gradient row."""
        order = self.by_latent
        return _weighted_bags(self.rows[order], x, self.latent_offsets, weights[order])


def _offsets(groups: Int[Tensor, " nnz"], n_groups: int) -> Int[Tensor, " n_groups_plus_1"]:
    # Not bincount: on a GPU it makes the host wait.
    counts = torch.zeros(n_groups, dtype=torch.int64, device=groups.device).index_add_(
        0, groups, torch.ones_like(groups)
    )
    return F.pad(counts.cumsum(0), (1, 0))


def _stable_order(latents: Int[Tensor, " nnz"], d_sae: int) -> Int[Tensor, " nnz"]:
    if latents.device.type == "cpu" and d_sae <= 2**15:
        # NumPy sorts 16-bit integers by radix, 15 times faster than torch sorts 64-bit ones.
        return torch.from_numpy(np.argsort(latents.numpy().astype(np.int16), kind="stable"))
    return latents.argsort(stable=True)


def _weighted_bags(indices: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


class _EncoderGradient(torch.autograd.Function):
    """Identity on values[b, i] = x[b] . encoder[j] + bias[j], j = indices[b, i]; the right side gets the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, encoder: Tensor, bias: Tensor, entries: Entries) -> Tensor:
        ctx.save_for_backward(values, x)
        ctx.entries = entries
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, x = ctx.saved_tensors
        entries: Entries = ctx.entries
        gradient = (gradients[0] * (values > 0)).flatten()[entries.slots]
        g_encoder = entries.rows_per_latent(gradient, x)
        g_bias = x.new_zeros(len(g_encoder)).index_add_(0, entries.latents, gradient)
        return None, None, g_encoder, g_bias, None


class _DecoderGradient(torch.autograd.Function):
    """Identity on decoded[b] = sum of values[e] W_dec[latent of e] over b's entries; adds W_dec's gradient."""

    @staticmethod
    def forward(ctx: Any, decoded: Tensor, values: Tensor, W_dec: Tensor, entries: Entries) -> Tensor:
        ctx.save_for_backward(values)
        ctx.entries = entries
        return decoded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        return gradients[0], None, ctx.entries.rows_per_latent(values, gradients[0]), None


def encode_decode(
    x: Float[Tensor, "batch d"],
    codes: SparseCodes,
    encoder: Float[Tensor, "d_sae d"],
    bias: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
) -> tuple[SparseCodes, Float[Tensor, "batch d_out"]]:
    """Codes chosen without a gradient, made differentiable, and what they decode to (without b_dec).

    Holds for codes that are pre-latents passed on: z = x . encoder_j + bias_j where z > 0, as TopK and BatchTopK
    select them. x is data: it gets no gradient.
    """
    entries = Entries.of(codes)
    values = _EncoderGradient.apply(codes.values, x, encoder, bias, entries)
    firing = values.flatten()[entries.slots]
    decoded = _weighted_bags(entries.latents, W_dec.detach(), entries.row_offsets, firing)
    decoded = _DecoderGradient.apply(decoded, firing.detach(), W_dec, entries)
    return SparseCodes(values, codes.indices, codes.d_sae), decoded
