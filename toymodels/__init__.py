"""Worlds whose true features are known: small networks that store more features than they have dimensions.

features = toymodels.Features(n_features=256, feature_prob=0.01)
model = toymodels.ToyModel(256, d_hidden=64, generator=toymodels.generator(0, "init"))
toymodels.train(model, features, n_steps=3000, generator=toymodels.generator(0, "batches"))
toymodels.geometry.norms(model.W)
"""

from toymodels import geometry
from toymodels.features import FeatureBatch, Features
from toymodels.models import ToyModel
from toymodels.saelens import load_world
from toymodels.sparse_coding import best_threshold, select_penalty, sparse_code
from toymodels.streams import generator
from toymodels.synthetic import SyntheticWorld, WorldDescription
from toymodels.training import ToyTraining, train, weighted_error

__all__ = [
    "FeatureBatch",
    "Features",
    "SyntheticWorld",
    "ToyModel",
    "ToyTraining",
    "WorldDescription",
    "best_threshold",
    "generator",
    "geometry",
    "load_world",
    "select_penalty",
    "sparse_code",
    "train",
    "weighted_error",
]
