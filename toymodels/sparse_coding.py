"""Non-negative sparse coding with a given dictionary: the oracle that knows the features and infers the rest.

An SAE's code is one matrix product and a threshold. The codes found here are the best ones for the same
dictionary, so that the gap between the two separates a bad dictionary from a bad encoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toymodels.thresholds import best_threshold

# Atoms that a row may add in one step: larger supports are found in fewer steps.
AT_ONCE = 4


def sparse_code(
    x: Float[Tensor, "batch d"],
    dictionary: Float[Tensor, "n d"],
    penalty: float,
    *,
    k: int | None = None,
    tolerance: float = 1e-4,
    n_steps: int | None = None,
) -> Float[Tensor, "batch n"]:
    """argmin_{z ≥ 0} ½|x − zD|² + penalty · Σ_j z_j for each row of x.

    With `k`, the k largest codes of that solution are kept, and refitted without a penalty: NNLS on them.

    Each row adds the atoms that violate the Karush-Kuhn-Tucker conditions most, solves for the codes of its
    support exactly, dropping those that would turn negative, and is done when no atom has
    (x − zD)·D_j > penalty + tolerance · |x| · max_j |D_j|. Cost follows the size of the supports.
    Source: Lawson & Hanson 1974, chapter 23, batched over rows and with a penalty.

    Raises:
        ValueError: a negative penalty, k outside 1..n, or x and dictionary of different widths.
    Warns:
        UserWarning: rows left undone after `n_steps`, by default 2 · (n + d).
    """
    n, d = dictionary.shape
    if x.shape[1] != d:
        raise ValueError(f"x has {x.shape[1]} dimensions, the dictionary {d}; they must agree")
    if penalty < 0:
        raise ValueError(f"penalty must not be negative, got {penalty}")
    if k is not None and not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..n={n}, got {k}")
    n_steps = 2 * (n + d) if n_steps is None else n_steps
    with torch.no_grad():
        z = _active_set(x, dictionary, penalty, tolerance=tolerance, n_steps=n_steps)
        return z if k is None else refit_largest(x, dictionary, z, k, tolerance=tolerance, n_steps=n_steps)


def refit_largest(
    x: Float[Tensor, "batch d"],
    dictionary: Float[Tensor, "n d"],
    z: Float[Tensor, "batch n"],
    k: int | Int[Tensor, " batch"],
    *,
    tolerance: float = 1e-4,
    n_steps: int | None = None,
) -> Float[Tensor, "batch n"]:
    """argmin_{z' ≥ 0} |x − z'D|² over the k largest positive codes of each row of z; k may differ from row to row."""
    most = min(int(torch.as_tensor(k).max()) if len(x) else 0, len(dictionary))
    largest = z.topk(most, dim=1)
    within = torch.arange(most, device=z.device) < torch.as_tensor(k, device=z.device).reshape(-1, 1)
    allowed = torch.zeros_like(z, dtype=torch.bool).scatter_(1, largest.indices, (largest.values > 0) & within)
    steps = 2 * sum(dictionary.shape) if n_steps is None else n_steps
    with torch.no_grad():
        return _active_set(x, dictionary, 0.0, allowed, tolerance=tolerance, n_steps=steps)


def _active_set(
    x: Float[Tensor, "batch d"],
    D: Float[Tensor, "n d"],
    penalty: float,
    allowed: Bool[Tensor, "batch n"] | None = None,
    *,
    tolerance: float,
    n_steps: int,
) -> Float[Tensor, "batch n"]:
    """The minimiser, whose support may be restricted to the allowed atoms."""
    z = x.new_zeros(len(x), len(D))
    n_candidates = min(AT_ONCE, len(D))
    slack = tolerance * torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(D, dim=1).amax()
    # The rows that are not done, the atoms in their slots and those atoms' codes; a free slot has code 0.
    rows = torch.arange(len(x), device=x.device)
    atoms, codes = rows.new_zeros(len(x), 1), x.new_zeros(len(x), 1)
    for _ in range(n_steps):
        residual = x[rows] - F.embedding_bag(atoms, D, per_sample_weights=codes, mode="sum")
        violation = residual @ D.mT
        if allowed is not None:
            violation.masked_fill_(~allowed[rows], -torch.inf)
        violation, candidates = (violation - penalty).topk(n_candidates, dim=1)
        open_ = violation[:, 0] > slack[rows]
        z.index_put_((rows[~open_, None], atoms[~open_]), codes[~open_], accumulate=True)
        if not open_.any():
            return z
        rows, candidates, violation = rows[open_], candidates[open_], violation[open_]
        n_added = (violation > violation[:, :1] / 2).sum(dim=1, keepdim=True)
        codes, order = codes[open_].sort(dim=1, descending=True)
        atoms = atoms[open_].gather(1, order)
        used = (codes > 0).sum(dim=1, keepdim=True)
        width = int(used.max()) + n_candidates
        codes, atoms = (F.pad(slots, (0, n_candidates))[:, :width] for slots in (codes, atoms))
        atoms = atoms.scatter(1, used + torch.arange(n_candidates, device=x.device), candidates)
        on = torch.arange(width, device=x.device) < used + n_added
        directions = D[atoms]
        gram = directions @ directions.mT
        target = einsum(x[rows], directions, "b d, b s d -> b s") - penalty
        codes = _solve_on_support(gram, target, on, codes)
    warnings.warn(f"sparse coding stopped after {n_steps} steps with {len(rows)} rows undone", stacklevel=3)
    return z.index_put_((rows[:, None], atoms), codes, accumulate=True)


def _solve_on_support(
    gram: Float[Tensor, "batch slots slots"],
    target: Float[Tensor, "batch slots"],
    on: Bool[Tensor, "batch slots"],
    codes: Float[Tensor, "batch slots"],
) -> Float[Tensor, "batch slots"]:
    """argmin_{z ≥ 0} ½ zᵀ gram z − target·z over a support that shrinks from the slots which are on.

    From the feasible codes it moves towards the unconstrained minimiser up to the first code that reaches 0,
    drops that atom, and aims anew, until the minimiser is positive.
    """
    codes, on = codes.clone(), on.clone()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = 32 * torch.finfo(gram.dtype).eps * diagonal  # keeps near-copies of an atom solvable
    undone = torch.arange(len(gram), device=gram.device)
    while len(undone):
        live, start = on[undone], codes[undone]
        both = live[:, :, None] & live[:, None, :]
        system = gram[undone] * both + torch.diag_embed(ridge[undone].where(live, 1))
        factor = torch.linalg.cholesky(system)
        aim = torch.cholesky_solve(rearrange(target[undone] * live, "b s -> b s 1"), factor).squeeze(2)
        negative = live & (aim < 0)
        reach = torch.where(negative, start / (start - aim), 1)
        step = reach.amin(dim=1, keepdim=True)
        dropped = negative & (reach <= step)
        codes[undone] = (start + step * (aim - start)).masked_fill_(dropped, 0)
        on[undone] = live & ~dropped
        undone = undone[negative.any(dim=1)]
    return codes


class PenaltyChoice(NamedTuple):
    """The penalty and firing threshold that read the features best, and how well they did."""

    penalty: float
    threshold: float
    f1: float


def select_penalty(
    x: Float[Tensor, "batch d"],
    truth: Float[Tensor, "batch n"],
    dictionary: Float[Tensor, "n d"],
    *,
    penalties: Sequence[float] | None = None,
    k: int | None = None,
) -> PenaltyChoice:
    """The penalty, and the threshold above which a code fires, of highest macro F1 on validation data.

    Row j of the dictionary is meant to be feature j, active where truth > 0. F1 = 2tp / (2tp + fp + fn) is
    averaged over the features that fire. Without a list, ten penalties are tried, from .001 to .5 (evenly in
    the logarithm) of the median row's largest (x · D_j).

    Raises:
        ValueError: no feature fires, or no penalties are given.
    """
    fires = truth > 0
    if not fires.any():
        raise ValueError("no feature fires in truth; pass a larger validation set")
    if penalties is None:
        largest = (x @ dictionary.mT).amax(dim=1)
        penalties = (largest[fires.any(dim=1)].median() * torch.logspace(-3, -0.3, 10)).tolist()
    if not penalties:
        raise ValueError("penalties must name at least one")
    choices = []
    for penalty in penalties:
        z = sparse_code(x, dictionary, penalty, k=k)
        choices.append(PenaltyChoice(penalty, *best_threshold(z, fires)))
    return max(choices, key=lambda choice: choice.f1)
