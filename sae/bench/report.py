"""What was measured, as tables for people and as JSON with every sample for programs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sae.bench.ceiling import Ceiling
from sae.bench.memory import Memory
from sae.bench.shapes import L1_COEFFICIENT, LEARNING_RATE, N_STEPS, Shape
from sae.bench.stages import Stage
from sae.bench.timing import Timing, ratio
from sae.console import print_table
from sae.errors import UsageError


@dataclass(frozen=True)
class Race:
    """The contenders of one shape and kind; the first is the one that the others are compared with."""

    shape: Shape
    kind: str
    timings: list[Timing]


@dataclass
class Report:
    """Everything that one call of `sae bench` found."""

    machine: dict[str, object]
    ceilings: list[Ceiling] = field(default_factory=list)
    stages: list[tuple[Shape, str, list[Stage]]] = field(default_factory=list)
    races: list[Race] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Plain values: seconds, bytes, rates in units of 1e9."""
        return {
            "machine": self.machine,
            "settings": {"lr": LEARNING_RATE, "l1_coefficient": L1_COEFFICIENT, "n_steps": N_STEPS},
            "ceiling": [asdict(ceiling) | {"rate": ceiling.rate} for ceiling in self.ceilings],
            "stages": [
                {"shape": asdict(shape), "kind": kind} | asdict(stage)
                for shape, kind, stages in self.stages
                for stage in stages
            ],
            "steps": [row for race in self.races for row in _race_rows(race)],
            "memory": [asdict(memory) | {"growth": memory.growth} for memory in self.memory],
            "left_out": self.left_out,
        }

    def save(self, path: Path) -> None:
        """Writes the JSON file.

        Raises:
            UsageError: it cannot be written there.
        """
        try:
            path.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _race_rows(race: Race) -> list[dict[str, object]]:
    return [
        {
            "shape": asdict(race.shape),
            "kind": race.kind,
            "name": timing.contender.name,
            "version": timing.contender.version,
            "precision": timing.contender.precision,
            "median_seconds": timing.median,
            "minimum_seconds": timing.minimum,
            "samples_per_second": race.shape.batch / timing.median,
            "ratio": asdict(ratio(timing, race.timings[0])),
            "steps_per_round": timing.steps_per_round,
            "seconds": timing.seconds,
        }
        for timing in race.timings
    ]


def print_machine(machine: dict[str, object]) -> None:
    """Two lines: what it is, and what else was running."""
    flags = machine["cpu_flags"]
    assert isinstance(flags, list)
    versions = machine["versions"]
    assert isinstance(versions, dict)
    where = machine["gpu"] or machine["cpu"]
    able = ", ".join([str(machine["cpu_capability"]), *flags])
    print(f"{where}, {machine['threads']} threads on {machine['cores']} cores, {able}")
    print(f"torch {versions['torch']}, sae {versions['sae']}, load {machine['load']}, {machine['date']}")


def print_ceilings(ceilings: Sequence[Ceiling]) -> None:
    """The limits of the machine."""
    rows = [[f"{one.what}, {one.shape}", f"{one.rate:,.1f} {one.unit}", f"{min(one.rates):,.1f}"] for one in ceilings]
    print_table("ceilings", ["what", "best", "worst repeat"], rows)


def print_stages(shape: Shape, kind: str, stages: Sequence[Stage], ceilings: Sequence[Ceiling]) -> None:
    """Each stage beside the rates that it reached, and their share of the machine's, when that was measured."""
    whole = sum(statistics.median(stage.seconds) for stage in stages)
    header = ["stage", "ms", "share", "GFLOP/s", "GB/s", *(["of ceiling"] if ceilings else [])]
    rows = []
    for stage in stages:
        seconds = statistics.median(stage.seconds)
        flops, bytes_ = stage.flops / seconds / 1e9, stage.bytes / seconds / 1e9
        rows.append(
            [
                stage.name,
                f"{1e3 * seconds:.3f}",
                f"{seconds / whole:.0%}",
                f"{flops:,.1f}" if stage.flops else "",
                f"{bytes_:,.1f}" if stage.bytes else "",
                *([share_of_ceiling(shape, stage, ceilings)] if ceilings else []),
            ]
        )
    rows.append(["whole step", f"{1e3 * whole:.3f}", *[""] * (len(header) - 2)])
    print_table(f"stages of {kind}, {shape}", header, rows)


def share_of_ceiling(shape: Shape, stage: Stage, ceilings: Sequence[Ceiling]) -> str:
    """The larger of two shares, of what products in the same numbers and what memory reach, and which of them it is."""
    if not (stage.flops or stage.bytes):
        return ""
    seconds = statistics.median(stage.seconds)
    (product,) = (one.rate for one in ceilings if (one.what, one.shape) == (stage.ceiling, shape.name))
    memory = max(one.rate for one in ceilings if one.unit == "GB/s")
    shares = {"product": stage.flops / seconds / 1e9 / product, "memory": stage.bytes / seconds / 1e9 / memory}
    bound = max(shares, key=lambda name: shares[name])
    return f"{shares[bound]:.0%} of {bound}"


def print_race(race: Race) -> None:
    """One row a contender; ratios are medians over rounds, with quartiles."""
    rows = []
    for timing in race.timings:
        r = ratio(timing, race.timings[0])
        rows.append(
            [
                " ".join(word for word in (timing.contender.name, timing.contender.version) if word),
                f"{1e3 * timing.median:.2f}",
                f"{1e3 * timing.minimum:.2f}",
                f"{race.shape.batch / timing.median:,.0f}",
                f"{r.median:.2f}",
                f"{r.low:.2f}–{r.high:.2f}",
            ]
        )
    n, steps = len(race.timings[0].seconds), race.timings[0].steps_per_round
    print_table(
        f"{race.kind}, {race.shape}; {n} rounds of {steps} steps",
        ["contender", "ms a step", "best", "samples/s", "times ours", "quartiles"],
        rows,
    )


def print_memory(shape: Shape, measured: Sequence[Memory]) -> None:
    """Peaks above what imports and activations take."""
    rows = [
        [f"{one.name}, {one.kind}", f"{one.growth / 2**20:,.0f}", f"{one.baseline / 2**20:,.0f}"] for one in measured
    ]
    print_table(f"peak memory of a few steps, {shape}", ["contender", "MiB", "MiB before"], rows)
