"""A language model of `transformers`, and the activations of its tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.errors import UsageError
from sae.extras import require
from sae.networks.pieces import Piece, columns_of
from sae.networks.reader import Reader, Site
from sae.networks.texts import Contexts
from sae.stores.writer import Columns

logger = logging.getLogger("sae")


class LanguageModel:
    """A causal language model, and how many contexts it reads at once."""

    def __init__(self, model: Any, contexts_at_once: int) -> None:
        self.model, self.contexts_at_once = model, contexts_at_once
        self.readers: dict[tuple[Site, ...], Reader] = {}

    @property
    def device(self) -> torch.device:
        """The device on which it runs."""
        return self.model.get_input_embeddings().weight.device

    @property
    def vocabulary(self) -> int:
        """Number of tokens that it knows."""
        return self.model.get_input_embeddings().weight.shape[0]

    def require_sites(self, sites: Sequence[Site]) -> None:
        """Refuses names of modules that it does not have.

        Raises:
            UsageError: there are any.
        """
        self._reader(sites)

    def _reader(self, sites: Sequence[Site]) -> Reader:
        """Made once for the same sites: it goes through all modules of the model."""
        key = tuple(sites)
        if key not in self.readers:
            self.readers[key] = Reader(self.model, sites)
        return self.readers[key]

    def require(self, contexts: Contexts) -> None:
        """Refuses contexts that it cannot read.

        Raises:
            UsageError: they are too long, or have tokens that it does not know.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None)
        length = contexts.tokens.shape[1]
        if limit is not None and length > limit:
            raise UsageError(
                f"contexts of {length} tokens are too long for a model of {limit} positions; "
                "lower source.context_length"
            )
        least, most = int(contexts.tokens.min()), int(contexts.tokens.max())
        if least < 0 or most >= self.vocabulary:
            raise UsageError(
                f"tokens {least} to {most} do not fit a model that knows 0 to {self.vocabulary - 1}; tokenize "
                "with this model's tokenizer"
            )

    def rows(
        self, sites: Sequence[Site], tokens: Int[Tensor, "n length"], kept: Bool[Tensor, "n length"]
    ) -> dict[Site, Float[Tensor, "rows d"]]:
        """The activations of the tokens that are kept, context after context.

        Raises:
            UsageError: a site has no activation for each token.
        """
        found = self._reader(sites)({"input_ids": tokens.long(), "use_cache": False})
        for site, acts in found.items():
            if acts.ndim != 3 or acts.shape[:2] != tokens.shape or not acts.is_floating_point():
                raise UsageError(
                    f"{site} holds {list(acts.shape)} of {acts.dtype} for {list(tokens.shape)} tokens, not one vector "
                    "per token; name another module"
                )
        return {site: acts[kept.to(acts.device)] for site, acts in found.items()}

    def pieces(
        self,
        where: Sequence[Site],
        target: Site | None,
        contexts: Contexts,
        order: Int[Tensor, " n"],
        start: int = 0,
    ) -> Iterator[Piece]:
        """All rows of some contexts, batch by batch from number `start` on, with the context and position of each."""
        sites = [*where, *([] if target is None else [target])]
        for part in order.split(self.contexts_at_once)[start:]:
            tokens = contexts.tokens[part]
            kept = contexts.kept(tokens)
            place = {"context": part[kept.nonzero()[:, 0]], "position": kept.nonzero()[:, 1]}
            rows = self.rows(sites, tokens, kept)
            columns: dict[Site, Columns] = {site: {**columns_of(rows, site, target), **place} for site in where}
            yield Piece(columns, kept.sum(dim=1).tolist())


def load_language_model(
    name: str, revision: str | None, dtype: str, device: torch.device, at_once: int
) -> LanguageModel:
    """From a folder that `transformers` saved, or from the Hub. Code that comes with a model is not run.

    Raises:
        UsageError: it cannot be loaded.
    """
    transformers = _transformers()
    if not Path(name).exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UsageError(f"source.model {name}: there is no such folder; give one that exists, or an id on the Hub")
        logger.info("looking for %s on the Hub", name)
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        model = model.eval().requires_grad_(False).to(device)
    except Exception as error:  # whatever the library raises for a missing file, a network or a setting
        raise _cannot_load(name, error) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise UsageError(
            f"source.model {name} lacks {len(missing)} weights, which would be random: {', '.join(missing[:3])}; give "
            "a whole causal language model"
        )
    return LanguageModel(model, at_once)


def load_tokenizer(name: str, revision: str | None) -> Any:
    """The tokenizer of a model.

    Raises:
        UsageError: it cannot be loaded.
    """
    transformers = _transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # as above
        raise _cannot_load(f"{name}'s tokenizer", error) from error


def _cannot_load(name: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in reason:
        reason = "it comes with code of its own, which is not run"
    rule = "give a folder that transformers saved, or the id of a causal language model on the Hub"
    return UsageError(f"source.model {name} cannot be loaded: {reason[:300]}; {rule}")


def _transformers() -> Any:
    require("transformers", "harvest", "reading a language model")
    import transformers  # noqa: PLC0415 - an extra, and slow to import

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return transformers
