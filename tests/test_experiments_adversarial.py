"""The attack, against brute force and closed forms."""

from math import pi

import pytest
import torch
from einops import rearrange

from toymodels.experiments.adversarial import losses, worst_steps
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.streams import generator


def with_weights(W, b):
    model = ToyModel(*W.shape[1:], n_instances=W.shape[0])
    model.W.data.copy_(W)
    model.b.data.copy_(b)
    return model.requires_grad_(False)


def pentagon():
    """The solution of five sparse features in two dimensions (row 2a), and a random arrangement beside it."""
    angles = torch.arange(5) * 2 * pi / 5
    exact = 1.13 * torch.stack([angles.cos(), angles.sin()], dim=1)
    random = torch.randn(5, 2, generator=generator(0))
    return with_weights(torch.stack([exact, random]), torch.tensor([[-0.245], [-0.1]]).expand(2, 5))


def brute_force(model, x, eps):
    """The largest loss of each input over a polar grid of the two dimensions that a step can move.

    What is orthogonal to the columns of W moves nothing, so that the worst step lies in their span.
    """
    basis = torch.linalg.qr(model.W).Q  # [instance, feature, 2]
    angles = torch.linspace(0, 2 * pi, 1201)
    circle = basis @ torch.stack([angles.cos(), angles.sin()])
    found = [losses(model, x)]
    for radius in torch.linspace(0.1, 1, 10):
        steps = radius * eps[:, None, None] * circle
        moved = rearrange(x, "i b n -> i b 1 n") + rearrange(steps, "i n a -> i 1 a n")
        y = model(rearrange(moved, "i b a n -> i (b a) n"))
        error = rearrange(y, "i (b a) n -> i b a n", a=len(angles)) - rearrange(x, "i b n -> i b 1 n")
        found.append(error.square().sum(-1).amax(2))
    return torch.stack(found).amax(0)


@pytest.mark.parametrize("size", [0.05, 0.3, 1.0])
def test_attack_is_as_bad_as_brute_force(size):
    model, eps = pentagon(), torch.tensor([size, size / 2])
    x = Features(5, 0.4).sample_dense(60, generator(1), 2)
    attacked = losses(model, x, worst_steps(model, x, eps))
    worst = brute_force(model, x, eps)
    assert (attacked <= worst * 1.001 + 1e-6).all()
    share = (attacked - losses(model, x)).sum(1) / (worst - losses(model, x)).sum(1)
    assert share[0] > 0.99
    assert share[1] > 0.97  # its long features interfere so much that active ones are cut off


def test_attack_stays_in_the_ball_and_never_helps():
    model, eps = pentagon(), torch.tensor([0.3, 0.1])
    x = Features(5, 0.4).sample_dense(60, generator(1), 2)
    steps = worst_steps(model, x, eps)
    assert (steps.norm(dim=2) <= eps[:, None] * 1.0001).all()
    assert (losses(model, x, steps) >= losses(model, x)).all()


def test_without_superposition_the_worst_step_costs_eps_squared():
    model = with_weights(torch.eye(6)[None], torch.zeros(1, 6))
    x = Features(6, 0.5).sample_dense(40, generator(2), 1)
    attacked = losses(model, x, worst_steps(model, x, torch.tensor([0.2])))
    torch.testing.assert_close(attacked, torch.full((1, 40), 0.04))


def test_a_silent_output_is_found_though_it_has_no_gradient():
    # W = 1, b = −0.1: from x = 0 a step of 0.3 along one feature yields 0.3 − 0.1, along four of them nothing.
    model = with_weights(torch.eye(4)[None], torch.full((1, 4), -0.1))
    attacked = losses(model, torch.zeros(1, 1, 4), worst_steps(model, torch.zeros(1, 1, 4), torch.tensor([0.3])))
    torch.testing.assert_close(attacked, torch.full((1, 1), 0.2**2))
