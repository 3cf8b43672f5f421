"""One training run from configuration to result."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sae import checkpoint
from sae.config import TrainConfig
from sae.directory import check_out, claim_out, require_same_run, save_evaluation
from sae.ensemble import Diverged, Ensemble, OnLine, Record, Run
from sae.errors import OtherProcess, UsageError
from sae.evaluation import chunk_rows, evaluate_on
from sae.extras import installed
from sae.kernels import require_device, require_kernels, resolve_device
from sae.levels import by_frequency
from sae.locks import hold
from sae.log import RunLog, require_wandb
from sae.model import SAE, load
from sae.names import CHECKPOINTS, CONFIG, RESULT
from sae.ranks import ALONE, Ranks, joined
from sae.sources import HeldOut, Source, as_source
from sae.sparsifiers.base import Sparsifier
from sae.start import N_CALIBRATION, start
from sae.stopping import stop_requested
from sae.stores import recorded
from sae.trainer import Trainer
from sae.warm_start import require_start

logger = logging.getLogger("sae")

# Thresholds are fitted on up to four times as many rows as the scale where rows are short, in so many entries. On a toy
# model an L0 of 2.56 varies by 3.5 from row to row: over 65,536 rows by .5 %, and over these by .27 %.
N_THRESHOLDS, THRESHOLD_ENTRIES = 4 * N_CALIBRATION, 2**24


@dataclass(frozen=True)
class Result:
    """A finished run: the SAE in the units of the data, its metrics on held-out activations, its directory."""

    sae: SAE
    metrics: dict[str, float]
    out: Path

    def __repr__(self) -> str:
        names = ("metrics/fvu", "metrics/l0", "recovery/mcc")
        said = [f"{name} {self.metrics[name]:.4g}" for name in names if name in self.metrics]
        return f"Result({', '.join(said)}; {len(self.metrics)} metrics, sae and out={self.out})"


def train(
    config: TrainConfig,
    source: object = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: bool = True,
    on_line: OnLine | None = None,
) -> Result:
    """Trains one SAE and writes its run directory.

    `source` (a tensor, an array, an iterable of batches, a `Source`) replaces the configuration's own.
    `on_line(step, values)` is called for each logged line; `report` writes report.html when its extra is installed.
    Processes started by `torchrun` train it together (docs/distributed.md): each must be given the same, and only the
    first calls `on_line`.

    Raises:
        UsageError: the source is bad, or `config.out` holds a run and neither resume nor overwrite is set.
        Interrupted: a signal came; a checkpoint was written first.
    """
    if not isinstance(config, TrainConfig):
        remedy = "pass sae.TrainConfig(...), or sae.load_config(path)"
        raise UsageError(f"a configuration is an sae.TrainConfig, got a {type(config).__name__}; {remedy}")
    if source is not None:
        # What is recorded must be what was trained on.
        config = config.model_copy(update={"source": recorded(source)})
    require_wandb(config)
    if source is None and config.source is None:
        raise UsageError("the configuration has no source; add one, or pass source= to sae.train")
    with joined(config.train.device) as ranks:
        ranks.of_all(lambda: require_device(config.train.device, "train.device"))
        ranks.require_same(config.to_yaml(), "settings are not", "start all with the same command")
        if ranks.of_lead(ranks.of_all(lambda: ranks.lead and _complete(config, resume, overwrite))):
            result = None
            if ranks.lead:
                result = Result(load(config.out), json.loads((config.out / RESULT).read_text()), config.out)
            return _of_lead(result, config, ranks)
        begun = _begun(config, resume, ranks)
        ranks.of_all(lambda: require_start(begun))
        own = config.source
        activations = ranks.of_all(lambda: as_source(own.open() if source is None and own is not None else source))
        run = open_run(config, begun, activations, resume, on_line, ranks)
        if run.n_steps_done:
            logger.info("%s continues after step %d of %d", config.out, run.n_steps_done, config.n_steps)
        try:
            with stop_requested() as stop:
                for _, error in Ensemble([run], activations, ranks).feed(stop):
                    if isinstance(error, Diverged) and not ranks.lead:
                        raise OtherProcess(str(error)) from error
                    if error is not None:
                        raise error
            return _of_lead(ranks.of_all(lambda: conclude(run, report) if ranks.lead else None), config, ranks)
        finally:
            run.close()


def _begun(config: TrainConfig, resume: bool, ranks: Ranks) -> TrainConfig:
    """`as_it_begins`, where rank 0 decides what depends on a checkpoint."""
    begun = ranks.of_all(lambda: as_it_begins(config, resume and ranks.lead))
    decided = ranks.of_lead(begun.train.model_dump(include={"kernels", "precision", "start_from"}))
    return begun.model_copy(update={"train": begun.train.model_copy(update=decided)})


def _of_lead(result: Result | None, config: TrainConfig, ranks: Ranks) -> Result:
    """Rank 0's result."""
    sizes, metrics = ranks.of_lead(((result.sae.d_in, result.sae.d_out), result.metrics) if result else ((0, 0), {}))
    sae = result.sae if result else SAE(sizes[0], config.sae, sizes[1]).eval().requires_grad_(False)
    tensors = ranks.tensors_of_lead(sae.state_dict(), torch.device("cpu"))
    if result is not None:
        return result
    sae.load_state_dict(tensors)
    return Result(sae, metrics, config.out)


