"""One self-contained page from run directories, and the picture that opens the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sae.errors import UsageError
from sae.names import COMPARISON, LEADERBOARD, REPORT, SWEEP
from sae.report.data import collect
from sae.report.html import page, plotly_js
from sae.report.leaderboard import leaderboard_contents
from sae.report.sections import contents, title
from sae.report.standings import read_leaderboard
from sae.report.sweep import read_sweep, sweep_contents


def write_report(runs: Sequence[Path], target: Path | None = None) -> Path:
    """Writes the report of one run, of several compared, of a sweep or of a leaderboard, and returns where it is.

    Only the run directories are read: configuration, log, results, weights; and `summary.json` with the runs
    that it names. `target` None: `report.html` in the directory, or where there are several `comparison.html` in the
    first of them, which keeps its own report. The file needs no network.

    Raises:
        UsageError: plotly is missing, no run is given, one is unfinished, or the target cannot be written.
    """
    plotly_js()
    for file, what in ((SWEEP, "sweep"), (LEADERBOARD, "leaderboard")):
        alone = [run for run in runs if (Path(run) / file).is_file()]
        if alone and len(runs) > 1:
            raise UsageError(f"{alone[0]} is a {what}, which has a page of its own; give it alone, or give its members")
    if runs and (Path(runs[0]) / SWEEP).is_file():
        sweep = read_sweep(Path(runs[0]))
        text = page(sweep.title, sweep_contents(sweep))
    elif runs and (Path(runs[0]) / LEADERBOARD).is_file():
        board = read_leaderboard(Path(runs[0]))
        text = page(board.title, leaderboard_contents(board))
    else:
        collection = collect([Path(run) for run in runs])
        text = page(title(collection), contents(collection))
    target = Path(runs[0]) / (REPORT if len(runs) == 1 else COMPARISON) if target is None else Path(target)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}; give another file as --out") from error
    return target
