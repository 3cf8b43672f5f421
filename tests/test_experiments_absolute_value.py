"""Row 10's measures, on networks whose answer is known: made by hand, not trained."""

import pytest
import torch

from toymodels.experiments import absolute_value_geometry as neurons
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.streams import generator


def exact(n_features):
    """W and W_out of a network that computes |x| with two neurons for each feature."""
    W = torch.zeros(1, n_features, 2 * n_features)
    for i in range(n_features):
        W[0, i, 2 * i], W[0, i, 2 * i + 1] = 2.0, -0.5
    W_out = torch.zeros(1, 2 * n_features, n_features)
    W_out[W.mT > 0], W_out[W.mT < 0] = 0.5, 2.0
    return W, W_out


def asymmetric():
    """One neuron reads feature 0 with 2 and writes it with ½, feature 1 the other way round; a second inhibits."""
    W = torch.tensor([[[2.0, 1.0], [0.5, 0.0], [0.0, 0.0]]])
    W_out = torch.tensor([[[0.5, 2.0, 0.0], [0.0, -4.0, 0.0]]])
    return W, W_out


def test_a_neuron_for_each_sign_is_pure_and_serves_one_feature():
    W, W_out = exact(4)
    assert torch.equal(neurons.service(W, W_out), (W != 0).float())
    assert neurons.pure_neurons(W, W_out).tolist() == [1]
    assert neurons.features_per_neuron(W, W_out).tolist() == [1]


@pytest.mark.parametrize(
    ("weights", "pure", "served"),
    [([0.8, 0.2], 1, 2), ([0.7, 0.3], 0, 2), ([0.96, 0.04], 1, 1), ([0.25, -0.25, 0.25, -0.25], 0, 4)],
)
def test_shares_decide_what_is_pure_and_what_is_served(weights, pure, served):
    W = torch.tensor(weights)[None, :, None]
    W_out = torch.ones(1, 1, len(weights))
    assert neurons.pure_neurons(W, W_out).tolist() == [pure]
    assert neurons.features_per_neuron(W, W_out).tolist() == [served]


def test_dead_neurons_are_left_out():
    W, W_out = exact(2)
    W[..., 0] *= 0.01  # a share of its own, but hardly any weight
    share = neurons.shares(W, W_out)
    assert share[0, :, 0].tolist() == [0, 0]
    assert neurons.pure_neurons(W, W_out).tolist() == [1]
    W_out[0, 1] = 1.0
    W[0, 1, 1] = -0.5  # one of the three live neurons now serves two features
    assert neurons.pure_neurons(W, W_out).item() == pytest.approx(2 / 3)
    assert neurons.features_per_neuron(W, W_out).item() == pytest.approx(4 / 3)


def test_variance_unexplained_is_zero_for_the_absolute_value_and_half_for_one_sign():
    p = 0.1
    model = ToyModel(3, 6, hidden_activation="relu", tied=False, generator=generator(0)).requires_grad_(False)
    W, W_out = exact(3)
    W[0, 1, 3] = 0  # feature 1 lost its negative half,
    W[0, 2] = 0  # feature 2 both
    model.W.copy_(W)
    model.own_W_out.copy_(W_out)
    fvu = neurons.unexplained(model, Features(3, p, signed=True), 1 << 17, generator(0))[0]
    variance = p / 3 - (p / 2) ** 2
    expected = [0.0, p / 6 / variance, p / 3 / variance]
    assert fvu.tolist() == pytest.approx(expected, abs=0.02)


def test_the_motif_is_found_once_and_its_interference_is_inhibited():
    W, W_out = asymmetric()
    found = neurons.motifs(W, W_out)
    assert [index.tolist() for index in found] == [[0], [0], [1], [0]]
    assert found.per_instance(2).tolist() == [1, 0]
    # Feature 0 at 1 excites output 1 by 2 · 2, and inhibits it by 1 · 4.
    assert neurons.inhibited(W, W_out, found).tolist() == [1]
    W_out[0, 1, 1] = -1
    assert neurons.inhibited(W, W_out, found).tolist() == [0.25]
    W[0, 0, 1] = -1  # the second neuron answers to the other sign of feature 0
    assert neurons.inhibited(W, W_out, found).tolist() == [0]
    W[0, 0] *= -1  # and now both have changed
    assert neurons.inhibited(W, W_out, found).tolist() == [0]


@pytest.mark.parametrize(
    ("read", "write"), [((1.4, 1.0), (0.5, 1.0)), ((2.0, 1.0), (0.7, 1.0)), ((2.0, 1.0), (-0.5, 1.0))]
)
def test_no_motif_without_both_ratios_and_two_positive_outputs(read, write):
    W, W_out = torch.tensor(read)[None, :, None].float(), torch.tensor(write)[None, None].float()
    assert len(neurons.motifs(W, W_out).neuron) == 0


def test_dealing_anew_keeps_each_feature_its_output_weights():
    W_out = torch.randn(3, 7, 5, generator=generator(0))
    dealt = neurons.dealt_anew(W_out, generator(1))
    assert torch.equal(dealt.sort(dim=1).values, W_out.sort(dim=1).values)
    assert not torch.equal(dealt, W_out)
