"""A score alone says little: the scores of chance and of the truth itself go next to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

# Shuffles of the evaluation set behind the chance value of a score on samples.
N_SHUFFLES = 4
# What is neither good nor bad has no chance value.
COUNTS = ("n_alive", "f1_best_threshold")


def beside_chance(
    scores: Mapping[str, float], draws: Sequence[Mapping[str, float]], truth: Mapping[str, float]
) -> dict[str, float]:
    """Each score with `<name>_chance` and `<name>_chance_sd`, mean and sd over the draws, and `<name>_truth`.

    Counts and thresholds stay alone; what the truth does not have is left out.
    """
    result = {}
    for name, value in scores.items():
        result[name] = value
        if name not in COUNTS:
            by_luck = [draw[name] for draw in draws]
            result[f"{name}_chance"], result[f"{name}_chance_sd"] = fmean(by_luck), stdev(by_luck)
            if name in truth:
                result[f"{name}_truth"] = truth[name]
    return result
