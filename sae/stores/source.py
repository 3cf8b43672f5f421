"""An activation store as a source."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae.arrays import Pairs, Rows, open_truth
from sae.config import SourceConfig
from sae.errors import UsageError
from sae.held_out import HeldOut, Purpose
from sae.sources import ArraySource, PairSource
from sae.stores.files import Store


class StoreSource(ArraySource):
    """The training rows of a store, shuffled like any array's; the held-out rows were chosen when it was written, as
    whole texts or whole images."""

    def __init__(self, store: Store, truth: Float[Tensor, "n_features d_in"] | None = None) -> None:
        self.store = store
        self.held: dict[Purpose, Rows | Pairs] = {p: store.rows(p) for p in ("calibration", "evaluation")}
        super().__init__(store.rows("training"), truth)

    def __repr__(self) -> str:
        manifest = self.store.manifest
        return f"StoreSource({str(self.store.path)!r}: {manifest.n_rows('training'):,} rows, d_in={manifest.d_in})"

    def _divided(self, n_blocks: int) -> tuple[dict[Purpose, Tensor], Tensor]:
        return {}, torch.arange(n_blocks)

    def held_out(self, purpose: Purpose, n: int) -> HeldOut:
        rows = self.held[purpose]
        return HeldOut(rows.read(0, min(n, len(rows))).float())


class StoreSourceConfig(SourceConfig):
    """A folder of activations written by `sae harvest`."""

    kind: Literal["store"] = "store"
    path: Path
    """The folder."""
    truth: Path | None = None
    """A file with the true features [n_features, d_in] (of the target: d_out), when they are known."""

    def open(self) -> StoreSource | PairSource:
        return open_store(self.path, None if self.truth is None else open_truth(self.truth))


def open_store(path: str | Path, truth: Float[Tensor, "n_features d_out"] | None = None) -> StoreSource | PairSource:
    """The store in a folder, as a source.

    Raises:
        UsageError: there is none, it is damaged, or it was not written to its end.
    """
    store = Store(path)
    if not store.manifest.complete:
        raise UsageError(f"{path} is incomplete; run its `sae harvest` again with --resume")
    if store.manifest.d_out is None:
        return StoreSource(store, truth)
    return PairSource(StoreSource(store), store.manifest.d_in, truth)


def recorded(source: object) -> StoreSourceConfig | None:
    """How a configuration records a source that was passed to a run: the folder of a store; nothing for any other."""
    rows = source.rows if isinstance(source, PairSource) else source
    known = isinstance(source, PairSource | StoreSource) and source.truth is not None
    return StoreSourceConfig(path=rows.store.path) if isinstance(rows, StoreSource) and not known else None
