"""Do the codes match what the true features do? The table "Recovery of the codes", on the matched pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.metrics.co_statistics import mean, ratio, variance
from sae.metrics.dictionary_recovery import Matching
from sae.metrics.inputs import Matrix, directions, rows_of, some_rows
from sae.metrics.native import add_matched_, can_call, look_up
from sae.metrics.samples import Window, rows_in
from toymodels.thresholds import orders, threshold_of_highest_f1

# Every fourth sample chooses the threshold of f1_best, the others judge it.
VALIDATION_EVERY = 4
# Of very many, these samples are enough to choose a single number.
CHOOSING_SAMPLES = 2**19
# Means over the features that fire in the evaluation set.
MACRO = ("precision", "recall", "f1", "auroc", "r2")


class CodeRecovery:
    """Streams windows of codes z and true activations a through a fixed match σ; any windows give the same numbers.

    Decoder rows and features count as unit rows: z_j is multiplied by |w_j|, a_i by |d_i|. Feature i is on when
    a_i > 0; what is left of the codes in a window fires. `best_threshold` is that of f1_best. What is kept are a few
    numbers for each latent and each feature.
    """

    def __init__(self, matching: Matching, truth: Matrix, best_threshold: float) -> None:
        n, d_sae = len(matching.latent), len(matching.best_feature)
        self.matching, self.best_threshold, self.n_samples = matching, best_threshold, 0
        self.feature_norms = directions(truth)[1].cpu()
        self.owner = owners(matching)
        self.on, self.feature_sum, self.feature_square, self.judged = torch.zeros(4, n, dtype=torch.float64)
        self.of_latents = torch.zeros(8, d_sae, dtype=torch.float64)
        # Of each latent: firings, Σ z, Σ z²; with its own feature: Σ a z, both; with the nearest one: both.
        self.fires, self.unit_sum, self.unit_square, self.product, self.both, self.both_nearest, *best = self.of_latents
        # The same firings above the threshold of f1_best, in the samples that judge it.
        self.best_fires, self.best_both = best

    def update(self, window: Window) -> None:
        """Adds a window of samples."""
        start, codes, acts = window.start, window.codes, window.acts
        self.n_samples += len(acts)
        a = acts.values.double()
        row, on = rows_of(acts), (a > 0).double()
        row = row if window.order is None else rows_in(window.order)[row]
        _count_(self.on, acts.indices, on)
        _count_(self.feature_sum, acts.indices, a)
        _count_(self.feature_square, acts.indices, a * a)
        _count_(self.judged, acts.indices, on * ((start + row) % VALIDATION_EVERY != 0))

        best_feature = self.matching.best_feature.cpu()
        if can_call():
            judged = (start, VALIDATION_EVERY, self.best_threshold)
            add_matched_(self.of_latents, codes, acts, window.order, *judged, self.owner, best_feature)
            return
        latent, z = codes.indices, codes.values.double()
        own, nearest = look_up(codes, acts, torch.stack([self.owner, best_feature]), window.order)
        fires, hit = z > 0, own > 0
        _count_(self.fires, latent, fires)
        _count_(self.unit_sum, latent, z)
        _count_(self.unit_square, latent, z * z)
        _count_(self.product, latent, own.double() * z)
        _count_(self.both, latent, fires & hit)
        _count_(self.both_nearest, latent, fires & (nearest > 0))
        above = ((z > self.best_threshold) & ((start + rows_of(codes)) % VALIDATION_EVERY != 0)).nonzero().squeeze(1)
        _count_(self.best_fires, latent[above], torch.ones_like(z[above]))
        _count_(self.best_both, latent[above], hit[above])

    def per_feature(self, area: Float[Tensor, " n_features"]) -> dict[str, Float[Tensor, " n_features"]]:
        """One value for each feature, as `compute` defines it; `area` is the auroc of each.

        A feature without a latent scores 0, as do undefined ratios; its auroc is .5, as is that of a feature
        that never fires or is never silent.
        """
        fires, both = self._own(self.fires), self._own(self.both)
        N = max(self.n_samples, 1)
        a, aa = self.feature_sum / N, self.feature_square / N
        z, zz, az = (self._own(total) / N for total in (self.unit_sum, self.unit_square, self.product))
        var_a = variance(self.feature_square, self.feature_sum, self.n_samples)
        r2 = 1 - ratio(aa - ratio(az * az, zz), var_a)
        return {
            "precision": ratio(both, fires),
            "recall": ratio(both, self.on),
            "f1": ratio(2 * both, self.on + fires),
            "auroc": area,
            "r2": torch.where(self._has_latent & (var_a > 0), r2, 0.0),
            "shrinkage": ratio(az - a * z, var_a * self.feature_norms),
        }

    def compute(self, area: Float[Tensor, " n_features"]) -> dict[str, float]:
        """Scores over the evaluation set that was streamed, with σ(i) the latent matched to feature i.

        precision   TP / (TP + FP), mean over the features that fire in the evaluation set (without latent: 0)
        recall      TP / (TP + FN), likewise
        f1          2 TP / (2 TP + FP + FN), likewise
        f1_micro    the same ratio of counts summed over all features
        f1_best     f1 with one threshold for all latents in place of the firing threshold: that with the
                    best f1 on every fourth sample (`f1_best_threshold`), judged on the other samples
        f1_saelens  mean over latents, dead included, of the F1 for feature argmax_i |C_ij|
        auroc       mean of P(score of σ(i) is higher where a_i > 0 than where a_i = 0), ties counting half
        r2          mean of 1 - min_s Σ(a_i - s z_σ(i))² / Σ(a_i - mean(a_i))²; it can be negative
        shrinkage   mean slope of the least-squares line of z_σ(i) on a_i, over firing features with a latent
        """
        on, fires, both = self.on, self._own(self.fires), self._own(self.both)
        values = self.per_feature(area)
        scores = {name: mean(values[name][on > 0]) for name in MACRO}
        scores["shrinkage"] = mean(values["shrinkage"][(on > 0) & self._has_latent])
        scores["f1_micro"] = float(ratio(2 * both.sum(), on.sum() + fires.sum()))
        scores["f1_saelens"] = mean(ratio(2 * self.both_nearest, on[self.matching.best_feature.cpu()] + self.fires))
        best = ratio(2 * self._own(self.best_both), self.judged + self._own(self.best_fires))
        return scores | {"f1_best": mean(best[self.judged > 0]), "f1_best_threshold": self.best_threshold}

    @property
    def _has_latent(self) -> Bool[Tensor, " n_features"]:
        return self.matching.has_latent.cpu()

    def _own(self, total: Float[Tensor, " d_sae"]) -> Float[Tensor, " n_features"]:
        """Each feature's entry for its own latent, 0 without one."""
        return torch.where(self._has_latent, total[self.matching.latent.cpu().clamp(min=0)], 0.0)


