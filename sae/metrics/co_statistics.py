"""What features and units do together: sums over samples, from which polysemanticity follows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics.inputs import compressed, rows_of
from toymodels.features import FeatureBatch

# Products that are added up together, and dense units that are.
ENTRIES_AT_ONCE = 2**22
DENSE_AT_ONCE = 2**24
PRECISE_PAIRS = 2**20


class CoStatistics:
    """Sums in float64 over samples of true activations a [N, n] and units z [N, K] (latents or neurons).

        feature_count = Σ 1[a > 0]     feature_sum = Σ a     feature_square = Σ a²      [n]
        unit_count    = Σ 1[z > t]     unit_sum    = Σ z     unit_square    = Σ z²      [K]
        both_count    = Σ 1[a > 0] 1[z > t]                  product        = Σ a z     [n, K]

    A value with |z| <= t = firing_threshold counts as 0. The products visit the pairs (active feature, firing
    unit) of each sample, not all n * K: memory is two [n, K] matrices, whatever the number of samples.
    """

    def __init__(self, n_features: int, n_units: int, firing_threshold: float = 0.0) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        self.firing_threshold, self.n_samples, self.n_units = firing_threshold, 0, n_units
        self.feature_count, self.feature_sum, self.feature_square = (zeros(n_features) for _ in range(3))
        self.unit_count, self.unit_sum, self.unit_square = (zeros(n_units) for _ in range(3))
        self.both_count, self.product = zeros(n_features, n_units), zeros(n_features, n_units)

    def update(self, units: SparseCodes | FeatureBatch, acts: FeatureBatch) -> None:
        """Adds a batch; row b of both is the same sample. Units are codes, or their entries in compressed rows.

        Raises:
            ValueError: the two have different numbers of samples, or other widths than the sums.
        """
        n_features, n_units = self.product.shape
        width = units.d_sae if isinstance(units, SparseCodes) else units.n_features
        if (len(units), width, acts.n_features) != (len(acts), n_units, n_features):
            raise ValueError(
                f"codes of {len(units)} samples and {width} latents do not fit true activations of "
                f"{len(acts)} samples and {acts.n_features} features in sums over {n_units} latents and "
                f"{n_features} features; pass both for the same samples"
            )
        self.n_samples += len(acts)
        a = acts.values.double()
        for total, weights in (
            (self.feature_count, (a > 0).double()),
            (self.feature_sum, a),
            (self.feature_square, a * a),
        ):
            total.add_(acts.indices.bincount(weights, minlength=n_features))
        if isinstance(units, SparseCodes) and units.indices is None:
            for rows, z, fires in dense_parts(units.values, self.firing_threshold):
                for total, values in ((self.unit_count, fires), (self.unit_sum, z), (self.unit_square, z * z)):
                    total.add_(values.sum(dim=0))
                self.add_dense_pairs(z, fires, acts[rows])
        else:
            self._add_sparse(compressed(units, 0.0) if isinstance(units, SparseCodes) else units, acts)

    def add_dense_pairs(
        self, z: Float[Tensor, "batch n_units"], fires: Float[Tensor, "batch n_units"], acts: FeatureBatch
    ) -> None:
        """Adds to both_count and product alone, from one of `dense_parts`."""
        # Of very many pairs, the products of one part are added up in float32, in a third of the time; counts always.
        dtype = torch.float64 if self.product.numel() <= PRECISE_PAIRS else torch.float32
        order = acts.indices.argsort()
        samples = rows_of(acts)[order]
        bags = F.pad(acts.indices.bincount(minlength=acts.n_features).cumsum(0), (1, 0))
        a = acts.values[order]
        for pairs, weights, values in ((self.both_count, (a > 0).float(), fires), (self.product, a.to(dtype), z)):
            rows = values.to(weights.dtype)
            sums = F.embedding_bag(
                samples, rows, bags, mode="sum", per_sample_weights=weights, include_last_offset=True
            )
            pairs.add_(sums)

    def share(self, other: CoStatistics) -> None:
        """Takes over from the same samples in another order what the order does not change."""
        self.n_samples = other.n_samples
        for side in ("feature", "unit"):
            for what in ("count", "sum", "square"):
                setattr(self, f"{side}_{what}", getattr(other, f"{side}_{what}"))

    def _add_sparse(self, units: FeatureBatch, acts: FeatureBatch) -> None:
        z = units.values.double()
        z = torch.where(z.abs() > self.firing_threshold, z, 0.0)
        fires = (z > self.firing_threshold).double()
        for total, values in ((self.unit_count, fires), (self.unit_sum, z), (self.unit_square, z * z)):
            total.add_(units.indices.bincount(values, minlength=len(total)))

        a = acts.values.double()
        _add_product_(self.both_count, acts, (a > 0).double(), units, fires)
        _add_product_(self.product, acts, a, units, z)

    def feature_variance(self) -> Float[Tensor, " n_features"]:
        """E[a²] - E[a]²."""
        return variance(self.feature_square, self.feature_sum, self.n_samples)

    def unit_variance(self) -> Float[Tensor, " n_units"]:
        """E[z²] - E[z]²."""
        return variance(self.unit_square, self.unit_sum, self.n_samples)

    def correlation(self) -> Float[Tensor, "n_features n_units"]:
        """Pearson's correlation of a_i and z_k: cov / sqrt(var var), 0 where one of them is constant."""
        N = max(self.n_samples, 1)
        covariance = self.product / N - torch.outer(self.feature_sum / N, self.unit_sum / N)
        return ratio(covariance, torch.outer(self.feature_variance().sqrt(), self.unit_variance().sqrt()))

    def correlation_square(self) -> Float[Tensor, "n_features n_units"]:
        """Its square, in the memory of one matrix."""
        N = max(self.n_samples, 1)
        r2 = self.product / N
        r2.addr_(self.feature_sum / N, self.unit_sum / N, alpha=-1).square_()
        for side, spread in ((1, self.feature_variance()), (0, self.unit_variance())):
            r2.mul_(ratio(torch.ones_like(spread), spread).unsqueeze(side))
        return r2


