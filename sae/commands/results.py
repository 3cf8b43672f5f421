"""Commands for what was trained: measure it, show it, draw it, write it for others."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from sae.commands.base import WithPlugins
from sae.errors import UsageError
from sae.hub import said

logger = logging.getLogger("sae")


@dataclass
class Eval(WithPlugins):
    """Measure a trained SAE again: every metric that applies, and recovery when the truth is known.

    For an unfinished run, the newest checkpoint is measured and nothing is written. With --source nothing is written
    either, and RUN_DIR may be an SAE of any library that `sae convert` reads, also on the Hub.
    """

    run_dir: Positional[Path]
    source: str | None = None
    """Other activations than the run's own: '{kind: store, path: acts}', or a YAML file with a section source."""
    n_samples: int | None = None
    """With --source: number of held-out rows to measure on; default 20,000."""
    baselines: bool = False
    """Also fit other methods on the same activations, with the same number of latents; seconds to minutes each."""
    diagnose: bool = False
    """Also find where F1 was lost, and which true features were missed and why: features.csv, diagnosis.json, and
    sections of the report. Takes up to a few minutes."""
    downstream: bool = False
    """Also measure what the language model behind a store loses; the model is loaded."""
    device: str | None = None
    """Torch device on which the language model of a run or store runs; default the run's, or the CPU."""

    def run(self) -> None:
        from sae.again import evaluate_run  # noqa: PLC0415
        from sae.console import print_metrics  # noqa: PLC0415
        from sae.unfinished import evaluate_checkpoint, is_unfinished  # noqa: PLC0415

        self.load_plugins()
        if self.source is not None or self.n_samples is not None:
            self._elsewhere()
            return
        if is_unfinished(self.run_dir):
            if self.baselines or self.diagnose or self.downstream:
                raise UsageError(f"{self.run_dir} is not finished; train it to the end with --resume first")
            evaluation, step, n_steps = evaluate_checkpoint(self.run_dir)
            print_metrics(evaluation.metrics)
            print(f"\n{self.run_dir} after step {step} of {n_steps}; nothing was written")
            return
        if self.baselines:
            from sae.baselines.beside import beside_run  # noqa: PLC0415
            from sae.baselines.show import print_beside  # noqa: PLC0415

            evaluation, rows = beside_run(
                self.run_dir,
                diagnose=self.diagnose,
                downstream=self.downstream,
                device=self.device,
                on_row=lambda name: logger.info("fitting %s", name),
            )
            print_beside(self.run_dir, evaluation, rows)
        else:
            evaluation = evaluate_run(
                self.run_dir, diagnose=self.diagnose, downstream=self.downstream, device=self.device
            )
            print_metrics(evaluation.metrics)
        if self.diagnose:
            from sae.diagnosis.show import print_diagnosis  # noqa: PLC0415

            print_diagnosis(self.run_dir, evaluation.metrics)

    def _elsewhere(self) -> None:
        from sae.console import print_metrics  # noqa: PLC0415
        from sae.elsewhere import evaluate_elsewhere  # noqa: PLC0415

        if self.source is None:
            raise UsageError("--n-samples goes with --source; for a run, set evaluation.n_samples")
        if self.baselines or self.diagnose or self.downstream:
            raise UsageError("--baselines, --diagnose and --downstream use a run's own source; leave --source out")
        n_samples = 20_000 if self.n_samples is None else self.n_samples
        if n_samples < 1:
            raise UsageError(f"--n-samples must be at least 1, got {n_samples}")
        print_metrics(evaluate_elsewhere(self.run_dir, self.source, n_samples).metrics)
        print(f"\n{said(self.run_dir)} on other activations; nothing was written")


@dataclass
class Latents(WithPlugins):
    """Show the texts in which latents fire most: RUN_DIR/latents.html, for a run on a language model's activations.

    With --source, RUN_DIR may be an SAE of any library that `sae convert` reads, also on the Hub.
    """

    run_dir: Positional[Path]
    source: str | None = None
    """Other activations than the run's own: '{kind: store, path: acts}', or a YAML file with a section source."""
    out: Path | None = None
    """The folder to write; default RUN_DIR, or RUN_DIR-latents with --source."""
    which: tuple[int, ...] = ()
    """Latents to show, by number; default a selection from the most frequent to the rarest."""
    n_latents: int = 100
    """Number of latents in the default selection."""
    n_examples: int = 8
    """Texts per latent."""
    n_rows: int = 200_000
    """Tokens to search: the first ones that the run was trained on."""

    def run(self) -> None:
        from sae.elsewhere import source_from  # noqa: PLC0415
        from sae.latents import describe  # noqa: PLC0415

        self.load_plugins()
        for name in ("n_latents", "n_examples", "n_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        page = describe(
            self.run_dir,
            self.which,
            self.n_latents,
            self.n_examples,
            self.n_rows,
            source=None if self.source is None else source_from(self.source),
            out=self.out,
        )
        print(f"wrote {page}; latents.safetensors next to it covers all latents")


@dataclass
class Report(WithPlugins):
    """Write one self-contained page: report.html for a run or sweep, or comparison.html for several runs."""

    run_dirs: Positional[tuple[Path, ...]]
    out: Path | None = None
    """The file to write; default report.html in the directory, or comparison.html in the first of several."""

    def run(self) -> None:
        from sae.report import write_report  # noqa: PLC0415

        self.load_plugins()
        if not self.run_dirs:
            raise UsageError("give at least one run directory, as in `sae report runs/demo`")
        print(f"wrote {write_report(self.run_dirs, self.out)}")


@dataclass
class Convert(WithPlugins):
    """Write an SAE in the format of another library, or read one from another library.

    PATH is a run directory, or a folder or file of SAELens, dictionary_learning, sparsify, Gemma Scope or OpenAI, which
    is recognised by its files; on the Hub it is hf://OWNER/NAME[@REVISION][/FOLDER]. Codes and reconstructions stay the
    same; anything the target format cannot express is refused.
    """

    path: Positional[Path]
    to: Literal["sae", "saelens", "dictionary_learning", "sparsify"] = "saelens"
    """The format to write; sae: our own, for `sae.load`."""
    out: Path | None = None
    """The folder to write, or an address on the Hub; default PATH-FORMAT."""
    metadata: str = "{}"
    """More to record in the files, in YAML: '{model_name: gpt2, hook_name: blocks.8.hook_resid_pre}'."""
    overwrite: bool = False
    """Replace files in the folder."""

    def run(self) -> None:
        from sae.formats.convert import convert  # noqa: PLC0415

        self.load_plugins()
        print(convert(self.path, self.to, self.out, self.metadata, self.overwrite))
