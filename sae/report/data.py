"""What a report is drawn from: run directories, and nothing else."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sae.config_text import read_yaml
from sae.errors import UsageError
from sae.metrics.dictionary_recovery import match_dictionary
from sae.metrics.ground_truth import FOUND, frequency_deciles
from sae.names import BASELINES, CLASSES, CONFIG, DIAGNOSIS, FEATURES, LINES, RESULT, SUMMARY, TABLES, WEIGHTS

# What a run has that is finished.
FILES = (CONFIG, LINES, RESULT, TABLES, WEIGHTS)
# Runs of which maps, densities and frequencies are drawn: more would not be told apart.
MAX_SHOWN = 6

# Fields of a configuration that tell one seed of a setting from another, or where it is written.
SEEDS = ("seed", "data_seed")
NOT_SETTINGS = ("out", "log", "checkpoint")

Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run. Runs of one `method` differ in their seed alone, and share a colour."""

    name: str
    method: str
    config: dict[str, Any]
    config_text: str
    lines: list[dict[str, Any]]
    result: dict[str, Any]
    tables: dict[str, np.ndarray]
    W_dec: Float[np.ndarray, "d_sae d_in"]
    classes: dict[str, list[dict[str, float]]] | None = None
    """For labelled data: what each class's best single unit of each sort scores."""
    diagnosis: dict[str, Any] | None = None
    """What `sae eval --diagnose` counted, and under `features` its table, a row a feature."""

    @property
    def truth(self) -> Float[np.ndarray, "n_features d_in"] | None:
        """Directions of the true features, when known."""
        return self.tables.get("truth")

    @property
    def knows_activations(self) -> bool:
        """Whether it is known when each true feature fires, and not only its direction."""
        return "feature/frequency" in self.tables

    @property
    def order(self) -> Int[np.ndarray, " n_features"]:
        """The true features from frequent to rare, or in their own order where that is not known."""
        if not self.knows_activations:
            return np.arange(len(self.tables["truth"]))
        return np.argsort(-self.feature("frequency"), kind="stable")

    def feature(self, name: str) -> np.ndarray:
        """One column of the table of true features."""
        return self.tables[f"feature/{name}"]

    def deciles(self) -> dict[str, np.ndarray]:
        """Means over tenths of the features, from rare to frequent (`metrics.frequency_deciles`)."""
        features = {key: torch.as_tensor(column) for key, column in self.tables.items() if key.startswith("feature/")}
        table = {key.removeprefix("feature/").removeprefix("matched_"): column for key, column in features.items()}
        return {name: column.numpy() for name, column in frequency_deciles(table).items()}

    def curve(self, key: str) -> tuple[list[int], list[float]]:
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
    baselines: dict[str, list[Row]]
    """Other methods on the activations of a run, those that its summary has already left out; by the run's name."""

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


def by_setting(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs whose configurations differ in their seeds alone, together; in order of appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        kept = {name: part for name, part in run.config.items() if name not in NOT_SETTINGS}
        groups.setdefault(json.dumps(_without_seeds(kept), sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def _without_seeds(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    return {name: _without_seeds(value) for name, value in part.items() if name not in SEEDS}


def collect(paths: Sequence[Path]) -> Collection:
    """Reads the given run directories, their summaries and baselines, and the runs that the summaries name.

    Raises:
        UsageError: there is no directory, or one holds no finished run or a damaged file.
    """
    if not paths:
        raise UsageError("a report needs a run directory, got none; give one, as in `sae report runs/demo`")
    given, siblings, summaries = [], [], []
    baselines: dict[str, list[Row]] = {}
    for path, name in zip(paths, _names(paths), strict=True):
        run = read_run(path, name, name)
        known = set()
        if (path / SUMMARY).is_file():
            rows = _read_json(path / SUMMARY)
            summaries.append(rows)
            known = {row["method"] for row in rows}
            folders = [path / _name(row) for row in rows]
            # The directory itself is the run of its kind that has no directory of its own.
            for row, folder in zip(rows, folders, strict=True):
                if row["method"] == run.config["sae"]["kind"] and not folder.is_dir():
                    run = replace(run, name=_name(row), method=row["method"])
                    break
            siblings += [
                read_run(folder, folder.name, row["method"])
                for row, folder in zip(rows, folders, strict=True)
                if all((folder / file).is_file() for file in FILES)
            ]
        if (path / BASELINES).is_file():
            beside = [row for row in _read_json(path / BASELINES) if row["method"] not in known]
            baselines |= {run.name: beside} if beside else {}
        given.append(run)
    return Collection(given, siblings, summaries, baselines)


def read_run(path: Path, name: str, method: str) -> Run:
    """One run directory."""
    missing = [file for file in FILES if not (path / file).is_file()]
    if missing:
        remedy = "train it to the end, with --resume" if (path / CONFIG).is_file() else "give the directory of a run"
        raise UsageError(f"{path} holds no finished run: {missing[0]} is missing; {remedy}")
    closed = [file for file in FILES if not os.access(path / file, os.R_OK)]
    if closed:
        raise UsageError(f"{path / closed[0]} cannot be read: permission denied; change the rights of the file")
    lines = (path / LINES).read_text(encoding="utf-8").splitlines()
    try:
        W_dec = load_file(path / WEIGHTS)["W_dec"].astype(np.float32)
        return Run(
            name=name,
            method=method,
            config=read_yaml(path / CONFIG),
            config_text=(path / CONFIG).read_text(encoding="utf-8"),
            lines=[json.loads(line) for line in lines if line.strip()],
            result=_read_json(path / RESULT),
            tables=_with_matching(load_file(path / TABLES), W_dec),
            W_dec=W_dec,
            classes=_read_json(path / CLASSES)["units"] if (path / CLASSES).is_file() else None,
            diagnosis=_diagnosis(path) if (path / DIAGNOSIS).is_file() else None,
        )
    except UsageError:
        raise
    except (ValueError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read: {error}; train the run again") from error


def _with_matching(tables: dict[str, np.ndarray], W_dec: Float[np.ndarray, "d_sae d_in"]) -> dict[str, np.ndarray]:
    """Where the features' directions are known but not their activations, the match alone is known too."""
    truth = tables.get("truth")
    if truth is None or "feature/matched_latent" in tables:
        return tables
    matching = match_dictionary(W_dec, truth, tables["latent/frequency"] > 0)
    columns = {
        "matched_latent": matching.latent,
        "matched_cosine": matching.cosine,
        "found": matching.cosine > FOUND,
        "nearest_latent": matching.nearest_latent,
        "nearest_latent_cosine": matching.nearest_cosine,
    }
    return tables | {f"feature/{name}": column.numpy() for name, column in columns.items()}


def _diagnosis(path: Path) -> dict[str, Any]:
    with (path / FEATURES).open(encoding="utf-8", newline="") as file:
        return _read_json(path / DIAGNOSIS) | {"features": list(csv.DictReader(file))}


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
        raise UsageError(f"{path} is not valid JSON ({error}); run the command that wrote it again") from error
