"""Several SAEs trained on one stream of batches: the data are made once, and each member has a core to itself.

The step of one small SAE does not fill several cores: after each stage its threads wait for each other. Members need
not wait for each other at all, so that each runs its whole step on a thread of its own; outside the operations that
hold no lock (products, kernels) little is left to wait for. A member's step is the same as when it trains alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor

from sae.trainer import Trainer


class Ensemble:
    """Members that take each step together; a context manager, as it holds threads."""

    def __init__(self, members: Sequence[Trainer]) -> None:
        self.members = list(members)
        cores = torch.get_num_threads()
        on_cpu = all(member.sae.W_dec.device.type == "cpu" for member in members)
        bf16 = {member.engine.kernels.precision == "bf16" for member in members}
        self.pool: ThreadPoolExecutor | None = None
        if on_cpu and cores > 1 and len(members) > 1 and len(bf16) == 1:
            n = min(cores, len(members))
            self.pool = ThreadPoolExecutor(n, "member", torch.set_num_threads, (cores // n,))
            list(self.pool.map(lambda _: None, range(n)))
            torch.set_num_threads(cores)  # a thread sets its own number, and that of threads to come

    def step(self, activations: Float[Tensor, "batch d_in"]) -> None:
        """One batch for every member."""
        if self.pool is None:
            for member in self.members:
                member.step(activations)
        else:
            list(self.pool.map(lambda member: member.step(activations), self.members))

    def __enter__(self) -> Ensemble:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.pool is not None:
            self.pool.shutdown()
