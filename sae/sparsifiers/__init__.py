"""From pre-activations to sparse codes: one file per idea, each a configuration under its `kind` and a `Sparsifier`."""

from sae.sparsifiers.base import Decode, Error, Flow, Objective, Sparsifier
from sae.sparsifiers.batchtopk import BatchTopK, BatchTopKConfig
from sae.sparsifiers.control import Control, Penalised, PenalisedConfig
from sae.sparsifiers.gated import Gated, GatedConfig
from sae.sparsifiers.jumprelu import JumpReLU, JumpReLUConfig
from sae.sparsifiers.lista_matryoshka import ListaMatryoshkaConfig
from sae.sparsifiers.matching_pursuit import MatchingPursuit, MatchingPursuitConfig
from sae.sparsifiers.matryoshka import MatryoshkaConfig
from sae.sparsifiers.p_annealing import PAnnealing, PAnnealingConfig
from sae.sparsifiers.refined import RefinedConfig
from sae.sparsifiers.relu import ReLU, ReLUConfig
from sae.sparsifiers.topk import TopK, TopKConfig
from sae.sparsifiers.transcoder import SkipTranscoderConfig, TranscoderConfig

__all__ = [
    "BatchTopK",
    "BatchTopKConfig",
    "Control",
    "Decode",
    "Error",
    "Flow",
    "Gated",
    "GatedConfig",
    "JumpReLU",
    "JumpReLUConfig",
    "ListaMatryoshkaConfig",
    "MatchingPursuit",
    "MatchingPursuitConfig",
    "MatryoshkaConfig",
    "Objective",
    "PAnnealing",
    "PAnnealingConfig",
    "Penalised",
    "PenalisedConfig",
    "ReLU",
    "ReLUConfig",
    "RefinedConfig",
    "SkipTranscoderConfig",
    "Sparsifier",
    "TopK",
    "TopKConfig",
    "TranscoderConfig",
]
