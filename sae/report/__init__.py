"""One self-contained `report.html` from run directories, and the picture that opens the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sae.errors import UsageError
from sae.report.data import collect
from sae.report.html import page, plotly_js
from sae.report.sections import contents, title

NAME = "report.html"


def write_report(runs: Sequence[Path], target: Path | None = None) -> Path:
    """Writes the report of one run, or of several compared, and returns where it is.

    Only the run directories are read: configuration, log, results, weights; and `summary.json` with the runs
    that it names. `target` None: `report.html` in the first of them. The file needs no network.

    Raises:
        UsageError: plotly is missing, no run is given, one is unfinished, or the target cannot be written.
    """
    plotly_js()
    collection = collect([Path(run) for run in runs])
    target = Path(runs[0]) / NAME if target is None else Path(target)
    try:
        target.write_text(page(title(collection), contents(collection)), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}; give another file as --out") from error
    return target
