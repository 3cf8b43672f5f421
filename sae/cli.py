"""The command line: `sae demo | train | sweep | eval | report | bench`. A user's error is one line and exit code 2."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from sae.errors import Interrupted, UsageError
from toymodels.errors import nearest


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
class FromFile(WithPlugins):
    """What trains as a file says, in a directory that may hold a part of it already."""

    config: Positional[Path]
    out: Path | None = None
    """Directory for what is trained; default what the file says."""
    resume: bool = False
    """Continue what the output directory holds, bit for bit."""
    overwrite: bool = False
    """Discard what the output directory holds."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """What the command line sets in the file."""
        return (*self.overrides, "--out", json.dumps(str(self.out))) if self.out is not None else self.overrides


@dataclass
class Train(FromFile):
    """Train an SAE as CONFIG.yaml says.

    Any value of the file can be set on the command line: `--sae.k 8`, `--train.lr 1e-3`, `--sae.kind batchtopk`,
    `--log.wandb offline`.
    """

    def run(self) -> None:
        from sae.config import load_config  # noqa: PLC0415
        from sae.console import print_headlines, progress  # noqa: PLC0415
        from sae.run import train  # noqa: PLC0415

        self.load_plugins()
        config = load_config(self.config, self.words)
        with progress(f"training {config.sae.kind}", config.n_steps) as on_line:
            result = train(config, resume=self.resume, overwrite=self.overwrite, on_line=on_line)
        print_headlines(result.metrics)
        print(f"\nwrote {result.out}/: every metric is in its result.json")


@dataclass
class Sweep(FromFile):
    """Train many SAEs as CONFIG.yaml says: its section `sweep` names what varies.

    Members on one stream of batches are trained together. Any value can be set on the command line, as for
    `sae train`: `--train.n_samples 1_000_000`, `--sweep.n_jobs 4`, `--sweep.grid '{sae.k: [2, 3]}'`.
    """

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
class Eval(WithPlugins):
    """Measure a trained SAE again: every metric that applies, and recovery when the truth is known."""

    run_dir: Positional[Path]
    baselines: bool = False
    """Other methods on the same activations too, at as many latents; takes seconds to minutes for each."""
    diagnose: bool = False
    """Also where its F1 went, and which true features it misses and why: features.csv, diagnosis.json, and sections of
    the report. Up to some minutes."""

    def run(self) -> None:
        from sae.console import print_metrics  # noqa: PLC0415
        from sae.run import evaluate_run  # noqa: PLC0415

        self.load_plugins()
        if self.baselines:
            from sae.baselines.beside import beside_run  # noqa: PLC0415
            from sae.baselines.show import print_beside  # noqa: PLC0415

            evaluation, rows = beside_run(self.run_dir, self.diagnose, lambda name: logger.info("fitting %s", name))
            print_beside(self.run_dir, evaluation, rows)
        else:
            evaluation = evaluate_run(self.run_dir, self.diagnose)
            print_metrics(evaluation.metrics)
        if self.diagnose:
            from sae.diagnosis.show import print_diagnosis  # noqa: PLC0415

            print_diagnosis(self.run_dir, evaluation.metrics)


@dataclass
class Report(WithPlugins):
    """Write one self-contained page: report.html of a run or sweep, or comparison.html of several runs."""

    run_dirs: Positional[tuple[Path, ...]]
    out: Path | None = None
    """The file to write; default report.html in the directory, or of several comparison.html in the first."""

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
    """Kinds, each with options of its own where wanted: topk,topk:multi_k=32,topk:train.moments=int8."""
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


logger = logging.getLogger("sae")

COMMANDS = {"demo": Demo, "train": Train, "sweep": Sweep, "eval": Eval, "report": Report, "bench": Bench}
Command = (
    Annotated[Demo, subcommand("demo", prefix_name=False)]
    | Annotated[Train, subcommand("train", prefix_name=False)]
    | Annotated[Sweep, subcommand("sweep", prefix_name=False)]
    | Annotated[Eval, subcommand("eval", prefix_name=False)]
    | Annotated[Report, subcommand("report", prefix_name=False)]
    | Annotated[Bench, subcommand("bench", prefix_name=False)]
)
REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _choice(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    """A Literal whose error names the nearest choice, too."""
    if get_origin(info.type) is not Literal:
        return None
    choices = get_args(info.type)

    def read(words: list[str]) -> str:
        if words[0] not in choices:
            raise ValueError(f"unknown {words[0]!r}{nearest(words[0], choices)}")
        return words[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(choices)}}}",
        instance_from_str=read,
        is_instance=choices.__contains__,
        str_from_instance=lambda choice: [choice],
    )


def parse(words: Sequence[str]) -> Demo | Train | Sweep | Eval | Report | Bench:
    """The command that the words ask for.

    Raises:
        UsageError: they ask for none.
        SystemExit: they ask for help, which is printed.
    """
    if not words:
        raise UsageError(f"give a command, one of {', '.join(COMMANDS)}; see `sae --help`")
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        raise UsageError(f"unknown command {words[0]!r}{nearest(words[0], COMMANDS)}")
    overrides, rest = _split_overrides(words) if words[0] in ("train", "sweep") else ([], words)
    if any(not word or (word.startswith("--") and word.endswith("=")) for word in rest):
        raise UsageError(f"a word of `sae {' '.join(words)}` is empty; is a shell variable unset?")
    said = StringIO()
    try:
        with redirect_stderr(said):
            command, unknown = tyro.cli(
                OmitArgPrefixes[Command],  # type: ignore[misc]
                prog="sae",
                description="Train sparse autoencoders on any activations, and know whether they found the truth.",
                args=rest,
                return_unknown_args=True,
                registry=REGISTRY,
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(_one_line(said.getvalue(), words)) from None
    if isinstance(command, Train | Sweep):
        _require_known(command, unknown)
        command.overrides = (*overrides, *unknown)
    elif unknown:
        raise UsageError(f"unknown argument {unknown[0]!r}; see `sae {type(command).__name__.lower()} --help`")
    return command


def _require_known(command: Train | Sweep, unknown: Sequence[str]) -> None:
    """A flag without a dot is one of the command, or a whole section of the file."""
    from sae.config import TrainConfig  # noqa: PLC0415

    sections = [*TrainConfig.model_fields, *(["sweep"] if isinstance(command, Sweep) else [])]
    known = [f"--{name}" for name in (*sections, "plugin", "resume", "overwrite")]
    for word in unknown:
        name = word.partition("=")[0]
        if name.startswith("--") and "." not in name and name not in known:
            raise UsageError(f"unknown flag {name!r}{nearest(name, known)}; a field is set as in --sae.k 3")


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with a dot and their values, and all other words: such a flag may stand before the file."""
    overrides, rest, queue = [], [], list(words)
    while queue:
        word = queue.pop(0)
        name, equals, _ = word.partition("=")
        if not (name.startswith("--") and "." in name):
            rest.append(word)
            continue
        overrides.append(word)
        if not equals and queue and not queue[0].startswith("--"):
            overrides.append(queue.pop(0))
    return overrides, rest


