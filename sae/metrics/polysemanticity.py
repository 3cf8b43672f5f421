"""How many features does a unit carry? One measure for neurons, hidden units and latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics.chance import N_SHUFFLES, beside_chance
from sae.metrics.co_statistics import CoStatistics, Margins, mean, ratio
from sae.metrics.failures import Related, related
from sae.metrics.inputs import Matrix, as_acts, as_codes, compressed
from sae.metrics.native import can_call, score_units_
from sae.metrics.once import once
from sae.metrics.samples import Samples, Window, window_rows
from toymodels.features import FeatureBatch

# r² of independent variables is about chi²(1) / N: what lies within three standard deviations is nothing.
NOISE_FLOOR = 9.0
# Pairs of features and units whose sums are in memory together.
SUMS_ENTRIES = 2**25
# The samples as they are, and shuffled.
DRAWS = (None, *range(N_SHUFFLES))


def polysemanticity(
    units: SparseCodes | Matrix,
    acts: FeatureBatch | Matrix,
    *,
    firing_threshold: float = 0.0,
    seed: int = 0,
) -> dict[str, float]:
    """How few features each of the units [samples, K] carries: means of `unit_scores` over the alive units.

        purity, features_per_unit, selectivity, n_alive

    `units` are codes, or dense values of any sign (neurons); `acts` [samples, n] the true activations of the
    same samples. Beside each score stand `<name>_chance` and `_chance_sd`, the same units against the true
    activations of shuffled samples, and `<name>_truth`, the true activations taken as units. Values with
    |z| <= firing_threshold count as 0. `seed` drives chance alone.

    The chance value of purity is high (about .5: of pure noise, one or two s_ik pass the floor), above that
    of a polysemantic neuron. Selectivity is near 0 by chance; read the two together.

    Raises:
        ValueError: no sample, different numbers of samples, or values that are not finite.
    """
    z, a = as_codes(units).to("cpu"), as_acts(acts)
    if not len(z):
        raise ValueError("units hold no sample, so there is nothing to evaluate; pass [samples, K]")
    if len(z) != len(a):
        raise ValueError(f"units of {len(z)} samples and acts of {len(a)}; pass the same evaluation set")
    sparse, size = isinstance(units, SparseCodes), window_rows(1, z.d_sae)
    neurons = None if sparse else Neurons(z.d_sae, a.n_features, firing_threshold, seed)
    with Samples(z.d_sae, a.n_features) as samples:
        for start in range(0, len(a), size):
            part, its_acts = z[start : start + size], a[start : start + size]
            samples.append(compressed(part if sparse else part.scaled(0.0), firing_threshold), its_acts)
            if neurons is not None:
                neurons.update(part.values, its_acts)
        if neurons is None:
            return latents_beside_chance(samples, seed)[0]
        return neurons.beside_chance(truth_as_units(samples))


class Neurons:
    """Streams dense units [N, K] of any sign and true activations, window after window."""

    def __init__(self, n_units: int, n_features: int, firing_threshold: float = 0.0, seed: int = 0) -> None:
        self.seed, self.n_windows, self.margins = seed, 0, Margins(n_features, n_units, firing_threshold)
        self.sums = {draw: CoStatistics.part(self.margins, 0, n_features) for draw in DRAWS}

    def update(self, units: Float[Tensor, "batch n_units"], acts: FeatureBatch) -> None:
        """Adds a window, and what it would be with its samples shuffled."""
        self.margins.update(units, acts)
        window = Window(0, acts, acts, self.n_windows)
        for draw, sums in self.sums.items():
            sums.add_pairs(units, window.by_feature, window.row_of(draw, self.seed))
        self.n_windows += 1

    def beside_chance(self, truth: Mapping[str, float]) -> dict[str, float]:
        """Means over the alive units, beside chance and the truth's."""
        scores, *by_luck = (mean_scores(unit_scores(sums)) for sums in self.sums.values())
        return beside_chance(scores, by_luck, truth)


