"""Runs that begin with the weights of a trained SAE."""

import copy

import pytest
import torch

import sae
from sae import UsageError, formats
from sae.sources import as_source
from sae.start import start

D = 8
X = torch.randn(3000, D, generator=torch.Generator().manual_seed(0)) * 5 + 2
TARGET = X[:, :5] ** 2
KINDS = [
    {"kind": "topk", "k": 3},
    {"kind": "batchtopk", "k": 2.5},
    {"kind": "matryoshka", "k": 3},
    {"kind": "refined", "k": 3},
    {"kind": "relu", "l1_coefficient": 0.02},
    {"kind": "gated", "l0": 2.5},
    {"kind": "jumprelu", "l0": 2.5},
    {"kind": "p_annealing", "l1_coefficient": 0.02, "anneal_start": 0.1},
    {"kind": "matching_pursuit", "k": 3},
    {"kind": "topk", "k": 3, "tied_bias": False},
    {"kind": "skip_transcoder", "k": 3},
]


def config(out, options, n_steps=40, **train) -> sae.TrainConfig:
    train = {"n_samples": 64 * n_steps, "batch_size": 64, "warmup_steps": 5} | train
    sections = {"checkpoint": {"every_steps": 10}, "log": {"every": 10}, "evaluation": {"n_samples": 300}}
    return sae.TrainConfig(sae={"d_sae": 24} | options, train=train, out=out, **sections)


def source_of(options):
    return (X, TARGET) if "transcoder" in options["kind"] else X


def begun(made: sae.TrainConfig):
    """The trainer of a run at step 0."""
    source = as_source(source_of({"kind": made.sae.kind}))
    return start(made, source, source.held_out("calibration", 300))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_it_begins_where_the_other_ended(tmp_path, options):
    """Of the same kind it reconstructs the same, in the units of the data, before its first step."""
    old = sae.train(config(tmp_path / "old", options), source_of(options), report=False).sae
    trainer = begun(config(tmp_path / "new", options, start_from=tmp_path / "old"))
    new = copy.deepcopy(trainer.sae)
    new.rescale_(trainer.unit, trainer.target_unit)
    for (name, weight), other in zip(new.named_parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-5, msg=name)
    assert (new.centre is None) == (old.centre is None)
    rows = X[:200]
    x_hat = new.decode(new.training_codes(rows), rows)
    expected = old.decode(old.training_codes(rows), rows)
    torch.testing.assert_close(x_hat, expected, rtol=1e-4, atol=1e-3)


def test_more_training_of_it_is_worth_as_much_as_a_longer_run(tmp_path):
    options = {"kind": "topk", "k": 3}
    first = sae.train(config(tmp_path / "old", options, 300), X, report=False)
    after = sae.train(config(tmp_path / "new", options, 60, start_from=tmp_path / "old"), X, report=False)
    cold = sae.train(config(tmp_path / "cold", options, 60), X, report=False)
    assert after.metrics["metrics/fvu"] < first.metrics["metrics/fvu"] * 1.02
    assert after.metrics["metrics/fvu"] < 0.95 * cold.metrics["metrics/fvu"]


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "jumprelu", "l0": 2.5},
        {"kind": "gated", "l0": 2.5},
        {"kind": "batchtopk", "k": 2.5},
        {"kind": "topk", "k": 3, "tied_bias": False},
        {"kind": "matching_pursuit", "k": 3},
    ],
    ids=str,
)
def test_another_kind_takes_the_dictionary(tmp_path, options):
    """What decides which latents fire begins as it does without. Codes grow by what rows shrink to norm 1."""
    old = sae.train(config(tmp_path / "old", {"kind": "topk", "k": 3}), X, report=False).sae
    trainer = begun(config(tmp_path / "new", options, start_from=tmp_path / "old"))
    norms = old.W_dec.norm(dim=1) if trainer.sae.config.unit_norm_decoder else torch.ones(24)
    torch.testing.assert_close(trainer.sae.W_dec, old.W_dec / norms[:, None])
    if options["kind"] != "matching_pursuit":  # which has one matrix
        torch.testing.assert_close(trainer.sae.encoder, old.encoder * norms[:, None])
    torch.testing.assert_close(trainer.sae.b_dec * trainer.unit, old.b_dec)
    if trainer.sae.centre is not None:
        torch.testing.assert_close(trainer.sae.centre * trainer.unit, old.b_dec)
    if options.get("l0") is not None:  # sparse from the first step
        codes = trainer.sae.training_codes(X[:500] / trainer.unit)
        assert 1 < float((codes.values > 0).sum()) / 500 < 10


