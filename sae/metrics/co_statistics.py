"""What features and units do together: sums over samples, from which polysemanticity follows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics.inputs import compressed
from sae.metrics.native import ByFeature, add_pairs_, by_feature
from toymodels.features import FeatureBatch

# Dense units that are in float64 together, and pairs of features and units that are read together: both stay in the
# cache.
DENSE_AT_ONCE = 2**18
PAIRS_AT_ONCE = 2**17


class Margins:
    """Sums in float64 over samples of true activations a [N, n] and units z [N, K], each by itself.

        of_features = Σ 1[a > 0], Σ a, Σ a²      [3, n]
        of_units    = Σ 1[z > t], Σ z, Σ z²      [3, K]

    A value with |z| <= t = threshold counts as 0.
    """

    def __init__(self, n_features: int, n_units: int, threshold: float = 0.0) -> None:
        self.n_samples, self.threshold = 0, threshold
        self.of_features = torch.zeros(3, n_features, dtype=torch.float64)
        self.of_units = torch.zeros(3, n_units, dtype=torch.float64)

    def update(self, units: FeatureBatch | Float[Tensor, "batch n_units"], acts: FeatureBatch) -> None:
        """Adds a batch; which row of one is which row of the other changes nothing."""
        self.n_samples += len(acts)
        a = acts.values.double()
        _add_columns_(self.of_features, acts.indices, a, (a > 0).double())
        if isinstance(units, FeatureBatch):
            z = units.values.double()
            z = torch.where(z.abs() > self.threshold, z, 0.0)
            _add_columns_(self.of_units, units.indices, z, (z > self.threshold).double())
            return
        for part in units.split(max(1, DENSE_AT_ONCE // max(units.shape[1], 1))):
            z = part.double()
            z = torch.where(z.abs() > self.threshold, z, 0.0) if self.threshold else z
            for total, values in zip(self.of_units, ((z > self.threshold).float(), z, z * z), strict=True):
                total.add_(values.sum(dim=0))


class CoStatistics:
    """Margins, and sums over samples of what features and units do together.

        both_count = Σ 1[a > 0] 1[z > t]      product = Σ a z      [n, K]

    in whole numbers and in float64. They visit the pairs (active feature, firing unit) of each sample, not all n * K:
    memory is two matrices, whatever the number of samples. Of some features alone, those from number `first` on, they
    are rows of these matrices.
    """

    def __init__(
        self,
        n_features: int,
        n_units: int,
        firing_threshold: float = 0.0,
        *,
        margins: Margins | None = None,
        first: int = 0,
    ) -> None:
        self.margins, self.first = margins or Margins(n_features, n_units, firing_threshold), first
        of_features = self.margins.of_features[:, first : first + n_features]
        self.feature_count, self.feature_sum, self.feature_square = of_features
        self.unit_count, self.unit_sum, self.unit_square = self.margins.of_units
        self.both_count = torch.zeros(n_features, n_units, dtype=torch.int32)
        self.product = torch.zeros(n_features, n_units, dtype=torch.float64)

    @classmethod
    def part(cls, margins: Margins, first: int, last: int) -> CoStatistics:
        """Those of features first..last - 1, whose margins are known."""
        return cls(last - first, margins.of_units.shape[1], margins=margins, first=first)

    @property
    def n_samples(self) -> int:
        return self.margins.n_samples

    @property
    def n_units(self) -> int:
        return len(self.unit_count)

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
        z: FeatureBatch | Tensor
        if isinstance(units, FeatureBatch):
            z = units
        else:
            z = units.values if units.indices is None else compressed(units, self.margins.threshold)
        self.margins.update(z, acts)
        self.add_pairs(z, by_feature(acts), torch.arange(len(acts), dtype=torch.int32))

    def add_pairs(
        self, units: FeatureBatch | Float[Tensor, "batch n_units"], acts: ByFeature, row_of: Int[Tensor, " samples"]
    ) -> None:
        """Adds to both_count and product alone; sample s of the true activations is row row_of[s] of the units."""
        add_pairs_(self.product, self.both_count, units, acts, row_of, self.first, self.margins.threshold)

    def blocks(self) -> Iterator[slice]:
        """Some features after the other, so few that all that is computed of their pairs stays in the cache."""
        at_once = max(1, PAIRS_AT_ONCE // max(self.n_units, 1))
        return (slice(start, start + at_once) for start in range(0, len(self.product), at_once))

    def feature_variance(self) -> Float[Tensor, " n_features"]:
        """E[a²] - E[a]²."""
        return variance(self.feature_square, self.feature_sum, self.n_samples)

    def unit_variance(self) -> Float[Tensor, " n_units"]:
        """E[z²] - E[z]²."""
        return variance(self.unit_square, self.unit_sum, self.n_samples)

    def correlation(self, rows: slice = slice(None)) -> Float[Tensor, "some n_units"]:
        """Pearson's correlation of a_i and z_k: cov / sqrt(var var), 0 where one of them is constant."""
        spread = self.feature_variance()[rows].sqrt(), self.unit_variance().sqrt()
        return _correlation(self.product[rows], self.feature_sum[rows], self.unit_sum, spread, self.n_samples)

    def phi(self, rows: slice = slice(None)) -> Float[Tensor, "some n_units"]:
        """The same of 1[a_i > 0] and 1[z_k > t]."""
        N, on, fires = max(self.n_samples, 1), self.feature_count[rows], self.unit_count
        spread = (on / N * (1 - on / N)).sqrt(), (fires / N * (1 - fires / N)).sqrt()
        return _correlation(self.both_count[rows].double(), on, fires, spread, self.n_samples)

    def sides(self) -> tuple[Float[Tensor, "5 n_features"], Float[Tensor, "5 n_units"]]:
        """Of each feature and each unit: mean, 1 / sd, count, share of samples with a > 0 or z > t, 1 / sd of that."""
        return (
            self._side(self.feature_sum, self.feature_variance(), self.feature_count),
            self._side(self.unit_sum, self.unit_variance(), self.unit_count),
        )

    def _side(self, total: Tensor, variances: Tensor, count: Tensor) -> Float[Tensor, "5 k"]:
        N, p = max(self.n_samples, 1), count / max(self.n_samples, 1)
        inverse = (ratio(torch.ones_like(each), each.sqrt()) for each in (variances, p * (1 - p)))
        return torch.stack([total / N, next(inverse), count, p, next(inverse)])


def _correlation(
    product: Float[Tensor, "rows columns"],
    row_sum: Float[Tensor, " rows"],
    column_sum: Float[Tensor, " columns"],
    spread: tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]],
    n_samples: int,
) -> Float[Tensor, "rows columns"]:
    """(E[xy] - E[x] E[y]) / (sd(x) sd(y))."""
    N = max(n_samples, 1)
    r = product / N
    r.addr_(row_sum / N, column_sum / N, alpha=-1)
    for side, sd in zip((1, 0), spread, strict=True):
        r.mul_(ratio(torch.ones_like(sd), sd).unsqueeze(side))
    return r


def _add_columns_(
    totals: Float[Tensor, "3 columns"],
    column: Int[Tensor, " entries"],
    values: Float[Tensor, " entries"],
    counts: Float[Tensor, " entries"],
) -> None:
    """Adds counts, values and their squares to their columns."""
    for total, weights in zip(totals, (counts, values, values * values), strict=True):
        total.add_(column.bincount(weights, minlength=len(total)))


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
