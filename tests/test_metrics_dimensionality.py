"""Judges of dimensionality: exact polytopes, the plain formulas, random directions, the truth itself."""

import math

import pytest
import torch
from torch import Tensor

from sae.metrics import dictionary_dimensionality, dimensionality
from sae.metrics.dimensionality import _random_coherence
from toymodels import geometry
from toymodels.streams import generator

NAMES = (
    "feature_dimensionality",
    "dimensions_per_feature",
    "interference",
    "capacity",
    "effective_rank",
    "participation_ratio",
    "coherence_over_welch",
    "rms_over_welch",
)


def polygon(n: int) -> Tensor:
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def random_rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=generator(seed, "test"), dtype=torch.float64)


def test_a_pentagon() -> None:
    scores = dimensionality(polygon(5))
    assert scores["feature_dimensionality"] == pytest.approx(2 / 5)
    assert scores["dimensions_per_feature"] == pytest.approx(2 / 5)
    assert scores["interference"] == pytest.approx(3 / 2)
    assert scores["capacity"] == pytest.approx(2)
    assert scores["effective_rank"] == pytest.approx(2)
    assert scores["participation_ratio"] == pytest.approx(2)
    assert scores["rms_over_welch"] == pytest.approx(1)
    assert scores["coherence_over_welch"] == pytest.approx(math.cos(math.pi / 5) / math.sqrt(3 / 8))
    assert scores["polytope_pentagon"] == 1
    assert sum(scores[name] for name in scores if name.startswith("polytope_") and "chance" not in name) == 1


def test_polytopes_are_counted_by_kind() -> None:
    W = torch.block_diag(polygon(3), polygon(5), torch.tensor([[1.0], [-1.0]]), torch.ones(1, 1))
    scores = dimensionality(W)
    kinds = ("triangle", "pentagon", "digon", "single", "other", "square_antiprism")
    assert [scores[f"polytope_{kind}"] for kind in kinds] == [1, 1, 1, 1, 0, 0]


def test_the_plain_formulas() -> None:
    W = random_rows(30, 6)
    unit = W / W.norm(dim=1, keepdim=True)
    overlap = (unit @ W.T).square()
    others = overlap.sum(dim=1) - overlap.diagonal()
    D = overlap.diagonal() / overlap.sum(dim=1)
    sigma = torch.linalg.svdvals(W)
    p = sigma / sigma.sum()
    cosines = (unit @ unit.T)[~torch.eye(30, dtype=torch.bool)]
    welch = math.sqrt(24 / (6 * 29))
    expected = {
        "feature_dimensionality": D.mean(),
        "dimensions_per_feature": 6 / W.square().sum(),
        "interference": others.mean(),
        "capacity": D.sum(),
        "effective_rank": (-(p * p.log()).sum()).exp(),
        "participation_ratio": sigma.square().sum() ** 2 / sigma.pow(4).sum(),
        "coherence_over_welch": cosines.abs().max() / welch,
        "rms_over_welch": cosines.square().mean().sqrt() / welch,
    }
    scores = dimensionality(W.float())
    assert {name: scores[name] for name in NAMES} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)


def test_welch_ratios_are_left_out_where_they_are_undefined() -> None:
    scores = dimensionality(torch.eye(3))
    assert "coherence_over_welch" not in scores
    assert "rms_over_welch_chance" not in scores
    assert scores["capacity"] == pytest.approx(3)
    assert all(math.isfinite(value) for value in scores.values())
    assert all(math.isfinite(value) for value in dimensionality(torch.zeros(4, 2)).values())


def test_random_directions_score_the_reported_chance() -> None:
    norms = torch.linspace(0.6, 2, 200, dtype=torch.float64)[:, None]
    rows = random_rows(200, 40, seed=4)
    scores = dimensionality(norms * rows / rows.norm(dim=1, keepdim=True))
    for name in NAMES:
        assert abs(scores[name] - scores[f"{name}_chance"]) <= 8 * scores[f"{name}_chance_sd"] + 1e-9, name
    assert scores["dimensions_per_feature_chance_sd"] == pytest.approx(0, abs=1e-12)
    assert dimensionality(polygon(5), seed=1) != dimensionality(polygon(5), seed=2)


