"""Features that fire together: how often each fires, and which never do without, or with, another."""

import pytest
import torch

from toymodels.co_firing import Exclusive, Together, Tree
from toymodels.errors import UsageError
from toymodels.features import Features
from toymodels.streams import generator

N = 40_000
TREE = Tree(n_roots=2, branching=3)  # two roots, six children, the last family of grandchildren short
FOREST = (0.5, 0.8, 0.3, 0.3, 0.4, 0.1, 0.6, 0.3, 0.5, 0.2, 0.2, 0.9, 0.1)
CASES = {
    "together": (Together(2), (0.1, 0.1, 0.6, 0.6)),
    "three together": (Together(3), (0.3,) * 6),
    "exclusive": (Exclusive(2), (0.1, 0.3, 0.5, 0.5)),
    "never and always": (Exclusive(3), (0.0, 1.0, 0.0)),
    "tree": (TREE, FOREST),
    "exclusive tree": (Tree(2, 3, exclusive=True), FOREST),
    "chain": (Tree(1, 1), (0.9, 0.8, 0.7, 0.6)),
    "roots alone": (Tree(3, 2, exclusive=True), (0.2, 0.3, 0.9)),
}


def drawn(co_firing, probs, how: str = "sample_dense") -> torch.Tensor:
    features = Features(len(probs), probs, co_firing=co_firing)
    g = generator(0, "co-firing", how)
    x = features.sample(N, g).dense() if how == "sample" else features.sample_dense(N // 2, g, 2)
    return x.reshape(N, len(probs))


@pytest.mark.parametrize("how", ["sample", "sample_dense"])
@pytest.mark.parametrize("case", CASES)
def test_each_feature_fires_as_often_as_its_marginal_says_at_independent_uniform_values(case, how):
    co_firing, probs = CASES[case]
    x = drawn(co_firing, probs, how)
    fires = x > 0
    marginal = Features(len(probs), probs, co_firing=co_firing).probs
    sd = (marginal * (1 - marginal) / N).sqrt()
    assert ((fires.double().mean(0) - marginal).abs() <= 5 * sd).all()
    centred = x.where(fires, 0.5) - 0.5
    assert (centred.sum(0).abs() <= 5 * (fires.sum(0) / 12).sqrt()).all()
    both = (fires.double().T @ fires.double()).fill_diagonal_(0)
    products = (centred.double().T @ centred.double()).fill_diagonal_(0)
    assert (products.abs() <= 5 * both.sqrt() / 12).all()
    assert ((x >= 0) & (x < 1)).all()


@pytest.mark.parametrize("case", ["together", "three together"])
def test_a_group_fires_as_one_and_groups_are_independent(case):
    co_firing, probs = CASES[case]
    fires = drawn(co_firing, probs) > 0
    groups = fires.view(N, -1, co_firing.size)
    assert torch.equal(groups.all(2), groups.any(2))
    assert_independent(groups[:, 0, 0], groups[:, 1, 0])


@pytest.mark.parametrize("case", ["exclusive", "never and always"])
def test_at_most_one_of_a_group_fires_and_groups_are_independent(case):
    co_firing, probs = CASES[case]
    groups = (drawn(co_firing, probs) > 0).view(N, -1, co_firing.size)
    assert groups.sum(2).max() == 1
    if groups.shape[1] > 1:
        assert_independent(groups[:, 0, 0], groups[:, 1, 0])


def test_shares_meet_without_overlap_or_gap_where_sums_are_rounded(monkeypatch):
    probs = torch.rand(200, 7, 1, generator=generator(0, "shares"))
    probs /= probs.sum(1, keepdim=True)
    ends = probs.cumsum(1)[:, :-1].mT
    monkeypatch.setattr(torch, "rand", lambda *_, **__: ends[:, None])  # u falls exactly where two shares meet
    fires = Exclusive(7).fire(probs, ends.shape[-1], generator(0))
    assert torch.equal(fires.sum(1), torch.ones(200, 6, dtype=torch.int64))


def test_a_tree_names_parents():
    assert TREE.parents(13) == [-1, -1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert Tree(1, 1).parents(3) == [-1, 0, 1]


def test_the_marginal_of_a_tree_multiplies_down_to_the_root():
    marginal = Features(13, FOREST, co_firing=TREE).probs
    assert marginal[2].item() == pytest.approx(0.5 * 0.3)
    assert marginal[12].item() == pytest.approx(0.5 * 0.3 * 0.1)  # 12 < 3 < 0
    assert torch.equal(marginal[:2], torch.tensor([0.5, 0.8], dtype=torch.float64))


@pytest.mark.parametrize("case", ["tree", "exclusive tree", "chain"])
def test_children_fire_only_with_their_parent_and_then_with_their_own_probability(case):
    co_firing, probs = CASES[case]
    fires = drawn(co_firing, probs) > 0
    for child, parent in enumerate(co_firing.parents(len(probs))):
        if parent >= 0:
            assert not (fires[:, child] & ~fires[:, parent]).any()
            given_parent = fires[fires[:, parent], child].double()
            p = probs[child]
            assert abs(given_parent.mean() - p) <= 5 * (p * (1 - p) / len(given_parent)) ** 0.5


def test_siblings_of_a_tree_are_exclusive_if_asked_and_else_independent_given_their_parent():
    exclusive = drawn(*CASES["exclusive tree"]) > 0
    for family in ((2, 3, 4), (5, 6, 7), (8, 9, 10), (11, 12)):
        assert exclusive[:, family].sum(1).max() == 1
    fires = drawn(*CASES["tree"]) > 0
    assert_independent(*fires[fires[:, 0]][:, 2:4].T)


def test_each_instance_of_a_stack_has_its_own_probabilities():
    probs = torch.tensor([[0.1], [0.4]])
    for co_firing in (Together(2), Exclusive(2), Tree(2, 1)):
        features = Features(4, probs, co_firing=co_firing)
        x = features.sample_dense(N, generator(0, "stack"), 2)
        expected = features.probs
        assert expected.shape == (2, 4)
        assert (((x > 0).double().mean(1) - expected).abs() <= 5 * (expected / N).sqrt()).all()


@pytest.mark.parametrize(
    ("co_firing", "probs", "message"),
    [
        (Together(3), (0.1,) * 4, "n_features=4 must be a multiple of the group size, got size=3"),
        (Together(0), (0.1,) * 4, "got size=0"),
        (Together(2), (0.1, 0.2), "one feature_prob per group of 2"),
        (Exclusive(2), (0.1,) * 3, "n_features=3 must be a multiple"),
        (Exclusive(2), (0.1, 0.1, 0.6, 0.5), "at most 1, got 1.1"),
        (Tree(0), (0.1,) * 3, "n_roots must lie in 1..n_features=3, got 0"),
        (Tree(4), (0.1,) * 3, "n_roots must lie in 1..n_features=3, got 4"),
        (Tree(1, 0), (0.1,) * 3, "branching must be at least 1, got 0"),
        (Tree(1, 2, exclusive=True), (0.1, 0.2, 0.9), "at most 1, got 1.1"),
    ],
)
def test_impossible_groups_are_named(co_firing, probs, message):
    with pytest.raises(UsageError, match=message):
        Features(len(probs), probs, co_firing=co_firing)


def assert_independent(a: torch.Tensor, b: torch.Tensor) -> None:
    """Joint frequency within 5 standard errors of the product."""
    a, b = a.double(), b.double()
    limit = 5 * (a.var() * b.var() / len(a)).sqrt()
    assert abs((a * b).mean() - a.mean() * b.mean()) <= limit
