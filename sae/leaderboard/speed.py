"""How fast each SAE trains: one after the other on one core, since SAEs that train together slow each other down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor

from sae import checkpoint
from sae.bench.machine import synchroniser
from sae.bench.timing import SETTLING_STEPS, WARM_UP_STEPS, Contender, interleaved
from sae.kernels import resolve_device
from sae.names import CHECKPOINTS
from sae.run import as_it_begins
from sae.sources import Source
from sae.start import N_CALIBRATION, start
from sae.sweep.plan import Member
from sae.trainer import Trainer

logger = logging.getLogger("sae")

# Ten steps are from one look of the host to the next, so that every turn holds one.
ROUNDS, STEPS = 7, 10
N_BATCHES = 8


def samples_per_second(members: Sequence[Member], source: Source) -> dict[str, float]:
    """Activations per second of each member's steps, by its name: the median over turns.

    Members continue from their last checkpoints, where codes are as sparse as they became. They take turns, so that
    whatever else runs on the machine slows all of them alike. Batches are in memory. A member without a checkpoint is
    left out.
    """
    train = members[0].config.train
    device = torch.device(resolve_device(train.device))
    settling = SETTLING_STEPS["cpu" if device.type == "cpu" else "cuda"]
    drawn = islice(source.batches(train.batch_size, members[0].config.data_seed), N_BATCHES)
    batches = [batch.to(device) for batch in drawn if isinstance(batch, Tensor)]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        contenders = []
        for member in members:
            trainer = _trained(member, source, settling + WARM_UP_STEPS + ROUNDS * STEPS)
            if trainer is not None:
                contenders.append(Contender(member.name, _advance(trainer, batches)))
        if not contenders:
            return {}
        timings = interleaved(contenders, ROUNDS, STEPS, synchroniser(str(device)), settling_steps=settling)
    finally:
        torch.set_num_threads(n_threads)
    return {timing.contender.name: train.batch_size / timing.median for timing in timings}


def _trained(member: Member, source: Source, n_more: int) -> Trainer | None:
    """Its trainer after its last step, in a run that is so much longer."""
    newest = checkpoint.latest(member.config.out / CHECKPOINTS)
    if newest is None:
        logger.warning("%s has no checkpoint to be timed from, so its speed is unknown", member.name)
        return None
    config = as_it_begins(member.config, resume=True)
    n_samples = (config.n_steps + n_more) * config.train.batch_size
    config = config.model_copy(update={"train": config.train.model_copy(update={"n_samples": n_samples})})
    trainer = start(config, source, source.held_out("calibration", N_CALIBRATION))
    trainer.load_state(*checkpoint.load(newest))
    return trainer


def _advance(trainer: Trainer, batches: Sequence[Tensor]) -> Callable[[], None]:
    endless = cycle(batches)

    def step() -> None:
        trainer.step(next(endless))

    return step
