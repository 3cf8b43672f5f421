"""Semi-non-negative matrix factorisation: codes of one sign, directions of any."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.baselines.base import Baseline, unit_rows
from sae.baselines.coding import sparse_coding
from sae.held_out import HeldOut
from toymodels.streams import generator


def learn_semi_nmf(
    x: Float[Tensor, "batch d"], n_atoms: int, *, n_rounds: int = 100, seed: int = 0
) -> tuple[Float[Tensor, "n_atoms d"], Float[Tensor, "batch n_atoms"]]:
    """argmin_{F, G ≥ 0} |x - G F|^2, by turns

        F <- (G^T G)^+ G^T x,    G <- G ∘ sqrt(([x F^T]_+ + G [F F^T]_-) / ([x F^T]_- + G [F F^T]_+)),

    where [A]_± = (|A| ± A) / 2; neither raises the objective.
    Source: Ding, Li & Jordan 2010, section 3. G begins as clusters + 0.2: each sample's nearest of randomly chosen
    samples.
    """
    centres = x[torch.randperm(len(x), generator=generator(seed, "semi-nmf"))[:n_atoms]]
    G = torch.nn.functional.one_hot(torch.cdist(x, centres).argmin(dim=1), n_atoms).to(x.dtype) + 0.2
    F = fitted_directions(x, G)
    for _ in range(n_rounds):
        G = updated_codes(x, G, F)
        F = fitted_directions(x, G)
    return F, G


def fitted_directions(x: Float[Tensor, "batch d"], G: Float[Tensor, "batch n"]) -> Float[Tensor, "n d"]:
    """(G^T G)^+ G^T x."""
    gram, of_x = (G.T @ G).double(), (G.T @ x).double()
    # What the products' rounding leaves of a direction that is not there would be divided by.
    return (torch.linalg.pinv(gram, hermitian=True, rtol=len(gram) * torch.finfo(G.dtype).eps) @ of_x).to(x.dtype)


def updated_codes(
    x: Float[Tensor, "batch d"], G: Float[Tensor, "batch n"], F: Float[Tensor, "n d"]
) -> Float[Tensor, "batch n"]:
    """One multiplicative step, its two large products had from one: [F F^T]_± = (|F F^T| ± F F^T) / 2."""
    of_x, in_size, signed = x @ F.T, G @ (F @ F.T).abs(), (G @ F) @ F.T
    up = of_x.clamp_min(0) + (in_size - signed).clamp_min(0) / 2
    down = (-of_x).clamp_min(0) + (in_size + signed).clamp_min(0) / 2
    return G * (up / down.clamp_min(torch.finfo(G.dtype).tiny)).sqrt()


def semi_nmf(
    x: Float[Tensor, "batch d_in"],
    d_sae: int,
    truth: Float[Tensor, "n_features d_in"] | None,
    validation: HeldOut,
    k: int,
    seed: int,
) -> Baseline:
    """The directions of a semi-NMF, coded with at most k.

    Nothing in it asks for sparse codes, and with more directions than dimensions its error can reach 0 without any
    feature being found: it shows what non-negative codes give alone.
    """
    mean = x.mean(dim=0)
    F, _ = learn_semi_nmf(x - mean, d_sae, seed=seed)
    return sparse_coding(unit_rows(F), truth, validation, k, mean)
