"""Worlds as sources, whose features are known: toy models, and synthetic worlds from a description or from SAELens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from pydantic import Field, field_validator
from safetensors import SafetensorError
from torch import Tensor

from sae.config import SourceConfig
from sae.errors import UsageError
from sae.held_out import HeldOut, HeldOutStream, Purpose, cut
from sae.sources import Source
from toymodels.experiments import NAMES, experiment
from toymodels.saelens import load_world
from toymodels.streams import generator
from toymodels.worlds import Recipe, ToyRecipe, World

logger = logging.getLogger("sae")

# A world's batches are drawn by the handful: for one batch of sparse features, calls cost more than draws.
BATCHES_AT_ONCE = 8
# A world's rows are drawn by so many, however many are asked for: the first ones stay the same.
ROWS_AT_ONCE = 4096


class WorldSource(Source):
    """The hidden activations of a toy world: an endless stream, with known features wherever there are features."""

    def __init__(self, world: World, seed: int = 0) -> None:
        self.world, self.seed = world, seed
        self.truth, self.d_in = world.truth, world.d_hidden

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        number, skip = divmod(start, BATCHES_AT_ONCE)
        while True:
            stream = generator(self.seed, "training", seed, number)
            yield from self.world.sample(BATCHES_AT_ONCE * batch_size, stream).hidden.split(batch_size)[skip:]
            number, skip = number + 1, 0

    def held_out(self, purpose: Purpose, n: int) -> HeldOut:
        (whole,) = self.held_out_stream(purpose, n).pieces(n)
        return whole

    def held_out_stream(self, purpose: Purpose, n: int) -> HeldOutStream:
        return WorldStream(self.world, self.seed, purpose, n)


class ShiftedSource(WorldSource):
    """Trains and calibrates in one world, evaluates in another with the same features."""

    def __init__(self, inside: WorldSource, outside: WorldSource) -> None:
        super().__init__(inside.world, inside.seed)
        self.outside = outside

    def held_out_stream(self, purpose: Purpose, n: int) -> HeldOutStream:
        if purpose == "evaluation":
            return self.outside.held_out_stream(purpose, n)
        return super().held_out_stream(purpose, n)


class WorldStream:
    """The first n rows that a world holds back for a purpose, drawn piece after piece when they are wanted."""

    def __init__(self, world: World, seed: int, purpose: Purpose, n: int) -> None:
        self.world, self.seed, self.purpose, self.n = world, seed, purpose, n

    def pieces(self, rows: int) -> Iterator[HeldOut]:
        draws = (
            HeldOut(*self.world.sample(ROWS_AT_ONCE, generator(self.seed, self.purpose, number)))
            for number in range(-(-self.n // ROWS_AT_ONCE))
        )
        return cut(draws, self.n, rows)


class ToySourceConfig(SourceConfig):
    """The hidden activations of a toy model trained on the spot (Elhage et al. 2022)."""

    kind: Literal["toy"] = "toy"
    experiment: str | None = None
    """An experiment from `toymodels list` whose features and model to use; default independent features of one
    frequency in a ReLU-output model, 256 in 64 dimensions at feature_prob 0.01."""
    n_features: int | None = Field(default=None, gt=0)
    """Number of true features; default the experiment's."""
    d_hidden: int | None = Field(default=None, gt=0)
    """Dimensions they are squeezed into: the SAE's d_in; default the experiment's."""
    feature_prob: float | None = Field(default=None, gt=0, le=1)
    """Probability that a feature fires, 1 - sparsity; default the experiment's."""
    n_steps: int | None = Field(default=None, gt=0)
    """Training steps of the toy model; default the experiment's."""
    seed: int = Field(default=0, ge=0)
    """Determines the toy model and its features; `train.seed` determines the SAE."""
    weights: Path | None = None
    """A toy model trained before, to load instead of training one. Its sizes must match the source's."""

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


class WorldSourceConfig(SourceConfig):
    """The activations of a synthetic world: thousands of features at the cost of the active ones."""

    kind: Literal["world"] = "world"
    path: Path
    """A YAML file that describes a world, or a folder in which SAELens saved one."""
    seed: int = Field(default=0, ge=0)
    """Determines what the description of a world leaves open, and its samples; `train.seed` determines the SAE."""
    shift: int | None = Field(default=None, ge=0)
    """Seed for different co-occurrences in the evaluation rows, with the same features and marginals; default the same
    world."""

    def open(self) -> WorldSource:
        logger.info("building the world of %s first, which may take seconds", self.path)
        try:
            world = load_world(self.path, self.seed)
        except UsageError as error:
            if str(self.path) in str(error):
                raise
            raise UsageError(f"{self.path}: {error}") from error
        if self.shift is None:
            return WorldSource(world, self.seed)
        return ShiftedSource(WorldSource(world, self.seed), WorldSource(world.shifted(self.shift), self.seed))
