"""Named streams: reproducible, and shared by nobody."""

import pytest
import torch

from toymodels.streams import generator, uniform_


def test_the_same_name_draws_the_same_and_any_other_name_differs():
    paths = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "a", 1), (0, "a", 2), (1, "a"), (0, 1)]
    draws = {path: torch.rand(4, generator=generator(*path)) for path in paths}
    for path in paths:
        assert torch.equal(draws[path], torch.rand(4, generator=generator(*path)))
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(paths)


def test_seeds_are_those_of_earlier_releases():
    assert generator(0, "init").initial_seed() == 6028041614538865766


def test_a_slash_in_a_name_is_refused():
    with pytest.raises(ValueError, match="must not contain '/', got 'a/b'"):
        generator(0, "a/b")


def test_uniform_draws_fill_the_unit_interval_and_depend_on_the_stream_alone():
    x = uniform_(torch.full((3, 33_333), torch.nan), generator(0, "test"))
    assert 0 <= x.min() < 1e-3
    assert 1 - 1e-3 < x.max() < 1
    assert ((x.flatten().sort().values - torch.linspace(0, 1, x.numel())).abs() < 2.5 / x.numel() ** 0.5).all()
    neighbours = torch.corrcoef(torch.stack([x[:, :-1].flatten(), x[:, 1:].flatten()]))[0, 1]
    assert neighbours.abs() < 5 / x.numel() ** 0.5
    assert torch.equal(uniform_(torch.empty(3, 33_333), generator(0, "test")), x)
    stream = generator(0, "test")
    first, second = uniform_(torch.empty(5), stream), uniform_(torch.empty(5), stream)
    assert not torch.equal(first, second)