@pytest.mark.parametrize(("n", "d"), [(60, 3), (400, 16), (900, 128)])
def test_the_largest_cosine_of_random_directions_follows_its_law(n: int, d: int) -> None:
    """Of 300 measured ones, the share below each quantile of the law."""
    bound = geometry.welch_bound(n, d)
    draws = torch.tensor([float(geometry.coherence_over_welch(random_rows(n, d, seed=seed))) for seed in range(300)])
    for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):
        below = float((draws < _random_coherence(n, d, quantile) / bound).double().mean())
        assert abs(below - quantile) < 4 * (quantile * (1 - quantile) / 300) ** 0.5, quantile


def test_chance_of_a_large_matrix_is_that_of_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law and its fewer draws, where a matrix is large; here by what counts as large."""
    rows = random_rows(700, 30, seed=9)
    drawn = dimensionality(rows)
    monkeypatch.setitem(dimensionality.__globals__, "LARGE", 1000)
    by_law = dimensionality(rows)
    for name in NAMES:
        spread = max(drawn[f"{name}_chance_sd"], by_law[f"{name}_chance_sd"])
        assert abs(drawn[f"{name}_chance"] - by_law[f"{name}_chance"]) <= 6 * spread + 1e-6 * abs(drawn[name]), name


def test_no_two_directions_have_a_largest_cosine() -> None:
    assert _random_coherence(1, 5, 0.5) == 0
    assert _random_coherence(7, 1, 0.5) == 1
    assert 0 <= _random_coherence(2, 2, 0.0) <= 1
    assert _random_coherence(131072, 4096, 0.5) == pytest.approx(
        0.1013, abs=0.0005
    )  # 6.5 standard deviations of 1 / 64


def test_the_truth_differs_from_itself_by_nothing() -> None:
    truth = random_rows(40, 8)
    scores = dictionary_dimensionality(3 * truth.flip(0), truth)
    for name in NAMES:
        assert scores[name] == pytest.approx(scores[f"{name}_truth"])
        assert scores[f"{name}_difference"] == pytest.approx(0, abs=1e-9)
    assert scores["dimensions_per_feature"] == pytest.approx(8 / 40)


def test_dead_and_zero_rows_are_left_out() -> None:
    truth, alive = random_rows(40, 8), torch.arange(40) < 20
    some = dictionary_dimensionality(truth, truth, alive=alive)
    assert some["dimensions_per_feature"] == pytest.approx(8 / 20)
    assert some["dimensions_per_feature_chance"] == pytest.approx(8 / 20)
    assert some["dimensions_per_feature_difference"] == pytest.approx(8 / 20 - 8 / 40)
    assert dictionary_dimensionality(truth * alive[:, None], truth) == pytest.approx(some)
    assert dictionary_dimensionality(truth * alive[:, None], truth, alive=alive | True) == pytest.approx(some)
    assert dictionary_dimensionality(truth, truth, alive=alive & False) == {}
    few = dictionary_dimensionality(truth[:5], truth)
    assert "rms_over_welch" not in few
    assert "rms_over_welch_difference" not in few


def test_a_dictionary_without_a_truth_has_no_norms_either() -> None:
    truth = torch.randn(40, 8, generator=generator(0, "test", "dictionary"), dtype=torch.float64)
    alone = dictionary_dimensionality(truth * torch.linspace(0.1, 5, 40, dtype=torch.float64)[:, None])
    beside = dictionary_dimensionality(truth, truth)
    assert alone == pytest.approx({name: beside[name] for name in alone})
    assert set(beside) - set(alone) == {name for name in beside if name.endswith(("_truth", "_difference"))}
    assert alone["dimensions_per_feature"] == pytest.approx(8 / 40)
