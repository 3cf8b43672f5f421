"""Batches on their way to a CUDA device while it computes: from pinned memory, on a separate stream."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from sae.arrays import Pairs, Rows
from sae.sources import ArraySource, Batch, PairSource, Source

logger = logging.getLogger("sae")

# Share of a device's free memory that a set may take to be kept and shuffled there.
SHARE = 0.25
# Batches that the host has drawn before they are asked for.
AHEAD = 2
CHUNK_ROWS = 65_536


class Resident(Rows):
    """Rows on a device. They were checked on their way there, so that reading them asks it nothing."""

    def _check_finite(self, rows: Tensor, start: int) -> None:
        return


def batches(source: Source, batch_size: int, seed: int, start: int, device: torch.device) -> Iterator[Batch]:
    """The source's batches on the device, in their order; one is on its way while another is in use.

    A set that fits is copied there once, and shuffled there into the same order.
    """
    if device.index is None:  # the thread that draws must be told which one
        device = torch.device(device.type, torch.cuda.current_device())
    stream = torch.cuda.Stream(device)
    here = _resident(source, device)
    waiting: Batch | None = None
    for batch in _drawn(here, here.batches(batch_size, seed, start), device):
        with torch.cuda.stream(stream):
            coming = _each(batch, lambda part: part.to(device, non_blocking=True))
        if waiting is not None:
            yield waiting
        torch.cuda.current_stream(device).wait_stream(stream)
        for part in coming if isinstance(coming, tuple) else (coming,):
            part.record_stream(torch.cuda.current_stream(device))
        waiting = coming
    if waiting is not None:
        yield waiting


def _drawn(source: Source, drawn: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, in pinned memory where they are the host's: gathering their rows and copying them may take the host
    longer than a step takes the device, so that a thread does both. Iterables of one's own stay on the thread they are
    on, as do networks, which would compute while a step is recorded; and what lies on the device needs no help."""
    rows = source.rows if isinstance(source, PairSource) else source
    if isinstance(rows, ArraySource) and isinstance(_first(rows.rows), Resident):
        yield from drawn
        return
    if source.stays:
        yield from map(_pinned, drawn)
        return
    with ThreadPoolExecutor(1, "batches", torch.cuda.set_device, (device,)) as pool:

        def draw() -> Batch | None:
            batch = next(drawn, None)
            return None if batch is None else _pinned(batch)

        coming = deque(pool.submit(draw) for _ in range(AHEAD))
        while (batch := coming.popleft().result()) is not None:
            coming.append(pool.submit(draw))
            yield batch


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    return (change(batch[0]), change(batch[1])) if isinstance(batch, tuple) else change(batch)


def _pinned(batch: Batch) -> Batch:
    return _each(batch, lambda part: part if part.is_cuda else part.contiguous().pin_memory())


def _resident(source: Source, device: torch.device) -> Source:
    """A set that fits on the device, there; any other source as it is."""
    if isinstance(source, PairSource) and isinstance(source.rows, ArraySource):
        rows = _resident(source.rows, device)
        assert isinstance(rows, ArraySource)
        return PairSource(rows, source.d_in, source.truth)
    if not isinstance(source, ArraySource):
        return source
    size, free = len(source.rows) * source.rows.row_bytes, torch.cuda.mem_get_info(device)[0]
    if size > SHARE * free:
        return source
    there = copy.copy(source)
    there.rows = _moved(source.rows, device)
    logger.info("all %d rows, %.2f GiB, are kept and shuffled on %s", len(source.rows), size / 2**30, device)
    return there


def _moved(rows: Rows | Pairs, device: torch.device) -> Rows | Pairs:
    """A piece at a time: files stay mapped, and the host never holds them whole."""
    if isinstance(rows, Pairs):
        left, right = (_moved(part, device) for part in (rows.left, rows.right))
        assert isinstance(left, Rows)
        assert isinstance(right, Rows)
        return Pairs(left, right)
    whole = torch.empty(len(rows), rows.d_in, dtype=rows.dtype, device=device)
    for start in range(0, len(rows), CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(rows))
        whole[start:stop] = rows.read(start, stop)
    return Resident([whole], [rows.name])


def _first(rows: Rows | Pairs) -> Rows:
    return rows.left if isinstance(rows, Pairs) else rows
