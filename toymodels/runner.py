"""Runs an experiment, and writes what it found: figures, result.json, weights.safetensors."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from toymodels import plots
from toymodels.experiments import experiment
from toymodels.experiments.base import Context, Outcome
from toymodels.files import save_tensors, write_text

RESULT, WEIGHTS = "result.json", "weights.safetensors"


def run_experiment(
    name: str, out: Path, seed: int, fast: bool, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Runs one experiment into the folder `out`, and returns what result.json says.

    Figures are written last: a drawing that fails does not lose a measurement.
    """
    chosen = experiment(name)
    plots.require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    outcome = chosen.run(Context(name, seed, fast, on_progress))
    result = {
        "name": name,
        "row": chosen.row,
        "seed": seed,
        "fast": fast,
        "n_seeds": outcome.n_seeds,
        "claims": [claim_json(asdict(claim) | {"holds": claim.holds}) for claim in outcome.claims],
        "conditions": outcome.conditions,
        "seconds": round(time.perf_counter() - began, 2),
        "hardware": hardware(),
    }
    save_tensors(out / WEIGHTS, outcome.tensors)
    write_text(out / RESULT, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    result["pictures"] = draw(name, outcome, out)
    return result


def draw(name: str, outcome: Outcome, out: Path) -> list[dict[str, str]]:
    """Writes the figures, and returns their names and captions."""
    with plots.style():
        pictures = experiment(name).draw(outcome)
        for picture in pictures:
            plots.save(picture.figure, out / picture.name)
    return [{"name": picture.name, "caption": picture.caption} for picture in pictures]


def claim_json(claim: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan: a measurement that is none is null."""
    return claim | {"measured": claim["measured"] if math.isfinite(claim["measured"]) else None}


def hardware() -> str:
    """Processor and library: "AMD EPYC, torch 2.13.0, Python 3.11.7"."""
    return f"{_processor()}, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