def code_recovery(
    views: Sequence[Callable[[], Iterable[Window]]], matching: Matching, truth: Matrix, firing_threshold: float
) -> list[CodeRecovery]:
    """All windows through a match, for each view of the true activations beside the same codes: first those that choose
    the threshold of f1_best, then all of them."""
    chosen = chosen_thresholds([windows() for windows in views], matching, firing_threshold)
    seen = [CodeRecovery(matching, truth, threshold) for threshold in chosen]
    for windows, each in zip(views, seen, strict=True):
        for window in windows():
            each.update(window)
    return seen


def chosen_thresholds(views: Sequence[Iterable[Window]], matching: Matching, floor: float) -> list[float]:
    """The thresholds with the best f1 on every fourth sample of the first CHOOSING_SAMPLES, one for each view."""
    owner = owners(matching)
    entries: list[tuple[Tensor, Tensor]] = []
    hits: list[list[Tensor]] = [[] for _ in views]
    n_active = torch.zeros(len(views), len(matching.latent), dtype=torch.float64)
    for several in zip(*views, strict=True):
        start, n_rows = several[0].start, len(several[0].acts)
        if start >= CHOOSING_SAMPLES:
            break
        chooses = torch.arange(-start % VALIDATION_EVERY, n_rows, VALIDATION_EVERY)
        codes = some_rows(several[0].codes, chooses)
        kept = ((owner[codes.indices] >= 0) & (codes.values > floor)).nonzero().squeeze(1)
        entries.append((owner[codes.indices[kept]], codes.values[kept]))
        for window, found, active in zip(several, hits, n_active, strict=True):
            acts = some_rows(window.acts, chooses if window.order is None else window.order[chooses])
            _count_(active, acts.indices, acts.values > 0)
            found.append(look_up(codes, acts, owner[None])[0][kept] > 0)
    column, value = (torch.cat(part) for part in zip(*entries, strict=True))
    order = orders(column, value, len(matching.latent))
    return [
        threshold_of_highest_f1(column, value, torch.cat(hit), active, floor, order)
        for hit, active in zip(hits, n_active, strict=True)
    ]