def _complete(config: TrainConfig, resume: bool, overwrite: bool) -> bool:
    """Whether nothing of the run is left to do.

    Raises:
        UsageError: its directory holds something that is in the way.
    """
    check_out(config.out, resume, overwrite)
    if not resume:
        return False
    if not (config.out / CONFIG).exists():
        logger.warning("nothing to resume in %s: starting the run", config.out)
        return False
    require_same_run(config)
    if (config.out / RESULT).exists():
        logger.info("%s is complete; nothing to resume", config.out)
        return True
    return False


def open_run(
    config: TrainConfig,
    begun: TrainConfig,
    source: Source,
    resume: bool,
    on_line: OnLine | None,
    ranks: Ranks = ALONE,
) -> Run:
    """A run at its first step, or at its newest checkpoint; `config.out` becomes its directory.

    `begun` is the configuration as `as_it_begins` gives it, `config` what is recorded.
    """
    # Nothing is written, and no earlier run given up, before the data have been found good.
    calibration = ranks.of_all(lambda: source.held_out("calibration", N_CALIBRATION))
    if ranks.n > 1:
        digest = hashlib.sha256(calibration.x.numpy().tobytes()).hexdigest()
        remedy = "give each the same source, whole and in the same order: every batch is divided here"
        ranks.require_same(digest, "held-out rows are not", remedy)
    trainer = ranks.of_all(lambda: start(begun, source, calibration, ranks))
    if ranks.n > 1:
        kernels, n_threads = trainer.engine.kernels, torch.get_num_threads()
        what = f"{kernels.name} kernels in {kernels.precision}, with {n_threads} threads, are not"
        remedy = "set train.kernels, train.precision and OMP_NUM_THREADS so that all have the same"
        ranks.require_same(what, what, remedy)
    record = ranks.of_all(lambda: _record(config, trainer, resume) if ranks.lead else None)
    try:
        run = Run(trainer, source, record, on_line)
        if ranks.n > 1:
            trainer.follow(ranks)
        return run
    except BaseException:
        if record is not None:
            record.close()
        raise


def _record(config: TrainConfig, trainer: Trainer, resume: bool) -> Record:
    """What a run writes to; the trainer is moved to where the run stands."""
    lock = hold(config.out)
    try:
        state = claim_out(config, resume)
        if state is not None:
            trainer.load_state(*checkpoint.load(state))
        return Record(RunLog(config.out, config, resume_at=trainer.n_steps_done), lock)
    except BaseException:
        lock.release()
        raise


