"""Which features draw, in how many steps as features fire: the sparse sampling behind synthetic worlds.

Rare features are found by thinning: a few cells of the rows × features table are proposed, each with a probability
that its feature surely does not exceed, and kept with what is missing to its own. Nothing is approximated: a cell
that could exceed the bound is found and drawn by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from toymodels.correlations import Factors, Groups, some_fire_prob, thresholds
from toymodels.firing import Profile

Rows = Int[np.ndarray, " nnz"]
Numbers = Int[np.ndarray, " nnz"]

# Above this share of cells a draw for each is cheaper than thinning.
DENSE = 0.15
CELLS_AT_ONCE = 1 << 21
# Features of one thinning have probabilities within this factor.
BAND = 4.0


def numpy_generator(stream: torch.Generator) -> np.random.Generator:
    """A generator that the stream decides; on a CPU its draws cost a fraction of torch's."""
    return np.random.Generator(np.random.SFC64(int(torch.randint(2**63 - 1, (1,), generator=stream).item())))


def bernoulli_cells(n_cells: int, prob: float, rng: np.random.Generator) -> Int[np.ndarray, " nnz"]:
    """Ascending cells of 0..n_cells − 1, each with probability `prob` < 1, at the cost of those that are drawn.

    A cell is in when at least one event of a Poisson process of rate −log(1 − prob) for each cell falls on it.
    """
    return _ascending(rng.integers(0, n_cells, rng.poisson(-n_cells * math.log1p(-prob))))


def _ascending(cells: Int[np.ndarray, " events"]) -> Int[np.ndarray, " nnz"]:
    """Each cell once, in order: numpy's own `unique` hashes, which costs several times a sort."""
    cells = np.sort(cells)
    return cells[np.diff(cells, prepend=-1) > 0]


def _exceeds(theta: Float[np.ndarray, " nnz"]) -> Float[np.ndarray, " nnz"]:
    """P(ε > θ), ε ~ N(0, 1)."""
    return torch.special.ndtr(torch.from_numpy(-theta.astype(np.float64))).numpy()


class Independent:
    """Each feature draws by itself, with probability p_i."""

    def __init__(self, probs: Profile, parentless: Numbers) -> None:
        self.probs = probs.numpy()
        p = self.probs[parentless]
        self.frequent, self.rare = parentless[p > DENSE], parentless[(p <= DENSE) & (p > 0)]
        self.hazard = -np.log1p(-self.probs[self.rare]).cumsum()

    def shared(self, rows: int, rng: np.random.Generator) -> Float[torch.Tensor, "rows rank"] | None:
        """What all features of a row have in common: nothing."""
        return None

    def first(
        self, rows: int, shared: Float[torch.Tensor, "rows rank"] | None, rng: np.random.Generator
    ) -> tuple[Rows, Numbers]:
        """Which features without a parent draw, in `rows` rows."""
        row, which = np.nonzero(rng.random((rows, len(self.frequent))) < self.probs[self.frequent])
        rare_row, rare = self._rare(rows, rng)
        return np.append(row, rare_row), np.append(self.frequent[which], rare)

    def _rare(self, rows: int, rng: np.random.Generator) -> tuple[Rows, Numbers]:
        if not len(self.rare):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        n_events = rng.poisson(rows * self.hazard[-1])
        at = np.searchsorted(self.hazard, rng.random(n_events) * self.hazard[-1], side="right")
        cells = _ascending(rng.integers(0, rows, n_events) * len(self.rare) + np.minimum(at, len(self.rare) - 1))
        row, which = np.divmod(cells, len(self.rare))
        return row, self.rare[which]

    def children(
        self, row: Rows, feature: Numbers, shared: Float[torch.Tensor, "rows rank"] | None, rng: np.random.Generator
    ) -> Bool[np.ndarray, " nnz"]:
        """Which of these candidates, whose parents fire, draw."""
        return rng.random(len(feature)) < self.probs[feature]


@dataclass
class _Band:
    """Features of similar probability: ε_i > θ_i = base_i − slope_i · u."""

    features: Numbers
    base: Float[torch.Tensor, " n"]
    slope: Float[torch.Tensor, "rank n"]
    bound: float | None
    """Cells with θ below it are drawn by themselves, the others proposed with P(ε > bound); None: all by themselves."""


