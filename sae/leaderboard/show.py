"""What the command line shows of a leaderboard: its progress, and the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite

from sae.console import fits, mean_over, one_bar, print_table
from sae.leaderboard.run import Outcome
from sae.metrics.seeds import Interval
from sae.report.standings import SCALES, Leaderboard, Standing
from sae.scores import COVERAGE, DEAD, DIMENSIONALITY, L0, SPEED, Score

# Left out where a terminal is narrow, the first of them first.
SPARED = (DIMENSIONALITY, SPEED, DEAD, L0, COVERAGE)


@contextmanager
def stage_bar(stage: str, n: int) -> Iterator[Callable[[], object]]:
    """A bar of n parts."""
    with one_bar(stage, n) as bar:
        bar.unit = "part"
        yield bar.update


def print_standings(board: Leaderboard) -> None:
    """The table: mean over seeds, below it half of the 95 % interval; as many columns as there is room for."""
    columns, spared = [score.narrow for score in board.columns], []
    header, rows = _cells(board, columns)
    for key in SPARED:
        if fits(header, rows):
            break
        spared += [score.name for score in columns if score.key == key]
        columns = [score for score in columns if score.key != key]
        header, rows = _cells(board, columns)
    world, n = board.about["world"], board.n_seeds
    words = [
        f"{world['n_features']:,} features in {world['d_in']:,} dimensions; L0 {board.about['l0']:g}, "
        f"{board.about['n_samples']:,} samples.",
        f"Mean over {n} seeds ± half of the 95 % interval; without ±: one run." if n > 1 else "One seed: no interval.",
        *([board.doubt] if board.doubt else []),
        "Ranked by MCC, then F1. =: its interval overlaps that of the first.",
        "oracle*: the true features, without a rank. cov: share of features with a cosine > .9.",
        "s: to train or fit on one core; k/s: thousand samples a second. purity, dim.: mean over latents.",
        *([f"There is no room here for {', '.join(spared)}; report.html has them."] if spared else []),
    ]
    print_table(board.title, header, rows, "\n".join(words))


def _cells(board: Leaderboard, columns: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for each in board.standings:
        rank = "" if each.rank is None else f"{each.rank}{' =' if each.level and each.rank > 1 else '  '}"
        rows.append([each.method, rank, *(_cell(each, score) for score in columns)])
    return ["", "rank", *(score.name for score in columns)], rows


def last_line(outcome: Outcome) -> str:
    """Who is missing."""
    left = outcome.missing
    named = ", ".join(f"{row['method']} seed {row['seed']} ({row['status']})" for row in left[:5])
    named += ", ..." if len(left) > 5 else ""
    remedy = "; continue with --resume" if outcome.signal_number else ""
    return f"{len(left)} of {len(left) + len(outcome.rows)} are not done: {named}{remedy}"


def _cell(standing: Standing, score: Score) -> str:
    """A mean over half of its interval, or a mean alone, or a dash."""
    found: Interval | None = standing.scores.get(score.key)
    if found is None:
        return "–"
    scale = SCALES.get(score.key, 1.0)
    return mean_over(scale * found.mean, scale * found.half if isfinite(found.half) else None, score.form)
