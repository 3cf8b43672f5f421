"""Is a feature readable from the scores of its latent, at any threshold? What auroc ranks."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.metrics.code_recovery import auroc, owners
from sae.metrics.dictionary_recovery import Matching
from sae.metrics.inputs import all_finite, rows_of, some_rows
from sae.metrics.samples import shuffled
from toymodels.features import FeatureBatch

# Scores that are kept whole, and of those the ones that are sorted at once.
KEPT_ENTRIES = 2**27
SORTED_ENTRIES = 2**23


class Ranking:
    """Keeps the scores of the matched latents on the first samples, as many as KEPT_ENTRIES allows.

    Ranks do not depend on the true activations, so those of shuffled samples are judged by the same.
    """

    def __init__(self, matching: Matching, n_samples: int) -> None:
        self.owner = owners(matching)
        self.n_latents = len(self.owner)
        self.latents = matching.latent.cpu()[matching.has_latent.cpu()]
        self.n_wanted = min(n_samples, max(1, KEPT_ENTRIES // max(len(self.latents), 1)))
        self.n_seen = 0
        self._scores: Tensor | None = None
        self._acts: list[FeatureBatch] = []

    @property
    def complete(self) -> bool:
        """Whether no further sample is wanted."""
        return self.n_seen >= self.n_wanted

    def update(self, scores: Float[Tensor, "batch d_sae"], acts: FeatureBatch) -> None:
        """Adds a batch: pre-latents, or codes where nothing else is known.

        Raises:
            ValueError: they are of another width, or not finite.
        """
        if scores.shape[1] != self.n_latents:
            raise ValueError(f"pre-latents of {scores.shape[1]} latents do not fit a W_dec of {self.n_latents} rows")
        if not all_finite(scores):
            sample = self.n_seen + int((~scores.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"pre-latents must be finite, those of sample {sample} hold nan or inf; drop that sample")
        n = min(len(scores), self.n_wanted - self.n_seen)
        if self._scores is None:
            self._scores = scores.new_empty(len(self.latents), self.n_wanted, device="cpu")
        self._scores[:, self.n_seen : self.n_seen + n] = scores[:n].detach().cpu()[:, self.latents].T
        self._acts.append(acts[:n])
        self.n_seen += n

    def areas(self, n_features: int, n_draws: int, seed: int) -> list[Float[Tensor, " n_features"]]:
        """Area under the ROC curve of each feature's latent: of the samples as they are, then of shuffled ones.

        A feature without a latent has .5.
        """
        acts = FeatureBatch.cat(self._acts)
        orders = [shuffled(len(acts), 0, draw, seed) for draw in range(n_draws)]
        views = [self._firings(each) for each in (acts, *(some_rows(acts, order) for order in orders))]
        area = torch.full((len(views), n_features), 0.5, dtype=torch.float64)
        if self._scores is None:
            return list(area)
        feature_of = self.owner[self.latents]
        at_once = max(1, SORTED_ENTRIES // max(self.n_seen, 1))
        for start in range(0, len(self.latents), at_once):
            scores = self._scores[start : start + at_once, : self.n_seen]
            # numpy sorts values several times as fast as torch, which sorts their indices too.
            ordered = torch.from_numpy(np.sort(scores.numpy(), axis=1))
            for found, (column, sample, bounds) in zip(area, views, strict=True):
                here = slice(bounds[start], bounds[start + len(scores)])
                own = column[here] - start
                found[feature_of[start : start + at_once]] = auroc(ordered, own, scores[own, sample[here]])
        return list(area)

    def _firings(self, acts: FeatureBatch) -> tuple[Tensor, Tensor, list[int]]:
        """Matched latent and sample of each time that a feature with a latent is on, in order of latents; and where
        each latent's begin."""
        column_of = torch.full((acts.n_features,), -1)
        column_of[self.owner[self.latents]] = torch.arange(len(self.latents))
        column = column_of[acts.indices]
        on = ((acts.values > 0) & (column >= 0)).nonzero().squeeze(1)
        column, sample = column[on], rows_of(acts)[on]
        order = column.argsort(stable=True)
        counts = column.bincount(minlength=len(self.latents))
        return column[order], sample[order], [0, *counts.cumsum(0).tolist()]
