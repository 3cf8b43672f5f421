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
from sae.metrics.co_statistics import CoStatistics, dense_parts, mean, ratio
from sae.metrics.failures import Related, related
from sae.metrics.inputs import Matrix, as_acts, as_codes, compressed
from sae.metrics.once import once
from sae.metrics.samples import Samples, Window, columns, shuffled, window_rows
from toymodels.features import FeatureBatch

# r² of independent variables is about chi²(1) / N: what lies within three standard deviations is nothing.
NOISE_FLOOR = 9.0
# Pairs of features and units whose sums are in memory together.
SUMS_ENTRIES = 2**24


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
        ValueError: different numbers of samples.
    """
    z, a = as_codes(units).to("cpu"), as_acts(acts)
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
        self.seed, self.n_windows = seed, 0
        self.sums = [CoStatistics(n_features, n_units, firing_threshold) for _ in range(1 + N_SHUFFLES)]

    def update(self, units: Float[Tensor, "batch n_units"], acts: FeatureBatch) -> None:
        """Adds a window, and what it would be with its samples shuffled."""
        shuffles = [shuffled(acts, self.n_windows, draw, self.seed) for draw in range(N_SHUFFLES)]
        real, *draws = self.sums
        real.update(SparseCodes(units, None, units.shape[1]), acts)
        for rows, z, fires in dense_parts(units, real.firing_threshold):
            for sums, view in zip(draws, shuffles, strict=True):
                sums.add_dense_pairs(z, fires, view[rows])
        self.n_windows += 1

    def beside_chance(self, truth: Mapping[str, float]) -> dict[str, float]:
        """Means over the alive units, beside chance and the truth's."""
        real, *draws = self.sums
        for sums in draws:
            sums.share(real)
        scores, *by_luck = (mean_scores(unit_scores(sums)) for sums in self.sums)
        return beside_chance(scores, by_luck, truth)


def latents_beside_chance(samples: Samples, seed: int = 0) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The scores of `polysemanticity` for codes, and the table of `unit_scores`."""
    table = table_of_units(samples.windows, samples.n_features, samples.n_latents)
    draws = [
        mean_scores(table_of_units(partial(samples.windows, draw, seed), samples.n_features, samples.n_latents))
        for draw in range(N_SHUFFLES)
    ]
    return beside_chance(mean_scores(table), draws, truth_as_units(samples)), table


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
        tables, pairs = [], []
        for start, sums in sums_in_parts(partial(samples.true_windows, torch.ones(n), 0.0), n, n):
            tables.append(unit_scores(sums))
            pairs.append(related(sums, start))
        return mean_scores(_joined(tables)), Related.join(pairs)

    return once(("units", n, samples.acts_key), measure)


def table_of_units(windows: Callable[[], Iterable[Window]], n_features: int, n_units: int) -> dict[str, Tensor]:
    """`unit_scores` of all units."""
    return _joined([unit_scores(sums) for _, sums in sums_in_parts(windows, n_features, n_units)])


def sums_in_parts(
    windows: Callable[[], Iterable[Window]], n_features: int, n_units: int
) -> Iterator[tuple[int, CoStatistics]]:
    """The sums of the units from a number on, so many units at a time that they fit in memory."""
    at_once = max(1, SUMS_ENTRIES // n_features)
    for start in range(0, n_units, at_once):
        sums = CoStatistics(n_features, min(at_once, n_units - start))
        for window in windows():
            sums.update(columns(window.codes, start, start + sums.n_units), window.acts)
        yield start, sums


def _joined(tables: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}


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

    A unit that tells of no feature (all s_ik = 0) scores 0 throughout, as do undefined ratios. r² rather than
    the co-firing mass E[a z]: that one counts chance, and perfect latents would score .35.
    """
    s = sums.correlation_square().sub_(NOISE_FLOOR / max(sums.n_samples, 1)).clamp_(min=0)
    total = s.sum(dim=0)
    best, feature = s.max(dim=0)
    tells = s.nonzero(as_tuple=True)  # few: most pairs lie below the floor
    share = ratio(s[tells], total[tells[1]])
    spread = tells[1].bincount(-torch.xlogy(share, share), minlength=len(total))
    del s
    return {
        "purity": ratio(best, total),
        "features_per_unit": torch.where(total > 0, spread.exp(), 0.0),
        "selectivity": ratio(best_information(sums), entropy(sums.unit_count, sums.n_samples)),
        "feature": torch.where(total > 0, feature, -1),
        "alive": sums.unit_variance() > 0,
    }


def best_information(sums: CoStatistics) -> Float[Tensor, " n_units"]:
    """max_i MI(1[z_k > t], 1[a_i > 0]) of each unit k.

    MI <= log(1 + phi²), phi the correlation of the two: only pairs whose bound reaches the information of their unit's
    largest phi are looked at.
    """
    N = max(sums.n_samples, 1)
    on, fires = sums.feature_count, sums.unit_count
    phi = sums.both_count / N
    phi.addr_(on / N, fires / N, alpha=-1).square_()
    for side, count in ((1, on), (0, fires)):
        p = count / N
        phi.mul_(ratio(torch.ones_like(p), p * (1 - p)).unsqueeze(side))
    feature, unit = phi.argmax(dim=0), torch.arange(len(fires))
    best = _information(sums, feature, unit)
    # The bound is compared with a little room for rounding.
    feature, unit = ((phi >= best.expm1() * (1 - 1e-9) - 1e-15).logical_and_(phi > 0)).nonzero().unbind(dim=1)
    np.maximum.at(best.numpy(), unit.numpy(), _information(sums, feature, unit).numpy())
    return best


def _information(
    sums: CoStatistics, feature: Int[Tensor, " pairs"], unit: Int[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """`mutual_information` of some pairs."""
    on, fires, both = sums.feature_count[feature], sums.unit_count[unit], sums.both_count[feature, unit]
    return _mutual(both, on, fires, sums.n_samples)


def mutual_information(
    both: Float[Tensor, "n_features n_units"],
    feature: Float[Tensor, " n_features"],
    unit: Float[Tensor, " n_units"],
    n_samples: int,
) -> Float[Tensor, "n_features n_units"]:
    """MI = Σ p(u, v) log(p(u, v) / (p(u) p(v))) in nats, where u and v say if unit k and feature i fire.

    From the counts of firings, as H(u) + H(v) - H(u, v), with 0 log 0 = 0.
    """
    return _mutual(both, feature[:, None].expand_as(both), unit[None, :].expand_as(both), n_samples)


def _mutual(
    both: Float[Tensor, "*k"], feature: Float[Tensor, "*k"], unit: Float[Tensor, "*k"], n_samples: int
) -> Float[Tensor, "*k"]:
    joint = sum(_surprise(n, n_samples) for n in (both, feature - both, unit - both, n_samples - feature - unit + both))
    return (entropy(feature, n_samples) + entropy(unit, n_samples) - joint).clamp(min=0)


def entropy(count: Float[Tensor, "*k"], n_samples: int) -> Float[Tensor, "*k"]:
    """H of a yes or no in nats, from how often it is yes."""
    return _surprise(count, n_samples) + _surprise(n_samples - count, n_samples)


def _surprise(count: Float[Tensor, "*k"], n_samples: int) -> Float[Tensor, "*k"]:
    """-p log p."""
    p = count / max(n_samples, 1)
    return -torch.xlogy(p, p)
