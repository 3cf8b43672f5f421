"""What fires, how often and how strongly: sparse batches of ground-truth features.

A batch is drawn, stored and embedded through its active entries alone, because at p = .01 the 99 % of zeros
of a dense batch would cost more than the model that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

# Hazard of a feature that always fires: it misses once in e^40 = 2e17 rows.
CERTAIN = 40.0


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """Activations x [*leading, n_features] in compressed rows (CSR), the leading axes flattened row-major.

    Row r holds the entries offsets[r] to offsets[r + 1]: feature `indices[e]` is active at `values[e]`.
    """

    indices: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    offsets: Int[Tensor, " rows_plus_1"]
    shape: tuple[int, ...]

    @property
    def n_features(self) -> int:
        return self.shape[-1]

    def __len__(self) -> int:
        """Number of rows."""
        return prod(self.shape[:-1])

    def __getitem__(self, rows: slice) -> FeatureBatch:
        """Some consecutive rows of a [batch, n_features] batch."""
        start, stop, step = rows.indices(len(self))
        if len(self.shape) != 2 or step != 1:
            raise ValueError(
                f"only consecutive rows of a [batch, n_features] batch can be sliced, got {rows} of shape "
                f"{list(self.shape)}; take rows with step 1, or index dense()"
            )
        stop = max(start, stop)
        offsets = self.offsets[start : stop + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        return FeatureBatch(
            self.indices[entries], self.values[entries], offsets - offsets[0], (stop - start, self.n_features)
        )

    def to(self, device: torch.device | str) -> FeatureBatch:
        """The batch on another device."""
        return FeatureBatch(self.indices.to(device), self.values.to(device), self.offsets.to(device), self.shape)

    @cached_property
    def positions(self) -> Int[Tensor, " nnz"]:
        """Where each entry lies in dense().flatten(): row * n_features + feature."""
        starts = torch.arange(0, len(self) * self.n_features, self.n_features, device=self.indices.device)
        counts = self.offsets.diff()
        return self.indices + starts.repeat_interleave(counts, output_size=len(self.indices))

    def dense(self) -> Float[Tensor, "*leading n_features"]:
        """x as a dense tensor."""
        x = self.values.new_zeros(prod(self.shape))
        return x.index_put_((self.positions,), self.values).view(self.shape)

    def embed(
        self, W: Float[Tensor, "n_features d"] | Float[Tensor, "n_instances n_features d"]
    ) -> Float[Tensor, "*leading d"]:
        """x W: each row adds up the rows of W that belong to its active features.

        One W serves every row; a stack of them needs leading = (n_instances, batch), and each serves its own
        rows. Differentiable in W.

        Raises:
            ValueError: W does not fit the batch.
        """
        fits = self.shape[-1:] if W.ndim == 2 else (self.shape[0], self.n_features)
        if W.shape[:-1] != fits or W.ndim > len(self.shape):
            raise ValueError(
                f"W of shape {list(W.shape)} cannot embed features of shape {list(self.shape)}; pass "
                "[n_features, d], or [n_instances, n_features, d] for [n_instances, batch, n_features]"
            )
        indices = self.indices
        if W.ndim == 3:
            starts = torch.arange(0, W.shape[0] * self.n_features, self.n_features, device=W.device)
            counts = self.offsets[:: self.shape[1]].diff()
            indices = indices + starts.repeat_interleave(counts, output_size=len(indices))
            W = rearrange(W, "i n d -> (i n) d")
        embedded = F.embedding_bag(
            indices,
            W,
            self.offsets,
            mode="sum",
            per_sample_weights=self.values.to(W.dtype),
            include_last_offset=True,
        )
        return embedded.view(*self.shape[:-1], W.shape[-1])

    @classmethod
    def from_dense(cls, x: Float[Tensor, "*leading n_features"]) -> FeatureBatch:
        """The non-zero entries of x."""
        flat = x.flatten()
        positions = flat.nonzero().squeeze(1)
        return _compressed(positions, flat[positions], tuple(x.shape))


def _compressed(positions: Int[Tensor, " nnz"], values: Float[Tensor, " nnz"], shape: tuple[int, ...]) -> FeatureBatch:
    """The batch with these values at these increasing positions of its flattened entries."""
    rows = positions // shape[-1]
    offsets = F.pad(torch.bincount(rows, minlength=prod(shape[:-1])).cumsum(0), (1, 0))
    batch = FeatureBatch(positions - rows * shape[-1], values, offsets, shape)
    batch.__dict__["positions"] = positions  # known already: fills the cached property
    return batch


@dataclass(frozen=True)
class Features:
    """Independent features x_i ~ Bernoulli(p_i) · U[0, 1] of importance I_i (Elhage et al. 2022, section 2).

    p_i = `feature_prob` is 1 − S for sparsity S; both it and `importance` are one number for all the
    features, or one for each.

    Raises:
        ValueError: no features, a probability outside [0, 1], a negative importance, a wrong number of them.
    """

    n_features: int
    feature_prob: float | Sequence[float] | Float[Tensor, " n_features"]
    importance: float | Sequence[float] | Float[Tensor, " n_features"] = 1.0

    def __post_init__(self) -> None:
        if self.n_features < 1:
            raise ValueError(f"n_features must be at least 1, got {self.n_features}")
        for name in ("feature_prob", "importance"):
            given = getattr(self, name)
            if isinstance(given, Tensor | Sequence):
                # Plain floats keep the world hashable and comparable.
                given = tuple(torch.as_tensor(given, dtype=torch.float64).tolist())
                if len(given) != self.n_features:
                    raise ValueError(
                        f"{name} must be one number or n_features={self.n_features} of them, got {len(given)}"
                    )
                object.__setattr__(self, name, given)
        if not ((self.probs >= 0) & (self.probs <= 1)).all():
            raise ValueError(f"feature_prob must lie in [0, 1], got {self.feature_prob}; it is 1 − sparsity")
        if not (self.importances >= 0).all():
            raise ValueError(f"importance must not be negative, got {self.importance}; 0 ignores a feature")

    @cached_property
    def probs(self) -> Float[Tensor, " n_features"]:
        """p_i, in float64."""
        return torch.as_tensor(self.feature_prob, dtype=torch.float64).expand(self.n_features)

    @cached_property
    def importances(self) -> Float[Tensor, " n_features"]:
        """I_i."""
        return torch.as_tensor(self.importance, dtype=torch.float32).expand(self.n_features)

    @cached_property
    def _hazard(self) -> Float[Tensor, " n_features"]:
        """Λ_i = Σ_{j≤i} λ_j, λ_j = −log(1 − p_j): the expected events of a row up to feature i."""
        return (-torch.log1p(-self.probs)).clamp(max=CERTAIN).cumsum(0)

    @property
    def mostly_dense(self) -> bool:
        """Whether so many features fire (p above about .22) that a draw for each entry is cheaper."""
        return bool(self._hazard[-1] > self.n_features / 4)

    def sample(self, batch_size: int, generator: torch.Generator, n_instances: int | None = None) -> FeatureBatch:
        """A batch on the generator's device: [batch_size, n_features], n_instances in front if given.

        Raises:
            ValueError: batch_size or n_instances below 1.
        """
        if self.mostly_dense:
            return FeatureBatch.from_dense(self.sample_dense(batch_size, generator, n_instances))
        shape = self._shape(batch_size, n_instances)
        positions = self._fire(prod(shape[:-1]), 1, generator)
        values = torch.rand(len(positions), generator=generator, device=generator.device)
        return _compressed(positions, values, shape)

    def sample_dense(
        self,
        batch_size: int,
        generator: torch.Generator,
        n_instances: int | None = None,
        *,
        out: Float[Tensor, "*leading n_features"] | None = None,
    ) -> Float[Tensor, "*leading n_features"]:
        """The same distribution as a tensor, in which the batch of each feature is contiguous (x.mT is).

        `out`, the result of an earlier call, is overwritten: fresh memory costs more than the draws.
        """
        shape = self._shape(batch_size, n_instances)
        groups, device = prod(shape[:-2]), generator.device
        size = (groups, self.n_features, batch_size)
        x = torch.empty(size, device=device) if out is None else out.mT.view(size)
        if self.mostly_dense:  # a draw u for each entry: it fires if u < p_i, at u / p_i
            probs = self.probs[:, None].to(device, torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
            torch.threshold_(x.uniform_(generator=generator).div_(-probs), -1.0, 0.0).abs_()
        else:
            positions = self._fire(groups, batch_size, generator)
            x.zero_().put_(positions, torch.rand(len(positions), generator=generator, device=device))
        return x.mT.view(shape) if n_instances is None else x.mT

    def _fire(self, groups: int, repeats: int, generator: torch.Generator) -> Int[Tensor, " nnz"]:
        """Increasing positions of the entries of a [groups, n_features, repeats] tensor that fire.

        A Poisson process of unit rate runs along an axis on which each entry of feature i has length λ_i.
        An entry fires when at least one event falls on it: independently, with probability
        1 − exp(−λ_i) = p_i. The cost is that of the events, groups · repeats · Σλ_i, whatever n_features is.
        """
        device, n = generator.device, self.n_features
        expected = (groups * repeats * self._hazard[-1]).to(device)
        n_events = int(torch.poisson(expected, generator=generator))
        # Cumulated exponential gaps, over their total, are sorted uniform times: nothing is left to sort.
        draws = torch.rand(n_events + 1, generator=generator, device=device, dtype=torch.float64)
        times = draws.neg_().add_(1).log_().cumsum(0)
        if isinstance(self.feature_prob, float | int):
            size = groups * n * repeats
            return torch.unique_consecutive((times[:-1] * (size / times[-1])).long().clamp_(max=size - 1))
        times = times[:-1] * (groups / times[-1])
        group = times.long().clamp_(max=groups - 1)
        within = times - group
        upper = (self._hazard / self._hazard[-1]).to(device)
        feature = torch.searchsorted(upper, within, right=True).clamp_(max=n - 1)
        width = upper.diff(prepend=upper.new_zeros(1))
        from_end = (upper[feature] - within) * (repeats / width[feature])
        repeat = repeats - 1 - from_end.long().clamp_(0, repeats - 1)
        return torch.unique_consecutive((group * n + feature) * repeats + repeat)

    def _shape(self, batch_size: int, n_instances: int | None) -> tuple[int, ...]:
        leading = (batch_size,) if n_instances is None else (n_instances, batch_size)
        shape = (*leading, self.n_features)
        if min(shape) < 1:
            raise ValueError(f"batch_size and n_instances must be at least 1, got shape {list(shape)}")
        return shape
