"""Runs that differ only in their seed: each metric's mean, with an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite, nan, sqrt
from statistics import fmean, stdev
from typing import NamedTuple

LEVEL = 0.95


class Interval(NamedTuple):
    """The mean over n seeds, its 95 % interval, and the standard deviation of one seed."""

    mean: float
    low: float
    high: float
    sd: float
    n: int

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return self.high - self.mean


def interval(values: Sequence[float]) -> Interval:
    """mean ± t_{.975, n - 1} sd / √n: Student's interval, for seeds that are draws from a normal distribution.

    It covers the mean over all seeds in 95 % of cases, however few there are: at n = 3, t is 4.3. One seed says nothing
    about others: its sd is nan and its interval everything.

    Raises:
        ValueError: no value.
    """
    if not len(values):
        raise ValueError("an interval over seeds needs a value, got none; pass the metrics of at least one run")
    mean, n = fmean(values), len(values)
    if n == 1:
        return Interval(mean, -inf, inf, nan, n)
    from scipy.special import stdtrit  # noqa: PLC0415 - slow to import

    sd = stdev(values) if all(map(isfinite, values)) else nan
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * sd / sqrt(n)
    return Interval(mean, mean - half, mean + half, sd, n)


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, Interval]:
    """The `interval` of each metric over runs that differ in their seed alone.

    A metric that only some of them have runs over those; its n says how many.

    Raises:
        ValueError: no run.
    """
    if not runs:
        raise ValueError("an interval over seeds needs a run, got none; pass the metrics of at least one")
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: interval([run[name] for run in runs if name in run]) for name in names}
