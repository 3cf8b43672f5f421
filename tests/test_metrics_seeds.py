"""Judges of intervals over seeds: scipy's t-test, and how often they cover the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from sae.metrics import interval, over_seeds


@pytest.mark.parametrize("n", [2, 3, 8])
def test_an_interval_is_that_of_the_t_test(n: int) -> None:
    values = np.random.default_rng(n).normal(0.7, 0.1, n)
    found, expected = interval(values.tolist()), stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.mean, found.sd, found.n) == pytest.approx((values.mean(), values.std(ddof=1), n))
    assert found.half == pytest.approx(found.mean - found.low)


def test_intervals_of_three_seeds_cover_the_mean_in_95_of_100_cases() -> None:
    draws = np.random.default_rng(0).normal(5.0, 2.0, (2000, 3))
    covered = np.mean([each.low <= 5.0 <= each.high for each in map(interval, draws.tolist())])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_one_seed_says_nothing_about_others() -> None:
    only = interval([0.5])
    assert (only.mean, only.low, only.high, only.n) == (0.5, -math.inf, math.inf, 1)
    assert math.isnan(only.sd)
    with pytest.raises(ValueError, match="needs a value, got none"):
        interval([])


def test_each_metric_runs_over_the_runs_that_have_it() -> None:
    found = over_seeds([{"mcc": 0.5, "f1": 0.1}, {"mcc": 0.7}])
    assert found["mcc"].mean == pytest.approx(0.6)
    assert (found["mcc"].n, found["f1"].n) == (2, 1)
    with pytest.raises(ValueError, match="needs a run, got none"):
        over_seeds([])