class LowRankDraws:
    """z_i = l_i · u + s_i ε_i draws above t_i, s_i = √(1 − |l_i|²): given u, where ε_i > θ_i = (t_i − l_i · u) / s_i.

    θ of features without a parent is one product of matrices, rows × rank × features; everything after it, and
    all work for children, is done for proposed cells alone.
    """

    def __init__(self, probs: Profile, parentless: Numbers, factors: Factors) -> None:
        left = (1 - factors.double().square().sum(1)).sqrt()
        self.base = (thresholds(probs) / left).float()
        self.slope = (factors.double() / left[:, None]).float()
        self.rank = factors.shape[1]
        order = parentless[np.argsort(-probs.numpy()[parentless], kind="stable")]
        p = probs.numpy()[order]
        order, p = order[p > 0], p[p > 0]
        step = np.floor(np.log(p / p[0]) / math.log(BAND) - 1e-12) if len(p) else p
        parts = np.split(order, np.flatnonzero(np.diff(step)) + 1) if len(order) else []
        bounds = [self._bound(part) for part in parts]
        dense = [part for part, bound in zip(parts, bounds, strict=True) if bound is None]
        self.bands = [self._band(np.concatenate(dense), None)] if dense else []
        self.bands += [self._band(part, bound) for part, bound in zip(parts, bounds, strict=True) if bound is not None]

    def _band(self, features: Numbers, bound: float | None) -> _Band:
        return _Band(features, self.base[features], self.slope[features].T.contiguous(), bound)

    def _bound(self, features: Numbers) -> float | None:
        """Where the fewest cells are proposed or drawn by themselves; None where that is too many."""
        base, slope = self.base[features], self.slope[features]
        grid = torch.arange(0, 6, 0.05, dtype=torch.float64)
        spread = slope.double().norm(dim=1).clamp(min=1e-9)
        direct = torch.special.ndtr((grid[:, None] - base.double()) / spread).mean(1)
        cost = torch.special.ndtr(-grid) + direct
        best = int(cost.argmin())
        return None if cost[best] > DENSE else float(grid[best])

    def shared(self, rows: int, rng: np.random.Generator) -> Float[torch.Tensor, "rows rank"] | None:
        """u of each row."""
        return torch.from_numpy(rng.standard_normal((rows, self.rank), dtype=np.float32))

    def first(
        self, rows: int, shared: Float[torch.Tensor, "rows rank"] | None, rng: np.random.Generator
    ) -> tuple[Rows, Numbers]:
        """Which features without a parent draw, in `rows` rows."""
        assert shared is not None
        found_rows, found = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for band in self.bands:
            n = len(band.features)
            block = max(1, CELLS_AT_ONCE // n)
            buffer = torch.empty(min(block, rows), n)
            for start in range(0, rows, block):
                u = shared[start : start + block]
                theta = torch.addmm(band.base, u, band.slope, alpha=-1, out=buffer[: len(u)]).view(-1).numpy()
                row, which = np.divmod(_firing_cells(theta, band.bound, rng), n)
                found_rows.append(row + start)
                found.append(band.features[which])
        return np.concatenate(found_rows), np.concatenate(found)

    def children(
        self, row: Rows, feature: Numbers, shared: Float[torch.Tensor, "rows rank"] | None, rng: np.random.Generator
    ) -> Bool[np.ndarray, " nnz"]:
        """Which of these candidates, whose parents fire, draw."""
        assert shared is not None
        theta = self.base.numpy().take(feature)
        draws = theta == -np.inf  # these draw whatever the factors are
        asked = np.flatnonzero(~draws)
        of_feature = self.slope.index_select(0, torch.from_numpy(feature.take(asked)))
        of_row = shared.index_select(0, torch.from_numpy(row.take(asked)))
        theta = theta.take(asked) - np.einsum("er,er->e", of_feature.numpy(), of_row.numpy())
        draws[asked] = rng.standard_normal(len(asked), dtype=np.float32) > theta
        return draws


def _firing_cells(
    theta: Float[np.ndarray, " cells"], bound: float | None, rng: np.random.Generator
) -> Int[np.ndarray, " nnz"]:
    """Cells with ε > θ, each with an ε ~ N(0, 1) of its own."""
    if bound is None:
        return np.flatnonzero(rng.standard_normal(len(theta), dtype=np.float32) > theta)
    low = np.flatnonzero(theta < bound)
    low = low[rng.random(len(low)) < _exceeds(theta[low])]
    most = 0.5 * math.erfc(bound / math.sqrt(2))
    high = bernoulli_cells(len(theta), most, rng)
    at = theta[high]
    high = high[(at >= bound) & (rng.random(len(high)) * most < _exceeds(at))]
    return np.append(low, high)


class GroupDraws(Independent):
    """Groups of correlated features without parents, drawn by the group.

    A group in which anything draws is found from its members: one is proposed with its own p_i, z_i is drawn above its
    threshold and the others' given it, and the set S that draws is kept with probability 1 / |S|, because each of its
    members could have proposed it. So S has the rate P(S), and a group that never draws costs nothing.
    """

    def __init__(self, probs: Profile, parentless: Numbers, groups: Groups) -> None:
        n = len(parentless) // groups.size * groups.size
        super().__init__(probs, parentless[n:])
        self.probs = probs.numpy()
        self.shared_part, self.own_part = math.sqrt(abs(groups.rho)), math.sqrt(1 - abs(groups.rho))
        self.members = parentless[:n].reshape(-1, groups.size)
        self.sign = groups.signs(np.arange(groups.size))
        self.threshold = thresholds(probs).numpy()[self.members]
        some = some_fire_prob(self.threshold, self.sign, groups.rho)
        p = self.probs[self.members]
        often = some > DENSE
        self.often, self.seldom = np.flatnonzero(often), np.flatnonzero(~often & (p.sum(1) > 0))
        # Of a Poisson process at rate −log(1 − q) the first event makes a cell's outcome: something with probability q.
        some = some[self.seldom, None]
        self.rate = (p[self.seldom] * (-np.log1p(-some) / some)).cumsum()

    def first(
        self, rows: int, shared: Float[torch.Tensor, "rows rank"] | None, rng: np.random.Generator
    ) -> tuple[Rows, Numbers]:
        """Which features without a parent draw, in `rows` rows."""
        row, feature = super().first(rows, shared, rng)
        w = rng.standard_normal((rows, len(self.often), 1))
        often = self._above(self.often, w, rng).nonzero()
        seldom_row, group, draws = self._seldom(rows, rng)
        entry, place = draws.nonzero()
        return (
            np.concatenate([row, often[0], seldom_row[entry]]),
            np.concatenate([feature, self.members[self.often[often[1]], often[2]], self.members[group[entry], place]]),
        )

    def _above(self, group: Numbers, w: Float[np.ndarray, "..."], rng: np.random.Generator) -> Bool[np.ndarray, "..."]:
        """Which members draw, given w."""
        z = self.shared_part * self.sign * w + self.own_part * rng.standard_normal((*w.shape[:-1], len(self.sign)))
        return z > self.threshold[group]

    def _seldom(self, rows: int, rng: np.random.Generator) -> tuple[Rows, Numbers, Bool[np.ndarray, "nnz size"]]:
        size = len(self.sign)
        if not len(self.seldom):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros((0, size), dtype=bool)
        n_events = rng.poisson(rows * self.rate[-1])
        at = np.searchsorted(self.rate, rng.random(n_events) * self.rate[-1], side="right")
        which, place = np.divmod(np.minimum(at, len(self.rate) - 1), size)
        group, row = self.seldom[which], rng.integers(0, rows, n_events)
        p = torch.from_numpy(self.probs[self.members[group, place]] * (1 - rng.random(n_events)))
        z = -torch.special.ndtri(p).numpy()
        w = self.shared_part * self.sign[place] * z + self.own_part * rng.standard_normal(n_events)
        draws = self._above(group, w[:, None], rng)
        draws[np.arange(n_events), place] = True
        kept = np.flatnonzero(rng.random(n_events) * draws.sum(1) < 1)
        _, first = np.unique(row[kept] * len(self.members) + group[kept], return_index=True)
        kept = kept[first]
        return row[kept], group[kept], draws[kept]
