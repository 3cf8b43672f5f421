"""What `uniform` and `energy_levels` measure, on weights and curves that are made by hand."""

from math import cos, pi, sin, sqrt

import pytest
import torch

from toymodels import geometry
from toymodels.experiments import energy_levels, uniform
from toymodels.experiments.energy_levels import SPAN, Jumps, find_jumps, losses_on, most_spread
from toymodels.models import ToyModel
from toymodels.streams import generator


def polygon(n: int) -> torch.Tensor:
    return torch.tensor([[cos(2 * pi * i / n), sin(2 * pi * i / n)] for i in range(n)])


def antiprism() -> torch.Tensor:
    ring = [(cos(i * pi / 4) * sqrt(2 / 3), sin(i * pi / 4) * sqrt(2 / 3), (-1) ** i / sqrt(3)) for i in range(8)]
    return torch.tensor(ring)


TETRAHEDRON = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / sqrt(3)
DIGON = torch.tensor([[1.0], [-1]])
SHAPES = [
    (torch.eye(1), "1, alone"),
    (TETRAHEDRON, "3/4, tetrahedron"),
    (polygon(3), "2/3, triangle"),
    (DIGON, "1/2, digon"),
    (polygon(5), "2/5, pentagon"),
    (antiprism(), "3/8, antiprism"),
]


@pytest.mark.parametrize(("shape", "rung"), SHAPES, ids=[rung for _, rung in SHAPES])
def test_exact_polytopes_lie_on_their_rung_and_on_no_other(shape, rung):
    # Features that are not represented have a direction of their own, and a say in nothing.
    W = torch.block_diag(1.1 * shape, torch.tensor([[0.4]]))[None]
    shares = {name: uniform.share_near(W, value, 1e-5) for name, value in uniform.LADDER.items()}
    assert shares == {name: float(name == rung) for name in uniform.LADDER}


def test_the_largest_share_is_of_the_represented_alone():
    W = torch.block_diag(DIGON, DIGON, DIGON, polygon(4) @ torch.diag(torch.tensor([1.0, 0.9])), 0.4 * DIGON)
    # Six of ten represented features in exact pairs, and all ten have D_i = 1/2; a pentagon makes it ten of fifteen.
    assert uniform.largest_share(W, 0.02) == 1
    assert uniform.largest_share(torch.block_diag(W, polygon(5)), 0.02) == pytest.approx(10 / 15)


def test_capacity_is_the_mean_of_the_instances():
    good = torch.block_diag(DIGON, DIGON)
    bad = good + torch.tensor([[0.0, 0.5], [0, 0], [0, 0], [0, 0]])
    (claim,) = uniform.capacities({3.0: torch.stack([bad, bad, good])})
    assert claim.measured == pytest.approx((2 * geometry.capacity(bad).item() + 2) / 3)
    assert not claim.holds
    assert uniform.capacities({3.0: torch.stack([good, good])})[0].holds


def curves(n_snapshots: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Two instances: feature 1 of the first rises by .4 as the loss drops, feature 0 of the second as it does not."""
    time = torch.arange(float(n_snapshots))
    D, loss = torch.full((n_snapshots, 2, 3), 0.3), torch.ones(n_snapshots, 2)
    D[:, 0, 1] += 0.4 * torch.sigmoid(time - 200)
    D[:, 1, 0] += 0.4 * torch.sigmoid(time - 100)
    D[:, 1, 2] += 0.14 * torch.sigmoid(time - 300)  # too little
    loss[:, 0] -= torch.sigmoid(time - 200) + 1e-5 * time
    loss[:, 1] -= torch.sigmoid(time - 300) + 1e-5 * time
    return D, loss


def test_each_jump_counts_once_and_with_the_loss_of_its_own_instance():
    found = find_jumps(*curves())
    assert found.jumps.sum((0, 2)).tolist() == [1, 1]
    window, instance, feature = found.jumps.nonzero().T
    assert [(int(i), int(f)) for i, f in zip(instance, feature, strict=True)] in ([(1, 0), (0, 1)], [(0, 1), (1, 0)])
    for start, centre in zip(window[instance.argsort()], (200, 100), strict=True):
        assert start < centre < start + SPAN
    assert found.top.float().mean() == pytest.approx(0.1, abs=0.01)
    assert found.share == 0.5


def test_the_null_turns_each_instance_by_its_own_shift():
    jumps = torch.rand(40, 3, 5, generator=generator(0)) < 0.05
    found = Jumps(jumps, torch.rand(40, 3, generator=generator(1)) < 0.2)
    stream = generator(2)
    shifts = torch.randint(40, (6, 3), generator=generator(2))
    expected = [
        Jumps(jumps, torch.stack([found.top[:, i].roll(int(row[i])) for i in range(3)], 1)).share for row in shifts
    ]
    torch.testing.assert_close(found.shifted(6, stream).float(), torch.stack(expected))


def test_the_model_shown_has_its_jumps_far_apart():
    jumps = torch.zeros(50, 3, 2, dtype=torch.bool)
    jumps[[10, 30], 1, [0, 1]] = True
    jumps[[49, 45], 0, 0] = True
    assert most_spread(Jumps(jumps, jumps[..., 0])) == 1


def test_snapshots_are_judged_on_one_batch():
    models = [ToyModel(4, 2, 3, generator=generator(seed)) for seed in range(5)]
    x = torch.rand(7, 4, generator=generator(9))
    W, b = (torch.stack([getattr(model, name).detach() for model in models]) for name in ("W", "b"))
    b = b + 0.1
    losses = losses_on(x, W, b)
    y = torch.relu(x @ W[3, 1] @ W[3, 1].T + 0.1)
    assert losses.shape == (5, 3)
    torch.testing.assert_close(losses[3, 1], (x - y).square().sum(1).mean())
    assert energy_levels.CONDITION == "p=0.1"
