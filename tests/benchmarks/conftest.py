"""Speed is measured and printed here, never asserted: `make bench`. Ratios come from rounds taken in turn.

One thread each, as `tests/conftest.py` sets, so that numbers of different machines can be compared.
"""

import statistics
import time
from collections.abc import Callable

import pytest


@pytest.fixture
def say(capsys):
    """Prints a line past pytest's capture."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", end="", flush=True)

    return line


@pytest.fixture
def against(benchmark):
    """Times `ours` and `other` in turn, so that both see the same machine; returns the median seconds of each."""

    def measure(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float]:
        theirs = []

        def other_first() -> None:
            began = time.perf_counter()
            other()
            theirs.append(time.perf_counter() - began)

        benchmark.pedantic(ours, setup=other_first, rounds=rounds, warmup_rounds=1)
        return benchmark.stats.stats.median, statistics.median(theirs[1:])

    return measure
