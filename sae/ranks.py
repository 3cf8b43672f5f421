"""The processes that train one SAE together, as `torchrun` starts them. Each computes the gradients of its rows of a
batch; their sum moves the weights of all. `docs/distributed.md` has the whole of it.

Rank 0 leads: it alone writes, and what it begins with is what all begin with.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sae.errors import Interrupted, OtherProcess, UsageError
from sae.kernels import resolve_device
from sae.launch import n_started
from sae.stopping import CONTINUE, Stop, asked

logger = logging.getLogger("sae")

Value = TypeVar("Value")
# Until all processes are there.
MEETING = timedelta(minutes=10)
# The others wait while rank 0 reads a checkpoint, or measures what was trained.
PATIENCE = timedelta(hours=6)
# After which a wait looks whether a signal came, and how often it does before it ends: torchrun kills after 30 s.
SLICE, UNANSWERED = timedelta(seconds=5), 3
# What is said where the other end of an exchange is gone.
GONE = re.compile(r"connect|peer|socket|timed? ?out|broken pipe|nccl", re.IGNORECASE)


@dataclass(frozen=True)
class Ranks:
    """This process among `n`. Alone, it exchanges nothing.

    Every exchange raises UsageError where another process has ended.
    """

    rank: int = 0
    n: int = 1
    host: Any = None
    """The process group that exchanges what lies on the host."""
    device: Any = None
    """The one for what lies on a device; None on a CPU."""

    @property
    def lead(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        """Each becomes its sum over the processes, the same bits in all."""
        for tensor in tensors if self.n > 1 else ():
            self._exchanged(dist.all_reduce, tensor)

    def take_of_lead_(self, tensors: Sequence[Tensor]) -> None:
        """Each takes its value from rank 0."""
        for tensor in tensors if self.n > 1 else ():
            self._exchanged(dist.broadcast, tensor, src=0)

    def gather_(self, whole: Tensor, ends: Sequence[int]) -> None:
        """Rows ends[r] to ends[r + 1] become what they are in process r."""
        for rank in range(self.n) if self.n > 1 else ():
            rows = whole[ends[rank] : ends[rank + 1]]
            if len(rows):
                self._exchanged(dist.broadcast, rows, src=rank)

    def of_lead(self, value: Value) -> Value:
        """A plain value, as rank 0 has it."""
        values = [value]
        if self.n > 1:
            on = torch.device("cpu")
            _told(lambda: dist.broadcast_object_list(values, src=0, group=self.host, device=on))
        return values[0]

    def tensors_of_lead(self, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Named tensors as rank 0 has them, on this device or on the host."""
        if self.n == 1:
            return tensors
        layout = self.of_lead({name: (tuple(t.shape), t.dtype, t.is_cpu) for name, t in tensors.items()})
        if self.lead:
            self.take_of_lead_([tensor.contiguous() for tensor in tensors.values()])
            return tensors
        tensors = {
            name: torch.empty(shape, dtype=dtype, device="cpu" if on_host else device)
            for name, (shape, dtype, on_host) in layout.items()
        }
        self.take_of_lead_(list(tensors.values()))
        return tensors

    def of_all(self, act: Callable[[], Value]) -> Value:
        """The result of `act` here, unless it fails in some process: it then fails in all.

        Raises:
            Exception: it was raised here.
            OtherProcess: it was raised in another process (too); the first of them reports it.
        """
        if self.n == 1:
            return act()
        given, failure = None, None
        try:
            given = act()
        except Exception as error:  # whatever it is, the others would wait
            failure = error
        told: list[str | None] = [None] * self.n
        own = None if failure is None else str(failure) or type(failure).__name__
        _told(lambda: dist.all_gather_object(told, own, group=self.host))
        first = next((rank for rank, words in enumerate(told) if words is not None), None)
        if first == self.rank and failure is not None:
            raise failure
        if first is not None:
            raise OtherProcess(f"process {first}: {told[first]}") from failure
        return given  # type: ignore[return-value]

    def require_same(self, text: str, what: str, remedy: str) -> None:
        """Refuses processes that were given different things.

        Raises:
            UsageError: this one was given something different from rank 0.
        """

        def compare() -> None:
            if text != leads:
                raise UsageError(f"its {what} those of process 0; {remedy}")

        leads = self.of_lead(text)
        self.of_all(compare)

    def agreed(self, stop: Stop) -> Stop:
        """`stop` asked in every process, so that all end at the same step. The device is not waited for."""
        if self.n == 1:
            return stop
        noted = 0

        def of_any() -> int:
            nonlocal noted
            noted = noted or self._greatest(stop())
            return noted

        return of_any

    def in_step(self, batches: Iterator[Value]) -> Iterator[Value]:
        """Batches for as long as every process has one; a source may share the work of one (`here`).

        Raises:
            Exception: one could not be drawn.
            OtherProcess: one could not be drawn in another process.
        """
        if self.n == 1:
            yield from batches
            return

        def draw() -> tuple[Value] | None:
            _sharing.append(self)
            try:
                return next(((batch,) for batch in batches), None)
            finally:
                _sharing.remove(self)

        while True:
            drawn, failure = None, None
            try:
                drawn = draw()
            except Exception as error:
                failure = error
            worst = self._greatest(2 if failure else int(drawn is None))
            if failure is not None:
                raise failure
            if worst == 2:
                raise OtherProcess("a batch could not be drawn in another process")
            if drawn is None or worst:
                return
            yield drawn[0]

    def _greatest(self, number: int) -> int:
        """Over the processes."""
        found = torch.tensor(number, device="cpu")
        self._exchanged(dist.all_reduce, found, op=dist.ReduceOp.MAX)
        return int(found)

    def _exchanged(self, exchange: Callable[..., Any], tensor: Tensor, **named: Any) -> None:
        if not tensor.is_cpu:
            _told(lambda: exchange(tensor, group=self.device, **named))
            return
        work, n_unanswered = _told(lambda: exchange(tensor, group=self.host, async_op=True, **named)), 0
        while not _told(partial(_ended, work)):
            # Gloo may miss that another process was killed, and torchrun then asks this one to stop, and kills it, too.
            # The one that saves gives up before that; the others may be waiting for just that.
            n_unanswered += self.lead and bool(asked())
            if n_unanswered == UNANSWERED:
                raise UsageError(f"another process of this run does not respond, and a signal arrived; {CONTINUE}")


