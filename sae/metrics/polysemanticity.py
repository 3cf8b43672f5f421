"""How many features does a unit carry? One measure for neurons, hidden units and latents."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics.chance import beside_chance, shuffles
from sae.metrics.co_statistics import CoStatistics, mean, ratio
from sae.metrics.inputs import Matrix, as_acts, as_codes, packed, permuted, slices, true_codes
from toymodels.features import FeatureBatch

# r² of independent variables is about chi²(1) / N: what lies within three standard deviations is nothing.
NOISE_FLOOR = 9.0


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
    z = packed(as_codes(units)) if isinstance(units, SparseCodes) else as_codes(units)
    a = as_acts(acts)
    draws = [permuted(a, order) for order in shuffles(len(a), seed)]
    return beside_chance(
        _mean_scores(z, a, firing_threshold),
        [_mean_scores(z, draw, firing_threshold) for draw in draws],
        _mean_scores(true_codes(a, a.n_features), a, 0.0),
    )


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
    s = (sums.correlation().square() - NOISE_FLOOR / max(sums.n_samples, 1)).clamp(min=0)
    total = s.sum(dim=0)
    share = ratio(s, total.expand_as(s))
    spread = -torch.xlogy(share, share).sum(dim=0)
    best, feature = share.max(dim=0)
    information = mutual_information(sums.both_count, sums.feature_count, sums.unit_count, sums.n_samples)
    return {
        "purity": best,
        "features_per_unit": torch.where(total > 0, spread.exp(), 0.0),
        "selectivity": ratio(information.max(dim=0).values, entropy(sums.unit_count, sums.n_samples)),
        "feature": torch.where(total > 0, feature, -1),
        "alive": sums.unit_variance() > 0,
    }


def mutual_information(
    both: Float[Tensor, "n_features n_units"],
    feature: Float[Tensor, " n_features"],
    unit: Float[Tensor, " n_units"],
    n_samples: int,
) -> Float[Tensor, "n_features n_units"]:
    """MI = Σ p(u, v) log(p(u, v) / (p(u) p(v))) in nats, where u and v say if unit k and feature i fire.

    From the counts of firings, as H(u) + H(v) - H(u, v), with 0 log 0 = 0.
    """
    rest = n_samples - feature[:, None] - unit[None, :] + both
    joint = sum(_surprise(n, n_samples) for n in (both, feature[:, None] - both, unit[None, :] - both, rest))
    separate = entropy(feature, n_samples)[:, None] + entropy(unit, n_samples)[None, :]
    return (separate - joint).clamp(min=0)


def entropy(count: Float[Tensor, " k"], n_samples: int) -> Float[Tensor, " k"]:
    """H of a yes or no in nats, from how often it is yes."""
    return _surprise(count, n_samples) + _surprise(n_samples - count, n_samples)


def _surprise(count: Float[Tensor, "*k"], n_samples: int) -> Float[Tensor, "*k"]:
    """-p log p."""
    p = count / max(n_samples, 1)
    return -torch.xlogy(p, p)


def _mean_scores(units: SparseCodes, acts: FeatureBatch, firing_threshold: float) -> dict[str, float]:
    """Means over the alive units, streamed."""
    if len(units) != len(acts):
        raise ValueError(f"units of {len(units)} samples and acts of {len(acts)}; pass the same evaluation set")
    sums = CoStatistics(acts.n_features, units.d_sae, firing_threshold, units.values.device)
    for rows in slices(len(acts)):
        sums.update(units[rows], acts[rows])
    scores = unit_scores(sums)
    alive = scores["alive"]
    means = {name: mean(scores[name][alive]) for name in ("purity", "features_per_unit", "selectivity")}
    return means | {"n_alive": float(alive.sum())}
