"""What a language model loses, for an SAE that was trained on a store of its activations."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from sae.config import SourceConfig
from sae.errors import UsageError
from sae.networks.losses import losses
from sae.networks.source import ModelSourceConfig
from sae.sources import Reconstruct
from sae.stores import Store, StoreSourceConfig
from sae.stores.files import TOKENS


def losses_of_store(source: SourceConfig | None, sae: Reconstruct, n: int) -> dict[str, float]:
    """`losses` on the contexts of the first n rows that a store holds out for evaluation. Its model is loaded.

    Raises:
        UsageError: the activations are not from such a store.
    """
    store = Store(source.path) if isinstance(source, StoreSourceConfig) else None
    if store is None or store.manifest.origin.get("kind") != "model":
        raise UsageError(
            "what a model loses is measured for activations that `sae harvest` wrote (and by itself where source.kind "
            "is model); in Python there is sae.metrics.Spliced"
        )
    fields = {name: value for name, value in store.manifest.origin.items() if name in ModelSourceConfig.model_fields}
    config = ModelSourceConfig.model_validate(fields)
    context, position = (store.column("evaluation", name).long() for name in ("context", "position"))
    own = torch.isin(context, context[:n])
    which, row = context[own].unique(return_inverse=True)
    tokens = load_file(store.path / TOKENS)["tokens"][which]
    kept = torch.zeros_like(tokens, dtype=torch.bool)
    kept[row, position[own]] = True
    return losses(config.load(), [config.site, *config.targets.values()], sae, tokens, kept)
