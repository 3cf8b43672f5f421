"""Toy models as a source: hidden activations of a small network, whose features are known."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from safetensors import SafetensorError

from sae.config import SourceConfig
from sae.errors import UsageError
from sae.sources import WorldSource
from toymodels.experiments import NAMES, experiment
from toymodels.worlds import Recipe, ToyRecipe

logger = logging.getLogger("sae")


class ToySourceConfig(SourceConfig):
    """The hidden activations of a toy model that is trained on the spot (Elhage et al. 2022)."""

    kind: Literal["toy"] = "toy"
    experiment: str | None = None
    """An experiment of `toymodels list`, whose features and model these are; default independent features of one
    frequency in a ReLU-output model, 256 in 64 dimensions at feature_prob 0.01."""
    n_features: int | None = Field(default=None, gt=0)
    """True features; default the experiment's."""
    d_hidden: int | None = Field(default=None, gt=0)
    """Dimensions that they are squeezed into, the SAE's d_in; default the experiment's."""
    feature_prob: float | None = Field(default=None, gt=0, le=1)
    """Probability that a feature fires, 1 - sparsity; default the experiment's."""
    n_steps: int | None = Field(default=None, gt=0)
    """Steps that the toy model trains for; default the experiment's."""
    seed: int = Field(default=0, ge=0)
    """Decides the toy model and its features; `train.seed` decides the SAE."""
    weights: Path | None = None
    """A toy model trained before, to load instead of training."""

    @field_validator("experiment")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None:
            experiment(name)
        return name

    @property
    def recipe(self) -> Recipe:
        """How the world is made.

        Raises:
            UsageError: the experiment has no hidden activations, or not such sizes.
        """
        recipe = ToyRecipe() if self.experiment is None else experiment(self.experiment).recipe
        if recipe is None:
            with_hidden = [name for name in NAMES if experiment(name).recipe is not None]
            raise UsageError(
                f"source.experiment {self.experiment!r} has no hidden activations; use one of {', '.join(with_hidden)}"
            )
        return recipe.resized(
            n_features=self.n_features, d_hidden=self.d_hidden, feature_prob=self.feature_prob, n_steps=self.n_steps
        )

    def open(self) -> WorldSource:
        recipe = self.recipe
        if self.weights is None:
            logger.info("the toy model is trained first, which may take seconds")
            return WorldSource(recipe.build(self.seed), self.seed)
        if not isinstance(recipe, ToyRecipe):
            raise UsageError(f"source.weights cannot be loaded into {self.experiment!r}; leave it out")
        try:
            return WorldSource(recipe.load(self.weights), self.seed)
        except (OSError, ValueError, SafetensorError) as error:
            raise UsageError(
                f"source.weights {self.weights} cannot be loaded: {error}; leave it out to train"
            ) from error
