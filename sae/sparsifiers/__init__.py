"""From pre-activations to sparse codes: one file an idea, each a configuration under its `kind` and a `Sparsifier`."""

from sae.sparsifiers.base import Decode, Error, Flow, Objective, Sparsifier
from sae.sparsifiers.batchtopk import BatchTopK, BatchTopKConfig
from sae.sparsifiers.relu import ReLU, ReLUConfig
from sae.sparsifiers.topk import TopK, TopKConfig
from sae.sparsifiers.transcoder import SkipTranscoderConfig, TranscoderConfig

__all__ = [
    "BatchTopK",
    "BatchTopKConfig",
    "Decode",
    "Error",
    "Flow",
    "Objective",
    "ReLU",
    "ReLUConfig",
    "SkipTranscoderConfig",
    "Sparsifier",
    "TopK",
    "TopKConfig",
    "TranscoderConfig",
]
