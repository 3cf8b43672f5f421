"""What a report is drawn from: run directories, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

from sae.config import read_yaml
from sae.errors import UsageError

CONFIG, LINES, RESULT, TABLES, WEIGHTS = FILES = (
    "config.yaml",
    "metrics.jsonl",
    "result.json",
    "evaluation.safetensors",
    "sae.safetensors",
)
SUMMARY = "summary.json"
# Runs of which maps, densities and frequencies are drawn: more would not be told apart.
MAX_SHOWN = 6

Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run. `method` is what runs that differ in their seed alone share; it decides the colour."""

    name: str
    method: str
    config: dict[str, Any]
    config_text: str
    lines: list[dict[str, float]]
    result: dict[str, float]
    tables: dict[str, np.ndarray]
    W_dec: Float[np.ndarray, "d_sae d_in"]

    @property
    def truth(self) -> Float[np.ndarray, "n_features d_in"] | None:
        """Directions of the true features, when known."""
        return self.tables.get("truth")

    def feature(self, name: str) -> np.ndarray:
        """One column of the table of true features."""
        return self.tables[f"feature/{name}"]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of the logged lines that have a key."""
        points = [(line["step"], line[key]) for line in self.lines if isfinite(line.get(key, nan))]
        return [step for step, _ in points], [value for _, value in points]


@dataclass(frozen=True, eq=False)
class Collection:
    """The runs of one report. The first is the one whose features are listed one by one."""

    given: list[Run]
    siblings: list[Run]
    """Further runs of a given directory's summary: they appear in figures, the summary in a table."""
    summaries: list[list[Row]]

    @property
    def runs(self) -> list[Run]:
        return [*self.given, *self.siblings]

    @property
    def methods(self) -> list[str]:
        """In order of appearance: the place decides the colour."""
        return list(dict.fromkeys(run.method for run in self.runs))

    @property
    def shown(self) -> list[Run]:
        """The first run of each method, MAX_SHOWN at most."""
        first: dict[str, Run] = {}
        for run in self.runs:
            first.setdefault(run.method, run)
        return list(first.values())[:MAX_SHOWN]


def collect(paths: Sequence[Path]) -> Collection:
    """Reads the given run directories, their summaries, and the runs that the summaries name.

    Raises:
        UsageError: there is no directory, or one holds no finished run or a damaged file.
    """
    if not paths:
        raise UsageError("a report needs at least one run directory, got none; give one, as in `sae report runs/demo`")
    given, siblings, summaries = [], [], []
    for path, name in zip(paths, _names(paths), strict=True):
        run = read_run(path, name, name)
        if (path / SUMMARY).is_file():
            rows = _read_json(path / SUMMARY)
            summaries.append(rows)
            own = [row for row in rows if not (path / _name(row)).is_dir() and row["method"] == run.config["sae"]["kind"]]
            if own:
                run = read_run(path, _name(own[0]), own[0]["method"])
            siblings += [
                read_run(path / _name(row), _name(row), row["method"]) for row in rows if _is_run(path / _name(row))
            ]
        given.append(run)
    return Collection(given, siblings, summaries)


def read_run(path: Path, name: str, method: str) -> Run:
    """One run directory."""
    missing = [file for file in FILES if not (path / file).is_file()]
    if missing:
        raise UsageError(
            f"{path} holds no finished run: {missing[0]} is missing; train it to the end (`sae train --resume` continues)"
        )
    lines = (path / LINES).read_text(encoding="utf-8").splitlines()
    try:
        return Run(
            name=name,
            method=method,
            config=read_yaml(path / CONFIG),
            config_text=(path / CONFIG).read_text(encoding="utf-8"),
            lines=[json.loads(line) for line in lines if line.strip()],
            result=_read_json(path / RESULT),
            tables=load_file(path / TABLES),
            W_dec=load_file(path / WEIGHTS)["W_dec"].astype(np.float32),
        )
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {error}; run `sae eval {path}` to write its results again") from error


def _is_run(path: Path) -> bool:
    return all((path / file).is_file() for file in FILES)


def _name(row: Row) -> str:
    return f"{row['method']}-{row['seed']}"


def _names(paths: Sequence[Path]) -> list[str]:
    """Directory names, or whole paths where two are alike."""
    short = [path.resolve().name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}; run the command that wrote it again") from error
