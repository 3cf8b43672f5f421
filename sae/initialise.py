"""How a sparsifier with one threshold per latent starts: sparse, as its steps expect."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.codes import kth_largest
from sae.model import SAE

# Activations that the start is fitted on, at most. A latent that fires for one in a thousand still fires for eight.
N_ROWS = 8192
# Pre-latents that exist together, at most.
ENTRIES = 2**24


@torch.no_grad()
def cuts(sae: SAE, x: Float[Tensor, "rows d_in"], l0: float) -> Float[Tensor, " d_sae"]:
    """What each latent's pre-latent exceeds for l0 / d_sae of the activations x, all latents for the same share.

    Where all latents fire above their cuts, l0 of them fire for one activation on average. x is in the trainer's
    units.
    """
    x = x[:: max(len(x) // N_ROWS, 1)].to(sae.encoder.dtype)
    rank = min(max(round(l0 / sae.d_sae * len(x)), 1), len(x) - 1)
    latents = torch.arange(sae.d_sae, device=x.device).split(max(ENTRIES // len(x), 1))
    columns = (column for some in latents for column in sae.affine(x, some).T.contiguous())
    # Strictly above: half-way between the last pre-latent that fires and the first that does not.
    return torch.stack([(kth_largest(column, rank) + kth_largest(column, rank + 1)) / 2 for column in columns])
