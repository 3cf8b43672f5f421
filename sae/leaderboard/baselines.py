"""Baselines side by side: each fitted and measured on one core, in a process that opens the source for itself."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sae import plugins
from sae.baselines import measured, prepare
from sae.config import SourceConfig
from sae.errors import Interrupted
from sae.leaderboard.recipe import Definite
from sae.sources import Source
from sae.stopping import Stop
from toymodels.processes import one_thread_each

PROCESS_ENDED = (
    "its process ended; is there enough memory, and is a script that calls this under `if __name__ == '__main__':`? "
    "--resume fits it again"
)


class Fit(NamedTuple):
    """A baseline with one seed."""

    name: str
    seed: int


class Fitted(NamedTuple):
    """How that ended: with a row of metrics, or with the reason why there is none."""

    fit: Fit
    row: dict[str, Any]
    reason: str = ""


def fits(board: Definite) -> list[Fit]:
    """Those of a board. The oracles know the truth and fit nothing, so no seed changes them."""
    return [
        Fit(name, seed)
        for name in board.recipe.baselines
        for seed in range(1 if name.startswith("oracle") else board.recipe.seeds)
    ]


def fit_all(board: Definite, left: Sequence[Fit], stop: Stop) -> Iterator[Fitted]:
    """Each as it ends.

    Raises:
        Interrupted: a signal came; what was under way is given up.
    """
    if not left:
        return
    source, n_evaluation = board.recipe.source.model_dump_json(), board.recipe.evaluation.n_samples
    with one_thread_each(_begin, (tuple(plugins.LOADED),)) as pool:
        jobs: dict[Future[dict[str, Any]], Fit] = {}
        for fit in reversed(left):  # a recipe ends with those that take longest
            jobs[pool.submit(_row, source, fit, board.d_sae, board.k, n_evaluation)] = fit
        waiting = set(jobs)
        while waiting:
            ended, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            for job in ended:
                try:
                    yield Fitted(jobs[job], job.result())
                except BrokenProcessPool:
                    yield Fitted(jobs[job], {}, PROCESS_ENDED)
                except Exception as error:  # one baseline's end is not the end of the others
                    yield Fitted(jobs[job], {}, " ".join(str(error).split()) or type(error).__name__)
            if stop():
                raise Interrupted("stopped; continue with --resume", stop())


def _begin(files: Sequence[Path]) -> None:
    """In a process of the pool: kinds of sources may be one's own, and of Ctrl-C the parent hears, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("sae").setLevel(logging.WARNING)
    for path in files:
        plugins.load_plugin(path)


@cache
def _opened(source: str) -> Source:
    return SourceConfig.of_kind(json.loads(source)).open()


def _row(source: str, fit: Fit, d_sae: int, k: int, n_evaluation: int) -> dict[str, Any]:
    opened = _opened(source)
    given = prepare([fit.name], opened, d_sae=d_sae, k=k, seed=fit.seed)
    return measured(fit.name, given, opened, n_evaluation)
