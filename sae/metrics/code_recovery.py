"""Do the codes say what the true features do? The table "Recovery of the codes", on the matched pairs."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics.co_statistics import CoStatistics, mean, ratio
from sae.metrics.dictionary_recovery import Matching
from sae.metrics.inputs import Matrix, directions, entries, rows_of
from toymodels.features import FeatureBatch

# Every fourth sample chooses the threshold of f1_best, the others judge it.
VALIDATION_EVERY = 4
# Means over the features that fire in the evaluation set.
MACRO = ("precision", "recall", "f1", "auroc", "r2")


class ScoreColumns:
    """Keeps what auroc ranks: the scores of the matched latents, whole and on the host.

    Ranks do not depend on the true activations, so those of shuffled samples are judged by the same.
    """

    def __init__(self, matching: Matching) -> None:
        self.matching = matching
        self._parts: list[Tensor] = []
        self._whole: tuple[Tensor, Tensor] | None = None

    def update(self, scores: Float[Tensor, "batch d_sae"]) -> None:
        """Adds a batch of scores: pre-latents, or codes where nothing else is known."""
        self._parts.append(scores.detach()[:, self.matching.latent[self.matching.has_latent]].T.cpu())
        self._whole = None

    def auroc(self, feature: Int[Tensor, " firings"], sample: Int[Tensor, " firings"]) -> Float[Tensor, " n_features"]:
        """Area under the ROC curve of each feature's latent, given the samples on which each feature fires.

        A feature without a latent has .5.
        """
        if self._whole is None:
            whole = torch.cat(self._parts, dim=1)
            # numpy sorts values several times as fast as torch, which sorts their indices too.
            self._whole = whole, torch.from_numpy(np.sort(whole.numpy(), axis=1))
        scores, ordered = self._whole
        has_latent = self.matching.has_latent.cpu()
        feature, sample = feature.cpu(), sample.cpu()
        kept = has_latent[feature]
        column, sample = (has_latent.cumsum(0) - 1)[feature[kept]], sample[kept]
        area = torch.full((len(has_latent),), 0.5, dtype=torch.float64)
        area[has_latent] = auroc(ordered, column, scores[column, sample])
        return area


class CodeRecovery:
    """Streams codes z and true activations a through a fixed match σ; any batch size gives the same numbers.

    Decoder rows and features count as unit rows: z_j is multiplied by |w_j|, a_i by |d_i|. Feature i fires
    when a_i > 0, latent j when z_j |w_j| > firing_threshold. Sums are kept for all pairs; the `scores`, which
    the caller fills, and the firings of matched pairs are kept whole: auroc and f1_best need their order.
    """

    def __init__(
        self,
        W_dec: Matrix,
        truth: Matrix,
        matching: Matching,
        scores: ScoreColumns,
        *,
        firing_threshold: float,
    ) -> None:
        device = matching.latent.device
        self.matching, self.scores, self.firing_threshold = matching, scores, firing_threshold
        self.decoder_norms = directions(W_dec)[1].to(device)
        self.feature_norms = directions(truth)[1].to(device)
        self.sums = CoStatistics(len(truth), len(W_dec), firing_threshold, device)
        # Firings of each feature in the samples that choose the threshold, and in those that judge it.
        self.n_active = torch.zeros(2, len(truth), dtype=torch.int64, device=device)
        self._matched_firings: list[tuple[Tensor, ...]] = []
        self._feature_firings: list[tuple[Tensor, Tensor]] = []

    def update(self, codes: SparseCodes, acts: FeatureBatch) -> None:
        """Adds a batch; row b of both is the same sample."""
        codes = codes.scaled(self.decoder_norms.to(codes.values.dtype))
        first, n = self.sums.n_samples, acts.n_features
        self.sums.update(codes, acts)

        on = acts.values > 0
        row, feature = rows_of(acts)[on], acts.indices[on]
        judges = ((first + row) % VALIDATION_EVERY != 0).long()
        self.n_active.view(-1).index_add_(0, judges * n + feature, torch.ones_like(feature))
        self._feature_firings.append((feature, first + row))

        owner = torch.full_like(self.matching.best_feature, -1)
        owner[self.matching.latent[self.matching.has_latent]] = self.matching.has_latent.nonzero().squeeze(1)
        z_row, latent, z = entries(codes, self.firing_threshold)
        matched = owner[latent] >= 0
        z_row, own, z = z_row[matched], owner[latent[matched]], z[matched]
        hit = torch.isin(z_row * n + own, row * n + feature)
        self._matched_firings.append((own, z, hit, (first + z_row) % VALIDATION_EVERY != 0))

    def per_feature(self) -> dict[str, Float[Tensor, " n_features"]]:
        """One value for each feature, as `compute` defines it.

        A feature without a latent scores 0, as do undefined ratios; its auroc is .5, as is that of a feature
        that never fires or is never silent.
        """
        on, fires, both = self._counts()
        N = max(self.sums.n_samples, 1)
        a, aa = self.sums.feature_sum / N, self.sums.feature_square / N
        z, zz = self._own(self.sums.unit_sum) / N, self._own(self.sums.unit_square) / N
        az, var_a = self._own(self.sums.product) / N, self.sums.feature_variance()
        feature, sample = (torch.cat(part) for part in zip(*self._feature_firings, strict=True))
        r2 = 1 - ratio(aa - ratio(az * az, zz), var_a)
        return {
            "precision": ratio(both, fires),
            "recall": ratio(both, on),
            "f1": ratio(2 * both, on + fires),
            "auroc": self.scores.auroc(feature, sample).to(on.device),
            "r2": torch.where(self.matching.has_latent & (var_a > 0), r2, 0.0),
            "shrinkage": ratio(az - a * z, var_a * self.feature_norms),
        }

    def compute(self) -> dict[str, float]:
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
        on, fires, both = self._counts()
        values = self.per_feature()
        scores = {name: mean(values[name][on > 0]) for name in MACRO}
        scores["shrinkage"] = mean(values["shrinkage"][(on > 0) & self.matching.has_latent])
        scores["f1_micro"] = float(ratio(2 * both.sum(), on.sum() + fires.sum()))
        best = self.matching.best_feature
        both_best = self.sums.both_count.gather(0, rearrange(best, "l -> 1 l")).squeeze(0)
        scores["f1_saelens"] = mean(ratio(2 * both_best, on[best] + self.sums.unit_count))
        return scores | self._f1_best()

    def _f1_best(self) -> dict[str, float]:
        own, z, hit, judge = (torch.cat(part) for part in zip(*self._matched_firings, strict=True))
        chooses, judged = self.n_active.double()
        threshold = best_threshold(own[~judge], z[~judge], hit[~judge], chooses, self.firing_threshold)
        fires = judge & (z > threshold)
        n_fires = own[fires].bincount(minlength=len(judged)).double()
        both = own[fires & hit].bincount(minlength=len(judged)).double()
        return {
            "f1_best": mean(ratio(2 * both, judged + n_fires)[judged > 0]),
            "f1_best_threshold": threshold,
        }

    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """How often each feature fires, its latent fires, and both do."""
        return self.sums.feature_count, self._own(self.sums.unit_count), self._own(self.sums.both_count)

    def _own(self, total: Float[Tensor, " d_sae"] | Float[Tensor, "n_features d_sae"]) -> Float[Tensor, " n_features"]:
        """Each feature's entry for its own latent, 0 without one."""
        latent = self.matching.latent.clamp(min=0)
        own = total[latent] if total.ndim == 1 else total.gather(1, rearrange(latent, "n -> n 1")).squeeze(1)
        return torch.where(self.matching.has_latent, own, 0.0)


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
    by_column = column.argsort()
    column, score = column[by_column], score[by_column]
    slot = torch.arange(len(column)) - F.pad(n_on.cumsum(0), (1, 0))[column]
    queries = score.new_zeros(len(ordered), int(n_on.max()) if len(n_on) else 0)
    queries[column, slot] = score
    below = torch.searchsorted(ordered, queries) + torch.searchsorted(ordered, queries, right=True)
    beaten = torch.zeros(len(ordered), dtype=torch.float64)
    beaten.index_add_(0, column, below[column, slot].double() / 2)
    P, N = n_on.double(), ordered.shape[1] - n_on.double()
    return torch.where(P * N > 0, ratio(beaten - P * P / 2, P * N), 0.5)


