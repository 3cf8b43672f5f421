"""The scores that tables and figures show: of each its key, its name, its digits and its meaning, in one place."""

from __future__ import annotations

from typing import NamedTuple


class Score(NamedTuple):
    """A column: where its value is in result.json, and how it is written."""

    key: str
    name: str
    form: str
    meaning: str
    short: str | None = None
    """The name in a terminal, where that has to be shorter."""
    short_form: str | None = None

    @property
    def narrow(self) -> Score:
        """As terminals have room for it."""
        return self._replace(name=self.short or self.name, form=self.short_form or self.form)


MCC, MMCS, COVERAGE, F1 = "recovery/mcc", "recovery/mmcs", "recovery/coverage_0.9", "recovery/f1"
FVU, L0, DEAD, DEAD_LATENTS = "metrics/fvu", "metrics/l0", "metrics/dead", "sparsity/dead_features"
CE, KL = "metrics/ce_recovered", "metrics/kl"
PURITY, DIMENSIONALITY = "polysemanticity/latent_purity", "dimensionality/feature_dimensionality"
SECONDS, SPEED = "seconds", "details/samples_per_second"

_SCORES = (
    Score(MCC, "MCC", ".3f", "mean cosine of a feature with its own latent, matched one to one"),
    Score(MMCS, "MMCS", ".3f", "mean cosine of a feature with its nearest latent"),
    Score(COVERAGE, "coverage", ".3f", "share of features with a cosine above 0.9 to their own latent", "cov"),
    Score(F1, "F1", ".3f", "agreement on when a feature fires, mean over features"),
    Score(PURITY, "purity", ".3f", "share of what a latent tells that is about its best feature; 1 is monosemantic"),
    Score(DIMENSIONALITY, "dim.", ".3f", "dimensions that a latent has to itself, on average"),
    Score(FVU, "FVU", ".4f", "share of the variance that the reconstruction misses", short_form=".3f"),
    Score(L0, "L0", ".2f", "latents that fire for one activation, on average"),
    Score(DEAD, "dead", ".1%", "share of latents that never fire", short_form=".0%"),
    Score(DEAD_LATENTS, "dead latents", ".0f", "latents that never fire", "dead"),
    Score(CE, "CE recovered", ".3f", "share of what the model loses with zeros that x_hat brings back"),
    Score(KL, "KL", ".3f", "nats that the model's predictions lose with x_hat in the place of x"),
    Score(SECONDS, "seconds to fit", ".1f", "time to fit or train", "fit s", ".0f"),
    Score(
        SPEED, "thousand / s", ".0f", "activations that training takes in a second, on one core, in thousands", "k/s"
    ),
)
SCORES = {score.key: score for score in _SCORES}


def scores(*keys: str) -> tuple[Score, ...]:
    """The columns of a table."""
    return tuple(SCORES[key] for key in keys)