def test_free_rows_become_rows_of_norm_1(tmp_path):
    """A ReLU's reconstruction stays."""
    free = {"kind": "relu", "l1_coefficient": 0.02, "unit_norm_decoder": False}
    old = sae.train(config(tmp_path / "old", free), X, report=False).sae
    made = config(tmp_path / "new", free | {"unit_norm_decoder": True}, start_from=tmp_path / "old")
    trainer = begun(made)
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(24))
    new = copy.deepcopy(trainer.sae)
    new.rescale_(trainer.unit)
    torch.testing.assert_close(new(X[:50]), old(X[:50]), rtol=1e-4, atol=1e-3)


def test_a_centre_of_its_own_becomes_a_bias(tmp_path):
    untied = {"kind": "topk", "k": 3, "tied_bias": False}
    old = sae.train(config(tmp_path / "old", untied), X, report=False).sae
    assert old.centre is not None
    assert not torch.allclose(old.centre, old.b_dec)
    trainer = begun(config(tmp_path / "new", {"kind": "topk", "k": 3}, start_from=tmp_path / "old"))
    new = copy.deepcopy(trainer.sae)
    new.rescale_(trainer.unit)
    torch.testing.assert_close(new.pre_latents(X[:50]), old.pre_latents(X[:50]), rtol=1e-4, atol=1e-3)


def test_files_of_other_libraries_are_a_start(tmp_path):
    old = sae.train(config(tmp_path / "old", {"kind": "relu", "l1_coefficient": 0.02}), X, report=False).sae
    formats.save(old, tmp_path / "theirs", "saelens")
    trainer = begun(config(tmp_path / "new", {"kind": "relu", "l1_coefficient": 0.02}, start_from=tmp_path / "theirs"))
    torch.testing.assert_close(trainer.sae.W_dec, old.W_dec, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trainer.sae.b_enc * trainer.unit, old.b_enc, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_needs_the_other_no_more(tmp_path, run_cli):
    options = {"kind": "jumprelu", "l0": 2.5}
    sae.train(config(tmp_path / "old", options), X, report=False)
    made = config(tmp_path / "new", options, start_from=tmp_path / "old")
    whole = sae.train(made, X, report=False).sae

    def stop(step, values):
        if step == 20:
            raise KeyboardInterrupt

    part = made.model_copy(update={"out": tmp_path / "part"})
    with pytest.raises(KeyboardInterrupt):
        sae.train(part, X, report=False, on_line=stop)
    (tmp_path / "old").rename(tmp_path / "elsewhere")
    found = sae.train(part, X, report=False, resume=True).sae
    for (name, ours), theirs in zip(found.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(UsageError, match=r"there is no .*old"):
        sae.train(part, X, report=False, overwrite=True)


def test_what_does_not_fit_is_told(tmp_path):
    sae.train(config(tmp_path / "old", {"kind": "topk", "k": 3, "d_sae": 16}), X, report=False)
    with pytest.raises(UsageError, match=r"start_from .*old has d_in=8, d_out=8, d_sae=16, but this run .* d_sae=24"):
        begun(config(tmp_path / "new", {"kind": "topk", "k": 3}, start_from=tmp_path / "old"))
    free = {"kind": "jumprelu", "l0": 2.5, "unit_norm_decoder": False}
    sae.train(config(tmp_path / "free", free), X, report=False)
    kept = config(tmp_path / "new", free | {"unit_norm_decoder": True}, start_from=tmp_path / "free")
    with pytest.raises(UsageError, match=r"to which its thresholds belong, .*; set sae.unit_norm_decoder false"):
        begun(kept)
    with pytest.raises(UsageError, match=r"there is no .*nothing; give a folder or file with an SAE"):
        begun(config(tmp_path / "new", free, start_from=tmp_path / "nothing"))
    assert not (tmp_path / "new").exists()
    for path, words in (("nothing", "train.start_from: there is no .*nothing"), ("free", "is the run's own directory")):
        run = config(tmp_path / "free", free, start_from=tmp_path / path)
        with pytest.raises(UsageError, match=words):  # before the data, which are none, are looked at
            sae.train(run, object(), overwrite=True)
    assert (tmp_path / "free/result.json").exists()
