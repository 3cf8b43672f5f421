"""Dictionaries of synthetic worlds: overlaps recomputed from the directions, and what is out of reach."""

import math

import pytest
import torch

from toymodels.dictionaries import (
    CoherentDictionary,
    OrthogonalisedDictionary,
    OverlapDictionary,
    RandomDictionary,
    overlaps,
)
from toymodels.errors import UsageError
from toymodels.streams import generator


def gram(D: torch.Tensor) -> torch.Tensor:
    """|d_i · d_j| off the diagonal, by the whole matrix."""
    return (D @ D.T).abs() - torch.eye(len(D))


@pytest.mark.parametrize(
    "dictionary",
    [
        RandomDictionary(),
        OrthogonalisedDictionary(n_steps=3),
        OverlapDictionary(0.5),
        CoherentDictionary(0.7),
    ],
)
@pytest.mark.parametrize("n", [1, 17])
def test_directions_are_units_and_the_streams(dictionary, n):
    if n == 1 and isinstance(dictionary, OverlapDictionary | CoherentDictionary):
        with pytest.raises(UsageError, match="one feature overlaps with none"):
            dictionary.directions(n, 8, generator(0))
        return
    D = dictionary.directions(n, 8, generator(0))
    torch.testing.assert_close(D.norm(dim=1), torch.ones(n))
    assert torch.equal(D, dictionary.directions(n, 8, generator(0)))
    assert not torch.equal(D, dictionary.directions(n, 8, generator(1)))


def test_overlaps_are_those_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr("toymodels.dictionaries.ROWS_AT_ONCE", 7)
    D = RandomDictionary().directions(30, 6, generator(0))
    torch.testing.assert_close(overlaps(D), gram(D).amax(1))


def reference_orthogonalised(D: torch.Tensor, n_steps: int, lr: float) -> torch.Tensor:
    """By autograd over all pairs, and torch's Adam."""
    x = D.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=lr)
    for _ in range(n_steps):
        adam.zero_grad()
        dots = x @ x.T
        off = dots - torch.diag(dots.diagonal())
        (off.square().sum() + len(x) * (dots.diagonal() - 1).square().sum()).backward()
        adam.step()
    return torch.nn.functional.normalize(x.detach(), dim=1)


def test_orthogonalisation_takes_the_steps_that_it_names():
    random = RandomDictionary().directions(40, 12, generator(0))
    ours = OrthogonalisedDictionary(n_steps=25, lr=0.01).directions(40, 12, generator(0))
    torch.testing.assert_close(ours, reference_orthogonalised(random, 25, 0.01), atol=2e-5, rtol=0)
    assert gram(ours).square().sum() < 0.95 * gram(random).square().sum()


@pytest.mark.parametrize("n", [100, 101])
@pytest.mark.parametrize("target", [0.25, 0.6, 0.9])
def test_the_mean_maximal_overlap_is_the_one_asked_for(n, target):
    random = RandomDictionary().directions(n, 32, generator(0))
    assert 0.3 < gram(random).amax(1).mean() < 0.55
    D = OverlapDictionary(target).directions(n, 32, generator(0))
    assert gram(D).amax(1).mean() == pytest.approx(target, abs=1e-5)


@pytest.mark.parametrize("target", [0.35, 0.43])
def test_orthogonalised_to_an_overlap(target):
    """The first is below what these steps reach, so that close pairs part further."""
    D = OrthogonalisedDictionary(n_steps=20, mean_max_overlap=target).directions(100, 32, generator(0))
    assert gram(D).amax(1).mean() == pytest.approx(target, abs=1e-5)


@pytest.mark.parametrize("target", [0.35, 0.8])
def test_the_coherence_is_the_one_asked_for(target):
    D = CoherentDictionary(target).directions(100, 32, generator(0))
    assert gram(D).max() == pytest.approx(target, abs=1e-5)


def test_what_is_out_of_reach_is_told(monkeypatch):
    welch = math.sqrt((100 - 32) / (32 * 99))
    with pytest.raises(UsageError, match=f"at least {welch:.4g}, the Welch bound of 100 features in 32"):
        CoherentDictionary(welch - 0.01).directions(100, 32, generator(0))
    monkeypatch.setattr("toymodels.dictionaries.MOST_STEPS", 50)
    with pytest.raises(UsageError, match=r"coherence 0.15 is out of reach: .* are at 0.* after 50 steps"):
        CoherentDictionary(0.15).directions(100, 32, generator(0))
    for wrong in (-0.1, 1.0):
        with pytest.raises(UsageError, match="must lie in"):
            OverlapDictionary(wrong)
    with pytest.raises(UsageError, match="n_steps and lr must be positive, got 0"):
        OrthogonalisedDictionary(n_steps=0)
