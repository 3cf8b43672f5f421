"""What a language model loses when an SAE's reconstructions replace its activations."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.metrics import Spliced
from sae.networks.language_model import LanguageModel
from sae.networks.reader import Site
from sae.sources import Reconstruct

logger = logging.getLogger("sae")

# Logits that exist together, at most.
PREDICTIONS = 2**26


def losses(
    model: LanguageModel,
    sites: Sequence[Site],
    sae: Reconstruct,
    tokens: Int[Tensor, "n length"],
    kept: Bool[Tensor, "n length"],
) -> dict[str, float]:
    """`sae.metrics.Spliced` on some contexts; nothing unless the SAE reconstructs a module's output.

    `sites` are where the SAE reads, followed by where its target is, if it has one.
    """
    where, *written = sites
    transcodes = where.reads == "input" and written == [Site(where.module)]
    if not transcodes and (where.reads == "input" or written):
        logger.info("the model's loss is not measured: this SAE does not reconstruct a module's output")
        return {}
    device = next((weight.device for weight in getattr(sae, "parameters", list)()), torch.device("cpu"))
    spliced = Spliced(model.model, where.module, lambda rows: sae(rows.float().to(device)), transcodes=transcodes)
    at_once = min(max(PREDICTIONS // (tokens.shape[1] * model.vocabulary), 1), model.contexts_at_once)
    for part, mask in zip(tokens.split(at_once), kept.split(at_once), strict=True):
        spliced.update(part.long().to(model.device), mask.to(model.device))
    return spliced.compute()
