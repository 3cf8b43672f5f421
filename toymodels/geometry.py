"""How a network arranges its features: norms, interference, dimensionality, and the polytopes that they form.

Every function reads W [..., n_features, d_hidden], rows as features; leading axes are models side by side. It
reads a learned dictionary W_dec just as well. Zero rows score 0. Definitions: docs/metrics.md, after Elhage et al.
2022 (Toy Models of Superposition) and Scherlis et al. 2022 (Polysemanticity and Capacity).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import nan, sqrt

import numpy as np
import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

REPRESENTED = 0.5
"""Norm above which a feature counts as represented."""


def norms(W: Float[Tensor, "*stack n_features d_hidden"]) -> Float[Tensor, "*stack n_features"]:
    """‖W_i‖."""
    return torch.linalg.vector_norm(W, dim=-1)


def represented(W: Float[Tensor, "*stack n_features d_hidden"]) -> Bool[Tensor, "*stack n_features"]:
    """‖W_i‖ > 0.5."""
    return norms(W) > REPRESENTED


def unit_rows(
    W: Float[Tensor, "*stack n_features d_hidden"],
) -> Float[Tensor, "*stack n_features d_hidden"]:
    """Ŵ_i = W_i / ‖W_i‖; a zero row stays zero."""
    length = norms(W)[..., None]
    return W / length.where(length > 0, 1)


def cosines(W: Float[Tensor, "*stack n_features d_hidden"]) -> Float[Tensor, "*stack n_features n_features"]:
    """Ŵ_i · Ŵ_j, the Gram matrix of the directions."""
    unit = unit_rows(W)
    return unit @ unit.mT


def _overlap(W: Float[Tensor, "*stack n_features d_hidden"]) -> Float[Tensor, "*stack n_features"]:
    """Σ_j (Ŵ_i · W_j)² = W_i (Wᵀ W) W_iᵀ / ‖W_i‖², without the n × n matrix."""
    inner, overlap = W.mT @ W, W.new_empty(W.shape[:-1])
    for rows in _blocks(W.shape[-2]):
        part = W[..., rows, :]
        overlap[..., rows] = (part @ inner * part).sum(-1)
    squares = norms(W).square()
    return overlap / squares.where(squares > 0, 1)


def interference(W: Float[Tensor, "*stack n_features d_hidden"]) -> Float[Tensor, "*stack n_features"]:
    """Σ_{j≠i} (Ŵ_i · W_j)²: how much of the other features is read along feature i."""
    return (_overlap(W) - norms(W).square()).clamp(min=0)


def feature_dimensionality(
    W: Float[Tensor, "*stack n_features d_hidden"],
) -> Float[Tensor, "*stack n_features"]:
    """D_i = ‖W_i‖² / Σ_j (Ŵ_i · W_j)²: the share of a dimension that feature i has to itself.

    Source: Elhage et al. 2022, The Geometry of Superposition. An exact tetrahedron gives 3/4, a triangle 2/3,
    a digon 1/2, a pentagon 2/5, a square antiprism 3/8.
    """
    overlap = _overlap(W)
    return norms(W).square() / overlap.where(overlap > 0, 1)


def capacity(W: Float[Tensor, "*stack n_features d_hidden"]) -> Float[Tensor, "*stack"]:
    """Σ_i D_i, at most the number of dimensions (Scherlis et al. 2022)."""
    return feature_dimensionality(W).sum(-1)


def dimensions_per_feature(W: Float[Tensor, "*stack n_features d_hidden"]) -> Float[Tensor, "*stack"]:
    """D* = d_hidden / ‖W‖_F² (Elhage et al. 2022); infinite for W = 0."""
    return W.shape[-1] / norms(W).square().sum(-1)


def purity_weights(W: Float[Tensor, "*stack n_features d_hidden"]) -> Float[Tensor, "*stack d_hidden"]:
    """max_i |W_ik| / Σ_i |W_ik| of each hidden unit k: 1 when it serves a single feature."""
    total = reduce(W.abs(), "... n k -> ... k", "sum")
    return reduce(W.abs(), "... n k -> ... k", "max") / total.where(total > 0, 1)


def welch_bound(n_features: int, d_hidden: int) -> float:
    """√((n − m) / (m (n − 1))): no n unit vectors in m dimensions have a smaller largest, or rms, |cosine|.

    Undefined (nan) for n ≤ m, where they can be orthogonal. Source: Welch 1974.
    """
    n, m = n_features, d_hidden
    return sqrt((n - m) / (m * (n - 1))) if n > m else nan


# Entries of a Gram matrix that are looked at together: a dictionary of 100 000 rows has more than fit in memory.
BLOCK_ENTRIES = 2**22


def _blocks(n_features: int) -> Iterator[slice]:
    rows = max(1, BLOCK_ENTRIES // max(n_features, 1))
    return (slice(start, min(start + rows, n_features)) for start in range(0, n_features, rows))


def coherence_over_welch(W: Float[Tensor, "*stack n_features d_hidden"]) -> Float[Tensor, "*stack"]:
    """max_{i≠j} |Ŵ_i · Ŵ_j| over the Welch bound; nan for n ≤ m."""
    unit = unit_rows(W)
    largest = W.new_zeros(W.shape[:-2])
    for rows in _blocks(W.shape[-2]):
        block = (unit[..., rows, :] @ unit[..., rows.start :, :].mT).abs_()  # what lies left of it, was in one before
        block.diagonal(0, -2, -1).zero_()
        largest = torch.maximum(largest, block.amax((-2, -1)))
    return largest / welch_bound(*W.shape[-2:])


def rms_over_welch(W: Float[Tensor, "*stack n_features d_hidden"]) -> Float[Tensor, "*stack"]:
    """Root mean square of Ŵ_i · Ŵ_j over i ≠ j, over the Welch bound; 1 for a tight frame, nan for n ≤ m."""
    n, inner = W.shape[-2], W.new_zeros(())
    for rows in _blocks(n):
        unit = unit_rows(W[..., rows, :])
        inner = inner + unit.mT @ unit
    off_diagonal = inner.square().sum((-2, -1)) - (norms(W) > 0).sum(-1)
    return (off_diagonal.clamp(min=0) / max(n * (n - 1), 1)).sqrt() / welch_bound(*W.shape[-2:])


def _inner(W: Float[Tensor, "*stack n_features d_hidden"]) -> Float[Tensor, "*stack d_hidden d_hidden"]:
    """W^T W in float64, from blocks of rows: square roots of its eigenvalues need the digits."""
    parts = (W[..., rows, :].double() for rows in _blocks(W.shape[-2]))
    return sum((part.mT @ part for part in parts), torch.zeros((), dtype=torch.float64, device=W.device))


def effective_rank(W: Float[Tensor, "*stack n_features d_hidden"]) -> Float[Tensor, "*stack"]:
    """exp(−Σ p log p) of the normalised singular values p = σ / Σσ (Roy & Vetterli 2007); 0 for W = 0."""
    # Of a tall matrix, by the eigenvalues of W^T W: as exact as an entropy needs, at a fraction of the cost.
    tall = W.shape[-2] > 4 * W.shape[-1]
    sigma = torch.linalg.eigvalsh(_inner(W)).clamp(min=0).sqrt() if tall else torch.linalg.svdvals(W)
    total = sigma.sum(-1, keepdim=True)
    entropy = torch.special.entr(sigma / total.where(total > 0, 1)).sum(-1)
    return entropy.exp() * (total.squeeze(-1) > 0)


def participation_ratio(W: Float[Tensor, "*stack n_features d_hidden"]) -> Float[Tensor, "*stack"]:
    """(Σλ)² / Σλ² of the squared singular values λ: how many directions share the variance; 0 for W = 0."""
    covariance = W.mT @ W
    squared = covariance.square().sum((-2, -1))
    return norms(W).square().sum(-1).square() / squared.where(squared > 0, 1)


POLYTOPES: dict[str, list[float]] = {
    "single": [],
    "digon": [-1],
    "triangle": [-1 / 2] * 2,
    "square": [-1, 0, 0],
    "tetrahedron": [-1 / 3] * 3,
    "pentagon": [-0.809, -0.809, 0.309, 0.309],
    "square antiprism": [-0.805, -0.805, -1 / 3, 0.138, 0.138, 1 / 3, 1 / 3],
}
"""The sorted cosines from one vertex to the others; every vertex of these polytopes sees the same ones."""


@dataclass(frozen=True)
class Polytope:
    """Features that interfere with one another, and the shape that they form."""

    kind: str
    features: tuple[int, ...]


def polytopes(
    W: Float[Tensor, "n_features d_hidden"], threshold: float = 0.1, tolerance: float = 0.15
) -> list[Polytope]:
    """The polytopes that the represented features form, in order of their first feature.

    Features belong together when a chain of |cosines| above `threshold` links them. A group is named after
    the shape whose cosines match, within `tolerance`, those that each vertex sees; else it is "other". An
    exact square is a pair of orthogonal digons, reported as such; a "square" is one whose diagonals lean.
    """
    chosen = represented(W).nonzero().squeeze(1)
    unit = unit_rows(W.detach()[chosen])
    group = _components(unit, threshold)
    order = group.argsort(stable=True)
    members = order.split(group.bincount().tolist()) if len(order) else ()
    return [Polytope(_kind(unit[g], tolerance), tuple(chosen[g].tolist())) for g in members]


def _components(unit: Float[Tensor, "n d"], threshold: float) -> Int[Tensor, " n"]:
    """The connected component of each row, where |cosines| above the threshold are edges; numbered by first row."""
    from scipy.sparse import coo_array  # noqa: PLC0415 (a slow import)
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    n = len(unit)
    label = np.arange(n)
    for rows in _blocks(n):
        near = (unit[rows] @ unit[rows.start :].T).abs_() > threshold
        i, j = (index.cpu().numpy() + rows.start for index in near.nonzero(as_tuple=True))
        # What is known so far: each row is tied to the row that its component is named after.
        i, j = np.concatenate([i, np.arange(n)]), np.concatenate([j, label])
        _, component = connected_components(coo_array((np.ones(len(i), bool), (i, j)), (n, n)), directed=False)
        _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
        label = first[inverse]
    return torch.from_numpy(np.unique(label, return_inverse=True)[1])


def _kind(unit: Float[Tensor, "n d"], tolerance: float) -> str:
    """The shape whose vertices all see the cosines that these do."""
    if len(unit) > max(len(seen) for seen in POLYTOPES.values()) + 1:
        return "other"
    seen = (unit @ unit.T).cpu().sort(dim=1).values[:, :-1]  # the last is the vertex itself, at cosine 1
    for kind, cosines_of_vertex in POLYTOPES.items():
        if len(cosines_of_vertex) == seen.shape[1]:
            difference = (seen - torch.tensor(cosines_of_vertex, dtype=seen.dtype)).abs()
            if not difference.numel() or difference.max() <= tolerance:
                return kind
    return "other"
