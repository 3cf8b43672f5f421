"""Geometry on shapes whose numbers are known."""

from math import cos, pi, sin, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toymodels import geometry
from toymodels.streams import generator


def polygon(n: int) -> torch.Tensor:
    return torch.tensor([[cos(2 * pi * i / n), sin(2 * pi * i / n)] for i in range(n)], dtype=torch.float64)


def antiprism(height: float) -> torch.Tensor:
    radius = sqrt(1 - height**2)
    ring = [(radius * cos(i * pi / 4), radius * sin(i * pi / 4), height * (-1) ** i) for i in range(8)]
    return torch.tensor(ring, dtype=torch.float64)


CUBE = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64) / sqrt(3)
SHAPES = {
    "single": (torch.eye(1, dtype=torch.float64), 1.0),
    "digon": (torch.tensor([[1.0], [-1]], dtype=torch.float64), 1 / 2),
    "triangle": (polygon(3), 2 / 3),
    "tetrahedron": (CUBE, 3 / 4),
    "pentagon": (polygon(5), 2 / 5),
    "square antiprism": (antiprism(1 / sqrt(3)), 3 / 8),
}


def rotation(d: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=generator(seed), dtype=torch.float64))[0]


@pytest.mark.parametrize("kind", SHAPES)
def test_known_shapes_have_their_dimensionality_and_name(kind):
    shape, dimensionality = SHAPES[kind]
    n, d = shape.shape
    torch.testing.assert_close(
        geometry.feature_dimensionality(shape), torch.full((n,), dimensionality, dtype=torch.float64)
    )
    assert geometry.capacity(shape).item() == pytest.approx(d)
    # The same anywhere in a larger space, at any size, with small errors, beside features that are not there.
    turned = 1.13 * torch.nn.functional.pad(shape, (0, 5 - d)) @ rotation(5, 0)
    noisy = turned + 0.02 * torch.randn(n, 5, generator=generator(1), dtype=torch.float64)
    W = torch.cat([0.1 * torch.ones(2, 5, dtype=torch.float64), noisy])
    (found,) = geometry.polytopes(W)
    assert found == geometry.Polytope(kind, tuple(range(2, 2 + n)))


def test_the_antiprism_of_least_energy_is_recognised_too():
    assert geometry.polytopes(antiprism(0.5604))[0].kind == "square antiprism"


def test_groups_are_told_apart():
    pentagon_and_digon = torch.block_diag(polygon(5), SHAPES["digon"][0])
    assert geometry.polytopes(pentagon_and_digon) == [
        geometry.Polytope("pentagon", (0, 1, 2, 3, 4)),
        geometry.Polytope("digon", (5, 6)),
    ]
    assert [shape.features for shape in geometry.polytopes(polygon(4))] == [(0, 2), (1, 3)]  # two digons
    leaning = polygon(4) @ torch.tensor([[1.0, 0.12], [0, 1]], dtype=torch.float64)
    assert [shape.kind for shape in geometry.polytopes(leaning)] == ["square"]
    assert [shape.kind for shape in geometry.polytopes(polygon(6))] == ["other"]
    for directions in ([[1.0, 0], [0.8, 0.6]], [[1.0, 0], [0.6, 0.8], [-0.5, -0.866]]):
        assert [shape.kind for shape in geometry.polytopes(torch.tensor(directions))] == ["other"]
    assert geometry.polytopes(torch.zeros(3, 2)) == []


