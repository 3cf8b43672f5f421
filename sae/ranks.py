"""The processes that train one SAE together, as `torchrun` starts them. Each computes the gradients of its rows of a
batch; their sum moves the weights of all. `docs/distributed.md` has the whole of it.

Rank 0 leads: it alone writes, and what it begins with is what all begin with.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sae.errors import Elsewhere, UsageError
from sae.stopping import Stop

logger = logging.getLogger("sae")

Value = TypeVar("Value")
# The others wait while rank 0 reads a checkpoint, or measures what was trained.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process among `n`. Alone, it exchanges nothing.

    Every exchange raises UsageError where another process has ended.
    """

    rank: int = 0
    n: int = 1

    @property
    def lead(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        """Each becomes its sum over the processes, the same bits in all."""
        for tensor in tensors if self.n > 1 else ():
            _exchanged(dist.all_reduce, tensor)

    def gather_(self, whole: Tensor, ends: Sequence[int]) -> None:
        """Rows ends[r] to ends[r + 1] become what they are in process r."""
        for rank in range(self.n) if self.n > 1 else ():
            rows = whole[ends[rank] : ends[rank + 1]]
            if len(rows):
                _exchanged(dist.broadcast, rows, src=rank)

    def of_lead(self, value: Value) -> Value:
        """A plain value, as rank 0 has it."""
        values = [value]
        if self.n > 1:
            _exchanged(dist.broadcast_object_list, values, src=0, device=torch.device("cpu"))
        return values[0]

    def tensors_of_lead(self, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Named tensors as rank 0 has them, on this device or on the host."""
        layout = self.of_lead({name: (tuple(t.shape), t.dtype, t.is_cpu) for name, t in tensors.items()})
        if not self.lead:
            tensors = {
                name: torch.empty(shape, dtype=dtype, device="cpu" if on_host else device)
                for name, (shape, dtype, on_host) in layout.items()
            }
        for name in layout if self.n > 1 else ():
            _exchanged(dist.broadcast, tensors[name].contiguous() if self.lead else tensors[name], src=0)
        return tensors

    def require_same(self, text: str, what: str) -> None:
        """Refuses processes that were given different things.

        Raises:
            UsageError: this one was given something else than rank 0.
        """

        def compare() -> None:
            if text != leads:
                raise UsageError(f"its {what} is not that of process 0; start all with the same command")

        leads = self.of_lead(text)
        self.of_all(compare)

    def of_all(self, act: Callable[[], Value]) -> Value:
        """What `act` gives here, unless it fails in some process: it then fails in all.

        Raises:
            UsageError: it was raised here.
            Elsewhere: it was raised in another process.
        """
        given, failure = None, None
        try:
            given = act()
        except UsageError as error:
            failure = error
        told: list[str | None] = [None if failure is None else str(failure)] * self.n
        if self.n > 1:
            _exchanged(dist.all_gather_object, told, told[self.rank])
        for rank, words in enumerate(told):  # the first one tells it, if several were to
            if words is not None and rank != self.rank:
                raise Elsewhere(f"process {rank}: {words}") from failure
            if failure is not None:
                raise failure
        return given  # type: ignore[return-value]

    def agreed(self, stop: Stop) -> Stop:
        """`stop` asked in every process, so that all end at the same step. The device is not waited for."""
        if self.n == 1:
            return stop
        noted = 0

        def of_any() -> int:
            nonlocal noted
            if not noted:
                number = torch.tensor(stop())
                _exchanged(dist.all_reduce, number, op=dist.ReduceOp.MAX)
                noted = int(number)
            return noted

        return of_any


ALONE = Ranks()
_joined: list[Ranks] = []


def here() -> Ranks:
    """The processes that train together now, for a source that shares its work among them."""
    return _joined[-1] if _joined else ALONE


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that `torchrun` started, each on a device of its own, until the block ends; else this one alone.

    Raises:
        UsageError: they cannot train together on this device.
    """
    if not ("RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1):
        yield ALONE
        return
    _take_device(torch.device(device))
    if not dist.is_initialized():
        try:
            dist.init_process_group(timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"the processes cannot find each other: {error}; start them with torchrun") from error
        atexit.register(_leave)
    ranks, level = Ranks(dist.get_rank(), dist.get_world_size()), logger.level
    _joined.append(ranks)
    if ranks.lead:
        logger.info("%d processes train together: each computes the gradients of its rows of a batch", ranks.n)
    else:
        logger.setLevel(logging.ERROR)
    try:
        yield ranks
    finally:
        _joined.remove(ranks)
        logger.setLevel(level)


def _take_device(device: torch.device) -> None:
    """`cuda` means the device of this process's number from here on."""
    if device.type != "cuda":
        return
    local, n_devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.index is not None:
        raise UsageError(
            f"train.device {str(device)!r} would be that of every process; say cuda, and each takes its own"
        )
    if local >= n_devices:
        raise UsageError(
            f"process {local} on this machine finds {n_devices} CUDA devices; start as many as there are: "
            f"torchrun --nproc-per-node {n_devices}"
        )
    torch.cuda.set_device(local)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _exchanged(exchange: Callable[..., Any], *given: Any, **named: Any) -> None:
    try:
        exchange(*given, **named)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(
            f"another process of this run ended, or cannot be reached ({reason}); see what it said, then start all of "
            "them again with --resume"
        ) from error
