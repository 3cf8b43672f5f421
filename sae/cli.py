"""The command line: `sae demo | train | eval | report | bench`. A user's errors are one line and exit code 2."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from sae.errors import Interrupted, UsageError


@dataclass(kw_only=True)
class WithPlugins:
    """A command that may meet kinds which are not built in."""

    plugin: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, arg(metavar="FILE")] = ()
    """A Python file that defines kinds of your own; it is run. May be given several times."""

    def load_plugins(self) -> None:
        from sae.plugins import load_plugin  # noqa: PLC0415

        for path in self.plugin:
            load_plugin(path)


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
class Train(WithPlugins):
    """Train an SAE as CONFIG.yaml says.

    Any value of the file can be set on the command line: `--sae.k 8`, `--train.lr 1e-3`, `--sae.kind batchtopk`,
    `--log.wandb offline`.
    """

    config: Positional[Path]
    out: Path | None = None
    """Run directory; default what the file says."""
    resume: bool = False
    """Continue the run in the output directory, bit for bit."""
    overwrite: bool = False
    """Discard the run in the output directory."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

    def run(self) -> None:
        from sae.config import load_config  # noqa: PLC0415
        from sae.console import print_metrics, progress  # noqa: PLC0415
        from sae.run import train  # noqa: PLC0415

        self.load_plugins()
        out = ("--out", json.dumps(str(self.out))) if self.out is not None else ()
        config = load_config(self.config, (*self.overrides, *out))
        with progress(f"training {config.sae.kind}", config.n_steps) as on_line:
            result = train(config, resume=self.resume, overwrite=self.overwrite, on_line=on_line)
        print_metrics(result.metrics)
        print(f"\nwrote {result.out}/")


@dataclass
class Eval(WithPlugins):
    """Measure a trained SAE again: every metric that applies, and recovery when the truth is known."""

    run_dir: Positional[Path]

    def run(self) -> None:
        from sae.console import print_metrics  # noqa: PLC0415
        from sae.run import evaluate_run  # noqa: PLC0415

        self.load_plugins()
        print_metrics(evaluate_run(self.run_dir).metrics)


@dataclass
class Report(WithPlugins):
    """Write one self-contained report.html; several runs are compared."""

    run_dirs: Positional[tuple[Path, ...]]
    out: Path | None = None
    """The file to write; default report.html in the first run directory."""

    def run(self) -> None:
        from sae.report import write_report  # noqa: PLC0415

        self.load_plugins()
        if not self.run_dirs:
            raise UsageError("give at least one run directory, as in `sae report runs/demo`")
        print(f"wrote {write_report(self.run_dirs, self.out)}")


@dataclass
class Bench(WithPlugins):
    """How fast this machine trains SAEs, how far that is from its limits, and how fast others are on it.

    NAMES are parts: `ceiling` (what the hardware can do), `stages` (the parts of a training step), `steps` (whole
    training steps), `memory` (their peak). Without names, all but memory.
    """

    names: Annotated[Positional[tuple[str, ...]], arg(metavar="[{ceiling,stages,steps,memory} ...]")] = ()
    device: str = "cpu"
    """A torch device: cpu, cuda."""
    shapes: str = "S,M,L"
    """Sizes by name, or as numbers d,F,k,B; several of these with spaces between."""
    kinds: str = "topk,batchtopk,relu"
    """Kinds, each with options of its own where wanted: topk,topk:multi_k=32,mykind:groups=8."""
    threads: int | None = None
    """Threads of the CPU; default torch's own number."""
    rounds: int = 10
    """In each round every contender takes one turn."""
    steps: int | None = None
    """Training steps of a turn; default what the slowest does in a fifth of a second, and 10 for memory."""
    rivals: bool = False
    """Also measure the other libraries that are installed."""
    precision: Literal["default", "medium-too"] = "default"
    """Rivals run as they come; medium-too: once more under torch.set_float32_matmul_precision("medium")."""
    memory: bool = False
    """The part `memory` too."""
    out: Path | None = None
    """A JSON file for every number and sample."""

    def run(self) -> None:
        from sae.bench.run import plan, run  # noqa: PLC0415

        self.load_plugins()
        run(
            plan(
                self.names,
                shapes=self.shapes,
                kinds=self.kinds,
                device=self.device,
                threads=self.threads,
                rounds=self.rounds,
                steps=self.steps,
                rivals=self.rivals,
                medium_too=self.precision == "medium-too",
                memory=self.memory,
                out=self.out,
            )
        )


Command = (
    Annotated[Demo, subcommand("demo", prefix_name=False)]
    | Annotated[Train, subcommand("train", prefix_name=False)]
    | Annotated[Eval, subcommand("eval", prefix_name=False)]
    | Annotated[Report, subcommand("report", prefix_name=False)]
    | Annotated[Bench, subcommand("bench", prefix_name=False)]
)


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(format="sae: %(message)s", level=logging.INFO, stream=sys.stderr)
    command, unknown = tyro.cli(
        OmitArgPrefixes[Command],  # type: ignore[misc]
        prog="sae",
        description="Train sparse autoencoders on any activations, and know whether they found the truth.",
        return_unknown_args=True,
    )
    try:
        if isinstance(command, Train):
            command.overrides = tuple(unknown)
        elif unknown:
            raise UsageError(f"unknown argument {unknown[0]!r}; see `sae {type(command).__name__.lower()} --help`")
        command.run()
    except UsageError as error:
        print(f"sae: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(f"sae: {stopped.message}", file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
