"""An evaluation set that the metrics read repeatedly: sparse codes and sparse true activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import IO

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.metrics.native import ByFeature, by_feature
from toymodels.features import FeatureBatch
from toymodels.streams import generator

# A window is what is held at once and shuffled within: as many rows as keep its dense matrices this small.
WINDOW_ENTRIES = 2**27
MIN_WINDOW_ROWS, MAX_WINDOW_ROWS = 2**12, 2**17
# What is larger than this lies on disk.
MEMORY_BYTES = 2**28


def window_rows(d_out: int, d_sae: int) -> int:
    """Rows of a window for activations and codes of these widths, the same for every evaluation set."""
    return max(MIN_WINDOW_ROWS, min(MAX_WINDOW_ROWS, WINDOW_ENTRIES // max(4 * d_out, d_sae)))


def shuffled(n_rows: int, window: int, draw: int, seed: int) -> Int[Tensor, " rows"]:
    """An order of the samples of a window that `draw` decides."""
    names = ("shuffle", draw) if window == 0 else ("shuffle", draw, window)
    return torch.randperm(n_rows, generator=generator(seed, "metrics", *names))


def rows_in(order: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The row at which each sample stands in an order."""
    at = torch.empty(len(order), dtype=torch.int32)
    at[order] = torch.arange(len(order), dtype=torch.int32)
    return at


@dataclass(frozen=True)
class Window:
    """Consecutive samples from number `start`: what the latents do, z_j |w_j|, and what the features do.

    Row r of the codes is beside row order[r] of the true activations; None: beside row r.
    """

    start: int
    codes: FeatureBatch
    acts: FeatureBatch
    number: int = 0
    order: Int[Tensor, " rows"] | None = None

    @cached_property
    def by_feature(self) -> ByFeature:
        """The true activations in the order of features."""
        return by_feature(self.acts)

    def row_of(self, draw: int | None, seed: int) -> Int[Tensor, " rows"]:
        """The row of the codes that each row of the true activations is beside, as they are or shuffled for a draw."""
        if draw is None:
            return torch.arange(len(self.acts), dtype=torch.int32)
        return rows_in(shuffled(len(self.acts), self.number, draw, seed))


class Samples:
    """The codes and true activations of an evaluation set, kept entry by entry, window after window.

    Beyond MEMORY_BYTES they lie in a temporary file, so that memory does not grow with their number. To be used
    in a `with` statement.
    """

    def __init__(self, n_latents: int, n_features: int) -> None:
        self.n_latents, self.n_features, self.n_samples = n_latents, n_features, 0
        self._file = SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115 - closed in __exit__
        self._windows: list[int] = []
        self._at_hand: Window | None = None
        self._digest = blake2b(digest_size=16)

    def __enter__(self) -> Samples:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, codes: FeatureBatch, acts: FeatureBatch) -> None:
        """Adds a window.

        Raises:
            ValueError: the two have different numbers of samples.
        """
        if len(codes) != len(acts):
            raise ValueError(
                f"codes of {len(codes)} samples do not fit acts of {len(acts)}; pass those of one evaluation set"
            )
        self._at_hand = None
        self._file.seek(0, 2)
        self._windows.append(self._file.tell())
        _write(self._file, codes)
        before = self._file.tell()
        _write(self._file, acts)
        self._file.seek(before)
        self._digest.update(self._file.read())
        self.n_samples += len(acts)

    @property
    def acts_key(self) -> bytes:
        """What tells these true activations from others."""
        return self._digest.digest()

    def windows(self, draw: int | None = None, seed: int = 0) -> Iterator[Window]:
        """The windows in order; for a draw each with its true activations shuffled: what is left is luck."""
        start = 0
        for number in range(len(self._windows)):
            window = self._window(number, start)
            start += len(window.acts)
            if draw is not None:
                window = replace(window, order=shuffled(len(window.acts), number, draw, seed))
            yield window

    def _window(self, number: int, start: int) -> Window:
        """One window. Where it is the only one, it stays at hand."""
        if self._at_hand is not None:
            return self._at_hand
        self._file.seek(self._windows[number])
        codes = _read(self._file, self.n_latents)
        window = Window(start, codes, _read(self._file, self.n_features), number)
        if len(self._windows) == 1:
            self._at_hand = window
        return window

    def true_windows(
        self, n: int, norms: Float[Tensor, " n_latents"] | None = None, threshold: float = 0.0
    ) -> Iterator[Window]:
        """The same samples with the first n true features as latents, whose directions have these norms; None: 1."""
        for window in self.windows():
            first = columns(window.acts, 0, n)
            codes = first if norms is None else _scaled(first, norms)
            yield replace(window, codes=above(codes, threshold))


def _scaled(batch: FeatureBatch, factors: Float[Tensor, " columns"]) -> FeatureBatch:
    """Each column multiplied by its factor."""
    values = batch.values * factors.to(batch.values.dtype)[batch.indices]
    return FeatureBatch(batch.indices, values, batch.offsets, batch.shape)


def above(batch: FeatureBatch, threshold: float) -> FeatureBatch:
    """The entries with |value| > threshold."""
    if threshold == 0 and bool(batch.values.all()):
        return batch
    return _kept(batch, batch.values.abs() > threshold, batch.n_features)


def columns(batch: FeatureBatch, start: int, stop: int) -> FeatureBatch:
    """The entries of columns start..stop - 1, renumbered from 0."""
    if start == 0 and stop >= batch.n_features:
        return batch
    inside = _kept(batch, (batch.indices >= start) & (batch.indices < stop), stop - start)
    return FeatureBatch(inside.indices - start, inside.values, inside.offsets, inside.shape)


def _kept(batch: FeatureBatch, kept: Bool[Tensor, " entries"], width: int) -> FeatureBatch:
    """Some of the entries."""
    before = torch.cat([batch.offsets.new_zeros(1), kept.cumsum(0)])
    return FeatureBatch(batch.indices[kept], batch.values[kept], before[batch.offsets], (len(batch), width))


def _write(file: IO[bytes], batch: FeatureBatch) -> None:
    """Indices in 32 bits, values as they are."""
    values = batch.values.numpy()
    file.write(np.array([len(batch), len(values), values.itemsize], dtype=np.int64).tobytes())
    for array in (batch.offsets.numpy(), batch.indices.to(torch.int32).numpy(), values):
        file.write(np.ascontiguousarray(array).data)


def _read(file: SpooledTemporaryFile[bytes], width: int) -> FeatureBatch:
    n_rows, n_entries, itemsize = np.frombuffer(file.read(24), dtype=np.int64).tolist()

    def array(n: int, dtype: type) -> Tensor:
        found: np.ndarray = np.empty(n, dtype=dtype)
        file.readinto(found.view(np.uint8).data)
        return torch.from_numpy(found)

    offsets, indices = array(n_rows + 1, np.int64), array(n_entries, np.int32)
    values = array(n_entries, np.float32 if itemsize == 4 else np.float64)
    return FeatureBatch(indices.long(), values, offsets, (n_rows, width))
