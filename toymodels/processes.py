"""One process for each core, with one thread each.

Small runs gain almost nothing from a second thread, so that many of them end soonest with a core each; and a
run's result then depends on its seed alone, not on how many cores there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any

# glibc gives freed memory back at once, and a step of a few ms then pays for the pages again: let it keep them.
CHILD_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def child_environment(n_threads: int) -> Iterator[None]:
    """Processes that start in this context use so many threads: their libraries read it when they are loaded."""
    environment = {**CHILD_ENVIRONMENT, "OMP_NUM_THREADS": str(n_threads)}
    previous = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in previous.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextmanager
def one_thread_each(
    begin: Callable[..., None] | None = None, given: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, each of which begins with `begin(*given)`; an exception inside the context ends them at
    once."""
    with child_environment(1), ProcessPoolExecutor(n_cores(), get_context("spawn"), begin, given) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                child.terminate()
            raise
