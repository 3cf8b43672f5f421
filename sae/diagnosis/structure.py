"""Which true features belong together: trees and exclusive groups, and who fires with whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.metrics.failures import ALWAYS, CORRELATED, DEVIATIONS, MIN_FIRINGS, PARENT_AT_MOST
from toymodels.co_firing import Exclusive, Tree
from toymodels.features import FeatureBatch
from toymodels.synthetic import SyntheticWorld
from toymodels.worlds import ToyWorld, World

if TYPE_CHECKING:
    from scipy.sparse import csc_array

# A pair of features is correlated only when they were on together so often: a single meeting of rare ones is luck.
MIN_TOGETHER = 5
# Features exclude each other when luck would bring them together so often, and at most this share of that is seen.
MIN_EXPECTED, AT_MOST = 20.0, 0.01
PAIRS_AT_ONCE = 2**23


@dataclass(frozen=True)
class Structure:
    """Trees and exclusive groups; -1 for none."""

    parent: Int[Tensor, " n_features"]
    group: Int[Tensor, " n_features"]
    """The group whose members are never on together."""
    declared: bool
    """The world says so; else it is read off the samples, where rare features show nothing."""

    @property
    def n_children(self) -> Int[Tensor, " n_features"]:
        """How many features have this one as their parent."""
        return self.parent[self.parent >= 0].bincount(minlength=len(self.parent))

    @property
    def exclusive_parent(self) -> Bool[Tensor, " n_features"]:
        """Parents of at least two children that exclude each other."""
        members = ((self.parent >= 0) & (self.group >= 0)).nonzero().squeeze(1)
        count = self.parent[members].bincount(minlength=len(self.parent))
        return count >= 2

    def descends(self, low: Int[Tensor, " pairs"], high: Int[Tensor, " pairs"]) -> Bool[Tensor, " pairs"]:
        """Whether low is a child of high, or a child's child, ..."""
        found = torch.zeros_like(low, dtype=torch.bool)
        above = self.parent[low]
        for _ in range(len(self.parent)):
            if not bool((above >= 0).any()):
                break
            found |= (above == high) & (above >= 0)
            above = torch.where(above >= 0, self.parent[above.clamp(min=0)], -1)
        return found

    def siblings(self, one: Int[Tensor, " pairs"], other: Int[Tensor, " pairs"]) -> Bool[Tensor, " pairs"]:
        """Whether two features share a parent, or a group."""
        same = [(column[one] == column[other]) & (column[one] >= 0) for column in (self.parent, self.group)]
        return (same[0] | same[1]) & (one != other)

    def relation(self, i: int, k: int) -> str:
        """What feature k is to feature i, in a word."""
        one, other = torch.tensor([i]), torch.tensor([k])
        if bool(self.descends(one, other)):
            return "parent" if int(self.parent[i]) == k else "ancestor"
        if bool(self.descends(other, one)):
            return "child" if int(self.parent[k]) == i else "descendant"
        return "sibling" if bool(self.siblings(one, other)) else "other"


