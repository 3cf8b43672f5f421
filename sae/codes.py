"""Sparse codes: the currency between encoder, decoder, losses and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SparseCodes:
    """Codes z [batch, d_sae] of which only a few entries of each row fire (z > 0).

    Two layouts share one interface:

    * padded: row b holds its entries in `values[b]` and the latents they belong to in `indices[b]`. Rows
      have k_cap slots; a slot that holds nothing has value 0 (its index is any valid latent).
    * full: `indices` is None, k_cap = d_sae, and slot j is latent j. This is how codes look before they
      are sparse, and how a differentiable selection over a whole batch hands them on.
    """

    values: Float[Tensor, "batch k_cap"]
    indices: Int[Tensor, "batch k_cap"] | None
    d_sae: int

    @property
    def counts(self) -> Int[Tensor, " batch"]:
        """Number of latents that fire in each row (the row's L0)."""
        return (self.values > 0).sum(dim=1)

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, rows: slice | Int[Tensor, " rows"]) -> SparseCodes:
        """The codes of some rows."""
        return SparseCodes(
            self.values[rows], None if self.indices is None else self.indices[rows], self.d_sae
        )

    def to(self, *args: torch.device | torch.dtype | str) -> SparseCodes:
        """Moves the codes; a dtype applies to the values only."""
        values = self.values.to(*args)
        indices = None if self.indices is None else self.indices.to(values.device)
        return SparseCodes(values, indices, self.d_sae)

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """z as a matrix."""
        if self.indices is None:
            return self.values
        empty = self.values.new_zeros(len(self), self.d_sae)
        return empty.scatter_add(1, self.indices, self.values)

    def decode(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "batch d_out"]:
        """z W_dec: a dense product for the full layout, k_cap decoder rows a sample for the padded one."""
        if self.indices is None:
            return self.values @ W_dec
        return F.embedding_bag(self.indices, W_dec, per_sample_weights=self.values, mode="sum")

    def fired(self) -> Bool[Tensor, " d_sae"]:
        """Which latents fire at least once in this batch, found without a host synchronisation."""
        if self.indices is None:
            return (self.values > 0).any(dim=0)
        fired = torch.zeros(self.d_sae, dtype=torch.int32, device=self.values.device)
        ones = (self.values > 0).to(torch.int32)
        return fired.scatter_add_(0, rearrange(self.indices, "b k -> (b k)"), rearrange(ones, "b k -> (b k)")) > 0

    def scaled(self, factor: float | Float[Tensor, " d_sae"]) -> SparseCodes:
        """z_j multiplied by a factor, or by one factor for each latent."""
        if isinstance(factor, Tensor) and self.indices is not None:
            factor = factor[self.indices]
        return SparseCodes(self.values * factor, self.indices, self.d_sae)

    def compact(self) -> SparseCodes:
        """The same codes padded to the longest row, each row's entries in order of latent."""
        dense = self.dense()
        k_cap = int((dense > 0).sum(dim=1).max()) if len(dense) else 0
        firing, order = (dense > 0).to(torch.int8).sort(dim=1, descending=True, stable=True)
        indices = order[:, : max(k_cap, 1)]
        return SparseCodes(dense.gather(1, indices) * firing[:, : max(k_cap, 1)], indices, self.d_sae)

    @classmethod
    def cat(cls, parts: Sequence[SparseCodes]) -> SparseCodes:
        """Stacks batches of codes; padded rows are widened to the widest part."""
        if any(part.indices is None for part in parts):
            return cls(torch.cat([part.dense() for part in parts]), None, parts[0].d_sae)
        k_cap = max(part.values.shape[1] for part in parts)
        pad = [(0, k_cap - part.values.shape[1]) for part in parts]
        values = torch.cat([F.pad(part.values, p) for part, p in zip(parts, pad, strict=True)])
        indices = torch.cat([F.pad(part.indices, p) for part, p in zip(parts, pad, strict=True) if part.indices is not None])
        return cls(values, indices, parts[0].d_sae)
