"""The expected loss against Monte Carlo and closed forms; where arrangements lose equally."""

import pytest
import torch

from toymodels import theory
from toymodels.experiments import pentagon_to_digons, phase_diagram
from toymodels.features import Features
from toymodels.streams import generator
from toymodels.training import weighted_error

DOUBLE = torch.float64
FINE = (64, 32, 16, 10)


def random_weights(*shape: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    stream = generator(seed, "theory")
    W = 0.7 * torch.randn(*shape, d, generator=stream, dtype=DOUBLE)
    return W, 0.2 * torch.randn(shape, generator=stream, dtype=DOUBLE)


def test_it_is_the_mean_over_samples():
    W, b = random_weights(4, 4, d=2)
    p, importance = torch.tensor([0.1, 0.5, 1.0, 0.3]), torch.tensor([1.0, 0.5, 2.0, 0.0])
    x = Features(4, p).sample_dense(100_000, generator(1), 4).double()
    y = torch.relu(x @ W @ W.mT + b[:, None])
    each = ((x - y).square() * importance).sum(2)
    error = each.std(1) / each.shape[1] ** 0.5
    expected = theory.expected_loss(W, b, p, importance)
    assert ((expected - each.mean(1)).abs() < 4 * error).all()
    assert (error / expected < 0.01).all()  # else it would prove little
    torch.testing.assert_close(weighted_error(x, y, importance), each.mean(1))


def test_closed_forms():
    p, r = 0.3, 0.5
    importance = torch.tensor([1.0, r], dtype=DOUBLE)
    variance = p / 3 - p**2 / 4
    for weights, dropped in (([1.0, 0], 1), ([0.0, 1], 0)):
        W, b = torch.tensor(weights, dtype=DOUBLE)[:, None], torch.zeros(2, dtype=DOUBLE)
        b[dropped] = p / 2
        torch.testing.assert_close(theory.expected_loss(W, b, p, importance), importance[dropped] * variance)
    assert theory.variance(p).item() == pytest.approx(variance)
    W = torch.tensor([[1.0], [-1.0]], dtype=DOUBLE)
    for probs in (p, torch.tensor([0.3, 0.1], dtype=DOUBLE)):
        antipodal = theory.antipodal_loss(importance, probs)
        torch.testing.assert_close(theory.expected_loss(W, torch.zeros(2), probs, importance), antipodal)
    assert antipodal.item() == pytest.approx(1.5 * 0.3 * 0.1 / 6)
    assert theory.expected_loss(torch.eye(3), torch.zeros(3), 0.4).abs() < 1e-15
    silent = theory.expected_loss(torch.zeros(3, 2), -torch.ones(3), 0.4)
    assert silent.item() == pytest.approx(3 * 0.4 / 3)
    assert theory.expected_loss(torch.zeros(1, 1), torch.tensor([p / 2]), p).item() == pytest.approx(variance)


def test_a_linear_model_keeps_what_matters_most():
    importance = torch.tensor([[0.2, 1.0, 0.5], [1.0, 1.0, 1.0]])
    p = torch.tensor([0.3, 0.3, 0.1], dtype=DOUBLE)
    v = p / 3 - p**2 / 4
    lost = theory.linear_loss(importance, p, 2)
    torch.testing.assert_close(lost, torch.stack([0.5 * v[2], v[2]]))
    torch.testing.assert_close(theory.linear_loss(importance, 0.3, 1), torch.tensor([0.7, 2.0], dtype=DOUBLE) * v[0])


@pytest.mark.parametrize(("p", "error"), [(0.05, 1e-4), (0.5, 1e-4), (1.0, 1e-3)])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_error_of_the_quadrature_is_as_stated(n, p, error):
    W, b = random_weights(10, n, d=2, seed=n)
    exact = theory.expected_loss(W, b, p, points=FINE)
    assert ((theory.expected_loss(W, b, p) / exact - 1).abs() < error).all()


def test_instances_have_probabilities_and_importances_of_their_own():
    W, b = random_weights(2, 2, 3, d=2)
    stream = generator(1)
    p, importance = torch.rand(2, 2, 2, 3, generator=stream, dtype=DOUBLE)
    together = theory.expected_loss(W, b, p, importance)
    downhill = theory.minimise(W, b, p, importance, tolerance=1e-4)
    assert together.shape == downhill.loss.shape == (2, 2)
    for i in range(2):
        for j in range(2):
            one = W[i, j], b[i, j], p[i, j], importance[i, j]
            torch.testing.assert_close(theory.expected_loss(*one), together[i, j])
            torch.testing.assert_close(theory.minimise(*one, tolerance=1e-4).loss, downhill.loss[i, j])


def test_gradients():
    W, b = (tensor.requires_grad_() for tensor in random_weights(2, 3, d=2))
    assert torch.autograd.gradcheck(lambda W, b: theory.expected_loss(W, b, 0.4, points=(6, 4)), (W, b))


def test_it_descends_to_a_minimum():
    W, b = random_weights(8, 2, d=1)
    found = theory.minimise(W, b, 0.1)
    at = [tensor.clone().requires_grad_() for tensor in (found.W, found.b)]
    loss = theory.expected_loss(*at, 0.1)
    torch.testing.assert_close(loss, found.loss)
    assert max(g.abs().max() for g in torch.autograd.grad(loss.sum(), at)) < 1e-8
    best = found.W[found.loss.argmin()].squeeze()
    torch.testing.assert_close(best, best.sign() * best.abs().mean())  # an antipodal pair
    assert best.prod() < 0
    assert found.loss.min() < theory.antipodal_loss(torch.ones(2), 0.1)


def test_too_many_features_are_refused():
    with pytest.raises(ValueError, match=r"up to 4 features at once, got 5"):
        theory.expected_loss(torch.zeros(6, 2), torch.zeros(6), 0.1)


@pytest.mark.parametrize("n", [2, 3])
def test_superposition_is_best_below_p_star_and_only_there(n):
    targets, tolerance = phase_diagram.TARGETS[n], phase_diagram.TOLERANCE[n]
    r, p_star = torch.tensor(list(targets.items()), dtype=DOUBLE).T
    p = torch.cat([p_star - tolerance, p_star + tolerance])
    W = phase_diagram.optimum(n, p, r.repeat(2), theory.POINTS)
    # Below, the last two features share a dimension; above, each dimension has one of the more important features.
    gram = W @ W.mT
    below, above = gram.abs().tril(-1).sum((1, 2)).chunk(2)
    assert (below > 0.5).all()
    assert (gram[: len(r), -2, -1] < -0.5).all()
    assert not above.any()


def test_pentagon_and_digons_lose_equally_at_rho_star():
    p, rho_star = torch.tensor(list(pentagon_to_digons.TARGETS.items()), dtype=DOUBLE)[2::2].T
    rho, pentagon = pentagon_to_digons.crossing(p)
    assert ((rho - rho_star).abs() < 0.01).all()
    digons = pentagon_to_digons.two_digons(p, rho)
    torch.testing.assert_close(pentagon.loss, digons.loss, rtol=1e-3, atol=0)
    pair = theory.minimise(torch.tensor([[1.0], [-1.0]]).expand(2, 2, 1), torch.zeros(2, 2), p[:, None])
    torch.testing.assert_close(digons.loss, 2 * pair.loss + theory.variance(rho * p))
    shapes = [[pentagon_to_digons.shape(w) for w in W] for W in (digons.W, pentagon.W)]
    assert shapes == [[0] * 2, [1] * 2]
