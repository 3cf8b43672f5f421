"""Semi-non-negative matrix factorisation: codes of one sign, directions of any."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.baselines.base import Baseline
from sae.baselines.coding import pursuit
from sae.errors import UsageError
from toymodels.streams import generator


def learn_semi_nmf(
    x: Float[Tensor, "batch d"], n_atoms: int, *, n_rounds: int = 30, seed: int = 0
) -> tuple[Float[Tensor, "n_atoms d"], Float[Tensor, "batch n_atoms"]]:
    """argmin_{F, G ≥ 0} |x - G F|^2 in float64, by turns

        F <- (G^T G)^+ G^T x,    G <- G ∘ sqrt(([x F^T]_+ + G [F F^T]_-) / ([x F^T]_- + G [F F^T]_+)),

    where [A]_± = (|A| ± A) / 2; neither raises the objective.
    Source: Ding, Li & Jordan 2010, section 3. G begins as clusters + 0.2: each sample's nearest of some samples, which
    are chosen at random and belong to themselves.

    Raises:
        UsageError: there are fewer samples than atoms.
    """
    if len(x) < n_atoms:
        raise UsageError(f"a semi-NMF with {n_atoms} atoms needs at least that many samples, got {len(x)}; lower d_sae")
    chosen = torch.randperm(len(x), generator=generator(seed, "semi-nmf"))[:n_atoms]
    nearest = torch.cdist(x, x[chosen]).argmin(dim=1)
    nearest[chosen] = torch.arange(n_atoms)
    G = torch.nn.functional.one_hot(nearest, n_atoms).to(x.dtype) + 0.2
    F = fitted_directions(x, G)
    for _ in range(n_rounds):
        G = updated_codes(x, G, F)
        F = fitted_directions(x, G)
    return F, G


def fitted_directions(x: Float[Tensor, "batch d"], G: Float[Tensor, "batch n"]) -> Float[Tensor, "n d"]:
    """(G^T G)^+ G^T x."""
    return torch.linalg.pinv(G.T @ G, hermitian=True) @ (G.T @ x)


def updated_codes(
    x: Float[Tensor, "batch d"], G: Float[Tensor, "batch n"], F: Float[Tensor, "n d"]
) -> Float[Tensor, "batch n"]:
    """One multiplicative step. Twice its numerator and denominator are |x F^T| + G |F F^T| ± (x - G F) F^T."""
    size = (x @ F.T).abs_().addmm_(G, (F @ F.T).abs_())
    slope = (x - G @ F) @ F.T
    up = (size + slope).clamp_min_(0)
    down = size.sub_(slope).clamp_min_(torch.finfo(G.dtype).tiny)
    return up.div_(down).sqrt_().mul_(G)


def semi_nmf(x: Float[Tensor, "batch d_in"], d_sae: int, k: int, seed: int) -> Baseline:
    """The directions of a semi-NMF, coded by matching pursuit with at most k, as its own codes are not sparse.

    With more directions than dimensions its error can reach 0 without any feature being found: it shows what
    non-negative codes give alone.
    """
    mean = x.mean(dim=0)
    F, _ = learn_semi_nmf((x - mean).double(), d_sae, seed=seed)
    return pursuit(F.to(x.dtype), k, mean)
