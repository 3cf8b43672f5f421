"""Small networks in one residual stream, on directions whose overlaps are known."""

import pytest
import torch

from toymodels.errors import UsageError
from toymodels.features import FeatureBatch
from toymodels.residual import (
    CompressedNetworks,
    ResidualRecipe,
    SmallNetworks,
    exactly_active,
    gate,
    interference_sd,
    random_directions,
    read_in_interference,
    read_out_effect,
    relative_error,
)
from toymodels.streams import generator


def test_random_directions_are_unit_vectors_that_overlap_by_one_over_the_width():
    directions = random_directions(300, 20, 3, generator(0))
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3, 300))
    overlaps = (directions @ directions.mT)[:, ~torch.eye(300, dtype=torch.bool)]
    assert overlaps.square().mean().item() == pytest.approx(1 / 20, rel=0.02)
    assert not torch.equal(directions[0], directions[1])


def test_exactly_so_many_are_active_and_all_alike():
    x = exactly_active(3, 10, 2000, 2, generator(1)).dense()
    assert x.shape == (2, 2000, 10)
    assert ((x > 0).sum(-1) == 3).all()
    torch.testing.assert_close((x > 0).float().mean((0, 1)), torch.full((10,), 0.3), atol=0.03, rtol=0)
    assert x[x > 0].square().mean().item() == pytest.approx(1 / 3, rel=0.05)
    always = exactly_active(3, 10, 50, 2, generator(1), always=7).dense()
    assert (always[..., 7] > 0).all()
    assert ((always > 0).sum(-1) == 3).all()


def test_units_hear_and_lose_the_overlap_times_the_others_strength():
    directions = torch.tensor([[[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1.0]]])
    a = FeatureBatch.from_dense(torch.tensor([[[0.5, 1.0, 0.0], [0.2, 0.0, 0.4]]]))
    torch.testing.assert_close(read_in_interference(a, directions), torch.tensor([[0.6, 0.3, 0.0, 0.0]]))
    # The first unit is zeroed in either row: the second loses .6 times its strength, the third nothing.
    expected = torch.tensor([(0.3**2 + 0.12**2) / 4])
    torch.testing.assert_close(read_out_effect(a, directions, lambda u: u), expected)
    expected = torch.tensor([1.3**2 / 4])  # above 1.25 is 1.3, and 1.0 is not
    torch.testing.assert_close(read_out_effect(a, directions, lambda u: gate(u, 1.25)), expected)


@pytest.mark.parametrize("n_active", [0, 11])
def test_no_more_are_active_than_there_are(n_active):
    with pytest.raises(UsageError, match=r"1\.\.n_features=10"):
        exactly_active(n_active, 10, 5, 1, generator(0))


def test_a_gate_is_the_limit_of_two_relus():
    u, theta, epsilon = torch.linspace(-1, 1, 97, dtype=torch.float64), 0.3, 1e-6
    relus = (theta * (u - theta + epsilon).relu() - (theta - epsilon) * (u - theta).relu()) / epsilon
    torch.testing.assert_close(gate(u, theta), relus)


def test_small_networks_are_broken_lines_through_the_origin():
    networks = SmallNetworks(torch.tensor([[[2.0, -3.0]]]))  # slope 2, then -1 from x = 1/2
    x = torch.tensor([[[-1.0], [0.0], [0.25], [0.5], [1.0]]])
    torch.testing.assert_close(networks(x), torch.tensor([[[0.0], [0.0], [0.5], [1.0], [0.5]]]))
    assert (SmallNetworks.random(50, 3, 2, generator(0)).v.cumsum(-1).abs() >= 1 - 1e-6).all()


def test_orthogonal_directions_compress_without_error():
    networks = SmallNetworks.random(6, 3, 2, generator(2))
    inputs, outputs = torch.eye(12).expand(2, -1, -1).split(6, dim=1)
    x = exactly_active(2, 6, 40, 2, generator(3))
    torch.testing.assert_close(CompressedNetworks(networks, inputs, outputs)(x), networks(x.dense()))


def test_two_networks_disturb_each_other_as_their_directions_overlap():
    networks = SmallNetworks(torch.tensor([[[1.0], [2.0]]]))
    inputs = torch.tensor([[[1.0, 0, 0, 0], [0.6, 0.8, 0, 0]]])
    outputs = torch.tensor([[[0, 0, 1.0, 0], [0, 0, 0.8, 0.6]]])
    compressed = CompressedNetworks(networks, inputs, outputs)
    x = FeatureBatch.from_dense(torch.tensor([[[0.5, 0.0]]]))
    # The second, which should rest, hears .3 and answers .6, which the first hears as .48.
    torch.testing.assert_close(compressed(x), torch.tensor([[[0.5 + 0.48, 0.6 + 0.4]]]))
    torch.testing.assert_close(compressed(x, threshold=0.4), torch.tensor([[[0.5, 0.4]]]))


@pytest.mark.parametrize("sds", [0, 3])
def test_the_expected_error_is_what_is_measured(sds):
    compressed = CompressedNetworks.random(600, 128, 3, 8, generator(4))
    threshold = sds * interference_sd(3, 128)
    x = exactly_active(3, 600, 200, 8, generator(5))
    active = x.indices.view(8, 200, 3)
    outputs = compressed(x, threshold), compressed.networks(x.dense())
    measured = relative_error(*(y.gather(2, active).flatten(1) for y in outputs)).mean().item()
    assert measured == pytest.approx(compressed.expected_error(3, threshold), rel=0.1)


def test_a_world_of_active_directions():
    recipe = ResidualRecipe().resized(n_features=40, d_hidden=16, feature_prob=0.1)
    world = recipe.build(3)
    assert world.d_hidden == 16
    sample = world.sample(500, generator(0))
    torch.testing.assert_close(sample.hidden, sample.acts.dense() @ world.truth)
    torch.testing.assert_close(world.truth.norm(dim=1), torch.ones(40))
    assert len(sample.acts.values) == pytest.approx(500 * 40 * 0.1, rel=0.1)
    assert torch.equal(recipe.build(3).truth, world.truth)
    with pytest.raises(UsageError, match="ResidualRecipe has no n_steps, got 5: nothing in it is trained"):
        recipe.resized(n_steps=5)
