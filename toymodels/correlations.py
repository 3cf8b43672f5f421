"""Which features draw together: Gaussian copulas, whose marginals are exact.

Feature i draws where z_i > t_i with z_i ~ N(0, 1) and t_i = Φ⁻¹(1 − p_i). The z of different features are
correlated, by factors that all share or by one for each group.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int

from toymodels.errors import UsageError
from toymodels.firing import Profile

logger = logging.getLogger("toymodels")

Factors = Float[torch.Tensor, "n_features rank"]

# The most that shared factors may explain of a feature's variance.
MOST_SHARED = 0.99


@dataclass(frozen=True)
class LowRank:
    """z_i = l_i · u + √(1 − |l_i|²) ε_i with u ~ N(0, 1)^rank for each row: corr(z_i, z_j) = l_i · l_j.

    The entries of l are N(0, scale²); a row with |l_i|² above .99 is scaled down to it.
    """

    KIND: ClassVar = "low_rank"
    rank: int = 8
    scale: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(
                f"rank must be at least 1, got {self.rank}; leave correlation out for independent features"
            )
        if self.scale < 0:
            raise UsageError(f"scale must not be negative, got {self.scale}; factors have either sign anyway")

    def factors(self, n: int, stream: torch.Generator) -> Factors:
        """l, one row for each feature."""
        loadings = self.scale * torch.randn(n, self.rank, generator=stream)
        shared = loadings.square().sum(1)
        if n_capped := int((shared > MOST_SHARED).sum()):
            logger.warning(
                "correlation: the factors of %d of %d features were scaled down to explain %g of their variance; lower "
                "rank or scale",
                n_capped,
                n,
                MOST_SHARED,
            )
        return loadings * (MOST_SHARED / shared).sqrt().clamp(max=1)[:, None]


@dataclass(frozen=True)
class Groups:
    """Groups of `size` features: corr(z_i, z_j) = rho inside a group, 0 outside.

    z_i = √|rho| w + √(1 − |rho|) ε_i with one w ~ N(0, 1) for each row and group; where rho is negative, which takes
    pairs, −w for the second. Features without a parent are grouped in order; those that fill no group are independent.
    """

    KIND: ClassVar = "groups"
    size: int = 2
    rho: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 2:
            raise UsageError(
                f"size must be at least 2, got {self.size}; leave correlation out for independent features"
            )
        if not abs(self.rho) <= MOST_SHARED:
            raise UsageError(f"rho must lie in [−{MOST_SHARED}, {MOST_SHARED}], got {self.rho}; bring it closer to 0")
        if self.rho < 0 and self.size > 2:
            raise UsageError(
                f"a negative rho takes pairs, got {self.rho} with size={self.size}: not all of them can be opposed; "
                "set size to 2, or make siblings exclusive"
            )

    def signs(self, members: Int[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Of w, by the place of a member in its group."""
        return np.where(members % self.size == 1, math.copysign(1.0, self.rho), 1.0)


Correlation = LowRank | Groups


def thresholds(probs: Profile) -> Profile:
    """t_i = Φ⁻¹(1 − p_i), in float64; +∞ for a feature that never draws, −∞ for one that always does."""
    return -torch.special.ndtri(probs)


def some_fire_prob(
    threshold: Float[np.ndarray, "groups size"], sign: Float[np.ndarray, " size"], rho: float
) -> Float[np.ndarray, " groups"]:
    """P(some member draws) = 1 − ∫ φ(w) Π_i Φ((t_i − s_i √|rho| w) / √(1 − |rho|)) dw.

    By the trapezoidal rule, whose error falls faster than any power for integrands such as this one: below 1e-12 here.
    """
    w = np.linspace(-9, 9, 1441)
    density = np.exp(-w * w / 2) / math.sqrt(2 * math.pi) * (w[1] - w[0])
    none = np.ones((len(threshold), len(w)))
    for i in range(threshold.shape[1]):
        at = (threshold[:, i, None] - sign[i] * math.sqrt(abs(rho)) * w) / math.sqrt(1 - abs(rho))
        none *= torch.special.ndtr(torch.from_numpy(at)).numpy()
    return 1 - none @ density


def rotated(factors: Factors, tree: Int[np.ndarray, " n_features"], stream: torch.Generator) -> Factors:
    """The factors of each tree, rotated by its own orthogonal matrix.

    Inside a tree all products l_i · l_j stay, and with them every marginal; across trees they are drawn anew.
    """
    result = factors.clone()
    _, where, sizes = np.unique(tree, return_inverse=True, return_counts=True)
    order = torch.from_numpy(np.argsort(where, kind="stable"))
    alone = torch.from_numpy(np.isin(where, np.flatnonzero(sizes == 1)))
    # A row that is alone only keeps its length.
    fresh = torch.randn(int(alone.sum()), factors.shape[1], generator=stream)
    result[alone] = fresh * (factors[alone].norm(dim=1) / fresh.norm(dim=1))[:, None]
    for members in order.split(sizes.tolist()):
        if len(members) > 1:
            turn, triangle = torch.linalg.qr(torch.randn(factors.shape[1], factors.shape[1], generator=stream))
            turn = turn * triangle.diagonal().sign()  # without it LAPACK's signs are no draw (Mezzadri 2007)
            result[members] = factors[members] @ turn
    return result
