"""What the command line shows: a live progress bar, and tables."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sae.launch import speaks
from sae.scores import CE, COVERAGE, DEAD_LATENTS, F1, FVU, L0, MCC, MMCS, PURITY, SECONDS, scores

LIVE = scores(FVU, L0, DEAD_LATENTS, MCC)
# What is smaller is what sums of floats leave of a 0.
ROUNDING = 1e-12
BESIDE = ("_chance", "_chance_sd", "_truth", "_difference")
HEADLINES = (FVU, L0, CE, DEAD_LATENTS, MMCS, MCC, COVERAGE, F1, PURITY, "polysemanticity/neuron_purity")
METHOD_COLUMNS = scores(MCC, MMCS, COVERAGE, F1, FVU, L0, DEAD_LATENTS, SECONDS)


def postfix(values: Mapping[str, float]) -> str:
    """The few numbers worth watching, e.g. `FVU 0.071  L0 2.6  dead 0  MCC 0.998`."""
    shown = [score for score in LIVE if score.key in values]
    return "  ".join(
        f"{score.narrow.name} {values[score.key]:{'.0f' if score.key == DEAD_LATENTS else '.4g'}}" for score in shown
    )


class Bar(tqdm):
    """A progress bar that knows whether it was drawn."""

    drawn = False

    def display(self, *args: Any, **options: Any) -> Any:
        self.drawn = True
        return super().display(*args, **options)


@contextmanager
def one_bar(title: str, n_steps: int, unit: str = "step") -> Iterator[Bar]:
    """A bar on stderr; what is logged meanwhile stands above it.

    Where it ends before its first step, nothing of it is left on a terminal.
    """
    with (
        logging_redirect_tqdm(),
        Bar(
            total=n_steps,
            desc=title,
            file=sys.stderr,
            dynamic_ncols=True,
            unit=unit,
            delay=1e-3,
            disable=not speaks(),
        ) as bar,
    ):
        try:
            yield bar
        finally:
            if bar.drawn and bar.n == 0:
                bar.clear() if sys.stderr.isatty() else print(file=sys.stderr)


@contextmanager
def progress(title: str, n_steps: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """One bar; the function that it yields takes each logged step and its values."""
    with one_bar(title, n_steps) as bar:

        def on_line(step: int, values: Mapping[str, float]) -> None:
            bar.set_postfix_str(postfix(values), refresh=False)
            bar.update(step - bar.n)

        yield on_line


def print_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str | None = None,
    ends: Collection[int] = (),
) -> None:
    """A table; the first column is text, the others are numbers. A gap follows each of the rows `ends`."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*row, end_section=number in ends)
    console = _console()
    console.print(table)
    if caption:
        console.print(caption, style="dim", highlight=False)


def _console() -> Console:
    """On stdout; a file or a pipe has no width to keep to."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def fits(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether there is room for such a table: two more characters a column than its longest line."""
    columns = zip(header, *rows, strict=True)
    widths = [max(len(line) for cell in column for line in cell.splitlines() or [""]) + 2 for column in columns]
    return sum(widths) + 1 <= _console().width


def print_methods(title: str, rows: Sequence[Mapping[str, Any]], caption: str) -> None:
    """A row for each method, mean ± sd over its seeds, a dash for none; columns without any value are left out."""
    columns = [score.narrow for score in METHOD_COLUMNS if any(score.key in row for row in rows)]
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        table.append([method, *(mean_sd([row[s.key] for row in own if s.key in row], s.form) for s in columns)])
    print_table(title, ["", *(score.name for score in columns)], table, caption)


def mean_sd(values: Sequence[float], form: str) -> str:
    """A cell of a mean over its standard deviation; or one value alone, or a dash."""
    if not values:
        return "–"
    return mean_over(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, form)


def mean_over(mean: float, spread: float | None, form: str) -> str:
    """`0.998` over `±.001`, so that eight columns fit a terminal."""
    below = "" if spread is None else f"\n±{spread:{form}}".replace("±0.", "±.")
    return f"{mean:{form}}{below}"


def print_headlines(metrics: Mapping[str, float]) -> None:
    """The few final metrics that say whether a run went well."""
    shown = {f"{name}{beside}" for name in HEADLINES for beside in ("", *BESIDE)}
    print_metrics({name: value for name, value in metrics.items() if name in shown})


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Final metrics, each beside its chance value and the true dictionary's where there are such, from which it differs
    by as much as a file says; without those of a diagnosis, which has words of its own."""
    names = [name for name in metrics if not name.endswith(BESIDE) and not name.startswith("diagnosis/")]
    rows = [
        [
            name,
            f"{metrics[name]:.4g}",
            *(_short(metrics[key]) if key in metrics else "" for key in (f"{name}_chance", f"{name}_truth")),
        ]
        for name in names
    ]
    groups = [name.partition("/")[0] for name in names]
    ends = {number for number, (this, then) in enumerate(pairwise(groups)) if this != then}
    print_table("held-out activations", ["metric", "measured", "chance", "true dictionary"], rows, ends=ends)


def _short(value: float) -> str:
    """Four digits, of a number without a unit; what rounding left of a 0 is 0."""
    return f"{0.0 if abs(value) < ROUNDING else value:.4g}"
