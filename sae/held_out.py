"""Rows that training does not see: all at once, or piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from toymodels.features import FeatureBatch

Purpose = Literal["calibration", "evaluation"]


class HeldOut(NamedTuple):
    """Rows that training does not see, the true features' activations in them when these are known, and what they are
    to be transcoded into, where that is something else."""

    x: Float[Tensor, "rows d_in"]
    acts: FeatureBatch | None = None
    target: Float[Tensor, "rows d_out"] | None = None

    @property
    def wanted(self) -> Float[Tensor, "rows d_out"]:
        """What is to be reconstructed."""
        return self.x if self.target is None else self.target

    def pieces(self, rows: int) -> Iterator[HeldOut]:
        """The same, so many rows at a time."""
        for start in range(0, len(self.x), rows):
            piece = slice(start, start + rows)
            acts = None if self.acts is None else self.acts[piece]
            yield HeldOut(self.x[piece], acts, None if self.target is None else self.target[piece])


@runtime_checkable
class HeldOutStream(Protocol):
    """Rows that training does not see, always the same ones, as many as wanted without holding them all."""

    def pieces(self, rows: int) -> Iterator[HeldOut]:
        """All of them from the first on, so many at a time."""


def cut(parts: Iterable[HeldOut], n: int, rows: int) -> Iterator[HeldOut]:
    """The first n rows of some parts without targets, in pieces of exactly `rows`; the last one holds the rest."""
    waiting: list[HeldOut] = []
    n_waiting, n_left = 0, n
    for part in parts:
        wanted = next(part.pieces(n_left))
        n_left -= len(wanted.x)
        waiting.append(wanted)
        n_waiting += len(wanted.x)
        if n_waiting < rows and n_left:
            continue
        pieces = list(_joined(waiting).pieces(rows))
        waiting = [] if not n_left or len(pieces[-1].x) == rows else [pieces.pop()]
        n_waiting = sum(len(piece.x) for piece in waiting)
        yield from pieces


def _joined(parts: list[HeldOut]) -> HeldOut:
    """Parts as one."""
    if len(parts) == 1:
        return parts[0]
    acts = [part.acts for part in parts if part.acts is not None]
    return HeldOut(torch.cat([part.x for part in parts]), FeatureBatch.cat(acts) if acts else None)
