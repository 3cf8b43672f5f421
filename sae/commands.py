"""The commands: what each is asked for, and whom it calls. What is slow to import is imported when it runs."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from sae.errors import Interrupted, UsageError

logger = logging.getLogger("sae")


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
class Harvest:
    """Write the activations of a language model into a store, once, to train on as often as wanted.

    CONFIG.yaml has a section `source` of kind `model`; it may be that of a training run. Any value of it can be set on
    the command line: `--source.n_tokens 1_000_000`, `--source.device cuda`.
    """

    config: Positional[Path]
    out: Path
    """The folder to write."""
    modules: tuple[str, ...] = ()
    """Several modules in one pass of the model, each into a folder of its own under OUT; default that of the file."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What activations are kept in; default what the model computes in."""
    resume: bool = False
    """Go on with a harvest that was stopped."""
    overwrite: bool = False
    """Discard the store that the folder holds."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

    def run(self) -> None:
        from sae.console import one_bar  # noqa: PLC0415
        from sae.networks.harvest import harvest_model  # noqa: PLC0415
        from sae.networks.plan import load_plan  # noqa: PLC0415
        from sae.stores.show import summary  # noqa: PLC0415

        plan = load_plan(self.config, self.overrides)
        with one_bar("reading", 0, "context") as bar:

            def on_begin(n: int) -> Callable[[int], object]:
                bar.reset(n)
                return bar.update

            paths = harvest_model(
                plan,
                self.out,
                self.modules,
                self.dtype,
                resume=self.resume,
                overwrite=self.overwrite,
                on_begin=on_begin,
            )
        for path in paths:
            print(summary(path))


@dataclass
class Store:
    """Look at an activation store, check it, or write one from other files.

    `info` says what a store holds, `verify` reads every shard against its checksum, and `convert` writes a store from
    arrays (.npy, .npz, .safetensors; [rows, d] or [inputs, positions, d]), from activations that SAELens cached, or
    from another store in another dtype.
    """

    action: Annotated[Positional[Literal["info", "verify", "convert"]], arg(metavar="{info,verify,convert}")]
    path: Positional[Path]
    out: Path | None = None
    """Of convert: the folder to write; default PATH-store."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of convert: what activations are kept in; default what they are in."""
    key: str | None = None
    """Of convert: the array or the column, where there are several."""
    overwrite: bool = False
    """Of convert: discard the store that the folder holds."""

    def run(self) -> None:
        from sae.stores.convert import write_store  # noqa: PLC0415
        from sae.stores.show import print_info, summary, verify  # noqa: PLC0415

        if self.action == "convert":
            if self.out is None and not self.path.exists():
                raise UsageError(f"several files, or none, are at {self.path}; say where the store is to be with --out")
            whole = self.path.resolve()  # "." has no name of its own
            name = whole.stem if whole.is_file() else whole.name
            out = self.out or self.path.parent / f"{name}-store"
            write_store(self.path, out, self.dtype, self.key, self.overwrite)
            print(summary(out))
            return
        given = {"--out": self.out, "--dtype": self.dtype, "--key": self.key, "--overwrite": self.overwrite or None}
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"{name} is for `sae store convert`; `sae store {self.action}` writes nothing")
        (print_info if self.action == "info" else verify)(self.path)


@dataclass
class Eval(WithPlugins):
    """Measure a trained SAE again: every metric that applies, and recovery when the truth is known.

    Of a run that is not finished, its newest checkpoint is measured, and nothing is written.
    """

    run_dir: Positional[Path]
    baselines: bool = False
    """Other methods on the same activations too, at as many latents; takes seconds to minutes for each."""
    diagnose: bool = False
    """Also where its F1 went, and which true features it misses and why: features.csv, diagnosis.json, and sections of
    the report. Up to some minutes."""
    downstream: bool = False
    """Also what the language model loses that a store was harvested from; it is loaded."""
    device: str = "cpu"
    """Where that model computes, a torch device."""

    def run(self) -> None:
        from sae.console import print_metrics  # noqa: PLC0415
        from sae.run import evaluate_run  # noqa: PLC0415
        from sae.unfinished import evaluate_checkpoint, is_unfinished  # noqa: PLC0415

        self.load_plugins()
        if is_unfinished(self.run_dir):
            if self.baselines or self.diagnose or self.downstream:
                raise UsageError(f"{self.run_dir} is not finished; train it to the end, with --resume, for that")
            evaluation, step, n_steps = evaluate_checkpoint(self.run_dir)
            print_metrics(evaluation.metrics)
            print(f"\n{self.run_dir} after step {step} of {n_steps}; nothing was written")
            return
        if self.baselines:
            from sae.baselines.beside import beside_run  # noqa: PLC0415
            from sae.baselines.show import print_beside  # noqa: PLC0415

            evaluation, rows = beside_run(
                self.run_dir,
                self.diagnose,
                lambda name: logger.info("fitting %s", name),
                self.device if self.downstream else None,
            )
            print_beside(self.run_dir, evaluation, rows)
        else:
            evaluation = evaluate_run(self.run_dir, self.diagnose, self.device if self.downstream else None)
            print_metrics(evaluation.metrics)
        if self.diagnose:
            from sae.diagnosis.show import print_diagnosis  # noqa: PLC0415

            print_diagnosis(self.run_dir, evaluation.metrics)


@dataclass
class Latents(WithPlugins):
    """Show the texts in which latents fire most: RUN_DIR/latents.html, of a run on a language model's activations."""

    run_dir: Positional[Path]
    which: tuple[int, ...] = ()
    """Latents to show, by number; default a selection from the most frequent to the rarest."""
    n_latents: int = 100
    """How many such a selection has."""
    n_examples: int = 8
    """Texts for each."""
    n_rows: int = 200_000
    """Tokens that are looked at: the first that the run was trained on."""

    def run(self) -> None:
        from sae.latents import describe  # noqa: PLC0415

        self.load_plugins()
        for name in ("n_latents", "n_examples", "n_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        page = describe(self.run_dir, self.which, self.n_latents, self.n_examples, self.n_rows)
        print(f"wrote {page}; of all latents: latents.safetensors beside it")


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
class Convert(WithPlugins):
    """Write an SAE in the files of another library, or read one of another library.

    PATH is a run directory, or a folder or file of SAELens, dictionary_learning, sparsify, Gemma Scope or OpenAI, which
    is recognised by its files. Codes and reconstructions stay the same; what cannot be said there is refused.
    """

    path: Positional[Path]
    to: Literal["sae", "saelens", "dictionary_learning", "sparsify"] = "saelens"
    """Whose files to write; sae: our own, for `sae.load`."""
    out: Path | None = None
    """The folder to write; default PATH-FORMAT."""
    metadata: str = "{}"
    """What else the files should say, in YAML: '{model_name: gpt2, hook_name: blocks.8.hook_resid_pre}'."""
    overwrite: bool = False
    """Replace files in the folder."""

    def run(self) -> None:
        from sae.formats.convert import convert  # noqa: PLC0415

        self.load_plugins()
        print(convert(self.path, self.to, self.out, self.metadata, self.overwrite))


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


COMMANDS = {
    "demo": Demo,
    "train": Train,
    "sweep": Sweep,
    "harvest": Harvest,
    "store": Store,
    "eval": Eval,
    "latents": Latents,
    "report": Report,
    "convert": Convert,
    "bench": Bench,
}
