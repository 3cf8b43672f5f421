"""The rows that an SAE was trained on, text by text, with where in the texts each of them is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.arrays import Pairs
from sae.config import SourceConfig
from sae.errors import UsageError
from sae.networks.reader import Site
from sae.networks.source import ModelSource, ModelSourceConfig
from sae.sources import PairSource
from sae.stores import Store, StoreSourceConfig
from sae.stores.files import is_store

ROWS_AT_ONCE = 4096


class Passage(NamedTuple):
    """Rows of some whole contexts, one context after the other."""

    x: Float[Tensor, "rows d_in"]
    context: Int[Tensor, " rows"]
    """Which row of the tokens."""
    position: Int[Tensor, " rows"]
    """Which column of the tokens."""


class Texts(ABC):
    """Tokens, and the activations of a language model for them, which can be gone through again and again."""

    tokens: Int[Tensor, "n_contexts length"]
    tokenizer: str | None
    """The model whose tokenizer made the tokens; None: it is not known."""
    revision: str | None
    d_in: int
    """Width of the activations."""
    name: str
    """What they are of, in words."""

    @abstractmethod
    def passages(self) -> Iterator[Passage]:
        """The first rows, always the same."""

    @property
    def network(self) -> Any:
        """The language model, where it is at hand and an SAE's output is a part of its residual stream; else None."""
        return None


class StoreTexts(Texts):
    """Of a store: its training rows, which are in random order of contexts."""

    def __init__(self, store: Store, n_rows: int) -> None:
        origin = store.manifest.origin
        self.tokens, self.d_in = store.tokens(), store.manifest.d_in
        self.store, self.tokenizer, self.revision = store, _tokenizer(origin), origin.get("revision")
        self.name = f"{origin['module']} of {origin['model']}"
        self.context = store.column("training", "context")[:n_rows].long()
        self.position = store.column("training", "position")[:n_rows].long()

    def passages(self) -> Iterator[Passage]:
        rows = self.store.rows("training")
        rows = rows.left if isinstance(rows, Pairs) else rows
        first = torch.ones_like(self.context, dtype=torch.bool)
        first[1:] = self.context[1:] != self.context[:-1]
        begins = [*first.nonzero().squeeze(1).tolist(), len(self.context)]
        start = 0
        for end in begins[1:]:
            if end - start >= ROWS_AT_ONCE or end == begins[-1]:
                own = slice(start, end)
                yield Passage(rows.read(start, end).float(), self.context[own], self.position[own])
                start = end


class ModelTexts(Texts):
    """Of a language model, which computes the rows anew each time."""

    def __init__(self, source: ModelSource, n_rows: int) -> None:
        self.source, self.tokens, self.d_in = source, source.contexts.tokens, source.widths[0]
        self.tokenizer = _tokenizer(source.config.fields)
        self.revision = source.config.revision
        self.name = f"{source.config.module} of {source.config.model}"
        self.order = source.first("training", n_rows)

    @property
    def network(self) -> Any:
        sites = self.source.sites
        return self.source.model.model if sites[-1].reads == "output" else None

    def passages(self) -> Iterator[Passage]:
        for part in self.order.split(self.source.model.contexts_at_once):
            where = self.source.contexts.kept(self.tokens[part]).nonzero()
            x = self.source.window(part)[:, : self.source.widths[0]].float().cpu()
            yield Passage(x, part[where[:, 0]], where[:, 1])


def open_texts(config: SourceConfig | None, n_rows: int) -> Texts:
    """The texts of a run's source.

    Raises:
        UsageError: its activations are not those of a language model.
    """
    if isinstance(config, StoreSourceConfig):
        return StoreTexts(Store(config.path), n_rows)
    if isinstance(config, ModelSourceConfig):
        source = config.open()
        rows = source.rows if isinstance(source, PairSource) else source
        assert isinstance(rows, ModelSource)
        return ModelTexts(rows, n_rows)
    kind = "none in its file" if config is None else f"one of kind {config.kind}"
    raise UsageError(
        f"latents are shown with the texts that they fire on, but the run's source is {kind}; use model or store"
    )


def place_of(config: SourceConfig | None) -> Site | None:
    """Where in a network a source's activations are, if it says so."""
    if isinstance(config, ModelSourceConfig):
        return config.site
    if isinstance(config, StoreSourceConfig) and is_store(config.path):
        origin = Store(config.path).manifest.origin
        return Site(str(origin["module"]), origin.get("reads", "output"))
    return None


def _tokenizer(fields: dict[str, object]) -> str | None:
    return None if fields["texts"] is None else str(fields["model"])
