"""Dictionaries that are not learned: random directions, and the samples themselves."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.baselines.base import Baseline
from sae.baselines.coding import pursuit
from sae.errors import UsageError
from sae.sparsifiers import TopK
from toymodels.geometry import unit_rows
from toymodels.streams import generator


def random_dictionary(d_sae: int, mean: Float[Tensor, " d_in"], k: int, seed: int) -> Baseline:
    """Random unit directions, each activation coded by its k largest projections: what chance looks like."""
    rows = unit_rows(torch.randn(d_sae, len(mean), generator=generator(seed, "random dictionary")))
    return Baseline(rows, mean, lambda x: TopK(k)(x @ rows.T).dense())


def data_points(x: Float[Tensor, "batch d_in"], d_sae: int, k: int, seed: int) -> Baseline:
    """Samples as dictionary: d_sae of them at random, centred and of norm 1, coded by matching pursuit.

    Nothing is fitted. Where few features are on at a time, a sample is close to one of them, and such a dictionary
    comes close to learnt ones (Coates & Ng 2011, "random patches").

    Raises:
        UsageError: there are fewer samples than latents.
    """
    if len(x) < d_sae:
        raise UsageError(
            f"data_points needs d_sae={d_sae} activations that differ from the mean, got {len(x)}; lower d_sae"
        )
    mean = x.mean(dim=0)
    rows = x[torch.randperm(len(x), generator=generator(seed, "data points"))[:d_sae]] - mean
    return pursuit(rows, k, mean)
