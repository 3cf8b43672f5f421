"""Principal components: at most d_in directions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.baselines.base import Baseline, signed_pairs


def pca(x: Float[Tensor, "batch d_in"]) -> Baseline:
    """Principal components, d_in of them, with both signs."""
    mean = x.mean(dim=0)
    components = torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors.T.flip(0).contiguous()
    return signed_pairs(components, mean, lambda x: x @ components.T)
