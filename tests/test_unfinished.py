"""Looking at a run that is not at its end."""

import shutil

import pytest
import torch

import sae
from sae import UsageError
from sae.names import CHECKPOINTS
from sae.unfinished import evaluate_checkpoint, is_unfinished

X = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0)) * 7 + 3
KINDS = [
    {"kind": "topk", "k": 3, "k_start": 9.0, "k_anneal_fraction": 0.8},
    {"kind": "batchtopk", "k": 2.5},
    {"kind": "jumprelu", "l0": 2.5},
    {"kind": "gated", "l0": 2.5},
    {"kind": "matching_pursuit", "k": 3},
    {"kind": "skip_transcoder", "k": 3},
]


def config(out, options=None, **sections) -> sae.TrainConfig:
    options = {"d_sae": 24} | (options or {"kind": "topk", "k": 3})
    train = {"n_samples": 1280, "batch_size": 64, "warmup_steps": 5}
    sections = {"checkpoint": {"every_steps": 10}, "log": {"every": 5}, "evaluation": {"n_samples": 500}} | sections
    return sae.TrainConfig(sae=options, train=train, out=out, **sections)


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_the_last_checkpoint_is_the_result(tmp_path, options):
    """Bit for bit: units, thresholds and the centre are as the end of a run makes them."""
    source = (X, X[:, :4] ** 2) if options["kind"] == "skip_transcoder" else X
    result = sae.train(config(tmp_path / "run", options), source, report=False)
    found = sae.load_checkpoint(tmp_path / "run", source)
    for (name, ours), theirs in zip(found.state_dict().items(), result.sae.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    rows = X[:50]
    assert torch.equal(found(rows), result.sae(rows))
    assert not found.training


def test_a_run_is_looked_at_while_it_goes_on(tmp_path, run_cli):
    toy = {"kind": "toy", "n_features": 16, "d_hidden": 6, "n_steps": 50}
    seen = []

    def look(step, values):
        if step == 15:
            assert is_unfinished(tmp_path / "run")
            before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
            evaluation, at, of = evaluate_checkpoint(tmp_path / "run")
            seen.append((evaluation.metrics["recovery/mcc"], at, of))
            assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sae.train(config(tmp_path / "run", source=toy), report=False, on_line=look)
    ((mcc, at, of),) = seen
    assert (at, of) == (10, 20)
    assert 0 < mcc < 1
    outcome = run_cli("eval", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert f"{tmp_path / 'run'} after step 10 of 20; nothing was written" in outcome.out
    assert f"{mcc:.4g}" in outcome.out
    assert not (tmp_path / "run/result.json").exists()
    run_cli("eval", tmp_path / "run", "--diagnose").assert_refused("is not finished; train it to the end with --resume")
    sae.train(config(tmp_path / "run", source=toy), resume=True, report=False)
    assert not is_unfinished(tmp_path / "run")


@pytest.mark.parametrize("options", [{"kind": "topk", "k": 3}, {"kind": "batchtopk", "k": 2.5}], ids=str)
def test_it_fires_as_many_as_the_run_does_by_then(tmp_path, options):
    """Also once it is saved: k falls from 9, and half way it is in between."""

    def stop(step, values):
        if step == 10:
            raise KeyboardInterrupt

    given = config(tmp_path / "run", options | {"k_start": 9.0, "k_anneal_fraction": 1.0})
    with pytest.raises(KeyboardInterrupt):
        sae.train(given, X, report=False, on_line=lambda step, values: stop(step - 5, values))
    found = sae.load_checkpoint(tmp_path / "run", X)
    l0 = float(found.encode(X).counts.float().mean())
    assert 4 < l0 < 8
    found.save(tmp_path / "saved")
    assert torch.equal(sae.load(tmp_path / "saved").encode(X).dense(), found.encode(X).dense())


def test_a_checkpoint_that_is_deleted_meanwhile_gives_way_to_the_next(tmp_path, monkeypatch):
    sae.train(config(tmp_path / "run", checkpoint={"every_steps": 10, "keep": 2}), X, report=False)
    older, newest = sorted((tmp_path / "run" / CHECKPOINTS).iterdir())
    answers = [older, newest]
    monkeypatch.setattr("sae.checkpoint.latest", lambda folder: answers.pop(0))
    shutil.rmtree(older)
    assert torch.equal(sae.load_checkpoint(tmp_path / "run", X).W_dec, sae.load(tmp_path / "run").W_dec)


def test_what_cannot_be_looked_at(tmp_path):
    with pytest.raises(UsageError, match="holds no run with a checkpoint; give a run directory"):
        sae.load_checkpoint(tmp_path)
    sae.train(config(tmp_path / "run"), X, report=False)
    with pytest.raises(
        UsageError, match=r"was trained on activations passed from Python; use sae\.load_checkpoint\(out,"
    ):
        sae.load_checkpoint(tmp_path / "run")
    with pytest.raises(UsageError, match=r"has W_dec \[24, 6\], but the source has d_in=5; give the run's own"):
        sae.load_checkpoint(tmp_path / "run", X[:, :5])
    (newest,) = sorted((tmp_path / "run" / CHECKPOINTS).iterdir())[-1:]
    (newest / "state.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="does not match its checksum"):
        sae.load_checkpoint(tmp_path / "run", X)
