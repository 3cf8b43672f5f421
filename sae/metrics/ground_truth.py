"""Everything that is measured where the true features are known: scores next to chance, and the table of features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics.chance import N_SHUFFLES, beside_chance
from sae.metrics.co_statistics import mean
from sae.metrics.code_recovery import MACRO, CodeRecovery, code_recovery
from sae.metrics.dictionary_recovery import (
    COVERAGE_THRESHOLDS,
    Matching,
    dictionary_chance,
    dictionary_limit,
    dictionary_scores,
    match_dictionary,
)
from sae.metrics.inputs import (
    Mask,
    Matrix,
    argmax,
    as_acts,
    as_codes,
    as_tensor,
    compressed,
    directions,
    firing_counts,
    scale_threshold,
    slices,
)
from sae.metrics.once import fingerprint, once
from sae.metrics.ranking import Ranking
from sae.metrics.samples import Samples, window_rows
from toymodels.features import FeatureBatch

# A feature is found when its own latent has a cosine above this.
FOUND = 0.9
N_DECILES = 10
NEIGHBOURS_AT_ONCE = 2**23


def recovery(
    W_dec: Matrix,
    truth: Matrix,
    *,
    codes: SparseCodes | Matrix | None = None,
    acts: FeatureBatch | Matrix | None = None,
    alive: Mask | None = None,
    pre_latents: Matrix | None = None,
    firing_threshold: float | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """How well latents W_dec [d_sae, d] recover the true features truth [n, d], rows of any norm.

    Always: the scores of `dictionary_recovery`, and `mcc_adjusted` = (mcc - chance) / (1 - chance). With
    codes z [samples, d_sae] and true activations acts a [samples, n] of one evaluation set, also those of
    `CodeRecovery.compute` (auroc from `pre_latents` [samples, d_sae] when given). Beside each score stand

        <name>_chance, _chance_sd   dictionary: random directions, as many as are alive; codes: the same codes
                                    against the true activations of shuffled samples
        <name>_truth                the true dictionary with the true activations as its codes, cut to the
                                    first d_sae features where the dictionary is smaller than the truth

    A latent fires when z_j |w_j| > `firing_threshold`; None: 1e-6 of the input's scale
    sqrt(E|x - mean(x)|^2), x = a truth, or x = z W_dec without acts. Only alive latents are matched:
    `alive`, or those that fire on the codes, or without codes every nonzero row. `seed` drives chance alone.
    The part that is cheap enough for a training log is `dictionary_recovery`.

    Raises:
        ValueError: shapes that do not fit, acts without codes, or rows with nan or inf.
    """
    if acts is not None and codes is None:
        raise ValueError("acts were given without codes; pass both to score the codes, or neither")
    z, a = None if codes is None else as_codes(codes).to("cpu"), None if acts is None else as_acts(acts)
    if z is not None:
        firing_threshold = _threshold(firing_threshold, W_dec, truth, z, a)
        alive = firing(W_dec, z, firing_threshold) if alive is None else alive
    matching = match_dictionary(W_dec, truth, alive)
    result = dictionary_beside_chance(matching, truth, seed)
    if z is None or a is None or firing_threshold is None:
        return result
    with as_samples(W_dec, truth, z, a, firing_threshold) as samples:
        ranking = _ranking(matching, z, a, pre_latents)
        judged = judge_codes(samples, ranking, matching, truth, firing_threshold, seed)
        return result | codes_beside_chance(judged, samples, truth, firing_threshold)


def feature_table(
    W_dec: Matrix,
    truth: Matrix,
    codes: SparseCodes | Matrix,
    acts: FeatureBatch | Matrix,
    *,
    alive: Mask | None = None,
    pre_latents: Matrix | None = None,
    firing_threshold: float | None = None,
) -> dict[str, Tensor]:
    """A row for each true feature: what became of it, and what the missed ones have in common.

        feature                                  i
        frequency, magnitude                     share of samples with a_i > 0, and mean a_i |d_i| over those
        latent, cosine, found                    its match (-1 without one), C of the match, C > .9
        precision, recall, f1, auroc, r2, shrinkage   of the match, as in `CodeRecovery.per_feature`
        nearest_feature, nearest_feature_cosine  the other feature with the largest d_i . d_j (-1 if n = 1)
        nearest_latent, nearest_latent_cosine    the alive latent with the largest C_ij (-1 if none is alive)

    Arguments as for `recovery`. All columns are [n]; the missed features are the rows with `found` false.
    """
    z, a = as_codes(codes).to("cpu"), as_acts(acts)
    threshold = _threshold(firing_threshold, W_dec, truth, z, a)
    matching = match_dictionary(W_dec, truth, firing(W_dec, z, threshold) if alive is None else alive)
    with as_samples(W_dec, truth, z, a, threshold) as samples:
        ranking = _ranking(matching, z, a, pre_latents)
        return table_of_features(judge_codes(samples, ranking, matching, truth, threshold, n_draws=0)[0], truth)


class Judged(NamedTuple):
    """Codes that went through a match, and the auroc of each feature."""

    seen: CodeRecovery
    area: Float[Tensor, " n_features"]

    def scores(self) -> dict[str, float]:
        """The means."""
        return self.seen.compute(self.area)


def dictionary_beside_chance(matching: Matching, truth: Matrix, seed: int = 0) -> dict[str, float]:
    """The part of `recovery` that needs no codes."""
    scores = dictionary_scores(matching)
    d_sae = len(matching.best_feature)
    draws = dictionary_chance(truth, int(scores["n_alive"]), d_sae, seed)
    limit = dictionary_limit(truth, d_sae)
    chance = fmean(draw["mcc"] for draw in draws)
    for each in (scores, *draws, limit):
        each["mcc_adjusted"] = (each["mcc"] - chance) / (1 - chance) if chance < 1 else 0.0
    return beside_chance(scores, draws, limit)


def judge_codes(
    samples: Samples,
    ranking: Ranking,
    matching: Matching,
    truth: Matrix,
    firing_threshold: float,
    seed: int = 0,
    n_draws: int = N_SHUFFLES,
) -> list[Judged]:
    """The codes against the true activations of their own samples, and then of shuffled ones."""
    views = [partial(samples.windows, draw, seed) for draw in (None, *range(n_draws))]
    seen = code_recovery(views, matching, truth, firing_threshold)
    areas = ranking.areas(samples.n_features, n_draws, seed)
    return [Judged(*both) for both in zip(seen, areas, strict=True)]


def codes_beside_chance(
    judged: list[Judged], samples: Samples, truth: Matrix, firing_threshold: float
) -> dict[str, float]:
    """The part of `recovery` that needs codes."""
    scores, *draws = (each.scores() for each in judged)
    key = ("codes", fingerprint(truth), samples.acts_key, samples.n_latents, firing_threshold)
    limit = once(key, lambda: _limit(truth, samples, firing_threshold))
    return beside_chance(scores, draws, limit)


def table_of_features(judged: Judged, truth: Matrix) -> dict[str, Tensor]:
    """`feature_table` of codes that were judged."""
    seen, matching = judged.seen, judged.seen.matching
    nearest, nearest_cosine = once(("neighbours", fingerprint(truth)), lambda: _neighbours(truth))
    cosine = matching.cosine.cpu()
    return {
        "feature": torch.arange(len(cosine)),
        "frequency": seen.on / max(seen.n_samples, 1),
        "magnitude": seen.feature_sum / seen.on.clamp(min=1) * seen.feature_norms,
        "latent": matching.latent.cpu(),
        "cosine": cosine,
        "found": cosine > FOUND,
        **seen.per_feature(judged.area),
        "nearest_feature": nearest,
        "nearest_feature_cosine": nearest_cosine,
        "nearest_latent": matching.nearest_latent.cpu(),
        "nearest_latent_cosine": matching.nearest_cosine.cpu(),
    }


def frequency_deciles(table: dict[str, Tensor]) -> dict[str, Float[Tensor, " deciles"]]:
    """Recovery against frequency: the rows of a `feature_table` in ten equal groups, from rare to frequent.

        n_features, frequency                            size of the group, mean frequency
        mmcs, mcc, coverage_t                            means over all features of the group
        precision, recall, f1, auroc, r2                 means over those that fire in the evaluation set
        shrinkage                                        mean over those that fire and have a latent

    Fewer than ten features make a group each. A mean of nothing is 0.
    """
    order = table["frequency"].argsort(stable=True)
    rows = []
    for group in order.tensor_split(min(N_DECILES, len(order))):
        part = {name: column[group] for name, column in table.items()}
        firing = part["frequency"] > 0
        members = {
            "frequency": part["frequency"],
            "mmcs": part["nearest_latent_cosine"],
            "mcc": part["cosine"],
        }
        members |= {f"coverage_{t}": part["cosine"] > t for t in COVERAGE_THRESHOLDS}
        members |= {name: part[name][firing] for name in MACRO}
        members["shrinkage"] = part["shrinkage"][firing & (part["latent"] >= 0)]
        rows.append({"n_features": len(group)} | {name: mean(column.double()) for name, column in members.items()})
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def firing(W_dec: Matrix, codes: SparseCodes | Matrix, firing_threshold: float) -> Bool[Tensor, " d_sae"]:
    """Which latents fire at least once, z_j |w_j| > firing_threshold."""
    z = as_codes(codes)
    return firing_counts(z.scaled(directions(W_dec)[1].to(z.values)), firing_threshold) > 0


@contextmanager
def as_samples(
    W_dec: Matrix, truth: Matrix, codes: SparseCodes, acts: FeatureBatch, firing_threshold: float
) -> Iterator[Samples]:
    """Codes and true activations that are at hand, as unit rows have them."""
    if len(codes) != len(acts):
        raise ValueError(
            f"codes of {len(codes)} samples do not fit acts of {len(acts)}; pass those of one evaluation set"
        )
    norms = directions(W_dec)[1].cpu().to(codes.values.dtype)
    with Samples(len(W_dec), len(truth)) as samples:
        size = window_rows(W_dec.shape[1], len(W_dec))
        for start in range(0, len(acts), size):
            part = codes[start : start + size].scaled(norms)
            samples.append(compressed(part, firing_threshold), acts[start : start + size])
        yield samples


def _threshold(
    given: float | None, W_dec: Matrix, truth: Matrix, codes: SparseCodes, acts: FeatureBatch | None
) -> float:
    """The firing threshold: as given, or 1e-6 of the scale of the inputs (or reconstructions)."""
    if codes.d_sae != len(W_dec):
        raise ValueError(
            f"codes of {codes.d_sae} latents do not fit a W_dec of {len(W_dec)} rows; pass those of one SAE"
        )
    if len(codes) == 0:
        raise ValueError("codes hold no sample, so there is nothing to evaluate; pass [samples, d_sae]")
    if acts is not None and acts.n_features != len(truth):
        raise ValueError(
            f"true activations of {acts.n_features} features do not fit a truth of {len(truth)}; pass those of one "
            "world"
        )
    if given is not None:
        return given
    if acts is None:
        return scale_threshold(codes.decode(as_tensor(W_dec).to(codes.values)))
    return scale_threshold(acts.embed(as_tensor(truth).to(acts.values)))


def _ranking(matching: Matching, codes: SparseCodes, acts: FeatureBatch, pre_latents: Matrix | None) -> Ranking:
    """What auroc ranks: the pre-latents of an evaluation set, or its codes."""
    ranking, scores = Ranking(matching, len(acts)), None if pre_latents is None else as_tensor(pre_latents)
    for rows in slices(ranking.n_wanted):
        ranking.update(codes[rows].dense() if scores is None else scores[rows], acts[rows])
    return ranking


def _limit(truth: Matrix, samples: Samples, firing_threshold: float) -> dict[str, float]:
    """What the first d_sae true features score with the true activations as their codes."""
    d_sae = min(samples.n_latents, samples.n_features)
    norms = directions(truth)[1].cpu()[:d_sae]
    matching = match_dictionary(as_tensor(truth)[:d_sae], truth)
    windows = partial(samples.true_windows, d_sae, norms, firing_threshold)
    (seen,) = code_recovery([windows], matching, truth, firing_threshold)
    ranking = Ranking(matching, samples.n_samples)
    for window in samples.true_windows(d_sae, norms):
        for rows in slices(len(window.acts)):
            if not ranking.complete:
                ranking.update(window.codes[rows].dense(), window.acts[rows])
    return Judged(seen, ranking.areas(samples.n_features, 0, 0)[0]).scores()


def _neighbours(truth: Matrix) -> tuple[Tensor, Tensor]:
    """The other feature with the largest cosine, and that cosine; -1 and 0 for a feature that is alone."""
    unit = directions(truth)[0].cpu()
    index, cosine = torch.full((len(unit),), -1), unit.new_zeros(len(unit))
    at_once = max(1, NEIGHBOURS_AT_ONCE // len(unit))
    unit = unit if len(unit) <= at_once else unit.float()  # of very many pairs
    for start in range(0, len(unit) if len(unit) > 1 else 0, at_once):
        block = unit[start : start + at_once] @ unit.T
        own = torch.arange(len(block))
        block[own, start + own] = -torch.inf
        nearest = argmax(block)
        cosine[start + own], index[start + own] = block[own, nearest].double(), nearest
    return index, cosine
