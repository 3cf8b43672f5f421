"""A language model as a source: its activations, computed while an SAE trains on them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sae.config import SourceConfig
from sae.errors import UsageError
from sae.held_out import HeldOut, Purpose
from sae.kernels import require_device, resolve_device
from sae.networks.language_model import LanguageModel, load_language_model, load_tokenizer
from sae.networks.losses import losses
from sae.networks.reader import Reads, Site
from sae.networks.texts import Contexts, contexts_of, open_tokens, special_tokens, texts
from sae.ranks import ALONE, Ranks, here
from sae.sources import Batch, Own, PairSource, Reconstruct, Source, over_epochs
from sae.stopping import stop_if_asked
from sae.stores.files import SPLITS, Split
from sae.stores.writer import Division
from toymodels.streams import generator

logger = logging.getLogger("sae")


class ModelSourceConfig(SourceConfig):
    """Activations of a language model of `transformers`, for the tokens of some texts."""

    kind: Literal["model"] = "model"
    model: str
    """A folder in which `transformers` saved a causal language model, or its id on the Hub."""
    module: str
    """The module to read: one of the model's `named_modules()`, such as transformer.h.8."""
    reads: Reads = "output"
    """What comes out of the module, or what goes into it."""
    target: str | None = None
    """A module whose output is what a transcoder writes."""
    texts: str | None = None
    """.txt, .jsonl, .json, .parquet or .csv files (one, or a glob of them), or the id of a dataset on the Hub."""
    tokens: Path | None = None
    """Instead of texts: a .npy file of tokens [contexts, length]."""
    subset: str | None = None
    """Which part of a dataset on the Hub, where it has several."""
    split: str = "train"
    """Which split of a dataset on the Hub."""
    column: str = "text"
    """The column with the texts, where files have columns."""
    n_tokens: int = Field(default=10_000_000, gt=0)
    """Maximum number of tokens that the model reads; they are kept in memory, at 4 bytes each."""
    context_length: int = Field(default=128, ge=2)
    """Tokens that the model reads together."""
    bos: bool = True
    """Begin each context with the tokenizer's beginning-of-sequence token, if it has one."""
    skip: int = Field(default=1, ge=0)
    """Positions at the start of each context that are left out: the first tokens of many models are far from all
    others."""
    keep_special: bool = False
    """Keep activations of special tokens such as end-of-text."""
    revision: str | None = None
    """A branch, tag or commit of a model on the Hub."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """The model's dtype; auto is the one it was saved in."""
    device: str = "cpu"
    """The torch device on which the model runs; auto is cuda where torch can use it, else cpu."""
    contexts_at_once: int = Field(default=32, gt=0)
    """Contexts in one batch of the model."""
    window_rows: int = Field(default=131_072, gt=0)
    """Rows that are computed together and shuffled before they are trained on; they stay in the model's dtype."""

    @model_validator(mode="after")
    def _reads_something(self) -> ModelSourceConfig:
        if (self.texts is None) == (self.tokens is None):
            given = "neither" if self.texts is None else "both"
            raise ValueError(f"a model reads texts or tokens, got {given}; give one of them")
        if self.tokens is None and self.skip >= self.context_length:
            raise ValueError(f"skip must lie below context_length={self.context_length}, got {self.skip}; lower it")
        return self

    @property
    def site(self) -> Site:
        return Site(self.module, self.reads)

    @property
    def target_site(self) -> Site | None:
        return None if self.target is None else Site(self.target)

    @property
    def sites(self) -> list[Site]:
        """Where the SAE reads, followed by where its target is, if it has one."""
        return [self.site] if self.target is None else [self.site, Site(self.target)]

    def load(self) -> LanguageModel:
        require_device(self.device, "source.device")
        device = torch.device(resolve_device(self.device))
        return load_language_model(self.model, self.revision, self.dtype, device, self.contexts_at_once)

    def read(self) -> Contexts:
        """What the model is to read.

        Raises:
            UsageError: it cannot be read.
        """
        special = torch.zeros(0, dtype=torch.int32)
        if self.tokens is not None:
            tokens = open_tokens(self.tokens, self.n_tokens)
        else:
            assert self.texts is not None
            tokenizer = load_tokenizer(self.model, self.revision)
            given = texts(self.texts, self.subset, self.split, self.column)
            tokens = contexts_of(given, tokenizer, self.context_length, self.n_tokens, self.bos)
            if not self.keep_special:
                special = special_tokens(tokenizer)
        if self.skip >= tokens.shape[1]:
            raise UsageError(
                f"source.skip={self.skip} leaves nothing of contexts of {tokens.shape[1]} tokens; lower it"
            )
        return Contexts(tokens, special, self.skip)

    @property
    def stream(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"module", "reads", "target"})

    @property
    def fields(self) -> dict[str, Any]:
        """Everything that determines what is read and where; another machine may compute it."""
        return self.model_dump(mode="json", exclude={"device", "window_rows"})

    def origin(self, contexts: Contexts) -> dict[str, Any]:
        """What determines the rows of a store."""
        return self.fields | {"tokens_sha256": hashlib.sha256(contexts.tokens.numpy().tobytes()).hexdigest()}

    def open(self) -> ModelSource | PairSource:
        model = self.load()
        model.require_sites(self.sites)
        return self._opened(model, self.read())

    def open_beside(self, others: Sequence[Source]) -> ModelSource | PairSource:
        for source in map(_reading, others):
            if isinstance(source, ModelSource) and source.config.stream == self.stream:
                source.model.require_sites(self.sites)
                return self._opened(source.model, source.contexts)
        return self.open()

    def _opened(self, model: LanguageModel, contexts: Contexts) -> ModelSource | PairSource:
        source = ModelSource(self, model, contexts)
        logger.info(
            "%s: d=%s, %d contexts of %d tokens, %d rows to train on",
            " -> ".join(map(str, self.sites)),
            " -> ".join(map(str, source.widths)),
            *contexts.tokens.shape,
            source.n_training_rows,
        )
        return source if self.target is None else PairSource(source, source.widths[0])


