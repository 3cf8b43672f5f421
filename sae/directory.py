"""The directory of a run: what it holds, and whether it can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae import checkpoint
from sae.config import TrainConfig, parse_config
from sae.config_text import read_yaml
from sae.errors import UsageError
from sae.evaluation import Evaluation
from sae.locks import cannot_write, require_free
from sae.names import CHECKPOINTS, CONFIG, OWN, RESULT, TABLES
from toymodels.files import save_tensors, write_text


def check_out(out: Path, resume: bool | None, overwrite: bool) -> None:
    """Refuses a directory that holds a run, unless it is to be resumed or overwritten.

    `resume` is None for what cannot be resumed.
    """
    require_out(out, "run", CONFIG, resume, overwrite)
    foreign = [name for name in OWN if (out / name).exists()]
    if foreign and not (out / CONFIG).exists():
        raise UsageError(f"{out} holds {', '.join(foreign)}, which no run wrote; give another --out")


def require_out(
    out: Path, what: str, mark: str, resume: bool | None, overwrite: bool, others: Mapping[str, str] | None = None
) -> None:
    """Refuses a directory in which `what` is, as the file `mark` tells, unless it is to be resumed or overwritten; and
    one that another process is at work in, or that holds others, which have files to be told by too.

    Raises:
        UsageError: it is such a directory, or a file.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a directory as --out")
    if resume and overwrite:
        raise UsageError(f"--resume continues a {what} and --overwrite discards it; give one of them")
    require_free(out)
    for name, other in (others or {}).items():
        if (out / name).exists():
            raise UsageError(f"{out} holds a {other}; give another --out")
    if (out / mark).exists() and not (resume or overwrite):
        remedy = "" if resume is None else "continue it with --resume (in Python resume=True), "
        raise UsageError(f"{out} already holds a {what}; {remedy}discard it with --overwrite")


def claim_out(config: TrainConfig, resume: bool) -> Path | None:
    """Makes `config.out`, which is locked, this run's directory; returns the checkpoint to resume from, if any.

    An earlier run in it is deleted; files that no run wrote are left alone.
    """
    out = config.out
    if resume and (out / CONFIG).exists():
        return checkpoint.latest(out / CHECKPOINTS)
    try:
        discard(out)
        write_text(out / CONFIG, config.to_yaml())
    except OSError as error:
        raise cannot_write(out, error) from error
    return None


def save_evaluation(out: Path, evaluation: Evaluation) -> None:
    """Final metrics, and the tables that the report is drawn from; result.json comes last and whole, since it says that
    the run is complete."""
    save_tensors(out / TABLES, evaluation.tables)
    write_text(out / RESULT, json.dumps(evaluation.metrics, indent=2) + "\n")


def discard(out: Path) -> None:
    """Deletes what a run wrote there, and nothing else."""
    for name in OWN:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)


def require_same_run(config: TrainConfig) -> None:
    """Refuses to resume a run that was started with other values."""
    saved = parse_config(read_yaml(config.out / CONFIG), where=str(config.out / CONFIG))
    ours, theirs = (whole.model_dump(mode="json", include={"source", "sae", "train"}) for whole in (config, saved))
    require_same(config.out, theirs, ours)


def require_same(out: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on in `out` with other values than it was begun with.

    Raises:
        UsageError: some differ; it names all of them.
    """
    differing = _differences(was, now)
    if differing:
        same = f"use the same value{'s' if len(differing) > 1 else ''}, or another --out"
        raise UsageError(f"{out} cannot be resumed: {'; '.join(differing)}; {same}")


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[str]:
    """Every field that differs, with both values; for a section of another kind, only the kind."""
    found = []
    for key in dict.fromkeys([*was, *now]):
        name, old, new = f"{within}{key}", was.get(key), now.get(key)
        if old == new:
            continue
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
            found.append(f"{name} was {_shown(old)}, now {_shown(new)}")
        elif old.get("kind") != new.get("kind"):
            found += _differences({"kind": old.get("kind")}, {"kind": new.get("kind")}, f"{name}.")
        else:
            found += _differences(old, new, f"{name}.")
    return found


def _shown(value: object) -> str:
    """As YAML has it, on one line; a whole section is its kind."""
    if isinstance(value, Mapping) and "kind" in value:
        return f"of kind {value['kind']}"
    return value if isinstance(value, str) else json.dumps(value)