def latents_beside_chance(samples: Samples, seed: int = 0) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The scores of `polysemanticity` for codes, and the table of `unit_scores`."""
    scores = {draw: UnitScores(samples.n_latents) for draw in DRAWS}
    for parts in sums_in_parts(samples.windows, samples.n_features, samples.n_latents, DRAWS, seed):
        for draw, sums in parts.items():
            scores[draw].add(sums)
    table, *draws = (each.table() for each in scores.values())
    return beside_chance(mean_scores(table), [mean_scores(draw) for draw in draws], truth_as_units(samples)), table


def truth_as_units(samples: Samples) -> dict[str, float]:
    """What the true activations score as units."""
    return _true_units(samples)[0]


def related_features(samples: Samples) -> Related:
    """Which true features fire together."""
    return _true_units(samples)[1]


def _true_units(samples: Samples) -> tuple[dict[str, float], Related]:
    """Both follow from the same sums over pairs of features."""
    n = samples.n_features

    def measure() -> tuple[dict[str, float], Related]:
        scores, pairs = UnitScores(n), []
        for parts in sums_in_parts(partial(samples.true_windows, n), n, n):
            scores.add(parts[None])
            pairs.append(related(parts[None]))
        return mean_scores(scores.table()), Related.join(pairs)

    return once(("units", n, samples.acts_key), measure)


def sums_in_parts(
    windows: Callable[[], Iterable[Window]],
    n_features: int,
    n_units: int,
    draws: Sequence[int | None] = (None,),
    seed: int = 0,
) -> Iterator[dict[int | None, CoStatistics]]:
    """The sums of some features after the other, so many at a time that they fit in memory: of the samples as they are
    (None) and with their true activations shuffled."""
    margins = Margins(n_features, n_units)
    for window in windows():
        margins.update(window.codes, window.acts)
    at_once = max(1, SUMS_ENTRIES // (n_units * len(draws)))
    for first in range(0, n_features, at_once):
        last = min(first + at_once, n_features)
        sums = {draw: CoStatistics.part(margins, first, last) for draw in draws}
        for window in windows():
            for draw, each in sums.items():
                each.add_pairs(window.codes, window.by_feature, window.row_of(draw, seed))
        yield sums


def mean_scores(table: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the alive units."""
    alive = table["alive"]
    means = {name: mean(table[name][alive]) for name in ("purity", "features_per_unit", "selectivity")}
    return means | {"n_alive": float(alive.sum())}


def unit_scores(sums: CoStatistics) -> dict[str, Tensor]:
    """One value for each unit k, from sums over samples of features a_i and units z_k; N samples.

        s_ik                = max(0, r²(a_i, z_k) - 9 / N)
        purity_k            = max_i s_ik / Σ_i s_ik
        features_per_unit_k = exp of the entropy of s_ik / Σ_i s_ik: 1 is monosemantic
        selectivity_k       = max_i MI(1[z_k > t], 1[a_i > 0]) / H(1[z_k > t])
        feature_k           = argmax_i s_ik, -1 where all are 0
        alive_k             : z_k is not constant

    A unit that tells of no feature (all s_ik = 0) has purity and features_per_unit 0; undefined ratios are 0, too.
    r² rather than the co-firing mass E[a z]: that one counts chance, and perfect latents would score .35.
    """
    scores = UnitScores(sums.n_units)
    scores.add(sums)
    return scores.table()


