"""K-SVD: a dictionary learned by alternating sparse coding with fitting its atoms one after another."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.baselines.base import Baseline, signed_pairs
from sae.baselines.orthogonal_pursuit import SignedCodes, omp
from toymodels.geometry import unit_rows
from toymodels.streams import generator

# Atoms that fewer samples use, or that are as close to another one, are replaced (Rubinstein's KSVD-Box).
LEAST_USES, TWINS = 4, 0.99


def learn_ksvd(
    x: Float[Tensor, "batch d"], n_atoms: int, k: int, *, n_rounds: int = 20, seed: int = 0
) -> Float[Tensor, "n_atoms d"]:
    """argmin_{D, z} |x - z D|^2 with at most k codes z, of either sign, in each row, and |D_j| = 1; x is centred.

    Each round codes x by orthogonal matching pursuit, then fits each atom and its codes to what the other atoms leave
    over. Between rounds, atoms that hardly a sample uses, and atoms that are a twin of another, are replaced by the
    samples that are coded worst. It begins with samples as atoms.
    Source: Aharon et al. 2006; the approximate update of Rubinstein et al. 2008.

    Raises:
        ValueError: k outside 1..min(n_atoms, d).
    """
    stream = generator(seed, "ksvd")
    D = unit_rows(x[torch.randperm(len(x), generator=stream)[:n_atoms]])
    if len(D) < n_atoms:
        D = torch.cat([D, unit_rows(torch.randn(n_atoms - len(D), x.shape[1], generator=stream, dtype=x.dtype))])
    for number in range(n_rounds):
        codes = omp(x, D, k)
        residual = x - codes.decode(D)
        update_atoms_(D, codes, residual)
        if number + 1 < n_rounds:
            replace_atoms_(D, codes, x, residual)
    return D


def update_atoms_(D: Float[Tensor, "n d"], codes: SignedCodes, residual: Float[Tensor, "batch d"]) -> None:
    """One after another, each atom and its codes g are fitted to E = residual + g D_j on the samples that use it:

        D_j <- E^T g / |E^T g|,    g <- E D_j,

    half a step of the power method for E's first singular pair, which never raises |residual|. E is not formed.
    """
    k = codes.values.shape[1]
    values = codes.values.view(-1)
    used = (values != 0).nonzero().squeeze(1)
    used = used[codes.atoms.view(-1)[used].argsort(stable=True)]
    uses = torch.bincount(codes.atoms.view(-1)[used], minlength=len(D))
    for j, slots in enumerate(used.split(uses.tolist())):
        if not len(slots):
            continue
        rows, g, old = slots // k, values[slots], D[j].clone()
        own = residual[rows]
        new = own.T @ g + g.dot(g) * old
        norm = torch.linalg.vector_norm(new)
        if not norm > 0:
            continue
        new /= norm
        fitted = own @ new + g * old.dot(new)
        own.addmm_(torch.stack([g, -fitted], dim=1), torch.stack([old, new]))
        residual[rows], values[slots], D[j] = own, fitted, new


def replace_atoms_(
    D: Float[Tensor, "n d"], codes: SignedCodes, x: Float[Tensor, "batch d"], residual: Float[Tensor, "batch d"]
) -> int:
    """Puts the samples that are coded worst in the place of atoms of no use; returns how many."""
    uses = torch.bincount(codes.atoms[codes.values != 0], minlength=len(D))
    order = uses.argsort(descending=True, stable=True)
    overlap = (D[order] @ D[order].T).abs().tril(-1)
    twin = torch.zeros_like(uses, dtype=torch.bool)
    twin[order] = (overlap > TWINS).any(dim=1)  # of one that is used more
    bad = ((uses < LEAST_USES) | twin).nonzero().squeeze(1)
    size = torch.linalg.vector_norm(residual, dim=1)
    worst = size.topk(min(len(bad), len(x)))
    worst_rows = worst.indices[worst.values > 0]
    D[bad[: len(worst_rows)]] = unit_rows(x[worst_rows])
    return len(worst_rows)


def ksvd(x: Float[Tensor, "batch d_in"], d_sae: int, k: int, seed: int) -> Baseline:
    """K-SVD's dictionary and its own codes, by orthogonal matching pursuit; d_sae atoms, each with both signs."""
    mean = x.mean(dim=0)
    D = learn_ksvd(x - mean, d_sae, k, seed=seed)
    return signed_pairs(D, mean, lambda x: omp(x, D, k).dense(len(D)))
