"""Runs fed from one pass over the same batches: a single run, or the members of a sweep.

Each batch is drawn once and given to every run that has not seen it. A run's weights depend only on its configuration
and its batches, so a member of many ends bit for bit as it would by itself. Runs may be at different steps, as after a
kill: the stream starts where the slowest is, and the others wait for the batch that they need next. Those at the same
step take it side by side (`sae.members`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from filelock import FileLock

from sae import checkpoint
from sae.errors import Interrupted, UsageError
from sae.evaluation import live_recovery
from sae.log import RunLog
from sae.members import Members
from sae.names import CHECKPOINTS
from sae.ranks import ALONE, Ranks
from sae.sources import Batch, SharedSource, Source
from sae.stopping import CONTINUE, Stop
from sae.trainer import Trainer

logger = logging.getLogger("sae")

OnLine = Callable[[int, Mapping[str, float]], None]


class Diverged(UsageError):
    """The loss became NaN or infinite."""


class Record(NamedTuple):
    """What a run writes to: its log, and the directory that it holds."""

    log: RunLog
    lock: FileLock

    def close(self) -> None:
        """Closes the log and releases the directory."""
        try:
            self.log.close()
        finally:
            self.lock.release()


class Run:
    """One run from its first step to its last: a trainer, its log, and what is saved. Without a record nothing is
    written, as in all but one of several processes that train together."""

    def __init__(self, trainer: Trainer, source: Source, record: Record | None, on_line: OnLine | None) -> None:
        self.trainer, self.config, self.on_line = trainer, trainer.config, on_line
        self.source, self.record = source, record
        self.probe = source.held_out("calibration", 1024)
        self.since, self.since_samples = time.perf_counter(), 0

    @property
    def n_steps_done(self) -> int:
        return self.trainer.n_steps_done

    @property
    def ended(self) -> bool:
        """No step is left."""
        return self.n_steps_done >= self.config.n_steps

    def look(self, n_rows: int) -> None:
        """What follows a step on n_rows activations: a line of the log, when it is time.

        Raises:
            Diverged: the loss or a weight is not finite.
        """
        config, step = self.config, self.n_steps_done
        self.since_samples += n_rows
        if step % config.log.every == 0 or step == config.n_steps:
            self._line(step)

    @property
    def save_due(self) -> bool:
        """Whether a checkpoint follows this step: what follows the last one may fail, or be stopped, too."""
        return self.n_steps_done % self.config.checkpoint.every_steps == 0 or self.ended

    def _line(self, step: int) -> None:
        trainer = self.trainer
        values, fired = trainer.take_window()
        if not (math.isfinite(values["losses/overall_loss"]) and trainer.engine.finite()):
            raise Diverged(f"the loss is not finite at step {step}; lower train.lr={self.config.lr:g} and --overwrite")
        if self.record is None:
            return
        truth, units = self.source.truth, (trainer.unit, trainer.target_unit)
        values |= live_recovery(trainer.sae, fired, truth, self.probe, *units)
        now = time.perf_counter()
        values["details/samples_per_second"] = self.since_samples / (now - self.since)
        self.since, self.since_samples = now, 0
        self.record.log.line(step, values)
        if self.on_line is not None:
            self.on_line(step, values)

    def save(self) -> None:
        """A checkpoint: everything that the next step depends on."""
        if self.record is None:
            return
        tensors, values = self.trainer.state()
        folder, keep = self.config.out / CHECKPOINTS, self.config.checkpoint.keep
        checkpoint.save(folder, self.n_steps_done, tensors, values, keep)

    def close(self) -> None:
        """Closes its log and releases its directory, however it ended."""
        if self.record is not None:
            self.record.close()


class Ensemble:
    """Runs on one stream: the same source, batch size and order of the data."""

    def __init__(self, runs: Sequence[Run], source: Source, ranks: Ranks = ALONE) -> None:
        self.runs, self.source, self.ranks = list(runs), source, ranks
        streams = {(run.config.train.batch_size, run.config.data_seed) for run in runs}
        assert len(streams) == 1, streams
        self.batch_size, self.data_seed = streams.pop()

    def feed(self, stop: Stop) -> Iterator[tuple[Run, Exception | None]]:
        """Feeds all runs, and yields each as it ends: with None after its last step, or with what ended it.

        Raises:
            Interrupted: a signal came; the runs that were left have been saved.
            UsageError: the source gave bad data; the runs that were left have been saved.
        """
        stop = self.ranks.agreed(stop)
        try:
            yield from self._finished(stop)
            number = min((run.n_steps_done for run in self.runs), default=0)
            batches = self.ranks.in_step(self._batches(number))
            with Members([run.trainer for run in self.runs]) as members:
                while self.runs:
                    batch = next(batches, None)
                    if batch is None:
                        yield from self._leave([(run, _source_ended(run)) for run in self.runs])
                        return
                    yield from self._leave(self._step(members, batch, number))
                    number += 1
                    if stop():
                        raise Interrupted(f"stopped at step {number}; {CONTINUE}", stop())
                    yield from self._finished(stop)
        except (UsageError, Interrupted):
            for run in self.runs:
                run.save()
            raise

    def _batches(self, start: int) -> Iterator[Batch]:
        devices = {torch.device(run.config.train.device) for run in self.runs}
        given = (self.batch_size, self.data_seed, start)
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            return self.source.batches(*given)
        from sae.prefetch import batches  # noqa: PLC0415 - where there is no CUDA it is not imported

        return batches(self.source, *given, devices.pop())

    def _step(self, members: Members, batch: Batch, number: int) -> list[tuple[Run, Exception | None]]:
        """Gives batch `number` to the runs that need it next; returns those that failed on it."""
        parts = batch if isinstance(batch, tuple) else (batch,)  # activations, and their targets
        due = [run for run in self.runs if run.n_steps_done == number]
        failed: dict[Run, Exception | None] = {}
        for device in dict.fromkeys(run.config.train.device for run in due):
            # From a device to the host nothing would wait until the rows are there.
            on = [part.to(device, non_blocking=torch.device(device).type == "cuda") for part in parts]
            there = [run for run in due if run.config.train.device == device]
            whole = (on[0], on[1]) if len(on) == 2 else on[0]
            each = [run.source.own(whole) if isinstance(run.source, SharedSource) else whole for run in there]
            for run, error in zip(there, members.step([run.trainer for run in there], each), strict=True):
                try:
                    if error is not None:
                        raise error
                    run.look(len(on[0]))
                except Exception as ended:  # one run's end is not the end of the others
                    if isinstance(ended, UsageError) and not isinstance(ended, Diverged):
                        run.save()
                    failed[run] = ended
        to_save = [run for run in due if run.save_due and run not in failed]
        for run, error in zip(to_save, members.each(Run.save, to_save), strict=True):
            if error is not None:
                failed[run] = error
        if self.ranks.n > 1:  # what was saved is what all go on with, whatever bits their machines disagree in
            for run in to_save:
                if run not in failed:
                    run.trainer.follow(self.ranks)
        return list(failed.items())

    def _finished(self, stop: Stop) -> Iterator[tuple[Run, Exception | None]]:
        """Runs without a step left; measuring each takes time, so signals are checked between them."""
        for run in [run for run in self.runs if run.ended]:
            if stop():
                raise Interrupted(f"stopped at step {run.n_steps_done}; {CONTINUE}", stop())
            yield from self._leave([(run, None)])

    def _leave(self, ended: Sequence[tuple[Run, Exception | None]]) -> Iterator[tuple[Run, Exception | None]]:
        for run, error in ended:
            self.runs.remove(run)
            yield run, error


def _source_ended(run: Run) -> UsageError | None:
    if run.n_steps_done == 0:
        return UsageError(
            f"the source ended before its first batch of {run.config.train.batch_size} rows; lower train.batch_size"
        )
    logger.warning("the source ended after %d of %d steps", run.n_steps_done, run.config.n_steps)
    return None
