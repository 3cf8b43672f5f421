"""Products with sparse codes whose gradients stay sparse.

Autograd would give the encoder a dense [batch, d_sae] gradient that is zero nearly everywhere. Here both weight
gradients are sums over the few codes that fire, read off one inverted index: which samples fired each latent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import SparseCodes


class InvertedIndex(NamedTuple):
    """The slots of padded codes in order of latent: latent j owns slots[offsets[j] : offsets[j + 1]]."""

    slots: Int[Tensor, " n_slots"]
    offsets: Int[Tensor, " d_sae_plus_1"]
    k_cap: int

    @classmethod
    def of(cls, codes: SparseCodes) -> InvertedIndex:
        assert codes.indices is not None, "full codes need no index"
        # Slots that hold nothing sort behind the last latent, where nobody reads them.
        latents = codes.indices.masked_fill(codes.values <= 0, codes.d_sae)
        ranked, slots = latents.flatten().sort(stable=True)
        bounds = torch.searchsorted(ranked, torch.arange(codes.d_sae + 1, device=ranked.device))
        return cls(slots, bounds, latents.shape[1])

    def rows_per_latent(
        self, weights: Float[Tensor, "batch k_cap"], x: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "d_sae d"]:
        """sum over slots (b, i) of latent j of weights[b, i] x[b]: a latent's gradient row."""
        return F.embedding_bag(
            self.slots // self.k_cap,
            x,
            self.offsets,
            mode="sum",
            per_sample_weights=weights.flatten()[self.slots],
            include_last_offset=True,
        )


class _EncoderGradient(torch.autograd.Function):
    """Identity on values[b, i] = x[b] . encoder[j] + bias[j], j = indices[b, i]; its gradient goes to the right side."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, x: Tensor, encoder: Tensor, bias: Tensor, indices: Tensor, inverted: InvertedIndex
    ) -> Tensor:
        ctx.save_for_backward(values, x, indices)
        ctx.inverted = inverted
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, x, indices = ctx.saved_tensors
        gradient = gradients[0] * (values > 0)
        g_encoder = ctx.inverted.rows_per_latent(gradient, x)
        g_bias = x.new_zeros(len(g_encoder)).index_add_(0, indices.flatten(), gradient.flatten())
        return None, None, g_encoder, g_bias, None, None


class _DecoderGradient(torch.autograd.Function):
    """Identity on decoded[b] = sum_i values[b, i] W_dec[indices[b, i]]; adds W_dec's gradient."""

    @staticmethod
    def forward(ctx: Any, decoded: Tensor, values: Tensor, W_dec: Tensor, inverted: InvertedIndex) -> Tensor:
        ctx.save_for_backward(values)
        ctx.inverted = inverted
        return decoded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        return gradients[0], None, ctx.inverted.rows_per_latent(values, gradients[0]), None


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
    assert codes.indices is not None, "full codes have a dense gradient anyway"
    inverted = InvertedIndex.of(codes)
    values = _EncoderGradient.apply(codes.values, x, encoder, bias, codes.indices, inverted)
    passed = SparseCodes(values, codes.indices, codes.d_sae)
    decoded = _DecoderGradient.apply(passed.decode(W_dec.detach()), codes.values, W_dec, inverted)
    return passed, decoded
