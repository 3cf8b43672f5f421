"""Several trainers given one batch at once: each takes its step on its own thread, or on its own CUDA stream.

The step of one small SAE does not fill several cores: after each stage its threads wait for each other. Members need
not wait for each other at all, so each runs its whole step on its own thread; outside the operations that hold no lock
(products, kernels) there is little to wait for. A member's step is the same as when it trains alone.

Nor does it fill a GPU, whose streams take its place there: recorded steps of several members run at the same time, and
the host, which only starts them, needs no threads. What a trainer allocates in its steps belongs to its stream, which
is therefore always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from types import TracebackType
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from sae.sources import Batch
from sae.trainer import Trainer

Member = TypeVar("Member")


class Members:
    """Threads for trainers that take steps together; a context manager, as it holds them.

    It holds no trainer: one may end long before the others, and its memory is then free.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        cores = torch.get_num_threads()
        on_cpu = all(_device(trainer).type == "cpu" for trainer in trainers)
        bf16 = {trainer.engine.kernels.precision == "bf16" for trainer in trainers}
        self.pool: ThreadPoolExecutor | None = None
        self.streams: WeakKeyDictionary[Trainer, torch.cuda.Stream] = WeakKeyDictionary()
        if len(trainers) > 1:
            self.streams.update(
                {
                    trainer: torch.cuda.Stream(device)
                    for trainer in trainers
                    if (device := _device(trainer)).type == "cuda"
                }
            )
        if on_cpu and cores > 1 and len(trainers) > 1 and len(bf16) == 1:
            n = min(cores, len(trainers))
            self.pool = ThreadPoolExecutor(n, "member", _set_own_threads, (cores // n,))
            started = Barrier(n)  # without it, one idle thread may do the work of several that never start
            list(self.pool.map(lambda _: started.wait(), range(n)))
            torch.set_num_threads(cores)  # what a thread set is also the number of those to come

    def step(self, trainers: Sequence[Trainer], batches: Sequence[Batch]) -> list[Exception | None]:
        """Each of these takes its batch; what one raised stops no other."""

        def step(given: tuple[Trainer, Batch]) -> None:
            trainer, batch = given
            trainer.step(*batch) if isinstance(batch, tuple) else trainer.step(batch)

        pairs = list(zip(trainers, batches, strict=True))
        if trainers and all(trainer in self.streams for trainer in trainers):
            return self._on_streams(pairs, step)
        return self.each(step, pairs)

    def each(self, act: Callable[[Member], None], members: Sequence[Member]) -> list[Exception | None]:
        """act of each one, on the threads where there are some; what each raised stops no other."""
        if self.pool is None or len(members) == 1:
            return [_error(act, member) for member in members]
        return list(self.pool.map(partial(_error, act), members))

    def _on_streams(
        self, pairs: Sequence[tuple[Trainer, Batch]], step: Callable[[tuple[Trainer, Batch]], None]
    ) -> list[Exception | None]:
        """Each begins once its batch is there; whatever comes after on this stream finds all of them done."""
        here, ended = torch.cuda.current_stream(_device(pairs[0][0])), []
        for trainer, batch in pairs:
            stream = self.streams[trainer]
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                ended.append(_error(step, (trainer, batch)))
        for trainer, _ in pairs:
            here.wait_stream(self.streams[trainer])
        return ended

    def __enter__(self) -> Members:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.pool is not None:
            self.pool.shutdown()


def _error(act: Callable[[Member], None], member: Member) -> Exception | None:
    try:
        act(member)
    except Exception as error:  # one member's end is not the end of the others
        return error
    return None


def _set_own_threads(n: int) -> None:
    """Cores for this thread's operations. The first thing that a thread does with torch takes over the number of the
    process, so that something has to come before."""
    torch.get_num_threads()
    torch.set_num_threads(n)


def _device(trainer: Trainer) -> torch.device:
    return trainer.sae.W_dec.device
