"""Worlds whose hidden activations an SAE can read, and recipes that make them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from toymodels.errors import UsageError
from toymodels.features import FeatureBatch, Features
from toymodels.models import ToyModel
from toymodels.streams import generator
from toymodels.training import train

OnStep = Callable[[int, Tensor], None]
"""Called after each training step with its number and the losses."""
OneRecipe = TypeVar("OneRecipe", bound="Recipe")


class Sample(NamedTuple):
    """Hidden activations, and what the true features do in them when these are known."""

    hidden: Float[Tensor, "batch d_hidden"]
    acts: FeatureBatch | None


class World(ABC):
    """An endless stream of hidden activations."""

    d_hidden: int
    truth: Float[Tensor, "n_features d_hidden"] | None
    """Directions of the true features, when known."""

    @abstractmethod
    def sample(self, n: int, stream: torch.Generator) -> Sample:
        """n activations, decided by the stream alone."""


WHY_ABSENT = {
    "n_features": "nobody knows its true features",
    "d_hidden": "its width is fixed",
    "feature_prob": "nobody knows its true features",
    "n_steps": "nothing in it is trained",
}
"""What it means that a recipe lacks a size."""


@dataclass(frozen=True)
class Recipe(ABC):
    """How to make a world. Its fields are the sizes that it has, and whatever else it needs."""

    def resized(
        self: OneRecipe,
        *,
        n_features: int | None = None,
        d_hidden: int | None = None,
        feature_prob: float | None = None,
        n_steps: int | None = None,
    ) -> OneRecipe:
        """The same recipe at other sizes; None keeps its own.

        Raises:
            UsageError: the recipe has no such size, or it is impossible.
        """
        asked = {"n_features": n_features, "d_hidden": d_hidden, "feature_prob": feature_prob, "n_steps": n_steps}
        sizes: dict[str, Any] = {name: size for name, size in asked.items() if size is not None}
        for name, size in sizes.items():
            if name not in {own.name for own in fields(self)}:
                raise UsageError(
                    f"{type(self).__name__} has no {name}, got {size}: {WHY_ABSENT[name]}; leave it out, or take "
                    "another experiment"
                )
        return replace(self, **sizes)

    @abstractmethod
    def build(self, seed: int, on_step: OnStep | None = None) -> World:
        """Trains what has to be trained."""


class ToyWorld(World):
    """The hidden layer of one toy model that reads its features.

    The true direction of a feature is the hidden layer's answer to it alone. Signed features count twice, as
    what fires above zero and what fires below.
    """

    def __init__(self, model: ToyModel, features: Features) -> None:
        self.model, self.features = model, features
        self.truth = model.directions(features.signed)[0]
        self.d_hidden = model.d_hidden

    def sample(self, n: int, stream: torch.Generator) -> Sample:
        acts = self.features.sample(n, stream)
        with torch.no_grad():
            hidden = self.model.activate(acts.embed(self.model.W[0]))
        return Sample(hidden, _both_signs(acts) if self.features.signed else acts)


def _both_signs(acts: FeatureBatch) -> FeatureBatch:
    """Feature i at −v becomes feature n_features + i at v."""
    indices = acts.indices + acts.n_features * (acts.values < 0)
    return FeatureBatch(indices, acts.values.abs(), acts.offsets, (*acts.shape[:-1], 2 * acts.n_features))


def falling_importance(ratio: float, n_reference: int) -> Callable[[int, float], Features]:
    """Features of importance ratio^i at n_reference features; at any other number, the same fall from first to last."""

    def make_features(n_features: int, feature_prob: float) -> Features:
        step = ratio ** (n_reference / n_features)
        return Features(n_features, feature_prob, [step**i for i in range(n_features)])

    return make_features


@dataclass(frozen=True)
class ToyRecipe(Recipe):
    """Trains one toy model. `make_features(n_features, feature_prob)` says what fires."""

    n_features: int = 256
    d_hidden: int = 64
    feature_prob: float = 0.01
    n_steps: int = 3000
    make_features: Callable[[int, float], Features] = Features
    model: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ToyModel."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of train."""

    @property
    def features(self) -> Features:
        """What fires."""
        return self.make_features(self.n_features, self.feature_prob)

    def build(self, seed: int, on_step: OnStep | None = None) -> ToyWorld:
        features = self.features
        model = ToyModel(self.n_features, self.d_hidden, generator=generator(seed, "toy", "weights"), **self.model)
        stream = generator(seed, "toy", "training")
        train(model, features, self.n_steps, generator=stream, progress=on_step, **self.training)
        return ToyWorld(model, features)

    def load(self, path: Path) -> ToyWorld:
        """The same world around a model that was saved.

        Raises:
            UsageError: it is of another size or form, or a stack of several.
        """
        model = ToyModel.load(path)
        if (model.n_features, model.d_hidden) != (self.n_features, self.d_hidden):
            raise UsageError(
                f"it holds {model.n_features} features in {model.d_hidden} dimensions, {self.n_features} in "
                f"{self.d_hidden} were asked for; make them agree"
            )
        expected = ToyModel(1, self.d_hidden, **self.model)
        if (model.form, model.tied, model.n_instances) != (expected.form, expected.tied, 1):
            raise UsageError(
                f"it holds {model.n_instances} models with {model.form}, tied={model.tied}; one with {expected.form}, "
                f"tied={expected.tied} was asked for; save it as that, with model.instance(i)"
            )
        return ToyWorld(model, self.features)
