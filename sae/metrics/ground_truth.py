"""All that can be said where the true features are known: scores beside chance, and the table of features."""

from __future__ import annotations

from statistics import fmean

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics.chance import beside_chance, shuffles
from sae.metrics.co_statistics import mean
from sae.metrics.code_recovery import MACRO, CodeRecovery, ScoreColumns
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
    as_acts,
    as_codes,
    as_tensor,
    directions,
    firing_counts,
    packed,
    permuted,
    scale_threshold,
    slices,
    true_codes,
)
from toymodels.features import FeatureBatch

FOUND = 0.9
N_DECILES = 10


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
    z, a = None if codes is None else as_codes(codes), None if acts is None else as_acts(acts)
    if z is not None:
        firing_threshold = _threshold(firing_threshold, W_dec, truth, z, a)
        alive = firing(W_dec, z, firing_threshold) if alive is None else alive
    matching = match_dictionary(W_dec, truth, alive)
    scores = dictionary_scores(matching)
    draws = dictionary_chance(truth, int(scores["n_alive"]), len(W_dec), seed)
    limit = dictionary_limit(truth, len(W_dec))
    chance = fmean(draw["mcc"] for draw in draws)
    for each in (scores, *draws, limit):
        each["mcc_adjusted"] = (each["mcc"] - chance) / (1 - chance) if chance < 1 else 0.0
    result = beside_chance(scores, draws, limit)
    if z is None or a is None or firing_threshold is None:
        return result

    columns, z = _score_columns(matching, z, pre_latents), packed(z)

    def against(acts: FeatureBatch) -> dict[str, float]:
        seen = CodeRecovery(W_dec, truth, matching, columns, firing_threshold=firing_threshold)
        return _streamed(seen, z, acts).compute()

    draws = [against(permuted(a, order)) for order in shuffles(len(a), seed)]
    return result | beside_chance(against(a), draws, _limit(truth, len(W_dec), a, firing_threshold))


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
    z, a = as_codes(codes), as_acts(acts)
    threshold = _threshold(firing_threshold, W_dec, truth, z, a)
    matching = match_dictionary(W_dec, truth, firing(W_dec, z, threshold) if alive is None else alive)
    columns = _score_columns(matching, z, pre_latents)
    seen = CodeRecovery(W_dec, truth, matching, columns, firing_threshold=threshold)
    per_feature = _streamed(seen, packed(z), a).per_feature()
    unit, norms = directions(truth)
    nearest_cosine, nearest = (unit @ unit.T).fill_diagonal_(-torch.inf).max(dim=1)
    alone = len(unit) == 1
    count, device = seen.sums.feature_count, matching.latent.device
    return {
        "feature": torch.arange(len(unit), device=device),
        "frequency": count / max(len(a), 1),
        "magnitude": seen.sums.feature_sum / count.clamp(min=1) * norms.to(device),
        "latent": matching.latent,
        "cosine": matching.cosine,
        "found": matching.cosine > FOUND,
        **per_feature,
        "nearest_feature": (nearest.fill_(-1) if alone else nearest).to(device),
        "nearest_feature_cosine": (nearest_cosine.fill_(0.0) if alone else nearest_cosine).to(device),
        "nearest_latent": matching.nearest_latent,
        "nearest_latent_cosine": matching.nearest_cosine,
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
    if given is not None:
        return given
    if acts is None:
        return scale_threshold(codes.decode(as_tensor(W_dec).to(codes.values)))
    return scale_threshold(acts.embed(as_tensor(truth).to(acts.values)))


def _score_columns(matching: Matching, codes: SparseCodes, pre_latents: Matrix | None) -> ScoreColumns:
    """What auroc ranks: the pre-latents of an evaluation set, or its codes."""
    columns, scores = ScoreColumns(matching), None if pre_latents is None else as_tensor(pre_latents)
    for rows in slices(len(codes)):
        columns.update(codes[rows].dense() if scores is None else scores[rows])
    return columns


def _streamed(seen: CodeRecovery, codes: SparseCodes, acts: FeatureBatch) -> CodeRecovery:
    """The same, after it has seen a whole evaluation set."""
    if len(codes) != len(acts):
        raise ValueError(
            f"codes of {len(codes)} samples do not fit acts of {len(acts)}; pass those of one evaluation set"
        )
    for rows in slices(len(acts)):
        seen.update(codes[rows], acts[rows])
    return seen


def _limit(truth: Matrix, d_sae: int, acts: FeatureBatch, firing_threshold: float) -> dict[str, float]:
    """What the first d_sae true features score with the true activations as their codes."""
    true = truth[:d_sae]
    matching, codes = match_dictionary(true, truth), true_codes(acts, len(true))
    columns = _score_columns(matching, codes, None)
    seen = CodeRecovery(true, truth, matching, columns, firing_threshold=firing_threshold)
    return _streamed(seen, codes, acts).compute()
