"""Trees of features: children fire only where their parent does, siblings may exclude each other, and be scaled.

The semantics are those of SAELens's hierarchies, so that its saved worlds mean the same here. A feature *draws* by
itself; it fires where it draws, its parent fires, and, in an exclusive family, it is the winner: one of the members
that draw, each as likely. Where the parent scales its children, x_child is multiplied by x_parent / mean_parent.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from toymodels.errors import UsageError, nearest
from toymodels.firing import Profile

logger = logging.getLogger("toymodels")


@dataclass(frozen=True)
class Forest:
    """Who is whose child, in numbers of features; −1 for none."""

    parent: Int[np.ndarray, " n"]
    family: Int[np.ndarray, " n"]
    """The exclusive family that a feature is a member of."""
    scaled: Bool[np.ndarray, " n"]
    """Its parent scales it."""

    @classmethod
    def flat(cls, n: int) -> Forest:
        """No feature has a parent or a family."""
        none = np.full(n, -1, dtype=np.int64)
        return cls(none, none.copy(), np.zeros(n, dtype=bool))

    @property
    def parentless(self) -> Int[np.ndarray, " n_parentless"]:
        """Features without a parent, ascending."""
        return np.flatnonzero(self.parent < 0)

    def children(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n_children"]]:
        """Those of feature i are children[first[i] : first[i] + count[i]], the members of a family side by side."""
        with_parent = np.flatnonzero(self.parent >= 0)
        order = np.lexsort((with_parent, self.family[with_parent], self.parent[with_parent]))
        count = np.bincount(self.parent[with_parent], minlength=len(self.parent))
        return np.cumsum(count) - count, count, with_parent[order]

    def generations(self) -> list[Int[np.ndarray, " n_of_depth"]]:
        """Features by depth: those without a parent, their children, theirs, ..."""
        first, count, children = self.children()
        result, here = [], self.parentless
        while len(here):
            result.append(here)
            here = children[expand(first[here], count[here])[1]]
        return result

    def trees(self) -> Int[np.ndarray, " n"]:
        """The number of the tree that a feature is in; a family of features without parents is in one tree."""
        tree = np.full(len(self.parent), -1, dtype=np.int64)
        for generation in self.generations():
            parent = self.parent[generation]
            tree[generation] = np.where(parent >= 0, tree[parent], generation)
        heads = {int(self.family[i]): int(i) for i in self.parentless[::-1] if self.family[i] >= 0}
        joined = {int(i): heads[int(self.family[i])] for i in self.parentless if self.family[i] >= 0}
        return np.array([joined.get(int(head), int(head)) for head in tree], dtype=np.int64)

    def families(self) -> list[Int[np.ndarray, " members"]]:
        """The members of each exclusive family."""
        members = np.flatnonzero(self.family >= 0)
        members = members[np.argsort(self.family[members], kind="stable")]
        return np.split(members, np.flatnonzero(np.diff(self.family[members])) + 1) if len(members) else []


def expand(
    first: Int[np.ndarray, " n"], count: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " total"]]:
    """Ranges laid end to end: which of them each entry is from, and first + 0, 1, ... count − 1."""
    which = np.repeat(np.arange(len(first)), count)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(count) - count - first, count)


@dataclass(frozen=True)
class Hierarchy:
    """`n_roots` trees of `depth` generations below the root, `branching` children each, built breadth-first.

    Features are taken in order, roots first; when they run out, the last parents stay without children, and those
    left over are in no tree. `exclusive` is the share of parents with at least two children whose children exclude
    each other. `compensation` changes what features draw by themselves:

        none      p_i: it fires less often, by its ancestors and rivals
        factors   p_i / p_parent · (1 + Σ_siblings p_j / p_parent), at most 1: SAELens's, which is exact without
                  rivals and too low with them
        exact     so that it fires with probability p_i where features draw independently
    """

    KIND: ClassVar = None
    n_roots: int
    branching: int = 2
    depth: int = 1
    exclusive: float = 0.0
    scale_children: bool = False
    compensation: str = "none"

    COMPENSATIONS: ClassVar = ("none", "factors", "exact")

    def __post_init__(self) -> None:
        for name, least in (("n_roots", 1), ("branching", 1), ("depth", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}; leave hierarchy out")
        if not 0 <= self.exclusive <= 1:
            raise UsageError(f"exclusive must lie in [0, 1], got {self.exclusive}; it is a share of the parents")
        if self.compensation not in self.COMPENSATIONS:
            raise UsageError(
                f"compensation {self.compensation!r} is unknown{nearest(self.compensation, self.COMPENSATIONS)}"
            )

    def n_parentless(self, n: int) -> int:
        """Roots, and features that are in no tree."""
        size = sum(self.n_roots * self.branching**generation for generation in range(1, self.depth + 1))
        return n - min(size, n - self.n_roots)

    def forest(self, n: int, stream: torch.Generator) -> Forest:
        """The trees over n features."""
        parent = np.full(n, -1, dtype=np.int64)
        start, size = 0, self.n_roots
        for _ in range(self.depth):
            children = np.arange(start + size, min(start + size * (1 + self.branching), n))
            parent[children] = start + np.arange(len(children)) // self.branching
            start, size = start + size, len(children)
        parents, counts = np.unique(parent[parent >= 0], return_counts=True)
        eligible = parents[counts >= 2]
        chosen = eligible[torch.randperm(len(eligible), generator=stream).numpy()]
        chosen = chosen[: int(len(eligible) * self.exclusive)]
        family = np.where(np.isin(parent, chosen), parent, -1)
        return Forest(parent, family, (parent >= 0) & self.scale_children)


def compensated(forest: Forest, probs: Profile, positive: Profile, how: str) -> Profile:
    """What features draw by themselves so that they fire with `probs`; `positive` is P(x > 0) where one draws.

    Raises:
        UsageError: children fire more often than their parent lets them, with `how` exact.
    """
    match how:
        case "none":
            return probs
        case "factors":
            return _by_factors(forest, probs)
    return _exact(forest, probs, positive)


def _by_factors(forest: Forest, probs: Profile) -> Profile:
    target = probs.numpy()
    parent = np.where(forest.parent >= 0, target[forest.parent], 1.0)
    factor = np.divide(1.0, parent, out=np.ones_like(parent), where=parent > 0)
    for members in forest.families():
        rivals = target[members].sum() - target[members]
        if len(members) > 1 and parent[members[0]] > 0:
            factor[members] *= 1 + rivals / parent[members[0]]
    draws = target * factor
    if n_clamped := int((draws > 1 + 1e-9).sum()):
        logger.warning(
            "compensation: %d of %d features would have to draw with a probability above 1 (up to %.3g), and fire less "
            "often than requested",
            n_clamped,
            len(draws),
            draws.max(),
        )
    return torch.from_numpy(np.minimum(draws, 1.0))


def _exact(forest: Forest, probs: Profile, positive: Profile) -> Profile:
    target, shown = probs.numpy(), positive.numpy()
    parent = np.where(forest.parent >= 0, target[forest.parent], 1.0)
    given = np.divide(target, parent, out=np.zeros_like(target), where=parent > 0)
    needed = given.copy()
    for members in forest.families():
        total = given[members].sum()
        if total > 1:
            head = int(forest.parent[members[0]])
            whose = (
                f"of feature {head}, which fires with {parent[members[0]]:.4g}," if head >= 0 else "without a parent"
            )
            raise UsageError(
                f"compensation cannot be exact: the exclusive children {whose} would have to fire with "
                f"{target[members].sum():.4g} in all; lower their probabilities, or use compensation factors"
            )
        needed[members] = _needed_to_win(given[members])
    draws = np.divide(needed, shown, out=np.full_like(needed, np.inf), where=shown > 0)
    draws[target == 0] = 0.0
    worst = int(draws.argmax())
    if draws[worst] > 1 + 1e-9:
        raise UsageError(
            f"compensation cannot be exact: feature {worst} would have to draw with {draws[worst]:.4g} to fire "
            f"with {target[worst]:.4g} under a parent of {parent[worst]:.4g}; lower it, or use compensation factors"
        )
    return torch.from_numpy(np.minimum(draws, 1.0))


# Gauss–Legendre nodes on [0, 1]: exact up to degree 2 · 32 − 1, so for families of up to 64.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def win_probs(draws: Float[np.ndarray, " members"]) -> Float[np.ndarray, " members"]:
    """P(i wins | i draws) = E[1 / (1 + rivals that draw)] = ∫₀¹ Π_{j≠i} (1 − c_j + c_j t) dt."""
    each = 1 - draws[:, None] + draws[:, None] * _NODES
    others = np.stack([np.delete(each, i, axis=0).prod(0) for i in range(len(draws))])
    return others @ _WEIGHTS


def _needed_to_win(given: Float[np.ndarray, " members"]) -> Float[np.ndarray, " members"]:
    """c with c_i P(i wins | i draws) = given_i, by fixed-point iteration from below."""
    draws = given.copy()
    for _ in range(20_000):
        following = np.minimum(given / win_probs(draws), 1.0)
        if np.abs(following - draws).max() < 1e-12:
            break
        draws = following
    return draws


def forest_of_nodes(roots: list[dict[str, Any]], n: int) -> Forest:
    """The forest that SAELens's `hierarchy.json` describes: nested nodes, of which some have no feature of their own.

    A node without a feature passes its own parent on to its children; whether these are scaled is said by the node
    right above them.

    Raises:
        UsageError: a feature outside 0..n−1, or in two places.
    """
    forest = Forest.flat(n)
    seen = np.zeros(n, dtype=bool)
    n_families = 0
    waiting: list[tuple[dict[str, Any], int, bool]] = [(root, -1, False) for root in roots]
    while waiting:
        node, above, scaled = waiting.pop()
        feature = node.get("feature_index")
        if feature is not None:
            if not isinstance(feature, int) or not 0 <= feature < n:
                raise UsageError(f"feature_index must lie in 0..{n - 1}, got {feature!r}; correct hierarchy.json")
            if seen[feature]:
                raise UsageError(f"feature_index {feature} occurs twice; correct hierarchy.json")
            seen[feature] = True
            forest.parent[feature], forest.scaled[feature] = above, scaled and above >= 0
            above = feature
        children = node.get("children", [])
        if not all(isinstance(child, dict) for child in children):
            raise UsageError(f"children must be nodes, got {children!r}")
        members = [child["feature_index"] for child in children if child.get("feature_index") is not None]
        if node.get("mutually_exclusive_children", False) and len(members) >= 2:
            forest.family[members] = n_families
            n_families += 1
        waiting += [(child, above, bool(node.get("scale_children_by_parent", False))) for child in children]
    return forest
