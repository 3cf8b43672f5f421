"""Other ways to a dictionary and to codes, measured by the same metrics as SAEs.

    rows = sae.baselines.run(["ksvd", "oracle_k"], source, d_sae=256, k=3)

random                directions drawn at random, each activation coded by its k largest projections
data_points           activations themselves as directions, coded by matching pursuit
pca, ica              at most d_in components, each as a pair of latents of opposite sign
semi_nmf              semi-non-negative matrix factorisation
dictionary_learning   scikit-learn's MiniBatchDictionaryLearning with non-negative codes
ksvd                  K-SVD, coded by orthogonal matching pursuit, each atom as a pair of latents
oracle, oracle_k      the true features, coded by non-negative sparse coding: free, and limited to k
sae_oracle            a trained SAE's dictionary, coded likewise: what its own encoder loses
oracle_pursuit, sae_pursuit   these dictionaries, coded by k steps of matching pursuit
"""

from sae.baselines.base import Baseline
from sae.baselines.by_name import BASELINES, Given, applicable, measured, prepare, run
from sae.baselines.coding import SparseCoding, oracle, pursuit, sparse_coding
from sae.baselines.fixed import data_points, random_dictionary
from sae.baselines.ksvd import learn_ksvd
from sae.baselines.linear import pca
from sae.baselines.orthogonal_pursuit import omp
from sae.baselines.scikit_learn import dictionary_learning, ica
from sae.baselines.semi_nmf import learn_semi_nmf

__all__ = [
    "BASELINES",
    "Baseline",
    "Given",
    "SparseCoding",
    "applicable",
    "data_points",
    "dictionary_learning",
    "ica",
    "learn_ksvd",
    "learn_semi_nmf",
    "measured",
    "omp",
    "oracle",
    "pca",
    "prepare",
    "pursuit",
    "random_dictionary",
    "run",
    "sparse_coding",
]
