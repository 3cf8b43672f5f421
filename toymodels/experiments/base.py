"""What an experiment is: it claims, runs, measures and draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from toymodels.plots import Figure
from toymodels.streams import generator
from toymodels.worlds import Recipe

Status = Literal["RUN", "EXACT", "DERIVED", "PROPOSED"]
"""Where a target comes from: a trained model, quadrature of the expected loss, algebra, or a calibration whose
reasoning stands in the experiment's file."""
Relation = Literal["within", "at_least", "at_most", "equals"]
Number = float | int
Measured = float | int | Tensor
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Claim:
    """A number, and what it must be for the claim to hold."""

    row: str
    """The phenomenon that it belongs to: 5a."""
    name: str
    """A key for programs: dimensions_per_feature_at_3."""
    text: str
    """What is measured, for a reader: "D* at 1/(1−S) = 3"."""
    measured: float
    relation: Relation
    target: float
    tolerance: float
    """How far `measured` may lie from the target; 0 unless the relation is "within"."""
    source: Status

    @property
    def holds(self) -> bool:
        """Whether the measured value stands in its relation to the target; never for nan or infinity."""
        if not math.isfinite(self.measured):
            return False
        match self.relation:
            case "within":
                return abs(self.measured - self.target) <= self.tolerance
            case "at_least":
                return self.measured >= self.target
            case "at_most":
                return self.measured <= self.target
            case "equals":
                return self.measured == self.target


class Claims:
    """Collects the claims of one row."""

    def __init__(self, row: str) -> None:
        self.row = row
        self.made: list[Claim] = []

    def within(
        self, name: str, text: str, measured: Measured, target: Number, tolerance: Number, source: Status
    ) -> None:
        """|measured − target| ≤ tolerance."""
        self._add(name, text, measured, "within", target, tolerance, source)

    def at_least(self, name: str, text: str, measured: Measured, target: Number, source: Status) -> None:
        """measured ≥ target."""
        self._add(name, text, measured, "at_least", target, 0.0, source)

    def at_most(self, name: str, text: str, measured: Measured, target: Number, source: Status) -> None:
        """measured ≤ target."""
        self._add(name, text, measured, "at_most", target, 0.0, source)

    def equals(self, name: str, text: str, measured: Measured, target: Number, source: Status) -> None:
        """measured = target, for counts."""
        self._add(name, text, measured, "equals", target, 0.0, source)

    def _add(
        self,
        name: str,
        text: str,
        measured: Measured,
        relation: Relation,
        target: Number,
        tolerance: Number,
        source: Status,
    ) -> None:
        assert all(claim.name != name for claim in self.made), f"two claims are named {name}"
        numbers = float(measured), relation, float(target), float(tolerance)
        self.made.append(Claim(self.row, name, text, *numbers, source))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an experiment found; the figures are drawn from it alone."""

    claims: Sequence[Claim]
    tensors: Mapping[str, Tensor]
    """`<condition>/W [n_instances, n_features, d_hidden]`, `<condition>/b`, and whatever else a figure shows or a
    reader may want to check, under names of its own. Saved as weights.safetensors."""
    conditions: Mapping[str, Mapping[str, Any]]
    """Condition → what it was trained on: {"feature_prob": .05, "n_steps": 1000, ...}, plain JSON values."""
    n_seeds: int

    def __post_init__(self) -> None:
        names = [claim.name for claim in self.claims]
        assert len(set(names)) == len(names), f"two claims have one name: {sorted(names)}"


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure, and the sentence below it."""

    name: str
    """Stem of its files."""
    figure: Figure
    caption: str


@dataclass(eq=False)
class Context:
    """What a run of an experiment is given: its seed, how much to do, and whom to tell how far it is."""

    name: str
    seed: int = 0
    fast: bool = False
    on_progress: Callable[[int, int], None] | None = None
    """Called with the number of steps done and expected."""
    _done: int = field(default=0, init=False)
    _expected: int = field(default=0, init=False)

    def stream(self, *names: str | int) -> torch.Generator:
        """A random stream of its own for each use."""
        return generator(self.seed, self.name, *names)

    def pick(self, *, fast: Choice, full: Choice) -> Choice:
        """The reduced or the full value of a size."""
        return fast if self.fast else full

    def expect(self, n_steps: int) -> None:
        """Announces steps still to come."""
        self._expected += n_steps
        self._tell()

    def tick(self, *_: object) -> None:
        """One step is done; takes and ignores what training tells its `progress`."""
        self._done += 1
        if self._done % 16 == 0 or self._done >= self._expected:
            self._tell()

    def _tell(self) -> None:
        if self.on_progress is not None:
            self.on_progress(self._done, self._expected)


@dataclass(frozen=True, eq=False)
class Experiment:
    """One phenomenon, by name."""

    name: str
    row: str
    title: str
    claim: str
    """One sentence: what it shows."""
    reference: str
    """Where it was published."""
    seconds: int
    """What --fast takes on one core."""
    run: Callable[[Context], Outcome]
    """Trains and measures."""
    draw: Callable[[Outcome], Sequence[Picture]]
    recipe: Recipe | None = None
    """How to make a world of this kind, whose hidden activations an SAE can read; None if there are none."""
