"""Associative memories, on keys whose recalls are known."""

from math import isnan

import pytest
import torch

from toymodels import memory
from toymodels.errors import UsageError
from toymodels.streams import generator


def pairs(n_pairs, d, n_instances=3, n_active=2):
    return memory.random_pairs(n_pairs, d, n_active, n_instances, generator(0, "pairs", n_pairs))


def test_values_are_sparse_unit_vectors():
    values = pairs(50, 16)[1]
    assert ((values > 0).sum(-1) == 2).all()
    assert ((values != 0).sum(-1) == 2).all()
    torch.testing.assert_close(values.norm(dim=-1), torch.ones(3, 50))


def test_orthogonal_keys_recall_without_noise():
    values = pairs(8, 8)[1]
    keys = torch.eye(8).expand(3, -1, -1)
    recalled = memory.hebbian(keys, values)(keys)
    torch.testing.assert_close(recalled, values)
    assert (memory.fraction_recalled(recalled, values) == 1).all()


def test_a_key_that_overlaps_recalls_some_of_the_other_value():
    keys, values = torch.tensor([[[1.0, 0], [0.6, 0.8]]]), torch.eye(2)[None]
    torch.testing.assert_close(memory.hebbian(keys, values)(keys), torch.tensor([[[1.0, 0.6], [0.6, 1.0]]]))
    b = torch.tensor([[0.0, -0.7]])
    rectified = memory.MatrixMemory(memory.hebbian(keys, values).W, b, rectified=True)
    torch.testing.assert_close(rectified(keys), torch.tensor([[[1.0, 0.0], [0.6, 0.3]]]))


def test_relative_noise_allows_for_a_gain():
    values = torch.eye(4).expand(1, -1, -1)
    torch.testing.assert_close(memory.relative_noise(0.1 * values, values), torch.zeros(1))
    noisy = 0.5 * (values + 0.2 * values.roll(1, dims=1))
    torch.testing.assert_close(memory.relative_noise(noisy, values), torch.tensor([0.04]))


def test_a_trained_memory_is_the_least_squares_solution():
    keys, values = pairs(30, 6)
    best = torch.linalg.lstsq(keys, values).solution.mT
    torch.testing.assert_close(memory.train_memory(keys, values).W, best, atol=2e-3, rtol=0)


def test_the_gradient_through_the_relu_is_autograds():
    keys, values = pairs(20, 6)
    W = (memory.hebbian(keys, values).W * (6 / 26)).requires_grad_()
    b = torch.zeros(3, 6, requires_grad=True)
    loss = ((keys @ W.mT + b[:, None]).relu() - values).square().sum(-1).mean(-1).sum()
    loss.backward()
    lr = 1e-3
    with torch.no_grad():  # one step of Adam: lr times the sign of the gradient
        expected_W, expected_b = W - lr * W.grad.sign(), b - lr * b.grad.sign()
    trained = memory.train_memory(keys, values, rectified=True, n_steps=1, lr=lr)
    torch.testing.assert_close(trained.W, expected_W, atol=1e-6, rtol=0)
    torch.testing.assert_close(trained.b, expected_b, atol=1e-6, rtol=0)


def test_softmax_chooses_among_the_keys():
    keys, values = pairs(12, 16)
    torch.testing.assert_close(memory.softmax_recall(keys, keys, values, sharpness=1000.0), values)
    mean = values.mean(1, keepdim=True).expand_as(values)
    torch.testing.assert_close(memory.softmax_recall(keys, keys, values, sharpness=0.0), mean)
    weights = torch.softmax(4.0 * keys @ keys.mT, -1)  # √16 by default
    torch.testing.assert_close(memory.softmax_recall(keys, keys, values), weights @ values)


def test_the_knee_is_where_half_are_recalled():
    assert memory.knee([1, 2, 4], [1.0, 0.9, 0.1]) == pytest.approx(3.0)
    assert isnan(memory.knee([1, 2], [1.0, 0.9]))


def test_training_needs_a_step():
    with pytest.raises(UsageError, match="n_steps must be at least 1, got 0"):
        memory.train_memory(*pairs(4, 4), n_steps=0)