def best_threshold(
    column: Int[Tensor, " entries"],
    value: Float[Tensor, " entries"],
    hit: Bool[Tensor, " entries"],
    n_active: Float[Tensor, " columns"],
    floor: float,
) -> float:
    """The threshold t >= floor for all columns that maximises Σ_i F1_i, column i firing where its value > t.

    Entry e, above the floor, is a value of column `column[e]` in a sample where that column's feature fires
    (`hit[e]`) or not; `n_active` is how often each does. Exact: values are added from the largest to the
    smallest, and each changes the F1 of its own column. The answer is the largest value that does not fire;
    the floor where nothing is ever hit.
    """
    if not hit.any():
        return floor
    descending = value.argsort(descending=True)
    by_column = descending[column[descending].argsort(stable=True)]
    own, hits = column[by_column], hit[by_column].double()
    starts = torch.ones_like(own, dtype=torch.bool)
    starts[1:] = own[1:] != own[:-1]
    start = starts.nonzero().squeeze(1)[starts.cumsum(0) - 1]

    n_fires = torch.arange(1, len(own) + 1, device=own.device) - start
    n_hits = hits.cumsum(0) - (hits.cumsum(0) - hits)[start]
    f1 = 2 * n_hits / (n_fires + n_active[own])
    gain = torch.empty_like(f1)
    gain[by_column] = f1 - torch.where(starts, 0.0, f1.roll(1))

    value, total = value[descending], gain[descending].cumsum(0)
    next_value = torch.cat([value[1:], value.new_tensor([floor])])
    total = torch.where(value > next_value, total, -torch.inf)  # equal values fire together
    return float(next_value[total.argmax()])