def order_of(contexts: Contexts) -> Tensor:
    """Contexts in random order: neighbouring texts in a file resemble each other."""
    return torch.randperm(len(contexts.tokens), generator=generator(0, "contexts"))


def divided(contexts: Contexts, order: Tensor) -> list[Split]:
    """The split of each context, in that order.

    Raises:
        UsageError: one has no rows.
    """
    division = Division()
    splits = division.next(contexts.n_rows[order].tolist())
    division.require_rows("raise source.n_tokens, give more texts, or lower source.context_length")
    return splits


class ModelSource(Source):
    """Rows of a language model, computed when they are needed; with targets, both side by side.

    An epoch visits the contexts in a new order. The model reads as many of them as fill a window, and their rows are
    permuted exactly; a batch depends only on its number and the seed, and resuming anywhere costs one window. Of every
    twenty contexts one is held out for calibration and one for evaluation, up to 50,000 rows each.
    """

    stays = True
    n_training_rows: int

    def __init__(
        self, config: ModelSourceConfig, model: LanguageModel, contexts: Contexts, sites: Sequence[Site] = ()
    ) -> None:
        """`sites` are those of several sources; default those of one."""
        model.require(contexts)
        self.config, self.model, self.contexts = config, model, contexts
        self.sites = list(sites) or config.sites
        order = order_of(contexts)
        splits = divided(contexts, order)
        self.order: dict[Split, Tensor] = {
            split: order[torch.tensor([one == split for one in splits])] for split in SPLITS
        }
        first = self._rows(order[:1])
        self.widths = [first[site].shape[1] for site in self.sites]
        self.d_in, self.dtype = sum(self.widths), first[self.sites[0]].dtype
        self.n_training_rows = int(contexts.n_rows[self.order["training"]].sum())

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        return over_epochs(self._epoch, self.n_training_rows, batch_size, seed, start)

    def held_out(self, purpose: Purpose, n: int) -> HeldOut:
        return HeldOut(self.window(self.first(purpose, n))[:n].float().cpu())

    def downstream(self, sae: Reconstruct, n: int) -> dict[str, float]:
        """The model's loss with the SAE spliced in (`sae.metrics.Spliced`)."""
        own = self.first("evaluation", n)
        tokens = self.contexts.tokens[own]
        return losses(self.model, self.sites, sae, tokens, self.contexts.kept(tokens))

    def first(self, split: Split, n: int) -> Tensor:
        """The first contexts of a split that have n rows together, or all."""
        own = self.order[split]
        return own[: int((self.contexts.n_rows[own].cumsum(0) < n).sum()) + 1]

    def _epoch(self, seed: int, epoch: int, skip: int, batch_size: int) -> Iterator[Tensor]:
        """One epoch's rows in pieces of at most batch_size, without the first `skip`."""
        own = self.order["training"]
        order = own[torch.randperm(len(own), generator=generator(seed, "epoch", epoch))]
        n_contexts = max(1, self.config.window_rows // self.contexts.tokens.shape[1])
        for number, window in enumerate(order.split(n_contexts)):
            n = int(self.contexts.n_rows[window].sum())
            if skip >= n:
                skip -= n
                continue
            rows = self.window(window, here())
            within = torch.randperm(n, generator=generator(seed, "epoch", epoch, "window", number))
            for piece in within[skip:].to(rows.device).split(batch_size):
                yield rows[piece].float()
            del rows  # before the next window is computed
            skip = 0

    def window(self, which: Tensor, ranks: Ranks = ALONE) -> Float[Tensor, "rows d_in"]:
        """The rows of some contexts, on the model's device. Processes that want the same ones compute a part each.

        Raises:
            UsageError: they are not finite.
        """
        parts = which.split(self.model.contexts_at_once)
        n_rows = [0, *(int(self.contexts.n_rows[part].sum()) for part in parts)]
        starts = list(accumulate(n_rows))
        shares = [len(parts) * rank // ranks.n for rank in range(ranks.n + 1)]
        rows = torch.empty(starts[-1], self.d_in, dtype=self.dtype, device=self.model.device)

        def read(number: int) -> None:
            if number < shares[ranks.rank + 1]:
                found = self._rows(parts[number])
                beside = [found[site] for site in self.sites]
                rows[starts[number] : starts[number + 1]] = torch.cat(beside, dim=1) if len(beside) > 1 else beside[0]

        for turn in range(max(end - start for start, end in pairwise(shares))):
            stop_if_asked("the model was reading", ranks.agreed)
            ranks.of_all(partial(read, shares[ranks.rank] + turn))
        ranks.gather_(rows, [starts[share] for share in shares])
        for site, columns in self.columns.items():
            if not bool(rows[:, columns].isfinite().all()):
                remedy = "look at the model" if rows.dtype == torch.float32 else "set source.dtype float32"
                raise UsageError(f"{site} of {self.config.model} holds NaN or infinity; {remedy}")
        return rows

    @property
    def columns(self) -> dict[Site, slice]:
        """Where the activations at each site are in a row."""
        ends = accumulate(self.widths)
        return {site: slice(end - width, end) for site, width, end in zip(self.sites, self.widths, ends, strict=True)}

    def _rows(self, which: Tensor) -> dict[Site, Tensor]:
        tokens = self.contexts.tokens[which]
        return self.model.rows(self.sites, tokens, self.contexts.kept(tokens))


def read_together(sources: Sequence[Source]) -> tuple[ModelSource, list[Own]]:
    """One source for several modules of one model that reads the same texts, and which part of its batches is whose.

    The model runs once for all of them. Each gets the rows that it would get by itself.
    """
    readings = [reading for source in sources if isinstance(reading := _reading(source), ModelSource)]
    assert len(readings) == len(sources), sources
    first = readings[0]
    sites = list(dict.fromkeys(site for reading in readings for site in reading.sites))
    whole = ModelSource(first.config, first.model, first.contexts, sites)
    columns = whole.columns

    def own_of(source: Source, reading: ModelSource) -> Own:
        def own(batch: Batch) -> Batch:
            assert isinstance(batch, Tensor)
            parts = [batch[:, columns[site]].contiguous() for site in reading.sites]
            return (parts[0], parts[1]) if isinstance(source, PairSource) else parts[0]

        return own

    return whole, [own_of(source, reading) for source, reading in zip(sources, readings, strict=True)]


def _reading(source: Source) -> Source:
    """The source that reads the model, if there is a model."""
    return source.rows if isinstance(source, PairSource) else source
