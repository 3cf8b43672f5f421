"""Named streams: reproducible, and shared by nobody."""

import pytest
import torch

from toymodels.streams import generator


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
