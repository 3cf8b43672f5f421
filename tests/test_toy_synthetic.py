"""Synthetic worlds: statistics recomputed from raw samples, and judged by a sampler that draws every cell."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_worlds import dense_features, moments, worst_z

from toymodels import generator
from toymodels.correlations import Groups, LowRank, rotated, some_fire_prob
from toymodels.draws import _firing_cells, bernoulli_cells
from toymodels.errors import UsageError
from toymodels.firing import (
    ConstantFiring,
    ExponentialOver,
    FoldedNormalOver,
    LinearFiring,
    LinearOver,
    Magnitudes,
    ZipfFiring,
    over_features,
)
from toymodels.hierarchies import Forest, Hierarchy, compensated, win_probs
from toymodels.synthetic import SyntheticWorld, WorldDescription

RECTIFIED = Magnitudes("rectified_normal", LinearOver(2.0, 1.0), FoldedNormalOver(0.8, 0.3))
TREES = Hierarchy(3, branching=3, depth=2, exclusive=1.0, scale_children=True)


def world_of(n: int = 30, seed: int = 0, **parts) -> SyntheticWorld:
    return WorldDescription(n, 8, **parts).build(seed)


def drawn(world: SyntheticWorld, n: int, *name: str | int) -> torch.Tensor:
    return world.sample(n, generator(0, "drawn", *name)).acts.dense()


def close(share: float, expected: float, n: int, errors: float = 5) -> bool:
    """A frequency within five standard errors of a probability."""
    return abs(share - expected) <= errors * math.sqrt(max(expected * (1 - expected), 1e-12) / n)


@pytest.mark.parametrize("firing", [ConstantFiring(0.05), ConstantFiring(0.5), ZipfFiring(0.5, 0.9, 0.001)])
@pytest.mark.parametrize("correlation", [None, LowRank(3, 0.4), LowRank(2, 0.0)])
@pytest.mark.parametrize("hierarchy", [None, TREES, Hierarchy(3, 3, 2, 0.5, compensation="factors")])
def test_samples_have_the_statistics_of_the_obvious_sampler(firing, correlation, hierarchy):
    n = 40
    parts = {"firing": firing, "correlation": correlation, "hierarchy": hierarchy, "magnitudes": RECTIFIED}
    world = world_of(n, **parts)
    judge = moments([dense_features(world, 120_000, generator(0, "judge"))])
    worst = worst_z(moments([drawn(world, 120_000)]), judge)
    assert max(worst.values()) < 5, worst


def test_a_batch_is_the_streams_and_adds_up():
    parts = {"firing": LinearFiring(0.3, 0.01), "hierarchy": TREES, "correlation": LowRank(2, 0.2), "bias": 0.7}
    world = world_of(**parts)
    hidden, acts = world.sample(50, generator(3, "a"))
    again = world.sample(50, generator(3, "a"))
    assert torch.equal(again.hidden, hidden)
    assert torch.equal(again.acts.values, acts.values)
    assert not torch.equal(world.sample(50, generator(3, "b")).hidden, hidden)
    assert world.bias.norm() == pytest.approx(0.7)
    torch.testing.assert_close(hidden, acts.dense() @ world.truth + world.bias)
    rows = torch.arange(50).repeat_interleave(acts.offsets.diff())
    assert ((rows * 30 + acts.indices).diff() > 0).all()
    assert (acts.values > 0).all()
    with pytest.raises(UsageError, match="at least 1 row, got 0"):
        world.sample(0, generator(0))
    other = world_of(seed=1, **parts)
    assert not torch.equal(other.truth, world.truth)


def test_noise_is_added_to_every_dimension():
    world = world_of(noise=0.3)
    hidden, acts = world.sample(20_000, generator(0))
    noise = hidden - acts.dense() @ world.truth
    torch.testing.assert_close(noise.std(0), torch.full((8,), 0.3), atol=0.01, rtol=0)
    assert noise.T.corrcoef().fill_diagonal_(0).abs().max() < 0.04


# How often


def test_profiles_of_firing():
    assert ConstantFiring(0.2).probs(3).tolist() == [0.2] * 3
    assert LinearFiring(0.3, 0.1).probs(3).tolist() == pytest.approx([0.3, 0.2, 0.1])
    zipf = ZipfFiring(0.5, 0.4, 5e-4).probs(16384)
    assert [float(zipf[0]), float(zipf[-1])] == pytest.approx([0.4, 5e-4])
    power = torch.arange(1, 16385, dtype=torch.float64) ** -0.5
    assert torch.corrcoef(torch.stack([zipf, power]))[0, 1] == pytest.approx(1)
    assert ZipfFiring(1.0, 0.3, 0.1).probs(1).tolist() == pytest.approx([0.3])


def test_cells_are_independent_bernoulli_draws():
    rng = np.random.default_rng(0)
    cells = [bernoulli_cells(50, 0.1, rng) for _ in range(5000)]
    assert all((np.diff(one) > 0).all() for one in cells)
    counts = np.bincount([len(one) for one in cells], minlength=51)
    mean, variance = 5.0, 4.5
    numbers = np.repeat(np.arange(len(counts)), counts)
    assert numbers.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / 5000))
    assert numbers.var() == pytest.approx(variance, rel=0.1)


def test_thinning_is_exact_on_both_sides_of_its_bound():
    """Cells far below, just below, just above and far above: none drawn twice, each at its own rate."""
    rng, repeats, bound = np.random.default_rng(0), 400_000, 1.5
    levels = np.array([-1.0, 1.4, 1.6, 2.5], dtype=np.float32)
    cells = _firing_cells(np.tile(levels, repeats), bound, rng)
    assert len(np.unique(cells)) == len(cells)
    for place, theta in enumerate(levels):
        assert close((cells % 4 == place).sum() / repeats, math.erfc(theta / math.sqrt(2)) / 2, repeats)


# How strongly


@pytest.mark.parametrize(
    ("magnitudes", "mean", "std"),
    [
        (Magnitudes("constant", 2.0), 2.0, 0.0),
        (Magnitudes("uniform", 2.0, 0.5), 2.0, 0.5),
        (Magnitudes("exponential", 2.0), 2.0, 2.0),
        (Magnitudes("folded_normal", 0.0, 1.5), 1.5 * math.sqrt(2 / math.pi), 1.5 * math.sqrt(1 - 2 / math.pi)),
        # Of max(0, ε) given that it is above 0: the same half of a normal.
        (Magnitudes("rectified_normal", 0.0, 1.5), 1.5 * math.sqrt(2 / math.pi), 1.5 * math.sqrt(1 - 2 / math.pi)),
    ],
)
def test_laws_of_magnitudes(magnitudes, mean, std):
    acts = world_of(4, firing=ConstantFiring(0.5), magnitudes=magnitudes).sample(40_000, generator(0)).acts
    n = len(acts.values)
    assert acts.values.mean() == pytest.approx(mean, abs=5 * std / math.sqrt(n) + 1e-6)
    assert acts.values.std() == pytest.approx(std, abs=6 * std / math.sqrt(n) + 1e-6)
    assert (acts.values > 0).all()
    fires = 0.25 if magnitudes.kind == "rectified_normal" else 0.5
    assert close(n / 160_000, fires, 160_000)


def test_means_and_spreads_vary_over_features():
    law = Magnitudes("rectified_normal", LinearOver(5.0, 4.0), ExponentialOver(0.8, 0.1))
    x = drawn(world_of(5, firing=ConstantFiring(0.5), magnitudes=law), 40_000)
    for i, (mean, std) in enumerate(zip(np.linspace(5, 4, 5), 0.8 * (1 / 8) ** np.linspace(0, 1, 5), strict=True)):
        values = x[x[:, i] > 0, i]
        assert values.mean() == pytest.approx(mean, abs=5 * std / math.sqrt(len(values)))
        assert values.std() == pytest.approx(std, rel=0.05)
    spread = over_features(FoldedNormalOver(0.5, 0.5, max_value=0.9), 20_000, generator(0))
    assert spread.min() >= 0
    assert spread.max() == pytest.approx(0.9)
    inside = spread[spread < 0.9]
    assert close(len(inside) / 20_000, math.erf(0.8 / math.sqrt(2)) / 2 + math.erf(2.8 / math.sqrt(2)) / 2, 20_000)


# Together


def orthant(t1: float, t2: float, rho: float) -> float:
    """P(z1 > t1, z2 > t2) of a bivariate normal, by quadrature."""
    z = torch.linspace(t1, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(density * torch.special.ndtr((rho * z - t2) / math.sqrt(1 - rho * rho)), z))


def threshold(p: float) -> float:
    return -float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64)))


def test_shared_factors_correlate_and_keep_the_marginals():
    world = world_of(12, firing=LinearFiring(0.3, 0.02), correlation=LowRank(2, 0.5))
    fires = (drawn(world, 400_000) > 0).double()
    L, p = world.correlation.double(), world.probs
    assert (L @ L.T).fill_diagonal_(0).abs().max() > 0.4  # it is worth the test
    for i in range(12):
        assert close(float(fires[:, i].mean()), float(p[i]), 400_000)
        for j in range(i):
            both = orthant(threshold(float(p[i])), threshold(float(p[j])), float(L[i] @ L[j]))
            assert close(float((fires[:, i] * fires[:, j]).mean()), both, 400_000)


@pytest.mark.parametrize(("size", "rho"), [(2, 0.8), (2, -0.9), (4, 0.5), (3, 0.0)])
@pytest.mark.parametrize("probs", [(0.02, 0.01), (0.07, 0.03), (0.6, 0.05)])
def test_groups_correlate_inside_alone(size, rho, probs):
    world = world_of(9, firing=LinearFiring(*probs), correlation=Groups(size, rho))
    n = 400_000
    fires = (drawn(world, n) > 0).double()
    grouped = 9 // size * size
    for i in range(9):
        assert close(float(fires[:, i].mean()), float(world.probs[i]), n)
        for j in range(i):
            inside = i // size == j // size and i < grouped
            both = orthant(*(threshold(float(world.probs[k])) for k in (i, j)), rho if inside else 0.0)
            assert close(float((fires[:, i] * fires[:, j]).mean()), both, n), (i, j)
    if size == 4 and probs[0] == 0.02:  # whole sets of more than two as well
        z = math.sqrt(0.5) * torch.randn(2_000_000, 1, generator=generator(0)) + math.sqrt(0.5) * torch.randn(
            2_000_000, 4, generator=generator(1)
        )
        t = torch.tensor([threshold(float(p)) for p in world.probs[:4]])
        triple = float((z > t)[:, :3].all(1).double().mean())
        assert close(float(fires[:, :3].prod(1).mean()), triple, n, errors=6)


def test_the_probability_that_a_group_fires():
    t = np.array([[1.0, 0.5]])
    expected = 1 - orthant(-1.0, -0.5, 0.7)
    assert some_fire_prob(t, np.ones(2), 0.7)[0] == pytest.approx(expected, abs=1e-10)
    assert some_fire_prob(t, np.array([1.0, -1.0]), -0.7)[0] == pytest.approx(1 - orthant(-1.0, -0.5, -0.7), abs=1e-10)


# Trees


def test_features_are_taken_in_order_breadth_first():
    forest = Hierarchy(2, branching=2, depth=2).forest(12, generator(0))
    assert forest.parent.tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    forest = Hierarchy(2, branching=2, depth=1).forest(5, generator(0))
    assert forest.parent.tolist() == [-1, -1, 0, 0, 1]
    assert Hierarchy(2, branching=2, depth=1).n_parentless(8) == 4
    assert Hierarchy(32, branching=4, depth=3).n_parentless(1024) == 32
    assert Hierarchy(128, branching=4, depth=3).n_parentless(16384) == 128 + 16384 - 10880


@pytest.mark.parametrize("exclusive", [0.0, 0.5, 1.0])
def test_parents_gate_and_siblings_exclude(exclusive):
    tree = Hierarchy(4, branching=3, depth=2, exclusive=exclusive)
    world = world_of(60, firing=ConstantFiring(0.6), hierarchy=tree, correlation=LowRank(2, 0.2))
    fires = drawn(world, 5000) > 0
    parent = world.forest.parent
    for i in np.flatnonzero(parent >= 0):
        assert not (fires[:, i] & ~fires[:, parent[i]]).any()
    families = world.forest.families()
    assert len(families) == int(16 * exclusive)
    for siblings in (np.flatnonzero(parent == i) for i in range(16)):
        most = int(fires[:, siblings].sum(1).max())
        assert most == (1 if any(set(siblings) == set(family) for family in families) else 3)


def test_rivals_win_alike():
    tree = Hierarchy(1, branching=3, depth=1, exclusive=1.0)
    fires = (drawn(world_of(4, firing=ConstantFiring(0.5), hierarchy=tree), 200_000) > 0).double()
    given_parent = fires[fires[:, 0] > 0]
    expected = 0.5 * float(win_probs(np.full(3, 0.5))[0])
    assert expected == pytest.approx((1 - 0.5**3) / 3)
    for i in (1, 2, 3):
        assert close(float(given_parent[:, i].mean()), expected, len(given_parent))


def test_children_are_scaled_by_their_parents():
    law = Magnitudes("rectified_normal", 2.0, 0.5)
    chain = Hierarchy(1, branching=1, depth=2, scale_children=True)
    x = drawn(world_of(3, firing=ConstantFiring(0.7), magnitudes=law, hierarchy=chain), 200_000).double()
    child, grandchild = x[x[:, 1] > 0], x[x[:, 2] > 0]
    raw = torch.cat([child[:, 1] / child[:, 0] * 2, grandchild[:, 2] / grandchild[:, 1] * 2])
    assert raw.mean() == pytest.approx(2.0, abs=5 * 0.5 / math.sqrt(len(raw)))
    assert raw.std() == pytest.approx(0.5, rel=0.02)
    assert torch.corrcoef(child[:, :2].T)[0, 1] > 0.6
    apart = Hierarchy(1, branching=1, depth=2)
    x = drawn(world_of(3, firing=ConstantFiring(0.7), magnitudes=law, hierarchy=apart), 200_000)
    assert torch.corrcoef(x[x[:, 1] > 0][:, :2].T)[0, 1].abs() < 0.02


@pytest.mark.parametrize("exclusive", [0.0, 1.0])
def test_exact_compensation_makes_features_fire_as_often_as_asked(exclusive):
    tree = Hierarchy(2, branching=3, depth=2, exclusive=exclusive, compensation="exact")
    law = Magnitudes("rectified_normal", 1.0, 0.8)
    world = world_of(30, firing=ZipfFiring(2.0, 0.6, 0.0005), magnitudes=law, hierarchy=tree)
    n = 400_000
    shares = (drawn(world, n) > 0).double().mean(0)
    target = ZipfFiring(2.0, 0.6, 0.0005).probs(30)
    for i in range(26):
        assert close(float(shares[i]), float(target[i]), n), i
    for i in range(26, 30):  # in no tree: what is silent at 0 is not made up for
        assert float(world.probs[i]) <= float(target[i]) / 0.8


def test_compensation_by_factors_is_that_of_saelens(caplog):
    forest = Forest(np.array([-1, 0, 0, 1]), np.array([-1, 0, 0, -1]), np.zeros(4, dtype=bool))
    target = torch.tensor([0.5, 0.2, 0.1, 0.05], dtype=torch.float64)
    draws = compensated(forest, target, torch.ones(4, dtype=torch.float64), "factors")
    assert draws.tolist() == pytest.approx([0.5, 0.4 * 1.2, 0.2 * 1.4, 0.25])
    assert not caplog.records
    crowded = torch.tensor([0.5, 0.4, 0.4, 0.05], dtype=torch.float64)
    draws = compensated(forest, crowded, torch.ones(4, dtype=torch.float64), "factors")
    assert draws.tolist() == pytest.approx([0.5, 1.0, 1.0, 0.125])
    assert "2 of 4 features would have to draw with a probability above 1 (up to 1.44)" in caplog.text
    caplog.clear()
    alike = torch.full((4,), 0.1, dtype=torch.float64)  # a child that always fires with its parent
    chain = Forest(np.array([-1, 0, 1, 2]), np.full(4, -1), np.zeros(4, dtype=bool))
    assert compensated(chain, alike, torch.ones(4, dtype=torch.float64), "factors").tolist() == [0.1, 1, 1, 1]
    assert not caplog.records


def test_synth16k_is_as_published():
    world = WorldDescription.read(Path(__file__).parent.parent / "configs" / "worlds" / "synth16k.yaml")
    assert (world.n_features, world.d_hidden) == (16384, 768)
    forest = world.hierarchy.forest(16384, generator(0))
    assert (forest.parent >= 0).sum() + 128 == 10880
    assert len(forest.families()) == 128 + 512 + 2048


# Other co-occurrences


def test_a_shift_keeps_every_marginal_and_changes_who_fires_with_whom():
    law = Magnitudes("rectified_normal", 1.0, 0.5)
    tree = Hierarchy(4, branching=2, depth=2, exclusive=1.0)
    world = world_of(34, firing=ConstantFiring(0.3), magnitudes=law, hierarchy=tree, correlation=LowRank(3, 0.5))
    other = world.shifted(1)
    assert torch.equal(other.truth, world.truth)
    assert torch.equal(other.shifted(2).truth, world.truth)
    a, b = moments([drawn(world, 300_000)]), moments([drawn(other, 300_000)])
    worst = worst_z(a, b)
    assert max(worst["fires"], worst["x"]) < 5
    assert worst["together"] > 20
    tree_of = torch.from_numpy(world.forest.trees())
    same = tree_of[:, None] == tree_of
    L, M = world.correlation, other.correlation
    torch.testing.assert_close((L @ L.T)[same], (M @ M.T)[same], atol=1e-5, rtol=0)
    changed = ((L @ L.T) - (M @ M.T)).masked_fill(same, 0).abs()
    assert changed[:28, :28].max() > 0.5  # across the four trees of seven
    assert changed[28:, 28:].max() > 0.5
    assert torch.equal(world.shifted(1).correlation, other.correlation)
    assert not torch.equal(world.shifted(2).correlation, other.correlation)


def test_factors_turn_evenly_in_all_directions():
    """Over many seeds nothing of the old factors is left on average, in any rank."""
    for rank in (1, 2, 5):
        factors = torch.eye(rank).repeat_interleave(2, dim=0)
        trees = np.zeros(len(factors), dtype=np.int64)
        turned = torch.stack([rotated(factors, trees, generator(seed, "turn")) for seed in range(400)])
        assert turned.mean(dim=0).abs().max() < 0.2
        torch.testing.assert_close(turned @ turned.mT, (factors @ factors.T).expand(400, -1, -1))


def test_a_shift_gives_groups_other_members():
    world = world_of(20, firing=ConstantFiring(0.2), correlation=Groups(2, 0.9))
    a, b = ((drawn(w, 50_000) > 0).double().T.corrcoef().fill_diagonal_(0) for w in (world, world.shifted(1)))
    partners, others = a.argmax(1), b.argmax(1)
    assert partners.tolist() == [i ^ 1 for i in range(20)]
    assert (partners != others).sum() >= 12
    with pytest.raises(UsageError, match="a world without correlation has no co-occurrences to shift"):
        world_of(20).shifted(1)
