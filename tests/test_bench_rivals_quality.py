"""Quality beside a rival: a fake one, whose steps are counted and whose codes are known."""

import json

import pytest
import torch

from sae.arrays import table as rows
from sae.bench import quality
from sae.bench.loading import RivalFailed
from sae.bench.quality import Comparison, Trial, table
from sae.bench.rivals import Rival, Training
from sae.bench.sets import Data, data
from sae.bench.shapes import Shape
from sae.errors import UsageError
from sae.sources import ArraySource


@pytest.fixture
def small(monkeypatch):
    """One set of three directions, each firing alone; a rival that knows them all, and fires two for a row."""
    truth = torch.eye(3, 6)
    stream = torch.Generator().manual_seed(0)
    x = truth[torch.randint(3, (2000,), generator=stream)] * (1 + torch.rand(2000, 1, generator=stream))
    given = Data(ArraySource(rows(x, "x"), truth), Shape("small", 6, 4, 1, 32), 30, 0.1)
    seen = []

    def make(shape, lr, device, settings):
        def reconstruct(part):
            codes = torch.zeros(len(part), 4)
            codes[:, :3] = part[:, :3]
            codes[:, 3] = 1e-3
            return codes, 0.5 * part

        return Training(lambda part: seen.append((len(part), settings)), lambda: torch.eye(4, 6), reconstruct)

    monkeypatch.setattr(quality, "RIVALS", {"fake": Rival("fake", {"batchtopk": make})})
    monkeypatch.setattr(quality, "data", lambda name, kind: given)
    return seen


def test_ours_is_asked_for_the_l0_of_the_rival(small, tmp_path, capsys):
    comparison = Comparison("small", tmp_path / "trials.jsonl")
    comparison.run(["batchtopk"], [0])
    theirs, ours = comparison.trials
    assert (theirs.name, theirs.l0, theirs.mcc) == ("fake", pytest.approx(2.0), pytest.approx(1.0))
    assert (ours.name, ours.asked) == ("sae", theirs.l0)
    assert len(small) == 30
    assert {n for n, _ in small} == {32}
    settings = small[0][1]
    assert (settings.n_steps, settings.warmups, settings.decay_steps) == (30, (100, 1), 9)
    assert settings.l0_price == pytest.approx(0.0025)
    assert "| batchtopk | fake | 2.00 |" in table(comparison)


def test_what_was_trained_is_not_trained_again(small, tmp_path):
    path = tmp_path / "trials.jsonl"
    Comparison("small", path).run(["batchtopk"], [0])
    written = path.read_text()
    Comparison("small", path).run(["batchtopk"], [0])
    assert (len(small), path.read_text()) == (30, written)
    assert Trial(**json.loads(written.splitlines()[0])).name == "fake"


def test_a_rival_that_fails_is_left_out(small, tmp_path, monkeypatch):
    def broken(shape, lr, device, settings):
        def step(part):
            raise RuntimeError("of no use")

        return Training(step, lambda: torch.eye(4, 6), lambda part: (part, part))

    rival = Rival("broken", {"batchtopk": broken})
    with pytest.raises(RivalFailed, match="broken is left out of batchtopk: RuntimeError: of no use"):
        quality.of_rival(rival, "batchtopk", 1e-3, 0, quality.data("small", "batchtopk"))
    monkeypatch.setattr(quality, "RIVALS", {"broken": rival})
    comparison = Comparison("small", tmp_path / "trials.jsonl")
    comparison.run(["batchtopk"], [0])
    assert comparison.trials == []


def test_an_unknown_set_is_one_line():
    with pytest.raises(UsageError, match="unknown set 'zips'; did you mean 'zipf'"):
        data("zips", "topk")
