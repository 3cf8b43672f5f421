"""Batches on their way to a CUDA device while it computes: from pinned memory, on a stream of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from sae.arrays import Pairs, Rows
from sae.sources import ArraySource, Batch, PairSource, Source

# Share of a device's free memory that a set may take to be kept and shuffled there.
SHARE = 0.25


def batches(source: Source, batch_size: int, seed: int, start: int, device: torch.device) -> Iterator[Batch]:
    """The source's batches on the device, in their order; one is on its way while another is in use.

    A set that fits is copied there once.
    """
    stream = torch.cuda.Stream(device)
    waiting: Batch | None = None
    for batch in _resident(source, device).batches(batch_size, seed, start):
        with torch.cuda.stream(stream):
            coming = _sent(batch, device)
        if waiting is not None:
            yield waiting
        torch.cuda.current_stream(device).wait_stream(stream)
        for part in coming if isinstance(coming, tuple) else (coming,):
            part.record_stream(torch.cuda.current_stream(device))
        waiting = coming
    if waiting is not None:
        yield waiting


def _sent(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, tuple):
        return _pinned(batch[0]).to(device, non_blocking=True), _pinned(batch[1]).to(device, non_blocking=True)
    return _pinned(batch).to(device, non_blocking=True)


def _pinned(part: Tensor) -> Tensor:
    return part if part.is_cuda else part.contiguous().pin_memory()


def _resident(source: Source, device: torch.device) -> Source:
    """A set that is shuffled row by row and fits on the device, there; any other source as it is."""
    if isinstance(source, PairSource) and isinstance(source.rows, ArraySource):
        rows = _resident(source.rows, device)
        assert isinstance(rows, ArraySource)
        return PairSource(rows, source.d_in, source.truth)
    fits = SHARE * torch.cuda.mem_get_info(device)[0]
    if not isinstance(source, ArraySource) or not source.exact or len(source.rows) * source.rows.row_bytes > fits:
        return source
    there = copy.copy(source)
    there.rows = _moved(source.rows, device)
    return there


def _moved(rows: Rows | Pairs, device: torch.device) -> Rows | Pairs:
    if isinstance(rows, Pairs):
        left, right = (Rows([torch.cat(part.parts).to(device)], [part.name]) for part in (rows.left, rows.right))
        return Pairs(left, right)
    return Rows([torch.cat(rows.parts).to(device)], [rows.name])
