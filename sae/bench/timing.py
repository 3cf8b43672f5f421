"""Contenders take turns, so that each sees the same machine: what else runs on it slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# A contender's turn lasts about this long when the number of steps is left open.
TURN_SECONDS = 0.2
MAX_STEPS = 200
WARM_UP_STEPS = 2
# Steps before any is timed: on a GPU our own are recorded after ten of a kind, of which there are two, with dead
# latents and without, and a rival may compile.
SETTLING_STEPS = {"cpu": 1, "cuda": 25}


@dataclass(frozen=True)
class Contender:
    """Something that can be asked for one more training step."""

    name: str
    advance: Callable[[], object]
    precision: str = "highest"
    """What `torch.set_float32_matmul_precision` is set to while it runs."""
    version: str | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds per step of one contender, one value a round."""

    contender: Contender
    seconds: list[float]
    steps_per_round: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times longer one contender takes than another: the median over rounds, and its quartiles."""

    median: float
    low: float
    high: float


def ratio(theirs: Timing, ours: Timing) -> Ratio:
    """Compares within each round, where both saw the same machine, and only then over rounds."""
    ratios = [a / b for a, b in zip(theirs.seconds, ours.seconds, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(middle, low, high)


def interleaved(
    contenders: Sequence[Contender],
    rounds: int,
    steps: int | None = None,
    synchronise: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    settling_steps: int = 1,
) -> list[Timing]:
    """Times every contender `rounds` times for the same number of steps in a row; the first moves up each round.

    All take `settling_steps` first. `steps` left open is as many as the slowest does in TURN_SECONDS. `synchronise`
    waits for the device, before and after each turn.
    """
    before = torch.get_float32_matmul_precision()

    def turn(contender: Contender, n: int) -> float:
        torch.set_float32_matmul_precision(contender.precision)
        synchronise()
        began = clock()
        for _ in range(n):
            contender.advance()
        synchronise()
        return (clock() - began) / n

    try:
        for contender in contenders:
            turn(contender, settling_steps)
        slowest = max(turn(contender, WARM_UP_STEPS) for contender in contenders)
        n = steps or max(1, min(MAX_STEPS, round(TURN_SECONDS / max(slowest, 1e-9))))
        seconds: dict[int, list[float]] = {number: [] for number in range(len(contenders))}
        for number_of_round in range(rounds):
            for place in range(len(contenders)):
                number = (number_of_round + place) % len(contenders)
                seconds[number].append(turn(contenders[number], n))
    finally:
        torch.set_float32_matmul_precision(before)
    return [Timing(contender, seconds[number], n) for number, contender in enumerate(contenders)]