def test_definitions_in_plain_loops():
    W = torch.randn(2, 6, 3, generator=generator(0), dtype=torch.float64)
    for i, w in enumerate(W):
        unit = w / w.norm(dim=1, keepdim=True)
        for f in range(6):
            others = [g for g in range(6) if g != f]
            read = sum((unit[f] @ w[g]) ** 2 for g in others)
            torch.testing.assert_close(geometry.interference(W)[i, f], read)
            d = w[f] @ w[f] / (read + (unit[f] @ w[f]) ** 2)
            torch.testing.assert_close(geometry.feature_dimensionality(W)[i, f], d)
        cosine = torch.stack([unit[f] @ unit[g] for f in range(6) for g in range(6) if f != g])
        bound = sqrt((6 - 3) / (3 * 5))
        assert geometry.welch_bound(6, 3) == pytest.approx(bound)
        torch.testing.assert_close(geometry.cosines(W)[i], unit @ unit.T)
        torch.testing.assert_close(geometry.coherence_over_welch(W)[i], cosine.abs().max() / bound)
        torch.testing.assert_close(geometry.rms_over_welch(W)[i], cosine.square().mean().sqrt() / bound)
        torch.testing.assert_close(geometry.norms(W)[i], w.square().sum(1).sqrt())
        assert torch.equal(geometry.represented(W)[i], w.norm(dim=1) > 0.5)
        torch.testing.assert_close(geometry.dimensions_per_feature(W)[i], 3 / w.square().sum())
        for k in range(3):
            purity = w[:, k].abs().max() / w[:, k].abs().sum()
            torch.testing.assert_close(geometry.purity_weights(W)[i, k], purity)
        sigma = torch.linalg.svdvals(w)
        share, variance = sigma / sigma.sum(), sigma.square()
        torch.testing.assert_close(geometry.effective_rank(W)[i], (-(share * share.log()).sum()).exp())
        ratio = variance.sum() ** 2 / variance.square().sum()
        torch.testing.assert_close(geometry.participation_ratio(W)[i], ratio)


def test_ranks_count_equal_directions():
    W = 3 * torch.nn.functional.pad(rotation(4, 0), (0, 2))
    assert geometry.effective_rank(W).item() == pytest.approx(4)
    assert geometry.participation_ratio(W).item() == pytest.approx(4)


def test_an_optimal_frame_reaches_the_welch_bound_and_few_vectors_have_none():
    for shape, _ in SHAPES.values():
        if len(shape) > shape.shape[1] >= 1:
            assert geometry.rms_over_welch(shape).item() == pytest.approx(1)
            assert geometry.coherence_over_welch(shape) >= 1 - 1e-9
    assert geometry.coherence_over_welch(CUBE).item() == pytest.approx(1)
    assert geometry.rms_over_welch(torch.eye(3)).isnan()
    assert geometry.coherence_over_welch(torch.eye(3)).isnan()


def test_zero_rows_and_units_score_zero():
    W = torch.tensor([[0.0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 2, 0]])
    assert geometry.feature_dimensionality(W).tolist() == [0, 0.5, 0.5, 1]
    assert geometry.interference(W).tolist() == [0, 1, 1, 0]
    assert geometry.cosines(W)[0].tolist() == [0, 0, 0, 0]
    assert geometry.purity_weights(W).tolist() == [0.5, 1, 0]
    assert geometry.capacity(W) == 2
    assert geometry.rms_over_welch(W).item() == pytest.approx(sqrt(2 / 12) / geometry.welch_bound(4, 3))
    nothing = torch.zeros(2, 4, 3)
    for score in (
        geometry.feature_dimensionality,
        geometry.interference,
        geometry.purity_weights,
        geometry.effective_rank,
        geometry.participation_ratio,
        geometry.rms_over_welch,
        geometry.coherence_over_welch,
    ):
        assert not score(nothing).any()


@given(seed=st.integers(0, 10_000), n=st.integers(1, 9), d=st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_geometry_does_not_see_rotations_and_follows_permutations(seed, n, d):
    W = torch.randn(n, d, generator=generator(seed), dtype=torch.float64)
    turned, order = W @ rotation(d, seed), torch.randperm(n, generator=generator(seed))
    for of_features in (geometry.norms, geometry.interference, geometry.feature_dimensionality):
        torch.testing.assert_close(of_features(turned), of_features(W))
        torch.testing.assert_close(of_features(W[order]), of_features(W)[order])
    for of_all in (geometry.capacity, geometry.effective_rank, geometry.rms_over_welch):
        torch.testing.assert_close(of_all(turned), of_all(W), equal_nan=True)
    torch.testing.assert_close(geometry.feature_dimensionality(2.5 * W), geometry.feature_dimensionality(W))
    assert geometry.capacity(W) <= min(n, d) + 1e-9
    kinds = sorted(shape.kind for shape in geometry.polytopes(W))
    assert kinds == sorted(shape.kind for shape in geometry.polytopes(W[order]))