def dense_parts(
    units: Float[Tensor, "samples n_units"], threshold: float
) -> Iterator[tuple[slice, Float[Tensor, "batch n_units"], Float[Tensor, "batch n_units"]]]:
    """Some rows of dense units after the other: z in float64 with 0 for |z| <= threshold, and 1[z > threshold]."""
    at_once = max(1, DENSE_AT_ONCE // max(units.shape[1], 1))
    for start in range(0, len(units), at_once):
        rows = slice(start, start + at_once)
        z = units[rows].double()
        z = torch.where(z.abs() > threshold, z, 0.0) if threshold else z
        yield rows, z, (z > threshold).float()


def ratio(numerator: Float[Tensor, "*k"], denominator: Float[Tensor, "*k"]) -> Float[Tensor, "*k"]:
    """numerator / denominator, 0 where that is undefined."""
    return torch.where(denominator != 0, numerator / torch.where(denominator != 0, denominator, 1.0), 0.0)


def mean(values: Float[Tensor, " k"]) -> float:
    """The mean, 0 of nothing."""
    return float(values.mean()) if len(values) else 0.0


def variance(square: Float[Tensor, " k"], total: Float[Tensor, " k"], n: int) -> Float[Tensor, " k"]:
    """Variance from the sums of squares and of values; 0 when only rounding is left of it."""
    difference = square / max(n, 1) - (total / max(n, 1)).square()
    return torch.where(difference > 1e-12 * square / max(n, 1), difference, 0.0)


def _add_product_(
    total: Float[Tensor, "n_features n_units"],
    acts: FeatureBatch,
    weights: Float[Tensor, " nnz"],
    units: FeatureBatch,
    values: Float[Tensor, " entries"],
) -> None:
    """total += aᵀ z, over the pairs of entries that share a sample."""
    from scipy.sparse import csr_array  # noqa: PLC0415 - slow to import

    n_features, n_units = total.shape
    a = csr_array((weights.numpy(), acts.indices.numpy(), acts.offsets.numpy()), shape=(len(acts), n_features))
    z = csr_array((values.numpy(), units.indices.numpy(), units.offsets.numpy()), shape=(len(acts), n_units))
    product, whole = (a.T @ z).tocsr(), total.numpy()
    if product.nnz > total.numel() // 8 and total.numel() <= ENTRIES_AT_ONCE:
        whole += product.toarray()
        return
    at_once = max(1, ENTRIES_AT_ONCE // max(n_units, 1))
    for start in range(0, n_features, at_once):
        pointers = product.indptr[start : start + at_once + 1]
        row = np.repeat(np.arange(start, start + len(pointers) - 1), np.diff(pointers))
        entries = slice(pointers[0], pointers[-1])
        # A pair occurs once in a product, so that no addition is lost.
        whole[row, product.indices[entries]] += product.data[entries]
