"""Train sparse autoencoders on any activations, and know whether they found the truth.

import sae
result = sae.train(sae.load_config("configs/mine.yaml"))
model = sae.load("runs/mine")
score = sae.metrics.recovery(model.W_dec, true_features)
"""

import os

# OpenMP's threads spin while they wait for each other, libgomp's for more than ten milliseconds: where a core is also
# wanted by something else, those that wait keep it from those that are waited for, and a step takes ten times as long.
# After so many turns, a quarter of a millisecond, they sleep; an idle machine is as fast as before.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "6000")

from sae import formats, metrics
from sae.again import evaluate_run
from sae.codes import SparseCodes
from sae.config import SAEConfig, SourceConfig, TrainConfig, load_config
from sae.errors import UsageError
from sae.model import SAE, load
from sae.networks import ModelSourceConfig, harvest, splice
from sae.plugins import load_plugin
from sae.run import Result, train
from sae.sources import HeldOut, Source
from sae.sparsifiers import Sparsifier
from sae.stores import StoreSourceConfig, open_store
from sae.unfinished import load_checkpoint
from sae.world_source import ToySourceConfig, WorldSourceConfig

__all__ = [
    "SAE",
    "HeldOut",
    "ModelSourceConfig",
    "Result",
    "SAEConfig",
    "Source",
    "SourceConfig",
    "SparseCodes",
    "Sparsifier",
    "StoreSourceConfig",
    "ToySourceConfig",
    "TrainConfig",
    "UsageError",
    "WorldSourceConfig",
    "evaluate_run",
    "formats",
    "harvest",
    "load",
    "load_checkpoint",
    "load_config",
    "load_plugin",
    "metrics",
    "open_store",
    "splice",
    "train",
]
