"""Synthetic worlds as a source: known features, from a description or from a world that SAELens saved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from pydantic import Field

from sae.config import SourceConfig
from sae.errors import UsageError
from sae.held_out import HeldOutStream, Purpose
from sae.sources import WorldSource
from toymodels.saelens import load_world

logger = logging.getLogger("sae")


class WorldSourceConfig(SourceConfig):
    """The activations of a synthetic world, thousands of features at the cost of those that are active."""

    kind: Literal["world"] = "world"
    path: Path
    """A YAML file that describes a world, or a folder that SAELens saved one in."""
    seed: int = Field(default=0, ge=0)
    """Decides the world that a description leaves open, and its samples; `train.seed` decides the SAE."""
    shift: int | None = Field(default=None, ge=0)
    """Seed of other co-occurrences for the evaluation rows, with the same features and marginals; default the same."""

    def open(self) -> WorldSource:
        logger.info("the world of %s is made first, which may take seconds", self.path)
        try:
            world = load_world(self.path, self.seed)
        except UsageError as error:
            if str(self.path) in str(error):
                raise
            raise UsageError(f"{self.path}: {error}") from error
        if self.shift is None:
            return WorldSource(world, self.seed)
        return ShiftedSource(WorldSource(world, self.seed), WorldSource(world.shifted(self.shift), self.seed))


class ShiftedSource(WorldSource):
    """Trains and calibrates in one world, evaluates in another with the same features."""

    def __init__(self, inside: WorldSource, outside: WorldSource) -> None:
        super().__init__(inside.world, inside.seed)
        self.outside = outside

    def held_out_stream(self, purpose: Purpose, n: int) -> HeldOutStream:
        if purpose == "evaluation":
            return self.outside.held_out_stream(purpose, n)
        return super().held_out_stream(purpose, n)
