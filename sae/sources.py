"""Where activations come from.

A source is a function from a step's number to that step's batch (given a seed), so a run resumes anywhere by
asking for the next number. It also holds out rows that training never sees, and knows the true features if there are
any.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from sae.arrays import Pairs, Rows, flat_rows, open_rows, open_truth, rebatch, table
from sae.config import SourceConfig
from sae.errors import UsageError
from sae.held_out import HeldOut, HeldOutStream, Purpose
from toymodels.streams import generator

logger = logging.getLogger("sae")

# Up to this size a set is shuffled row by row; above it, in windows made of random blocks.
EXACT_SHUFFLE_BYTES = 2**30
WINDOW_BYTES = 2**27
BLOCK_BYTES = 2**20
MIN_ROWS = 50
HELD_OUT_ROWS = 100_000


Batch: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Activations [batch, d_in]; with their targets [batch, d_out] from a source that has targets."""
Own: TypeAlias = Callable[[Batch], Batch]
"""The part of a shared batch that belongs to one source."""
Reconstruct: TypeAlias = Callable[[Tensor], Tensor]
"""x_hat [n, d_out] of x [n, d_in]."""


class Source(ABC):
    """Activations [*, d_in] to train on, and perhaps a target [*, d_out] for each."""

    d_in: int
    d_out: int | None = None
    """Width of the targets; None: the activations themselves are to be reconstructed."""
    truth: Float[Tensor, "n_features d_out"] | None = None
    """Directions of the true features in what is to be reconstructed, when known."""
    n_training_rows: int | None = None
    """Rows in an epoch; None where there is no end of them, or none that is known."""
    stays: bool = False
    """Batches are drawn on the training thread, never ahead on another one."""

    @abstractmethod
    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Batches number `start`, `start` + 1, ... in float32."""

    @abstractmethod
    def held_out(self, purpose: Purpose, n: int) -> HeldOut:
        """Up to n rows for one purpose: always the same ones, disjoint from training and from the other purpose."""

    def held_out_stream(self, purpose: Purpose, n: int) -> HeldOutStream:
        """The rows of `held_out` as a stream: all at once, unless a source can give them piece by piece."""
        return self.held_out(purpose, n)

    def downstream(self, sae: Reconstruct, n: int) -> dict[str, float]:
        """What is measured in the network behind the activations when the SAE's reconstructions replace about n
        held-out rows; nothing where no network is available."""
        return {}


Epoch: TypeAlias = Callable[[int, int, int, int], Iterator[Tensor]]
"""The rows of an epoch, given the seed, the epoch's number, how many rows to skip, and the most rows of a piece."""