def owners(matching: Matching) -> Int[Tensor, " d_sae"]:
    """The feature that each latent is matched to, -1 without one."""
    owner = torch.full((len(matching.best_feature),), -1)
    has_latent = matching.has_latent.cpu()
    owner[matching.latent.cpu()[has_latent]] = has_latent.nonzero().squeeze(1)
    return owner


def auroc(
    ordered: Float[Tensor, "columns samples"],
    column: Int[Tensor, " firings"],
    score: Float[Tensor, " firings"],
) -> Float[Tensor, " columns"]:
    """P(score+ > score-) + P(score+ = score-) / 2 in each column, + being a sample where its feature fires.

    `ordered` are all scores, ascending; firing e of a column has score `score[e]`. A firing's mid-rank among
    all samples counts whom it beats; what the firings win among themselves, n+² / 2, goes off again.
    .5 where all samples fire, or none.
    """
    n_on = column.bincount(minlength=len(ordered))
    first = _position(ordered, column, score, right=False)
    beaten = first.double() + 0.5
    # Of a score that occurs once, that is the mid-rank; only the others' last place is searched for.
    after = ordered[column, (first + 1).clamp(max=ordered.shape[1] - 1)]
    tied = ((after == score) & (first + 1 < ordered.shape[1])).nonzero().squeeze(1)
    last = _position(ordered, column[tied], score[tied], right=True)
    beaten[tied] = (first[tied] + last).double() / 2
    beaten = column.bincount(beaten, minlength=len(ordered))
    P, N = n_on.double(), ordered.shape[1] - n_on.double()
    return torch.where(P * N > 0, ratio(beaten - P * P / 2, P * N), 0.5)


def _position(
    ordered: Float[Tensor, "columns samples"],
    column: Int[Tensor, " queries"],
    score: Float[Tensor, " queries"],
    *,
    right: bool,
) -> Int[Tensor, " queries"]:
    """Where each score stands in its ordered column: at its first place, or (right) behind its last."""
    counts = column.bincount(minlength=len(ordered))
    if not len(column):
        return column
    order = column.argsort(stable=True)
    slot = torch.empty_like(column)
    slot[order] = torch.arange(len(column)) - F.pad(counts.cumsum(0), (1, 0))[column[order]]
    queries = score.new_zeros(len(ordered), int(counts.max()))
    queries[column, slot] = score
    return torch.searchsorted(ordered, queries, right=right)[column, slot]


def _count_(total: Float[Tensor, " k"], index: Int[Tensor, " entries"], weights: Tensor) -> None:
    """total[index[e]] += weights[e]."""
    total += index.bincount(weights.double(), minlength=len(total))
