"""Which features fire together: correlated and mutually exclusive groups, and trees of parents and children.

Elhage et al. 2022 ("Correlated and Anticorrelated Features") for the groups; Chanin et al. 2024 (A is for
Absorption) for why trees matter to SAEs. Features are grouped in order: 0 ... size − 1 is the first group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
            raise UsageError(
                f"features that fire together need one feature_prob per group of {self.size}, got {probs.tolist()}"
            )

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
                f"the feature_prob of {self.size} mutually exclusive features must add up to at most 1, "
                f"got {total:.4g}; lower it"
            )

    def marginals(self, probs: Float[Tensor, "*i n"]) -> Float[Tensor, "*i n"]:
        """P(feature fires)."""
        return probs

    def fire(self, probs: Float[Tensor, "i n 1"], batch: int, stream: torch.Generator) -> Bool[Tensor, "i n batch"]:
        """One draw u for each group: member j fires when u falls into its share of [0, 1]."""
        upper = rearrange(probs, "i (g size) 1 -> i g size 1", size=self.size).cumsum(2)
        lower = F.pad(upper[:, :, :-1], (0, 0, 1, 0))  # the very same numbers: shares neither overlap nor part
        n_instances, n_groups = upper.shape[:2]
        u = torch.rand(n_instances, n_groups, 1, batch, generator=stream, device=stream.device)
        return rearrange((u >= lower) & (u < upper), "i g size b -> i (g size) b")


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
        """Raises UsageError when these features do not form such a tree."""
        n = probs.shape[-1]
        if not 1 <= self.n_roots <= n:
            raise UsageError(f"n_roots must lie in 1..n_features={n}, got {self.n_roots}; change one of them")
        if self.branching < 1:
            raise UsageError(f"branching must be at least 1, got {self.branching}; a chain has branching 1")
        if self.exclusive and n > self.n_roots:
            Exclusive(self.branching).check(self._families(probs))

    def parents(self, n: int) -> list[int]:
        """The parent of each feature, -1 for roots."""
        return [-1 if i < self.n_roots else (i - self.n_roots) // self.branching for i in range(n)]

    def marginals(self, probs: Float[Tensor, "*i n"]) -> Float[Tensor, "*i n"]:
        """P(feature fires) = p_i · P(its parent fires)."""
        fires, parents = probs.clone(), torch.tensor(self.parents(probs.shape[-1]))
        for children in self._descent(len(parents)):
            fires[..., children] *= fires[..., parents[children]]
        return fires

    def fire(self, probs: Float[Tensor, "i n 1"], batch: int, stream: torch.Generator) -> Bool[Tensor, "i n batch"]:
        """Which features fire in each of `batch` independent rows: each by itself, then only where its parent does."""
        n = probs.shape[1]
        if self.exclusive:
            roots = _below(probs[:, : self.n_roots], batch, stream)
            families = self._families(probs.squeeze(2)).unsqueeze(2)
            fires = torch.cat([roots, Exclusive(self.branching).fire(families, batch, stream)], 1)[:, :n]
        else:
            fires = _below(probs, batch, stream)
        parents = torch.tensor(self.parents(n), device=probs.device)
        for children in self._descent(n):
            fires[:, children] &= fires[:, parents[children]]
        return fires

    def _descent(self, n: int) -> Iterator[slice]:
        """Children, their children, ...: each generation lies in one piece, after that of its parents."""
        start, size = self.n_roots, self.n_roots * self.branching
        while start < n:
            yield slice(start, min(start + size, n))
            start, size = start + size, size * self.branching

    def _families(self, probs: Float[Tensor, "*i n"]) -> Float[Tensor, "*i whole"]:
        """All but the roots; the last family, if short, is filled up with children that never fire."""
        children = probs[..., self.n_roots :]
        return F.pad(children, (0, -children.shape[-1] % self.branching))


CoFiring = Together | Exclusive | Tree


def _grouped(probs: Tensor, size: int) -> Tensor:
    n = probs.shape[-1]
    if not 1 <= size <= n or n % size:
        raise UsageError(f"n_features={n} must be a multiple of the group size, got size={size}; change one of them")
    return rearrange(probs, "... (g size) -> ... g size", size=size)


def _below(probs: Tensor, batch: int, stream: torch.Generator) -> Tensor:
    return torch.rand(*probs.shape[:2], batch, generator=stream, device=stream.device) < probs
