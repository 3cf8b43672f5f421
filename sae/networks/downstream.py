"""What a language model loses, for an SAE trained on a store of its activations."""

from __future__ import annotations

import torch

from sae.config import SourceConfig
from sae.errors import UsageError
from sae.networks.losses import losses
from sae.networks.source import ModelSourceConfig
from sae.sources import Reconstruct
from sae.stores import Store, StoreSourceConfig


def require_network(source: SourceConfig | None) -> None:
    """Refuses activations whose language model is not known.

    Raises:
        UsageError: they are neither from one nor from a store harvested from one.
    """
    if isinstance(source, ModelSourceConfig):
        return  # it measures by itself, where it can
    if not isinstance(source, StoreSourceConfig) or Store(source.path).manifest.origin.get("kind") != "model":
        raise UsageError(
            "what a model loses is measured for activations of a language model; use source.kind model or a store "
            "written by `sae harvest`, or sae.metrics.Spliced in Python"
        )


def losses_of_store(source: StoreSourceConfig, sae: Reconstruct, n: int, device: str) -> dict[str, float]:
    """`losses` on the contexts of the first n rows that a store holds out for evaluation. Its model is loaded.

    Raises:
        UsageError: the model cannot be loaded, or lacks the module that the store is from.
    """
    store = Store(source.path)
    fields = {name: value for name, value in store.manifest.origin.items() if name in ModelSourceConfig.model_fields}
    config = ModelSourceConfig.model_validate(fields | {"device": device})
    context, position = (store.column("evaluation", name).long() for name in ("context", "position"))
    own = torch.isin(context, context[:n])
    which, row = context[own].unique(return_inverse=True)
    tokens = store.tokens()[which]
    kept = torch.zeros_like(tokens, dtype=torch.bool)
    kept[row, position[own]] = True
    return losses(config.load(), config.sites, sae, tokens, kept)
