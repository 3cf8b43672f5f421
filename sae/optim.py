"""The optimiser, and what keeps decoder rows on the unit sphere."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
    """Fused Adam: one pass over each parameter and its moments. The trainer sets the learning rate each step."""
    return torch.optim.Adam(parameters, lr=0.0, betas=(0.9, 0.999), fused=True)


@torch.no_grad()
def project_gradient_(gradient: Float[Tensor, "d_sae d"], unit_rows: Float[Tensor, "d_sae d"]) -> None:
    """Removes from each row's gradient the part along the row: g - (g . w) w.

    That part would change the norm, which renormalisation undoes, but it would also feed Adam's moments.
    """
    radial = (gradient * unit_rows).sum(dim=1, keepdim=True)
    gradient.addcmul_(radial, unit_rows, value=-1)


@torch.no_grad()
def normalise_rows_(rows: Float[Tensor, "d_sae d"]) -> None:
    """w / |w| for each row."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(1e-12))
