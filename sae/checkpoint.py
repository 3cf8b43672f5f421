"""Checkpoints: one folder each, whole or absent, from which a run continues bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sae.errors import UsageError
from toymodels.files import save_tensors, sha256

TENSORS, VALUES = "state.safetensors", "state.json"


def save(folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], keep: int) -> None:
    """Writes `folder/step-<step>`, then deletes all but the latest `keep`.

    The files are written under a temporary name and renamed at once: a reader never sees half a checkpoint.
    """
    target = folder / f"step-{step:09d}"
    if target.exists():
        return
    partial = folder / f"{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_tensors(partial / TENSORS, tensors)
    values = values | {"sha256": sha256(partial / TENSORS)}
    (partial / VALUES).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, target)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next(reversed(_all(folder)), None)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and values of one checkpoint.

    Raises:
        UsageError: the tensors do not match their checksum.
    """
    values = load_values(path)
    if sha256(path / TENSORS) != values.pop("sha256"):
        raise UsageError(f"{path / TENSORS} does not match its checksum; delete {path} to resume from the one before")
    return load_file(path / TENSORS), values


def load_values(path: Path) -> dict[str, Any]:
    """Only the values of one checkpoint.

    Raises:
        UsageError: they cannot be read.
    """
    try:
        return json.loads((path / VALUES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path / VALUES} is damaged; delete {path} to resume from the one before") from error


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")
