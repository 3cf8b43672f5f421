"""`sae leaderboard`: what it is asked for, and whom it calls."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from sae.commands import WithPlugins
from sae.errors import Interrupted


@dataclass
class Leaderboard(WithPlugins):
    """Every architecture and every baseline on one world whose true features are known, with intervals over seeds.

    WORLD is a file that describes a world, a folder that SAELens saved one in, or a training configuration, of which
    the source is taken. Who takes part, and what all share, says a recipe. Its fields can be set: `--seeds 5`,
    `--l0 4`, `--d_sae 512`, `--train.n_samples 1_000_000`, `--source.seed 1`, `--baselines '[random, oracle]'`.
    """

    world: Annotated[Positional[Path | None], arg(metavar="[WORLD]")] = None
    """Default the recipe's."""
    add: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, arg(metavar="ENTRY")] = ()
    """One more SAE, as in '{kind: mine, k: l0}'; its kind may come from --plugin. May be given several times."""
    recipe: Path | None = None
    """Default configs/leaderboard.yaml, with --resume that of the output directory."""
    out: Path = Path("runs/leaderboard")
    """Output directory."""
    resume: bool = False
    """Continue what the output directory holds, perhaps with more entries or seeds."""
    overwrite: bool = False
    """Discard what the output directory holds."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

    def run(self) -> None:
        from sae.leaderboard import read_recipe, run_leaderboard  # noqa: PLC0415
        from sae.leaderboard.run import RECIPE  # noqa: PLC0415
        from sae.leaderboard.show import last_line, print_standings, stage_bar  # noqa: PLC0415
        from sae.report.standings import read_leaderboard  # noqa: PLC0415
        from sae.sweep.show import progress  # noqa: PLC0415

        self.load_plugins()
        begun = self.out / RECIPE
        file = begun if self.resume and self.recipe is None and begun.is_file() else self.recipe
        outcome = run_leaderboard(
            read_recipe(file, self.world, self.overrides, self.add),
            self.out,
            resume=self.resume,
            overwrite=self.overwrite,
            watch_sweep=progress,
            watch_stage=stage_bar,
        )
        if outcome.rows:
            print_standings(read_leaderboard(self.out))
        print(f"\nwrote {outcome.report or f'{self.out}/'}")
        if outcome.signal_number:
            raise Interrupted(last_line(outcome), outcome.signal_number)
        if outcome.missing:
            print(f"sae: {last_line(outcome)}", file=sys.stderr)
            sys.exit(1)