def over_epochs(
    epoch_of: Epoch, n_rows: int, batch_size: int, seed: int, start: int
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Batches from number `start` on; one that begins in one epoch of n_rows may end in the next."""
    epoch, skip = divmod(start * batch_size, n_rows)

    def pieces() -> Iterator[Tensor]:
        yield from epoch_of(seed, epoch, skip, batch_size)
        for later in count(epoch + 1):
            yield from epoch_of(seed, later, 0, batch_size)

    return rebatch(pieces(), batch_size)


class ArraySource(Source):
    """Rows in memory or on disk, visited in a new order each epoch.

    A set up to EXACT_SHUFFLE_BYTES is permuted row by row. A larger one is read in blocks of about BLOCK_BYTES:
    the blocks are permuted, and the rows inside a window of about WINDOW_BYTES of them are permuted exactly.
    Either way an epoch visits each row once, and memory does not grow with the set: files stay mapped.
    """

    n_training_rows: int

    def __init__(self, rows: Rows | Pairs, truth: Float[Tensor, "n_features d_in"] | None = None) -> None:
        if len(rows) < MIN_ROWS:
            raise UsageError(f"{rows.name} has {len(rows)} rows; give at least {MIN_ROWS}, as some are held out")
        if truth is not None and truth.shape[1] != rows.d_in:
            raise UsageError(
                f"true features have d_in={truth.shape[1]}, {rows.name} has d_in={rows.d_in}; give directions "
                "[n_features, d_in] of the space that the activations are in"
            )
        self.rows, self.d_in, self.truth = rows, rows.d_in, truth
        self.exact = len(rows) * rows.row_bytes <= EXACT_SHUFFLE_BYTES
        self.block_rows = 1 if self.exact else max(1, BLOCK_BYTES // rows.row_bytes)
        if self.exact:
            rows.check_all()
        self.held_blocks, self.training_blocks = self._divided(-(-len(rows) // self.block_rows))
        starts = self.training_blocks * self.block_rows
        self.n_training_rows = int(((starts + self.block_rows).clamp_max(len(rows)) - starts).sum())

    def _divided(self, n_blocks: int) -> tuple[dict[Purpose, Tensor], Tensor]:
        """The blocks held out for each purpose, and the training blocks."""
        blocks = torch.randperm(n_blocks, generator=generator(0, "held-out"))
        # A tenth of a large set, more of a small one: a mean L0 is good to about 1 / sqrt(rows).
        held_rows = min(max(len(self.rows) // 10, min(len(self.rows) // 5, 2000)), HELD_OUT_ROWS)
        half = max(1, held_rows // 2 // self.block_rows)
        return {"calibration": blocks[:half], "evaluation": blocks[half : 2 * half]}, blocks[2 * half :]

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        return over_epochs(self._epoch, self.n_training_rows, batch_size, seed, start)

    def held_out(self, purpose: Purpose, n: int) -> HeldOut:
        if self.exact:
            return HeldOut(self.rows.take(self.held_blocks[purpose][:n]).cpu())
        n_blocks = -(-n // self.block_rows)
        return HeldOut(self._window([self._span(b) for b in self.held_blocks[purpose][:n_blocks].tolist()])[:n].float())

    def _span(self, block: int) -> tuple[int, int]:
        return block * self.block_rows, min((block + 1) * self.block_rows, len(self.rows))

    def _epoch(self, seed: int, epoch: int, skip: int, batch_size: int) -> Iterator[Tensor]:
        """One epoch's rows in pieces of at most batch_size, without the first `skip`."""
        stream = generator(seed, "epoch", epoch)
        order = self.training_blocks[torch.randperm(len(self.training_blocks), generator=stream)]
        if self.exact:
            for piece in self.rows.sent(order[skip:]).split(batch_size):
                yield self.rows.take(piece)
            return
        for number, window in enumerate(order.split(max(1, WINDOW_BYTES // BLOCK_BYTES))):
            spans = [self._span(block) for block in window.tolist()]
            n = sum(stop - start for start, stop in spans)
            if skip >= n:
                skip -= n
                continue
            rows = self._window(spans)
            within = torch.randperm(n, generator=generator(seed, "epoch", epoch, "window", number))
            for piece in self.rows.sent(within[skip:]).split(batch_size):
                yield rows[piece].float()
            del rows  # before the next window is read
            skip = 0

    def _window(self, spans: list[tuple[int, int]]) -> Tensor:
        """The rows of some blocks in one buffer: never more than a window is held."""
        n = sum(stop - start for start, stop in spans)
        rows = torch.empty(n, self.d_in, dtype=self.rows.dtype, device=self.rows.device)
        filled = 0
        for start, stop in spans:
            rows[filled : filled + stop - start] = self.rows.read(start, stop)
            filled += stop - start
        return rows


class PairSource(Source):
    """Activations with targets, from a source whose rows hold both side by side: they are shuffled together."""

    def __init__(self, rows: Source, d_in: int, truth: Float[Tensor, "n_features d_out"] | None = None) -> None:
        self.rows, self.d_in, self.d_out, self.truth = rows, d_in, rows.d_in - d_in, truth
        self.stays, self.n_training_rows = rows.stays, rows.n_training_rows
        if truth is not None and truth.shape[1] != self.d_out:
            raise UsageError(
                f"true features have d_in={truth.shape[1]}, targets have d_out={self.d_out}; give directions "
                "[n_features, d_out] of the space that the targets are in"
            )

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self._apart, self.rows.batches(batch_size, seed, start))

    def held_out(self, purpose: Purpose, n: int) -> HeldOut:
        x, target = self._apart(self.rows.held_out(purpose, n).x)
        return HeldOut(x, target=target)

    def downstream(self, sae: Reconstruct, n: int) -> dict[str, float]:
        return self.rows.downstream(sae, n)

    def _apart(self, rows: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(rows, Tensor)
        return rows[:, : self.d_in].contiguous(), rows[:, self.d_in :].contiguous()


class IterableSource(Source):
    """Any iterable of batches [..., d_in], in its own order; its first rows are held out. Batches that are pairs hold
    activations and targets, which are read side by side.

    An iterable that can be read again (a data loader) gives further epochs; one that cannot (a generator) ends
    the run when it ends.
    """

    N_HELD_OUT = 8192
    stays = True

    def __init__(self, batches: Iterable[Tensor | np.ndarray]) -> None:
        self.iterable = batches
        self.widths: list[int] = []
        self.stream = self._rows()
        held = torch.zeros(0)
        while len(held) < self.N_HELD_OUT:
            rows = next(self.stream, None)
            if rows is None:
                raise UsageError(
                    f"the source ended after {len(held)} rows, but the first {self.N_HELD_OUT} are held out; "
                    "pass small sets as one tensor"
                )
            held = torch.cat([held, rows]) if len(held) else rows
        self.d_in = held.shape[1]
        self.first, self.unread = held[: self.N_HELD_OUT], held[self.N_HELD_OUT :]
        logger.info("the first %d rows are held out: half for calibration, half for evaluation", self.N_HELD_OUT)
        calibration, evaluation = self.first.tensor_split(2)
        self.held = {"calibration": calibration, "evaluation": evaluation}

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        """The stream can be read once; the seed has no effect, since the order is the iterable's."""
        return islice(rebatch(self._training_rows(), batch_size), start, None)

    def held_out(self, purpose: Purpose, n: int) -> HeldOut:
        return HeldOut(self.held[purpose][:n])

    def _training_rows(self) -> Iterator[Tensor]:
        yield self.unread
        yield from self.stream
        while iter(self.iterable) is not self.iterable:
            seen = 0
            for rows in self._rows():
                held = rows[: max(self.N_HELD_OUT - seen, 0)]
                if not torch.equal(held, self.first[seen : seen + len(held)]):
                    raise UsageError(
                        "the source yields its batches in a different order each epoch, so held-out rows would be "
                        "trained on; pass iter(source) for a single epoch, or one tensor, which is shuffled here"
                    )
                seen += len(rows)
                yield rows[len(held) :]
            if seen <= self.N_HELD_OUT:
                return

    def _rows(self) -> Iterator[Tensor]:
        for number, batch in enumerate(self.iterable):
            # A TensorDataset wraps its rows; two parts are activations and targets.
            parts = batch if isinstance(batch, list | tuple) and len(batch) in (1, 2) else [batch]
            leading = {tuple(part.shape[:-1]) for part in parts if isinstance(part, Tensor | np.ndarray)}
            if len(leading) > 1:
                raise UsageError(
                    f"batch {number} of the source has a target with other axes: {sorted(leading)}; align them"
                )
            names = (f"batch {number}", f"the target of batch {number}")
            tables = [
                table(flat_rows(part.cpu() if isinstance(part, Tensor) else part), name)
                for part, name in zip(parts, names, strict=False)
            ]
            widths = [rows.d_in for rows in tables]
            if self.widths not in ([], widths):
                raise UsageError(
                    f"batch {number} of the source has widths {widths}, but those before it {self.widths}; give "
                    "batches of one width"
                )
            self.widths = widths
            rows = Pairs(*tables) if len(tables) == 2 else tables[0]
            yield rows.read(0, len(rows)).float()


class SharedSource(Source):
    """A source whose held-out rows are drawn once for all that want them at once; streams are drawn anew. `own` is what
    it takes of a batch that several sources read together."""

    def __init__(self, source: Source, own: Own | None = None) -> None:
        self.source, self.truth = source, source.truth
        self.d_in, self.d_out, self.stays = source.d_in, source.d_out, source.stays
        self.n_training_rows = source.n_training_rows
        self._held_out: Callable[[Purpose, int], HeldOut] = cache(source.held_out)
        self.own: Own = own or (lambda batch: batch)

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        return self.source.batches(batch_size, seed, start)

    def held_out(self, purpose: Purpose, n: int) -> HeldOut:
        return self._held_out(purpose, n)

    def held_out_stream(self, purpose: Purpose, n: int) -> HeldOutStream:
        return self.source.held_out_stream(purpose, n)

    def downstream(self, sae: Reconstruct, n: int) -> dict[str, float]:
        return self.source.downstream(sae, n)


def as_source(data: object) -> Source:
    """A source from whatever the user has: a tensor, an array, a list of them, a file, or any iterable of batches.

    A tuple of two is activations and targets; the batches of an iterable may be such pairs.

    Raises:
        UsageError: it is none of these, or its rows are not activations.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, tuple):
        if len(data) != 2:
            raise UsageError(
                f"a tuple is (activations, targets), got {len(data)} entries; pass parts of one set as a list"
            )
        x, target = (table(part, name) for part, name in zip(data, ("the source", "the target"), strict=True))
        return PairSource(ArraySource(Pairs(x, target)), x.d_in)
    if isinstance(data, str | Path):
        return ArraySourceConfig(path=Path(data)).open()
    if isinstance(data, Tensor | np.ndarray | list):
        return ArraySource(table(data, "the source"))
    if isinstance(data, Iterable):
        source = IterableSource(data)
        return PairSource(source, source.widths[0]) if len(source.widths) == 2 else source
    remedy = (
        "call it: what it yields can be passed"
        if callable(data)
        else "pass a tensor, an array, or an iterable of batches"
    )
    raise UsageError(f"cannot train on {type(data).__name__}; {remedy}")


class ArraySourceConfig(SourceConfig):
    """Activations stored in .npy, .npz or .safetensors files."""

    kind: Literal["array"] = "array"
    path: Path
    """A file, or a glob of files."""
    key: str | None = None
    """Name of the array inside .npz and .safetensors files."""
    target: Path | None = None
    """A file, or a glob of files, with what a transcoder writes for each row, such as an MLP's output."""
    target_key: str | None = None
    """Name of the array inside .npz and .safetensors files of targets."""
    truth: Path | None = None
    """A file with the true features [n_features, d_in] (of the target: d_out), when they are known."""

    @model_validator(mode="after")
    def _key_has_a_target(self) -> ArraySourceConfig:
        if self.target_key is not None and self.target is None:
            raise ValueError(
                f"target_key {self.target_key!r} names an array in target, which is not given; add target or drop it"
            )
        return self

    def open(self) -> ArraySource | PairSource:
        truth = None if self.truth is None else open_truth(self.truth)
        x = open_rows(self.path, self.key)
        if self.target is None:
            return ArraySource(x, truth)
        return PairSource(ArraySource(Pairs(x, open_rows(self.target, self.target_key))), x.d_in, truth)
