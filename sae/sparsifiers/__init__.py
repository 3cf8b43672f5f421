"""From pre-activations to sparse codes: one file an idea, each a configuration under its `kind` and a `Sparsifier`."""

from sae.sparsifiers.base import Decode, Error, Flow, Objective, Sparsifier
from sae.sparsifiers.batchtopk import BatchTopK, BatchTopKConfig
from sae.sparsifiers.matching_pursuit import MatchingPursuit, MatchingPursuitConfig
from sae.sparsifiers.relu import ReLU, ReLUConfig
from sae.sparsifiers.topk import TopK, TopKConfig

__all__ = [
    "BatchTopK",
    "BatchTopKConfig",
    "Decode",
    "Error",
    "Flow",
    "MatchingPursuit",
    "MatchingPursuitConfig",
    "Objective",
    "ReLU",
    "ReLUConfig",
    "Sparsifier",
    "TopK",
    "TopKConfig",
]
