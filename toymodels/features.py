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

from toymodels.co_firing import CoFiring
from toymodels.errors import UsageError
from toymodels.streams import uniform_

Numbers = float | Sequence[float] | Sequence[Sequence[float]] | Float[Tensor, "*instances n_features"]

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
    def cat(cls, parts: Sequence[FeatureBatch]) -> FeatureBatch:
        """Batches [batch, n_features] one after the other."""
        counts = torch.cat([parts[0].offsets[:1], *(part.offsets.diff() for part in parts)])
        indices, values = (torch.cat([getattr(part, name) for part in parts]) for name in ("indices", "values"))
        return cls(indices, values, counts.cumsum(0), (len(counts) - 1, parts[0].n_features))

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
    """Features x_i = fires_i · U[0, 1] of importance I_i, independent unless `co_firing` says otherwise.

    fires_i ~ Bernoulli(p_i), where p_i = `feature_prob` is 1 − S for sparsity S (Elhage et al. 2022, section 2).
    Both it and `importance` are one number for all the features, one for each, or one for each instance and
    feature, [n_instances, n_features] or [n_instances, 1]: a stack of models then sweeps over them. `signed`
    features are U[−1, 1] where they fire.

    Raises:
        UsageError: no features, a probability outside [0, 1], a negative importance, a wrong number of them, or
            features that cannot fire together as asked.
    """

    n_features: int
    feature_prob: Numbers
    importance: Numbers = 1.0
    signed: bool = False
    co_firing: CoFiring | None = None

    def __post_init__(self) -> None:
        if self.n_features < 1:
            raise UsageError(f"n_features must be at least 1, got {self.n_features}; raise it")
        for name in ("feature_prob", "importance"):
            given = getattr(self, name)
            if isinstance(given, Tensor | Sequence):
                # Plain floats keep the world hashable and comparable.
                table = torch.as_tensor(given, dtype=torch.float64)
                widths = (self.n_features,) if table.ndim == 1 else (self.n_features, 1)
                if table.ndim not in (1, 2) or table.shape[-1] not in widths:
                    raise UsageError(
                        f"{name} must be one number, n_features={self.n_features} of them, or a row of either for "
                        f"each instance, got shape {list(table.shape)}"
                    )
                rows = table.tolist()
                object.__setattr__(self, name, tuple(map(tuple, rows)) if table.ndim == 2 else tuple(rows))
        if not ((self._gates >= 0) & (self._gates <= 1)).all():
            raise UsageError(f"feature_prob must lie in [0, 1], got {self.feature_prob}; it is 1 − sparsity")
        if not (self.importances >= 0).all():
            raise UsageError(f"importance must not be negative, got {self.importance}; 0 ignores a feature")
        if self.co_firing is not None:
            self.co_firing.check(self._gates)
        _ = self.n_instances

    @cached_property
    def n_instances(self) -> int | None:
        """How many instances have probabilities or importances of their own; None when all share them."""
        counts = {len(table) for table in (self._gates, self.importances) if table.ndim == 2}
        if len(counts) > 1:
            raise UsageError(
                f"feature_prob and importance are given for different numbers of instances, {counts}; give "
                "both for one number"
            )
        return counts.pop() if counts else None

    @cached_property
    def _gates(self) -> Float[Tensor, "*instances n_features"]:
        """p_i as given, in float64."""
        return self._table(self.feature_prob, torch.float64)

    @cached_property
    def probs(self) -> Float[Tensor, "*instances n_features"]:
        """P(x_i ≠ 0), in float64."""
        return self._gates if self.co_firing is None else self.co_firing.marginals(self._gates)

    @cached_property
    def importances(self) -> Float[Tensor, "*instances n_features"]:
        """I_i."""
        return self._table(self.importance, torch.float32)

    def _table(self, given: Numbers, dtype: torch.dtype) -> Tensor:
        table = torch.as_tensor(given, dtype=dtype)
        return table.expand(*table.shape[:-1], self.n_features)

    @cached_property
    def _hazard(self) -> Float[Tensor, " n_features_of_all_instances"]:
        """Λ_i = Σ_{j≤i} λ_j, λ_j = −log(1 − p_j): the expected events of a row up to feature i."""
        return (-torch.log1p(-self._gates)).clamp(max=CERTAIN).flatten().cumsum(0)

    @property
    def mostly_dense(self) -> bool:
        """Whether so many features fire (p above about .22) that a draw for each entry is cheaper."""
        return bool(self._hazard[-1] > len(self._hazard) / 4)

    def sample(self, batch_size: int, generator: torch.Generator, n_instances: int | None = None) -> FeatureBatch:
        """A batch on the generator's device: [batch_size, n_features], n_instances in front if given.

        Raises:
            UsageError: batch_size or n_instances below 1, or not the number of instances of these features.
        """
        if self.mostly_dense or self.co_firing is not None or self.n_instances is not None:
            return FeatureBatch.from_dense(self.sample_dense(batch_size, generator, n_instances))
        shape = self._shape(batch_size, n_instances)
        positions = self._fire(prod(shape[:-1]), 1, generator)
        return _compressed(positions, self._values(len(positions), generator), shape)

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
        gates = rearrange(self._gates, "... n -> ... n 1").to(device, torch.float32)
        if self.co_firing is not None:
            fires = self.co_firing.fire(gates.expand(groups, self.n_features, 1), batch_size, generator)
            x = self._spread(uniform_(x, generator)).mul_(fires)
        elif self.mostly_dense:  # a draw u for each entry: it fires if u < p_i, at u / p_i
            tiny = gates.clamp(min=torch.finfo(torch.float32).tiny)
            if self.signed:  # u in [-1, 1] fires if |u| < p_i
                self._spread(uniform_(x, generator)).div_(tiny)
                x.mul_(x.abs() < 1)
            else:
                torch.threshold_(uniform_(x, generator).div_(-tiny), -1.0, 0.0).abs_()
        else:
            # With probabilities for each instance, the stack is one long row of features.
            stacked = self._gates.ndim == 2
            positions = self._fire(1 if stacked else groups, batch_size, generator)
            x.zero_().put_(positions, self._values(len(positions), generator))
        return x.mT.view(shape) if n_instances is None else x.mT

    def _values(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        """U[0, 1], or U[−1, 1] when signed."""
        return self._spread(torch.rand(n, generator=generator, device=generator.device))

    def _spread(self, uniform: Tensor) -> Tensor:
        """Draws from U[0, 1], spread over [−1, 1] when signed."""
        return uniform.mul_(2).sub_(1) if self.signed else uniform

    def _fire(self, groups: int, repeats: int, generator: torch.Generator) -> Int[Tensor, " nnz"]:
        """Increasing positions of the entries of a [groups, n_features, repeats] tensor that fire.

        A Poisson process of unit rate runs along an axis on which each entry of feature i has length λ_i.
        An entry fires when at least one event falls on it: independently, with probability
        1 − exp(−λ_i) = p_i. The cost is that of the events, groups · repeats · Σλ_i, whatever n_features is.
        """
        device, n = generator.device, len(self._hazard)
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
            raise UsageError(f"batch_size and n_instances must be at least 1, got shape {list(shape)}")
        if self.n_instances not in (None, n_instances):
            raise UsageError(
                f"these features differ between n_instances={self.n_instances} instances, got {n_instances}; "
                "give a model of as many"
            )
        return shape