class UnitScores:
    """`unit_scores` from the sums of some features after the other; what is kept are a few numbers for each unit."""

    def __init__(self, n_units: int) -> None:
        # Of each unit: Σ s, max s, Σ s log s, the largest mutual information; and the feature of the largest s.
        self.total, self.best, self.spread, self.information = torch.zeros(4, n_units, dtype=torch.float64)
        self.feature = torch.full((n_units,), -1)
        self.alive = torch.zeros(n_units, dtype=torch.bool)
        self.entropy = torch.zeros(n_units, dtype=torch.float64)

    def add(self, sums: CoStatistics) -> None:
        """Adds the sums of features that were not there before."""
        self.alive, self.entropy = sums.unit_variance() > 0, entropy(sums.unit_count, sums.n_samples)
        floor = NOISE_FLOOR / max(sums.n_samples, 1)
        if can_call():
            kept = (self.total, self.best, self.spread, self.information, self.feature)
            score_units_(sums.product, sums.both_count, sums.first, max(sums.n_samples, 1), floor, sums.sides(), kept)
            return
        for rows in sums.blocks():
            s = sums.correlation(rows).square_().sub_(floor).clamp_(min=0)
            self.total += s.sum(dim=0)
            best, feature = s.max(dim=0)
            self.feature = torch.where(best > self.best, sums.first + rows.start + feature, self.feature)
            self.best = torch.maximum(self.best, best)
            tells = torch.from_numpy(np.flatnonzero(s.numpy()))  # few: most pairs lie below the floor
            share = s.flatten()[tells]
            unit = tells % s.shape[1]
            self.spread += unit.bincount(torch.xlogy(share, share), minlength=s.shape[1])
            self._inform(sums, rows)

    def _inform(self, sums: CoStatistics, rows: slice) -> None:
        """Raises `information` to the largest of these features.

        MI <= log(1 + phi²), phi the correlation of the two: only pairs whose bound exceeds what is known, after
        the unit's largest phi, are looked at.
        """
        bound = sums.phi(rows).square_()
        feature, unit = bound.argmax(dim=0), torch.arange(bound.shape[1])
        self.information = torch.maximum(self.information, _information(sums, rows.start + feature, unit))
        # The bound is compared with a little room for rounding.
        known = self.information.expm1().mul_(1 - 1e-9).sub_(1e-15).clamp_(min=0)
        pairs = torch.from_numpy(np.flatnonzero((bound > known).numpy()))
        feature, unit = rows.start + pairs // bound.shape[1], pairs % bound.shape[1]
        np.maximum.at(self.information.numpy(), unit.numpy(), _information(sums, feature, unit).numpy())

    def table(self) -> dict[str, Tensor]:
        """The scores."""
        # -Σ p log p of p = s / Σs
        spread = self.total.log() - ratio(self.spread, self.total)
        return {
            "purity": ratio(self.best, self.total),
            "features_per_unit": torch.where(self.total > 0, spread.exp(), 0.0),
            "selectivity": ratio(self.information, self.entropy),
            "feature": self.feature,
            "alive": self.alive,
        }


def _information(
    sums: CoStatistics, feature: Int[Tensor, " pairs"], unit: Int[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """`mutual_information` of some pairs."""
    on, fires, both = sums.feature_count[feature], sums.unit_count[unit], sums.both_count[feature, unit].double()
    return mutual_information(both, on, fires, sums.n_samples)


def mutual_information(
    both: Float[Tensor, "*k"], feature: Float[Tensor, "*k"], unit: Float[Tensor, "*k"], n_samples: int
) -> Float[Tensor, "*k"]:
    """MI = Σ p(u, v) log(p(u, v) / (p(u) p(v))) in nats, where u and v say if a unit and a feature fire.

    From the counts of firings, as H(u) + H(v) - H(u, v), with 0 log 0 = 0.
    """
    joint = sum(_surprise(n, n_samples) for n in (both, feature - both, unit - both, n_samples - feature - unit + both))
    return (entropy(feature, n_samples) + entropy(unit, n_samples) - joint).clamp(min=0)


def entropy(count: Float[Tensor, "*k"], n_samples: int) -> Float[Tensor, "*k"]:
    """H of a yes or no in nats, from how often it is yes."""
    return _surprise(count, n_samples) + _surprise(n_samples - count, n_samples)


def _surprise(count: Float[Tensor, "*k"], n_samples: int) -> Float[Tensor, "*k"]:
    """-p log p."""
    p = count / max(n_samples, 1)
    return -torch.xlogy(p, p)
