"""Runs experiments side by side, and writes what each found: figures, result.json, weights.safetensors."""

from __future__ import annotations

import json
import math
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import Manager
from pathlib import Path
from typing import Any

import torch

from toymodels import plots
from toymodels.errors import UsageError
from toymodels.experiments import experiment
from toymodels.experiments.base import Context, Outcome
from toymodels.files import save_tensors, write_text
from toymodels.processes import one_thread_each

Told = Any
"""A queue between processes, of (name, steps done, steps expected)."""
RESULT, WEIGHTS, ERROR, INDEX = "result.json", "weights.safetensors", "error.txt", "index.html"


@dataclass(frozen=True)
class Ended:
    """How an experiment ended: with its result, or with a traceback."""

    name: str
    result: dict[str, Any] | None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """It ran, and all its claims hold."""
        return self.result is not None and all(claim["holds"] for claim in self.result["claims"])


def run_all(
    names: Sequence[str],
    out: Path,
    seed: int,
    fast: bool,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_end: Callable[[Ended], None] | None = None,
) -> list[Ended]:
    """Runs each experiment into the folder out/NAME, a process a core; one that fails does not stop the others.

    `on_progress` is told an experiment's name and the steps done and expected, `on_end` how it ended.

    Raises:
        UsageError: what `check` finds.
    """
    check(names, out, seed)
    # The slow ones first, so that no core waits for a long last one.
    chosen = sorted((experiment(name) for name in names), key=lambda one: -one.seconds)
    todo, ended = [one.name for one in chosen], {}
    with Manager() as manager:
        told = manager.Queue()
        while todo:
            with one_thread_each() as pool:
                jobs = {pool.submit(_run_and_tell, name, out / name, seed, fast, told): name for name in todo}
                for name, how in _as_they_end(jobs, told, on_progress):
                    ended[name] = how
                    if on_end is not None:
                        on_end(how)
            left = [name for name in todo if name not in ended]
            if len(left) == len(todo):
                # A process was killed, for want of memory perhaps. It took the pool with it: the others go on.
                name = left.pop(0)
                ended[name] = _failed(name, out / name, "its process was killed; is there enough memory?")
                if on_end is not None:
                    on_end(ended[name])
            todo = left
    return [ended[name] for name in names]


def check(names: Sequence[str], out: Path, seed: int) -> None:
    """Finds what would stop a run before it begins, and clears the places of its results.

    Raises:
        UsageError: an unknown name, a negative seed, matplotlib is missing, or `out` cannot be written.
    """
    if seed < 0:
        raise UsageError(f"seed must not be negative, got {seed}")
    plots.require_matplotlib()
    for name in names:
        experiment(name)
    if (out / INDEX).is_dir():
        raise UsageError(f"cannot write {out / INDEX}: it is a folder; give another folder as --out")
    for name in names:
        _prepare(out / name)


def run_experiment(
    name: str, out: Path, seed: int, fast: bool, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Runs one experiment into the folder `out`, and returns what result.json says.

    What was measured is written before the figures are drawn: a drawing that fails does not lose it.
    """
    chosen = experiment(name)
    _prepare(out)
    began = time.perf_counter()
    outcome = chosen.run(Context(name, seed, fast, on_progress))
    result = {
        "name": name,
        "row": chosen.row,
        "seed": seed,
        "fast": fast,
        "n_seeds": outcome.n_seeds,
        "claims": [_finite(asdict(claim) | {"holds": claim.holds}) for claim in outcome.claims],
        "conditions": _finite(outcome.conditions),
        "figures": [],
        "seconds": round(time.perf_counter() - began, 2),
        "hardware": hardware(),
    }
    save_tensors(out / WEIGHTS, outcome.tensors)
    _write_result(out, result)
    result["figures"] = _draw(name, outcome, out)
    result["seconds"] = round(time.perf_counter() - began, 2)
    _write_result(out, result)
    return result


def hardware() -> str:
    """Processor and library: "AMD EPYC, torch 2.13.0, Python 3.11.7"."""
    return f"{_processor()}, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"


def _as_they_end(
    jobs: Mapping[Future[Ended], str],
    told: Told,
    on_progress: Callable[[str, int, int], None] | None,
) -> Iterator[tuple[str, Ended]]:
    """Each job when it ends, but for those whose process was killed or that waited in a pool that broke."""
    waiting = set(jobs)
    while waiting:
        finished, waiting = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
        while not told.empty():
            progress = told.get()
            if on_progress is not None:
                on_progress(*progress)
        for job in finished:
            if not isinstance(job.exception(), BrokenProcessPool):
                yield jobs[job], job.result()


def _failed(name: str, out: Path, error: str) -> Ended:
    """Keeps the error beside the results, if the disk still takes it."""
    with suppress(OSError):
        write_text(out / ERROR, error)
    return Ended(name, None, error)


def _run_and_tell(name: str, out: Path, seed: int, fast: bool, told: Told) -> Ended:
    """One experiment in a process of its own."""
    last = 0.0

    def on_progress(done: int, expected: int) -> None:
        nonlocal last
        if time.perf_counter() - last > 0.1 or done >= expected:
            last = time.perf_counter()
            told.put((name, done, expected))

    try:
        return Ended(name, run_experiment(name, out, seed, fast, on_progress))
    except Exception:
        return _failed(name, out, traceback.format_exc())


def _prepare(out: Path) -> None:
    """An empty place: what an earlier run found must not be taken for what this one finds."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, WEIGHTS, ERROR):
            (out / name).unlink(missing_ok=True)
        probe = out / f"{RESULT}.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}; give another folder as --out") from error


def _draw(name: str, outcome: Outcome, out: Path) -> list[dict[str, str]]:
    """Writes the figures, and returns their names and captions."""
    with plots.style():
        pictures = experiment(name).draw(outcome)
        for picture in pictures:
            plots.save(picture.figure, out / picture.name)
    return [{"name": picture.name, "caption": picture.caption} for picture in pictures]


def _write_result(out: Path, result: dict[str, Any]) -> None:
    write_text(out / RESULT, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no nan: a number that is none is null."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