ALONE = Ranks()
_sharing: list[Ranks] = []


def here() -> Ranks:
    """The processes that are drawing the same batch now."""
    return _sharing[-1] if _sharing else ALONE


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that `torchrun` started, or that are in a process group already, each on a device of its own, until
    the block ends; else this one alone. Where it ends in one of them, the others learn it at their next exchange.

    Raises:
        UsageError: they cannot train together on this device, or do not all come.
    """
    theirs = dist.is_available() and dist.is_initialized()
    if (dist.get_world_size() if theirs else n_started()) == 1:
        yield ALONE
        return
    on_cuda = _take_device(torch.device(resolve_device(device)))
    if not theirs:
        _meet()
    groups = [dist.new_group(backend=name, timeout=PATIENCE) for name in ("gloo", *(["nccl"] if on_cuda else []))]
    ranks, level = Ranks(dist.get_rank(), dist.get_world_size(), *groups), logger.level
    if ranks.lead:
        logger.info("%d processes train together: each computes the gradients of its rows of a batch", ranks.n)
    else:
        logger.setLevel(logging.ERROR)
    try:
        yield ranks
        dist.barrier(group=ranks.host)
    except Interrupted:  # all are, at the same step; torchrun ends what is left once the first has gone
        with suppress(RuntimeError):
            dist.barrier(group=ranks.host)
        raise
    finally:
        logger.setLevel(level)
        for group in reversed(groups):
            dist.destroy_process_group(group)
        if not theirs:
            dist.destroy_process_group()


_meetings = count()


def _meet() -> None:
    """A process group of our own. Its keys are of this meeting alone: a store outlives processes that are restarted."""
    try:
        store, rank, n = _rendezvous()
        keys = f"sae {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {next(_meetings)}"
        given = dist.PrefixStore(keys, store)
        dist.init_process_group("gloo", store=given, rank=rank, world_size=n, timeout=MEETING)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"{n_started()} processes were expected, but not all joined ({_reason(error)}); start them with torchrun, "
            "or unset RANK and WORLD_SIZE to train alone"
        ) from error


@cache
def _rendezvous() -> tuple[Any, int, int]:
    store, rank, n = next(iter(dist.rendezvous("env://", timeout=MEETING)))
    return store, rank, n


def _take_device(device: torch.device) -> bool:
    """`cuda` means the device of this process's number from here on; whether it is wanted."""
    local, n_here = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    n_devices = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"train.device {device.type!r} is not shared by processes; use cuda or cpu, or one process")
    if device.type == "cuda" and device.index is not None and n_here != 1:
        raise UsageError(f"train.device '{device}' would be every process's; give cuda, and each takes its own")
    if device.type == "cuda" and local >= n_devices > 1:
        raise UsageError(
            f"process {local} on this machine finds {n_devices} CUDA devices; start as many as there are: "
            f"torchrun --nproc-per-node {n_devices}"
        )
    if "LOCAL_RANK" in os.environ and local < n_devices:
        torch.cuda.set_device(local)
    return device.type == "cuda"


def _ended(work: Any) -> bool:
    """Whether an exchange is over, after waiting for at most a short time."""
    try:
        work.wait(SLICE)
    except RuntimeError:
        if not work.is_completed():
            return False
        raise
    return True


def _told(exchange: Callable[[], Value]) -> Value:
    """Its result; if another process is gone, the error says so."""
    try:
        return exchange()
    except RuntimeError as error:
        if not GONE.search(str(error)):
            raise
        raise UsageError(
            f"another process of this run ended or cannot be reached ({_reason(error)}); check whether it reported "
            "why, then start all of them again with --resume"
        ) from error


def _reason(error: Exception) -> str:
    """The first sentence of a library's message, without the place in its source."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[/\S*\] ", "", line).partition(". ")[0][:200]
