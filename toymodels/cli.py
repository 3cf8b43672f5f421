"""The command line: `toymodels list | run`. A user's error is one line and exit code 2."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from toymodels.errors import UsageError
from toymodels.one_line import require_command, understood


@dataclass
class List:
    """The experiments: name, claim, and how many seconds each takes with --fast on one core."""

    def run(self) -> int:
        from rich.box import SIMPLE_HEAD  # noqa: PLC0415
        from rich.console import Console  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415

        from toymodels.experiments import NAMES, experiment  # noqa: PLC0415

        table = Table("row", "name", "claim", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("seconds", justify="right")
        for name in NAMES:
            chosen = experiment(name)
            table.add_row(chosen.row, name, chosen.claim, f"{chosen.seconds:.0f}")
        console = Console()
        (console if console.is_terminal else Console(width=120)).print(table)
        return 0


@dataclass
class Run:
    """Run one experiment, or `all`: figures, result.json and weights per experiment, and index.html for all.

    The exit code is 0 when every claim holds, 1 when one does not or an experiment fails.
    """

    name: Positional[str]
    """A name from `toymodels list`, or all."""
    out: Path = Path("runs/toymodels")
    """The folder to write: NAME/ for each experiment, and index.html."""
    fast: bool = False
    """Fewer seeds and grid points; the training runs behind each target stay at full length."""
    seed: int = 0

    def run(self) -> int:
        from toymodels.experiments import NAMES  # noqa: PLC0415
        from toymodels.gallery import verdict, write_gallery  # noqa: PLC0415
        from toymodels.progress import progress_bars  # noqa: PLC0415
        from toymodels.runner import run_all  # noqa: PLC0415

        names = NAMES if self.name == "all" else (self.name,)
        with progress_bars(len(names)) as bars:
            ended = run_all(names, self.out, self.seed, self.fast, bars.on_progress, bars.on_end)
        for one in ended:
            if one.result is None:
                assert one.error is not None
                print(f"{one.name}: {one.error.strip().splitlines()[-1]}; see {self.out / one.name / 'error.txt'}")
                continue
            print(f"{one.name}: {verdict(one.result['claims'])}, {one.result['seconds']:.0f} s")
            for claim in one.result["claims"]:
                if not claim["holds"]:
                    print(f"  fails: {claim['text']}: {claim['measured']}, {claim['relation']} {claim['target']}")
        print(f"\nwrote {write_gallery(self.out)}")
        return 0 if all(one.ok for one in ended) else 1


COMMANDS: dict[str, Callable[..., Any]] = {"list": List, "run": Run}


def parse(words: Sequence[str]) -> List | Run:
    """The command that the words stand for.

    Raises:
        UsageError: they are not a valid command.
        SystemExit: they ask for help, which is printed.
    """
    require_command("toymodels", words, COMMANDS)

    def read() -> List | Run:
        command: List | Run = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="toymodels",
            description="Toy models of superposition: every phenomenon, shown and measured.",
            args=list(words),
            config=(OmitArgPrefixes,),
        )
        return command

    return understood(read, "toymodels", words, COMMANDS)


def main() -> None:
    """Entry point of the console script."""
    try:
        sys.exit(parse(sys.argv[1:]).run())
    except UsageError as error:
        print(f"toymodels: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
