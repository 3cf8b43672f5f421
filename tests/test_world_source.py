"""Synthetic worlds as a source of activations, from a configuration to a report."""

import json

import pytest
import torch
import yaml
from dense_worlds import write_saelens_world

from sae import UsageError
from sae.config import parse_config
from sae.world_source import ROWS_AT_ONCE, ShiftedSource, WorldSource, WorldSourceConfig
from toymodels import generator, load_world

WORLD = {
    "n_features": 40,
    "d_hidden": 12,
    "firing": {"kind": "constant", "prob": 0.1},
    "hierarchy": {"n_roots": 3, "branching": 3, "exclusive": 1.0},
    "correlation": {"kind": "low_rank", "rank": 3, "scale": 0.5},
}


@pytest.fixture
def world(tmp_path):
    path = tmp_path / "world.yaml"
    path.write_text(yaml.safe_dump(WORLD), encoding="utf-8")
    return path


def test_a_described_world_is_a_source(world):
    source = WorldSourceConfig(path=world, seed=3).open()
    assert type(source) is WorldSource
    assert (source.d_in, source.truth.shape) == (12, (40, 12))
    batch = next(source.batches(16, seed=0))
    assert batch.shape == (16, 12)
    assert torch.equal(batch, next(WorldSourceConfig(path=world, seed=3).open().batches(16, seed=0)))
    assert not torch.equal(batch, next(WorldSourceConfig(path=world, seed=4).open().batches(16, seed=0)))
    held = source.held_out("evaluation", 30)
    torch.testing.assert_close(held.x, held.acts.dense() @ source.truth)
    assert torch.equal(held.x, source.held_out("evaluation", 30).x)
    assert not torch.equal(held.x, source.held_out("calibration", 30).x)


def test_a_world_of_saelens_is_a_source(tmp_path):
    write_saelens_world(tmp_path / "saved")
    source = WorldSourceConfig(path=tmp_path / "saved").open()
    assert torch.equal(source.truth, load_world(tmp_path / "saved").truth)
    hidden = load_world(tmp_path / "saved").sample(ROWS_AT_ONCE, generator(0, "evaluation", 0)).hidden
    assert torch.equal(source.held_out("evaluation", 5).x, hidden[:5])


def test_a_shift_touches_the_evaluation_rows_alone(world):
    plain, shifted = WorldSourceConfig(path=world).open(), WorldSourceConfig(path=world, shift=1).open()
    assert isinstance(shifted, ShiftedSource)
    assert torch.equal(next(shifted.batches(16, seed=0)), next(plain.batches(16, seed=0)))
    assert torch.equal(shifted.held_out("calibration", 50).x, plain.held_out("calibration", 50).x)
    assert torch.equal(shifted.truth, plain.truth)
    there = plain.world.shifted(1).sample(ROWS_AT_ONCE, generator(0, "evaluation", 0)).hidden[:50]
    assert torch.equal(shifted.held_out("evaluation", 50).x, there)
    (piece,) = shifted.held_out_stream("evaluation", 50).pieces(50)
    assert torch.equal(piece.x, there)
    assert not torch.equal(there, plain.held_out("evaluation", 50).x)


def test_train_eval_and_report(world, tmp_path, run_cli):
    out, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "source": {"kind": "world", "path": str(world), "shift": 2},
                "sae": {"kind": "topk", "d_sae": 40, "k": 4},
                "train": {"n_samples": 6400, "batch_size": 64},
                "evaluation": {"n_samples": 500},
                "out": str(out),
            }
        ),
        encoding="utf-8",
    )
    assert run_cli("train", config).code == 0
    first = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert first["recovery/mcc"] > 0
    assert "recovery/f1" in first
    assert run_cli("eval", out).code == 0
    assert run_cli("report", out).code == 0
    assert json.loads((out / "result.json").read_text(encoding="utf-8"))["recovery/mcc"] == first["recovery/mcc"]


def test_paths_are_relative_to_where_the_run_starts(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = parse_config(
        {"source": {"kind": "world", "path": "world.yaml"}, "sae": {"kind": "topk", "d_sae": 8, "k": 2}}
    )
    assert source.source.open().d_in == 12
    monkeypatch.chdir("/")
    with pytest.raises(UsageError, match=r"cannot read world.yaml: No such file"):
        source.source.open()


def test_a_bad_world_is_told_in_one_line(world, tmp_path, run_cli):
    world.write_text("{n_features: 8, d_hidden: 4, hierarchy: {n_roots: 9}}", encoding="utf-8")
    words = ("--source.kind", "world", "--source.path", world, "--sae.kind", "topk", "--sae.d_sae", 8, "--sae.k", 2)
    config = tmp_path / "run.yaml"
    config.write_text("{sae: {kind: topk, d_sae: 8, k: 2}}", encoding="utf-8")
    ended = run_cli("train", config, *words, "--out", tmp_path / "run")
    ended.assert_refused("n_roots must not exceed n_features=8, got 9", str(world))
    with pytest.raises(UsageError, match="unknown key 'pth' for kind 'world'; did you mean 'path'"):
        parse_config({"source": {"kind": "world", "pth": "x"}, "sae": {"kind": "topk", "d_sae": 8, "k": 2}})


def test_a_world_that_cannot_be_made_is_told_with_its_file(tmp_path):
    path = tmp_path / "tight.yaml"
    path.write_text("n_features: 50\nd_hidden: 10\ndictionary: {kind: coherence, coherence: 0.1}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"tight\.yaml: .*coherence must be at least .*Welch bound"):
        WorldSourceConfig(path=path).open()
