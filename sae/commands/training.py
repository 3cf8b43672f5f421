"""Commands that train."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from tyro.conf import Positional, arg

from sae.commands.base import FromFile, SetsFields, WithPlugins
from sae.errors import Interrupted, UsageError


@dataclass
class Demo:
    """Features -> toy model -> SAE -> recovery -> report, in one command.

    `sae demo` trains a toy model in superposition (256 features in 64 dimensions) and SAEs on its hidden
    activations, and measures whether they found the features. `sae demo digits` trains an SAE on the hidden
    activations of a small network that reads scanned digits, and shows what its latents mean.
    """

    what: Annotated[Positional[Literal["features", "digits"]], arg(metavar="{features,digits}")] = "features"
    out: Path | None = None
    """Output directory; default runs/demo or runs/digits."""
    seed: int = 0
    overwrite: bool = False
    """Replace an earlier demo in the output directory."""

    def run(self) -> None:
        from sae import demo, digits  # noqa: PLC0415

        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, got {self.seed}")

        if self.what == "features":
            demo.run(self.out or Path("runs/demo"), self.seed, self.overwrite)
        else:
            digits.run(self.out or Path("runs/digits"), self.seed, self.overwrite)


@dataclass
class Train(FromFile):
    """Train an SAE as CONFIG.yaml says.

    Any value of the file can be set on the command line: `--sae.k 8`, `--train.lr 1e-3`, `--sae.kind batchtopk`,
    `--log.wandb offline`. Several processes share every batch when started by `torchrun --standalone --nproc-per-node N
    -m sae train CONFIG.yaml` (docs/distributed.md).
    """

    def run(self) -> None:
        from sae.config import load_config  # noqa: PLC0415
        from sae.console import print_headlines, progress  # noqa: PLC0415
        from sae.launch import speaks  # noqa: PLC0415
        from sae.run import train  # noqa: PLC0415

        self.load_plugins()
        config = load_config(self.config, self.words)
        with progress(f"training {config.sae.kind}", config.n_steps) as on_line:
            result = train(config, resume=self.resume, overwrite=self.overwrite, on_line=on_line)
        if not speaks():
            return
        print_headlines(result.metrics)
        print(f"\nwrote {result.out}/: every metric is in its result.json")


@dataclass
class Sweep(FromFile):
    """Train many SAEs as CONFIG.yaml says: its section `sweep` names what varies.

    Members on one stream of batches are trained together. Any value can be set on the command line, as for
    `sae train`: `--train.n_samples 1_000_000`, `--sweep.n_jobs 4`, `--sweep.grid '{sae.k: [2, 3]}'`.
    """

    @classmethod
    def sections(cls) -> list[str]:
        return [*super().sections(), "sweep"]

    def run(self) -> None:
        from sae.sweep import load_sweep, run_sweep  # noqa: PLC0415
        from sae.sweep.show import last_line, print_outcome, progress  # noqa: PLC0415

        self.load_plugins()
        plan = load_sweep(self.config, self.words)
        with progress(plan) as on_event:
            outcome = run_sweep(plan, resume=self.resume, overwrite=self.overwrite, on_event=on_event)
        print_outcome(outcome)
        print(f"\nwrote {outcome.report or f'{plan.out}/'}")
        if outcome.signal_number:
            raise Interrupted(last_line(outcome), outcome.signal_number)
        if outcome.not_done:
            print(f"sae: {last_line(outcome)}", file=sys.stderr)
            sys.exit(1)


@dataclass
class Leaderboard(WithPlugins, SetsFields):
    """Train every architecture and baseline on one world with known true features, with intervals over seeds.

    WORLD is a file that describes a world, a folder in which SAELens saved one, or a training configuration, whose
    source is used. A recipe says who takes part and what they share. Its fields can be set: `--seeds 5`, `--l0 4`,
    `--d_sae 512`, `--train.n_samples 1_000_000`, `--source.seed 1`, `--baselines '[random, oracle]'`.
    """

    world: Annotated[Positional[Path | None], arg(metavar="[WORLD]")] = None
    """The world; default the recipe's."""
    add: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, arg(metavar="ENTRY")] = ()
    """One more SAE, as in '{kind: mine, k: l0}'; its kind may come from --plugin. May be given several times."""
    recipe: Path | None = None
    """The recipe; default configs/leaderboard.yaml, or the output directory's with --resume."""
    out: Path = Path("runs/leaderboard")
    """Output directory."""
    resume: bool = False
    """Continue what the output directory holds, perhaps with more entries or seeds."""
    overwrite: bool = False
    """Discard what the output directory holds."""
    example: ClassVar[str] = "--train.n_samples 1_000_000"

    @classmethod
    def sections(cls) -> list[str]:
        from sae.leaderboard.recipe import Recipe  # noqa: PLC0415

        return list(Recipe.model_fields)

    def run(self) -> None:
        from sae.leaderboard import read_recipe, run_leaderboard  # noqa: PLC0415
        from sae.leaderboard.show import last_line, print_standings, stage_bar  # noqa: PLC0415
        from sae.names import RECIPE  # noqa: PLC0415
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
