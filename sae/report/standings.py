"""A leaderboard as it stands: who is ahead of whom, and of whom the seeds cannot tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from sae.errors import UsageError
from sae.metrics.seeds import Interval, over_seeds
from sae.names import LEADERBOARD, RECIPE
from sae.report.data import Row
from sae.scores import (
    COVERAGE,
    DEAD,
    DIMENSIONALITY,
    F1,
    FVU,
    L0,
    MCC,
    PURITY,
    SCORES,
    SECONDS,
    SPEED,
    Score,
    scores,
)

DIGITS = 3
"""To which means are compared: methods with the same MCC are in the order of their F1."""
COLUMNS = (
    *scores(MCC, COVERAGE, F1, PURITY, DIMENSIONALITY, FVU, L0, DEAD),
    # On one core, unlike those of other tables.
    SCORES[SECONDS]._replace(name="seconds", meaning="to train or fit on one core", short="s"),
    SCORES[SPEED],
)
SCALES = {SPEED: 1e-3}
"""What a column multiplies its values by."""


@dataclass(frozen=True, eq=False)
class Standing:
    """A method over its seeds."""

    method: str
    family: str
    """`sae`, `baseline`, or `oracle`: what knows the truth takes no rank."""
    scores: Mapping[str, Interval]
    rows: Sequence[Row]
    rank: int | None = None
    level: bool = False
    """Its interval of the MCC overlaps that of the first."""

    @property
    def options(self) -> str:
        """Of an SAE beside its kind: `k = 5`."""
        shown = [
            (key[4:], value) for key, value in self.rows[0].items() if key.startswith("sae.") and key != "sae.kind"
        ]
        return ", ".join(
            f"{key} = {value:g}" if isinstance(value, float) else f"{key} = {value}" for key, value in shown
        )


@dataclass(frozen=True, eq=False)
class Leaderboard:
    """All that its table and its page are drawn from."""

    about: Mapping[str, Any]
    """leaderboard.json without its rows."""
    standings: Sequence[Standing]
    """The ranked from the first on, then the oracles."""
    recipe: str

    @property
    def columns(self) -> list[Score]:
        """Those that any method has."""
        return [score for score in COLUMNS if any(score.key in standing.scores for standing in self.standings)]

    @property
    def ranked(self) -> list[Standing]:
        return [standing for standing in self.standings if standing.rank is not None]

    @property
    def n_seeds(self) -> int:
        return len(self.about["seeds"])

    @property
    def doubt(self) -> str:
        """What to think of a table in which no SAE is above chance; empty of any other."""
        saes = [each.scores for each in self.standings if each.family == "sae"]
        above = [
            scores[MCC].mean > scores[f"{MCC}_chance"].mean + 3 * scores[f"{MCC}_chance_sd"].mean
            for scores in saes
            if f"{MCC}_chance_sd" in scores
        ]
        if not above or any(above):
            return ""
        return "No SAE is above chance, so that ranks mean nothing: take more samples, another L0, or an easier world."

    @property
    def title(self) -> str:
        """One line."""
        n = sum(standing.family == "sae" for standing in self.standings)
        others = len(self.standings) - n
        return f"{n} SAEs and {others} other methods on {self.about['world']['name']}"


def read_leaderboard(path: Path) -> Leaderboard:
    """Reads leaderboard.json, and the recipe beside it.

    Raises:
        UsageError: they cannot be read, or there is no row yet.
    """
    try:
        about = json.loads((path / LEADERBOARD).read_text(encoding="utf-8"))
        rows, recipe = about.pop("rows"), (path / RECIPE).read_text(encoding="utf-8")
        standings = stand(rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path / LEADERBOARD} cannot be read ({error}); run it again with --resume") from error
    if not standings:
        raise UsageError(f"{path} has no row yet; go on with `sae leaderboard --out {path} --resume`")
    return Leaderboard(about, standings, recipe)


def stand(rows: Sequence[Row]) -> list[Standing]:
    """Ranks methods by their mean MCC, where that is the same to three digits by their mean F1; oracles come last, in
    the order of the rows.

    A method is level with the first where their 95 % intervals of the MCC overlap. That is cautious: intervals of
    methods that differ can overlap, and those that do not overlap belong to methods that differ. Of a single seed
    nothing is told apart.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    found = [
        Standing(name, own[0]["family"], over_seeds(list(map(_numbers, own))), own) for name, own in groups.items()
    ]
    ranked = sorted((each for each in found if each.family != "oracle"), key=_place)
    first = ranked[0].scores[MCC] if ranked else None
    standings: list[Standing] = []
    for number, each in enumerate(ranked):
        rank = standings[-1].rank if standings and _place(each) == _place(ranked[number - 1]) else number + 1
        level = first is not None and first.low > -inf and each.scores[MCC].high >= first.low
        standings.append(Standing(each.method, each.family, each.scores, each.rows, rank, level))
    return standings + [each for each in found if each.family == "oracle"]


def _place(standing: Standing) -> tuple[float, float]:
    f1 = standing.scores[F1].mean if F1 in standing.scores else 0.0
    return -round(standing.scores[MCC].mean, DIGITS), -round(f1, DIGITS)


def _numbers(row: Row) -> dict[str, float]:
    """The metrics of a row."""
    return {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and key != "seed" and not key.startswith("sae.")
    }
