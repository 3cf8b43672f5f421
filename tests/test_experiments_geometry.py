"""The experiments on known geometry: what they measure on exact weights, and that their claims say what they saved."""

from math import cos, log, sin

import pytest
import torch

from toymodels import theory
from toymodels.experiments import linear, polygons, sparsity
from toymodels.experiments.base import Context
from toymodels.features import Features
from toymodels.geometry import feature_dimensionality, represented
from toymodels.models import ToyModel
from toymodels.streams import generator
from toymodels.training import train

PENTAGON, SQUARE = polygons.regular_polygon(5, 1.13), polygons.regular_polygon(4, 1.0)


def test_exact_polygons_have_their_gaps_names_and_dimensionality():
    torch.testing.assert_close(polygons.angle_gaps(PENTAGON), torch.full((5,), 72.0, dtype=torch.float64))
    torch.testing.assert_close(feature_dimensionality(PENTAGON), torch.full((5,), 0.4, dtype=torch.float64))
    turn = torch.tensor([[cos(1), sin(1)], [-sin(1), cos(1)]], dtype=torch.float64)
    for W, shape in ((PENTAGON, "pentagon"), (SQUARE, "square"), (polygons.regular_polygon(3, 1.0), "triangle")):
        assert polygons.polygon(W) == polygons.polygon(W[[2, 0, 4, 1, 3]] @ turn) == shape
    assert polygons.polygon(SQUARE * torch.tensor([[1.0], [1], [0], [0], [0]])) == "orthogonal pair"


def test_what_is_no_polygon_has_no_name():
    digon = SQUARE * torch.tensor([[1.0], [0], [1], [0], [0]])
    leaning = PENTAGON + torch.tensor([[0.0, 0.2]] + [[0.0, 0]] * 4)
    assert {polygons.polygon(W) for W in (digon, leaning, torch.zeros(5, 2))} == {"other"}
    assert polygons.farthest(torch.tensor([71.0, 75.0, 70.0]), 72.0) == 75


def test_a_quickly_trained_pentagon():
    model = ToyModel(5, 2, 6, init_sd=polygons.INIT_SD, generator=generator(0, "weights"))
    training = train(model, Features(5, 0.05), 600, 512, generator=generator(0, "batches"))
    W, b = model.W.detach()[training.best], model.b.detach()[training.best]
    assert polygons.polygon(W) == "pentagon"
    assert feature_dimensionality(W).sub(0.4).abs().max() < 0.01
    assert b.add(0.245).abs().max() < 0.03


def test_square_and_pentagon_cross_where_the_docstring_says():
    p = torch.tensor([[0.220], [0.230]], dtype=torch.float64)
    square, pentagon = (
        theory.minimise(polygons.regular_polygon(n, 1.0).expand(2, 5, 2), torch.zeros(2, 5), p).loss for n in (4, 5)
    )
    assert (pentagon < square).tolist() == [True, False]


@pytest.mark.parametrize("p", [1.0, 0.3])
def test_expected_linear_loss_is_that_of_samples(p):
    stream = generator(3)
    W, b = torch.randn(10, 4, generator=stream) / 4, torch.randn(10, generator=stream) / 4
    x = Features(10, p).sample_dense(200_000, stream)
    sampled = ((x - x @ W @ W.T - b).square().mean(0) * torch.tensor(linear.IMPORTANCE)).sum()
    exact = linear.expected_loss(W, b, torch.tensor([p]))
    assert sampled == pytest.approx(float(exact), rel=0.01)


def test_expected_linear_loss_of_the_optimum_is_the_closed_form():
    p, kept = torch.tensor([0.2]), torch.eye(10)[:, :3]
    b = torch.where(torch.arange(10) < 3, 0, p / 2)
    least = theory.linear_loss(torch.tensor(linear.IMPORTANCE), 0.2, 3)
    assert float(linear.expected_loss(kept, b, p)) == pytest.approx(float(least), rel=1e-6)
    other = torch.eye(10)[:, [0, 1, 3]]
    assert linear.expected_loss(other, (p / 2) * (other.sum(1) == 0), p) > 1.02 * least


def test_linear_claims_say_what_was_saved(monkeypatch):
    monkeypatch.setattr(linear, "N_STEPS", 60)
    outcome = linear.run(Context("linear", fast=True))
    claims = {claim.name: claim for claim in outcome.claims}
    for m in (2, 5):
        ratios, kept = [], 0
        for condition, facts in outcome.conditions.items():
            if facts["activation"] == "linear" and facts["d_hidden"] == m:
                p, W, b = facts["feature_prob"], *(outcome.tensors[f"{condition}/{part}"] for part in ("W", "b"))
                losses = linear.expected_loss(W, b, torch.tensor([p], dtype=torch.float64))
                ratios += (losses / (sum(linear.IMPORTANCE[m:]) * (p / 3 - p**2 / 4))).tolist()
                kept += sum(row == [i < m for i in range(10)] for row in represented(W).tolist())
        assert claims[f"kept_m={m}"].measured == kept
        assert claims[f"loss_m={m}"].measured == pytest.approx(max(ratios, key=lambda ratio: abs(ratio - 1)))
        assert not claims[f"loss_m={m}"].holds  # after so few steps


def test_every_code_is_recovered_from_orthogonal_directions_and_none_from_one():
    assert sparsity.recovered(torch.eye(30), 4, 20, generator(0)) == 1
    assert sparsity.recovered(torch.ones(30, 1), 4, 20, generator(0)) == 0


def test_recovery_turns_on_at_about_one_k_log_n_over_k(monkeypatch):
    monkeypatch.setattr(sparsity, "N_MATRICES", 2)
    ratio, found = sparsity.recovery_curve(60, 6, Context("sparsity")).values()
    assert sparsity.half(ratio, found) == pytest.approx(1.08, abs=0.15)
    assert float(ratio[0]) == pytest.approx(8 / (6 * log(10)))  # m = 8 is the closest to 0.6


def test_half_interpolates_the_first_crossing():
    ratio = torch.tensor([1.0, 2, 3, 4])
    assert sparsity.half(ratio, torch.tensor([0.0, 0.1, 0.6, 1])) == pytest.approx(2.8)
    assert torch.tensor(sparsity.half(ratio, torch.tensor([0.0, 0.1, 0.2, 0.3]))).isnan()
    assert torch.tensor(sparsity.half(ratio, torch.ones(4))).isnan()
