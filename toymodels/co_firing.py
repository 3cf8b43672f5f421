"""Which features fire together: correlated and mutually exclusive groups, and trees of parents and children.

Elhage et al. 2022 ("Correlated and Anticorrelated Features") for the groups; Chanin et al. 2024 (A is for
Absorption) for why trees matter to SAEs. Features are grouped in order: 0 ... size − 1 is the first group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from toymodels.errors import UsageError


@dataclass(frozen=True)
class Together:
    """The members of a group of `size` fire at the same time, with the group's probability p."""

    size: int = 2

    def check(self, probs: Float[Tensor, "*i n"]) -> None:
        """Raises UsageError when these features cannot be grouped so."""
        groups = _grouped(probs, self.size)
        if not (groups == groups[..., :1]).all():
            raise UsageError(f"features that fire together need one feature_prob for each group of {self.size}")

    def marginals(self, probs: Float[Tensor, "*i n"]) -> Float[Tensor, "*i n"]:
        """P(feature fires)."""
        return probs

    def fire(self, probs: Float[Tensor, "i n 1"], batch: int, stream: torch.Generator) -> Bool[Tensor, "i n batch"]:
        """Which features fire in each of `batch` independent rows."""
        group = _below(probs[:, :: self.size], batch, stream)
        return repeat(group, "i g b -> i (g size) b", size=self.size)


@dataclass(frozen=True)
class Exclusive:
    """At most one member of a group of `size` fires at a time, each with its own probability p_i; Σ p_i ≤ 1."""

    size: int = 2

    def check(self, probs: Float[Tensor, "*i n"]) -> None:
        """Raises UsageError when these features cannot be grouped so."""
        total = float(_grouped(probs, self.size).sum(-1).max())
        if total > 1 + 1e-9:
            raise UsageError(
                f"probabilities of {self.size} mutually exclusive features must add up to at most 1, got {total:.4g}; "
                "lower feature_prob"
            )

    def marginals(self, probs: Float[Tensor, "*i n"]) -> Float[Tensor, "*i n"]:
        """P(feature fires)."""
        return probs

    def fire(self, probs: Float[Tensor, "i n 1"], batch: int, stream: torch.Generator) -> Bool[Tensor, "i n batch"]:
        """One draw u for each group: member j fires when u falls into its share of [0, 1]."""
        groups = rearrange(probs, "i (g size) 1 -> i g size 1", size=self.size)
        upper = groups.cumsum(2)
        n_instances, n_groups = groups.shape[:2]
        u = torch.rand(n_instances, n_groups, 1, batch, generator=stream, device=stream.device)
        return rearrange((u < upper) & (u >= upper - groups), "i g size b -> i (g size) b")


@dataclass(frozen=True)
class Tree:
    """Children fire only where their parent does: feature_prob is then P(feature | its parent fires).

    The first `n_roots` features have no parent; feature i ≥ n_roots is a child of (i − n_roots) // branching.
    With `exclusive`, at most one child of a parent fires at a time.
    """

    n_roots: int = 1
    branching: int = 2
    exclusive: bool = False

    def check(self, probs: Float[Tensor, "*i n"]) -> None:
        """Raises UsageError when these features do not make such a tree."""
        n = probs.shape[-1]
        if not 1 <= self.n_roots <= n:
            raise UsageError(f"n_roots must lie in 1..n_features={n}, got {self.n_roots}; lower n_roots")
        if self.branching < 1:
            raise UsageError(f"branching must be at least 1, got {self.branching}")
        if self.exclusive:
            for children in self.families(n):
                total = float(probs[..., children].sum(-1).max())
                if total > 1 + 1e-9:
                    raise UsageError(
                        f"probabilities of {len(children)} mutually exclusive children must add up to at most 1, "
                        f"got {total:.4g}; lower feature_prob or branching"
                    )

    def parents(self, n: int) -> list[int]:
        """The parent of each feature, -1 for roots."""
        return [-1 if i < self.n_roots else (i - self.n_roots) // self.branching for i in range(n)]

    def families(self, n: int) -> list[list[int]]:
        """The children of each feature that has some, in the order of their parents."""
        return _families(self.n_roots, self.branching, n)

    def marginals(self, probs: Float[Tensor, "*i n"]) -> Float[Tensor, "*i n"]:
        """P(feature fires) = p_i · P(parent fires)."""
        fires = probs.clone()
        for i, parent in enumerate(self.parents(probs.shape[-1])):
            if parent >= 0:
                fires[..., i] *= fires[..., parent]
        return fires

    def fire(self, probs: Float[Tensor, "i n 1"], batch: int, stream: torch.Generator) -> Bool[Tensor, "i n batch"]:
        """Which features fire in each of `batch` independent rows."""
        n = probs.shape[1]
        fires = _below(probs, batch, stream)
        for children in self.families(n):
            first, after = children[0], children[-1] + 1
            if self.exclusive:
                siblings = Exclusive(len(children))
                fires[:, first:after] = siblings.fire(probs[:, first:after], batch, stream)
            parent = (first - self.n_roots) // self.branching
            fires[:, first:after] &= fires[:, parent : parent + 1]
        return fires


CoFiring = Together | Exclusive | Tree


@cache
def _families(n_roots: int, branching: int, n: int) -> list[list[int]]:
    starts = range(n_roots, n, branching)
    return [list(range(start, min(start + branching, n))) for start in starts]


def _grouped(probs: Tensor, size: int) -> Tensor:
    n = probs.shape[-1]
    if not 1 <= size <= n or n % size:
        raise UsageError(f"n_features={n} must be a multiple of the group size, got {size}; change one of them")
    return rearrange(probs, "... (g size) -> ... g size", size=size)


def _below(probs: Tensor, batch: int, stream: torch.Generator) -> Tensor:
    return torch.rand(*probs.shape[:2], batch, generator=stream, device=stream.device) < probs
