"""A bar for each experiment that runs, and one for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from toymodels.runner import Ended


class Bars:
    """What `run_all` tells, as bars."""

    def __init__(self, bars: Progress, n_experiments: int) -> None:
        self.bars = bars
        self.total = bars.add_task("experiments", total=n_experiments)
        self.tasks: dict[str, TaskID] = {}
        self.ended: set[str] = set()

    def on_progress(self, name: str, done: int, expected: int) -> None:
        """Some steps of one experiment are done."""
        self.bars.start()
        if name in self.ended:
            return  # told before it ended, heard after
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=None)
        self.bars.update(self.tasks[name], completed=done, total=expected)

    def on_end(self, ended: Ended) -> None:
        """One experiment ended: its bar goes."""
        self.bars.start()
        self.ended.add(ended.name)
        if ended.name in self.tasks:
            self.bars.remove_task(self.tasks.pop(ended.name))
        self.bars.advance(self.total)
        if not ended.ok:
            self.bars.console.print(f"{ended.name}: {'a claim fails' if ended.result else 'an error'}", style="red")


@contextmanager
def progress_bars(n_experiments: int) -> Iterator[Bars]:
    """On stderr, from the first event until the context ends: a mistake that is found before has a clean line."""
    columns = (TextColumn("{task.description:>22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    try:
        yield Bars(bars, n_experiments)
    finally:
        if bars.live.is_started:  # stopping prints a line
            bars.stop()
