"""Several trainers given one batch at once: each takes its step on a thread of its own.

The step of one small SAE does not fill several cores: after each stage its threads wait for each other. Members need
not wait for each other at all, so that each runs its whole step on a thread of its own; outside the operations that
hold no lock (products, kernels) little is left to wait for. A member's step is the same as when it trains alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from sae.trainer import Trainer


class Members:
    """Threads for trainers that take steps together; a context manager, as it holds them.

    It holds no trainer: one may end long before the others, and its memory is then free.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        cores = torch.get_num_threads()
        on_cpu = all(trainer.sae.W_dec.device.type == "cpu" for trainer in trainers)
        bf16 = {trainer.engine.kernels.precision == "bf16" for trainer in trainers}
        self.pool: ThreadPoolExecutor | None = None
        if on_cpu and cores > 1 and len(trainers) > 1 and len(bf16) == 1:
            n = min(cores, len(trainers))
            self.pool = ThreadPoolExecutor(n, "member", torch.set_num_threads, (cores // n,))
            list(self.pool.map(lambda _: None, range(n)))
            torch.set_num_threads(cores)  # a thread sets its own number, and that of threads to come

    def step(self, trainers: Sequence[Trainer], *batch: Tensor) -> list[Exception | None]:
        """One batch for each of these, activations and perhaps their targets; what each raised stops no other."""

        def attempt(trainer: Trainer) -> Exception | None:
            try:
                trainer.step(*batch)
            except Exception as error:  # one member's end is not the end of the others
                return error
            return None

        if self.pool is None or len(trainers) == 1:
            return [attempt(trainer) for trainer in trainers]
        return list(self.pool.map(attempt, trainers))

    def __enter__(self) -> Members:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.pool is not None:
            self.pool.shutdown()
