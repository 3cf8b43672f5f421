"""What features and units do together: sums over samples, from which recovery and polysemanticity follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics.inputs import column_sums, rows_of
from toymodels.features import FeatureBatch


class CoStatistics:
    """Sums in float64 over samples of true activations a [N, n] and units z [N, K] (latents or neurons).

        feature_count = Σ 1[a > 0]     feature_sum = Σ a     feature_square = Σ a²      [n]
        unit_count    = Σ 1[z > t]     unit_sum    = Σ z     unit_square    = Σ z²      [K]
        both_count    = Σ 1[a > 0] 1[z > t]                  product        = Σ a z     [n, K]

    A value with |z| <= t = firing_threshold counts as 0. The products visit the pairs (active feature, firing
    unit) of each sample, not all n * K: memory is two [n, K] matrices, whatever the number of samples.
    """

    def __init__(
        self,
        n_features: int,
        n_units: int,
        firing_threshold: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.firing_threshold, self.n_samples = firing_threshold, 0
        self.feature_count, self.feature_sum, self.feature_square = (zeros(n_features) for _ in range(3))
        self.unit_count, self.unit_sum, self.unit_square = (zeros(n_units) for _ in range(3))
        self.both_count, self.product = zeros(n_features, n_units), zeros(n_features, n_units)

    def update(self, units: SparseCodes, acts: FeatureBatch) -> None:
        """Adds a batch; row b of both is the same sample.

        Raises:
            ValueError: the two have different numbers of samples, or other widths than the sums.
        """
        n_features, n_units = self.product.shape
        if (len(units), units.d_sae, acts.n_features) != (len(acts), n_units, n_features):
            raise ValueError(
                f"codes of {len(units)} samples and {units.d_sae} latents do not fit true activations of "
                f"{len(acts)} samples and {acts.n_features} features in sums over {n_units} latents and "
                f"{n_features} features; pass both for the same samples"
            )
        a = acts.values.double()
        z = units.values.double()
        z = torch.where(z.abs() > self.firing_threshold, z, 0.0)
        on, fires = (a > 0).double(), (z > self.firing_threshold).double()

        self.n_samples += len(acts)
        for total, weights in ((self.feature_count, on), (self.feature_sum, a), (self.feature_square, a * a)):
            total.index_add_(0, acts.indices, weights)
        for total, values in ((self.unit_count, fires), (self.unit_sum, z), (self.unit_square, z * z)):
            total.add_(column_sums(SparseCodes(values, units.indices, units.d_sae)))
        _add_products_(self.both_count, acts, on, fires, units.indices)
        _add_products_(self.product, acts, a, z, units.indices)

    def feature_variance(self) -> Float[Tensor, " n_features"]:
        """E[a²] - E[a]²."""
        return _variance(self.feature_square, self.feature_sum, self.n_samples)

    def unit_variance(self) -> Float[Tensor, " n_units"]:
        """E[z²] - E[z]²."""
        return _variance(self.unit_square, self.unit_sum, self.n_samples)

    def correlation(self) -> Float[Tensor, "n_features n_units"]:
        """Pearson's correlation of a_i and z_k: cov / sqrt(var var), 0 where one of them is constant."""
        N = max(self.n_samples, 1)
        covariance = self.product / N - torch.outer(self.feature_sum / N, self.unit_sum / N)
        return ratio(covariance, torch.outer(self.feature_variance().sqrt(), self.unit_variance().sqrt()))


def ratio(numerator: Float[Tensor, "*k"], denominator: Float[Tensor, "*k"]) -> Float[Tensor, "*k"]:
    """numerator / denominator, 0 where that is undefined."""
    return torch.where(denominator != 0, numerator / torch.where(denominator != 0, denominator, 1.0), 0.0)


def mean(values: Float[Tensor, " k"]) -> float:
    """The mean, 0 of nothing."""
    return float(values.mean()) if len(values) else 0.0


def _variance(square: Float[Tensor, " k"], total: Float[Tensor, " k"], n: int) -> Float[Tensor, " k"]:
    """Variance from the sums of squares and of values; 0 when only rounding is left of it."""
    difference = square / max(n, 1) - (total / max(n, 1)).square()
    return torch.where(difference > 1e-12 * square / max(n, 1), difference, 0.0)


def _add_products_(
    total: Float[Tensor, "n_features n_units"],
    acts: FeatureBatch,
    weights: Float[Tensor, " nnz"],
    values: Float[Tensor, "batch k_cap"],
    indices: Int[Tensor, "batch k_cap"] | None,
) -> None:
    """total += aᵀ z, where entry e of `acts` weighs `weights[e]`."""
    rows = rows_of(acts)
    if indices is None:
        order = acts.indices.argsort()
        bags = F.pad(torch.bincount(acts.indices, minlength=acts.n_features).cumsum(0), (1, 0))
        total += F.embedding_bag(
            rows[order], values, bags, mode="sum", per_sample_weights=weights[order], include_last_offset=True
        )
    else:
        pairs = rearrange(acts.indices, "e -> e 1") * total.shape[1] + indices[rows]
        products = rearrange(weights, "e -> e 1") * values[rows]
        total.view(-1).index_add_(0, rearrange(pairs, "e k -> (e k)"), rearrange(products, "e k -> (e k)"))