def declared_structure(world: World) -> Structure | None:
    """What a world says about its own features; None where it says nothing."""
    if isinstance(world, SyntheticWorld):
        return Structure(torch.from_numpy(world.forest.parent), torch.from_numpy(world.forest.family), True)
    if not isinstance(world, ToyWorld) or world.features.signed or world.truth is None:
        return None
    n, together = len(world.truth), world.features.co_firing
    none = torch.full((n,), -1)
    if isinstance(together, Tree):
        parent = torch.tensor(together.parents(n))
        return Structure(parent, parent if together.exclusive else none, True)
    if isinstance(together, Exclusive):
        return Structure(none, torch.arange(n) // together.size, True)
    return Structure(none, none, True)


class CoFiring:
    """In how many samples features are on, and pairs of them together."""

    def __init__(self, acts: FeatureBatch) -> None:
        from scipy.sparse import csr_array  # noqa: PLC0415 - slow to import

        on = (acts.values > 0).numpy()
        whole = csr_array(
            (on.astype(np.float32), acts.indices.numpy(), acts.offsets.numpy()), shape=(len(acts), acts.n_features)
        )
        whole.eliminate_zeros()
        self.columns: csc_array[Any] = whole.tocsc()
        self.n_samples = len(acts)
        self.on = torch.from_numpy(np.diff(self.columns.indptr)).double()

    def blocks(self) -> Iterator[tuple[slice, Float[Tensor, "some n_features"]]]:
        """Counts of pairs in float32, where whole numbers are exact up to 2^24: some features against all."""
        n = len(self.on)
        at_once = max(1, PAIRS_AT_ONCE // n)
        for start in range(0, n, at_once):
            rows = slice(start, min(start + at_once, n))
            both = (self.columns[:, rows].T @ self.columns).toarray()
            yield rows, torch.from_numpy(both)

    def phi(
        self, one: Int[Tensor, "..."], other: Int[Tensor, "..."], both: Float[Tensor, "*pairs"]
    ) -> Float[Tensor, "*pairs"]:
        """Correlation of being on, of pairs or of an outer product; 0 for features that are always or never on, and
        where little is known of a pair.

        Something is known where both are on in MIN_FIRINGS samples, and are together in MIN_TOGETHER of them or would
        be by luck.
        """
        N = self.n_samples
        p, q = self.on[one] / N, self.on[other] / N
        scale = (p * (1 - p) * q * (1 - q)).sqrt()
        phi = torch.where(scale > 0, (both / N - p * q) / scale.clamp(min=1e-30), 0.0)
        often = (self.on[one] >= MIN_FIRINGS) & (self.on[other] >= MIN_FIRINGS)
        return torch.where(often & ((both >= MIN_TOGETHER) | (p * q * N >= MIN_TOGETHER)), phi, 0.0)

    def together(self, one: Int[Tensor, " pairs"], other: Int[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """In how many samples the features of each pair are on together."""
        counts = [torch.zeros(0)]
        for i, k in zip(one.split(4096), other.split(4096), strict=True):
            both = self.columns[:, i.numpy()].multiply(self.columns[:, k.numpy()]).sum(axis=0)
            counts.append(torch.from_numpy(np.asarray(both).ravel()))
        return torch.cat(counts).double()

    def correlated(self, phi: Float[Tensor, "*pairs"]) -> Bool[Tensor, "*pairs"]:
        """|phi| > .1 and > 5 / √N, as for hedging."""
        return phi.abs() > max(CORRELATED, DEVIATIONS / max(self.n_samples, 1) ** 0.5)


def partners(seen: CoFiring) -> tuple[Int[Tensor, " n_features"], Float[Tensor, " n_features"]]:
    """Of each feature the one whose being on is correlated most with its own, by |phi|; -1 and 0 without."""
    n, N = len(seen.on), seen.n_samples
    partner, strongest = torch.full((n,), -1), torch.zeros(n, dtype=torch.float64)
    p = (seen.on / N).float()
    # 1 / sd, and 0 for what `phi` knows nothing of: the largest of all pairs is sought quickly, in float32.
    sharp = torch.where((seen.on >= MIN_FIRINGS) & (p < 1), (p * (1 - p)).rsqrt(), 0.0)
    for rows, both in seen.blocks():
        own = torch.arange(rows.start, rows.stop)
        lucky = torch.outer(p[own], p)
        known = (both >= MIN_TOGETHER).logical_or_(lucky >= MIN_TOGETHER / N)
        size = (both / N).sub_(lucky).mul_(sharp).abs_().mul_(known)
        size[own - rows.start, own] = 0.0
        best = size.argmax(dim=1)
        exact = seen.phi(own, best, both[own - rows.start, best].double())
        exact = torch.where(own == best, 0.0, exact)
        partner[own], strongest[own] = torch.where(exact != 0, best, -1), exact
    return partner, strongest


def observed_structure(seen: CoFiring) -> Structure:
    """Read off samples.

    parent(c)   the least frequent of the features that are on in >= 99 % of the samples with c, where c is on >= 20
                times, and they more often than c and in at most half of all samples (as for absorption)
    group       siblings of one parent, where pairs of them would be together >= 20 times in all if they were
                independent given the parent, and are in at most 1 % of that; and features without a parent, where
                that holds for each pair along a chain
    """
    from scipy.sparse import coo_array  # noqa: PLC0415 - slow to import
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    n, N, on = len(seen.on), seen.n_samples, seen.on
    parent = torch.full((n,), -1)
    apart: list[Tensor] = [torch.zeros(2, 0, dtype=torch.int64)]
    for rows, both in seen.blocks():
        of = on[rows][:, None]
        above = (of >= MIN_FIRINGS) & (both >= ALWAYS * of) & (on > of) & (on <= PARENT_AT_MOST * N)
        least, which = torch.where(above, on, torch.inf).min(dim=1)
        parent[rows] = torch.where(least.isfinite(), which, -1)
        expected = of * on / N
        never = ((expected >= MIN_EXPECTED) & (both <= AT_MOST * expected)).nonzero().T
        apart.append(never + torch.tensor([[rows.start], [0]]))
    one, other = torch.cat(apart, dim=1)
    loose = (parent[one] < 0) & (parent[other] < 0)
    edges = (np.ones(int(loose.sum()), bool), (one[loose].numpy(), other[loose].numpy()))
    _, label = connected_components(coo_array(edges, shape=(n, n)), directed=False)
    chain = torch.from_numpy(label).long()
    group = torch.where(chain.bincount(minlength=n)[chain] > 1, chain, -1)
    for head in parent[parent >= 0].unique().tolist():
        members = (parent == head).nonzero().squeeze(1)
        i, k = torch.combinations(members).unbind(dim=1) if len(members) > 1 else (members[:0], members[:0])
        expected_all = float((on[i] * on[k]).sum() / on[head])
        if expected_all >= MIN_EXPECTED and float(seen.together(i, k).sum()) <= AT_MOST * expected_all:
            group[members] = n + head
    return Structure(parent, group, False)