def conclude(run: Run, report: bool) -> Result:
    """Calibrates, measures and saves what a run has learned; its trainer is released."""
    config, source, trainer, record = run.config, run.source, run.trainer, run.record
    assert record is not None
    rows = calibration_rows(trainer.sae, source)
    n_steps, sae = trainer.n_steps_done, finished(trainer, rows)
    del run.trainer, trainer  # Adam's moments take twice the memory of the weights
    sae.save(config.out)  # whatever measuring it may find
    evaluation = evaluate_on(source, sae, config.evaluation.n_samples)
    fvu = evaluation.metrics["metrics/fvu"]
    if fvu > 1:
        logger.warning(
            "FVU is %.3g on held-out activations: their mean would reconstruct better; lower train.lr=%g, or take "
            "more than %d steps",
            fvu,
            config.lr,
            n_steps,
        )
    save_evaluation(config.out, evaluation)
    if n_steps <= config.checkpoint.every_steps:  # what was saved for a stop in the meantime
        shutil.rmtree(config.out / CHECKPOINTS, ignore_errors=True)
    page = write_report_if_installed(config.out) if report else None
    record.log.finish(n_steps, evaluation.metrics, evaluation.tables["latent/frequency"], page)
    return Result(sae, evaluation.metrics, config.out)


def finished(trainer: Trainer, calibration: HeldOut) -> SAE:
    """The trained SAE made ready for inference, in place."""
    frequency, units = trainer.engine.levels.frequency.cpu(), (trainer.unit, trainer.target_unit)
    return ready_(trainer.sae.cpu(), *units, calibration, 1.0, frequency)  # a source may end early


def ready_(
    sae: SAE,
    unit: float,
    target_unit: float,
    calibration: HeldOut,
    done: float,
    frequency: Float[Tensor, " d_sae"] | None,
) -> SAE:
    """An SAE after a fraction `done` of its training, for inference: in the units of the data, with calibrated
    thresholds, and its latents in the order of their frequency where prefixes are sorted."""
    sae.eval().requires_grad_(False)
    if sae.config.sort_prefixes and frequency is not None:
        sae.reorder_(by_frequency(frequency))
    sae.sparsifier.anneal_(done)
    chunks = calibration.x.split(chunk_rows(sae.d_sae))
    if sae.sparsifier.refine and sae.sparsifier.first is not None:
        sae.sparsifier.first.calibrate_((sae.affine(chunk / unit) for chunk in chunks), len(calibration.x))
    sae.sparsifier.calibrate_((sae.pre_latents(chunk / unit) for chunk in chunks), len(calibration.x))
    sae.rescale_(unit, target_unit)
    return sae


def calibration_rows(sae: SAE, source: Source) -> HeldOut:
    """The rows that thresholds are fitted on; few where there are none to fit."""
    if type(sae.sparsifier).calibrate_ is Sparsifier.calibrate_:
        return source.held_out("calibration", 1024)
    return source.held_out("calibration", min(max(THRESHOLD_ENTRIES // source.d_in, N_CALIBRATION), N_THRESHOLDS))


def as_it_begins(config: TrainConfig, resume: bool) -> TrainConfig:
    """On the device that `auto` finds here; on resuming with the kernels and the precision of the newest checkpoint,
    whatever `auto` would choose.

    Raises:
        UsageError: its kernels and precision cannot work on this machine.
    """
    train = config.train.model_copy(update={"device": resolve_device(config.train.device)})
    config = config.model_copy(update={"train": train})
    device, dtype = torch.device(train.device), torch.get_default_dtype()
    newest = checkpoint.latest(config.out / CHECKPOINTS) if resume else None
    if newest is None:
        require_kernels(device, dtype, config.train.kernels, config.train.precision)
        return config
    train = train.model_copy(update={"start_from": None})  # the checkpoint is what the run begins with
    values = checkpoint.load_values(newest)
    name, precision = values["kernels"], values["precision"]
    try:
        require_kernels(device, dtype, name, precision)
    except UsageError as error:
        raise UsageError(
            f"the run began with {name} kernels in {precision} and must continue with them: {error}, "
            "or start again in another --out"
        ) from error
    return config.model_copy(update={"train": train.model_copy(update={"kernels": name, "precision": precision})})


def write_report_if_installed(out: Path) -> Path | None:
    """The run's report.html; without the `report` extra a line says what is missing."""
    if not installed("plotly"):
        logger.info("no report.html: pip install 'sae[report]', then `sae report %s`", out)
        return None
    from sae.report import write_report  # noqa: PLC0415 - an extra, and slow to import

    return write_report([out])