def _one_line(box: str, words: Sequence[str]) -> str:
    """What tyro frames and wraps, without the frame, the title, and the part on help below the first rule."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
    below_rule = dropwhile(lambda line: not line.strip("╰╯─-"), lines)
    text = " ".join(takewhile(lambda line: line.strip("╰╯─-"), below_rule)).removeprefix("Error parsing ").rstrip(".")
    called = " ".join(["sae", *(word for word in words[:1] if word in COMMANDS)])
    return f"{text[:1].lower()}{text[1:]}; see `{called} --help`"


# What can befall any file that a command reads or writes.
DENIED = "give a file or directory that you may read and write"
FULL = "make room on that disk and run again; `sae train` goes on from its last checkpoint with --resume"
REMEDIES = {errno.EACCES: DENIED, errno.EPERM: DENIED, errno.EROFS: DENIED, errno.ENOSPC: FULL, errno.EDQUOT: FULL}


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(format="sae: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        parse(sys.argv[1:]).run()
    except UsageError as error:
        print(f"sae: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"sae: error: {what}; {REMEDIES[error.errno]}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch has no class of its own for this.
        if isinstance(error, RuntimeError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        print("sae: error: memory does not suffice; lower train.batch_size or sae.d_sae", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(f"sae: {stopped.message}", file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        print("sae: stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
