"""SAEs of any library on any activations: the metrics of `sae eval`, and the texts of `sae latents`."""

import json

import pytest
import torch

import sae
from sae.elsewhere import evaluate_elsewhere, source_from
from sae.errors import UsageError

TOY = {"kind": "toy", "n_features": 12, "d_hidden": 5, "feature_prob": 0.1, "n_steps": 50}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a toy model, and its SAE in the files of another library, in a folder beside it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    config = sae.TrainConfig(
        source=TOY,
        sae={"kind": "topk", "d_sae": 12, "k": 2},
        train={"n_samples": 200_000, "batch_size": 256, "lr": 0.01},
        evaluation={"n_samples": 3000},
        out=folder / "run",
    )
    result = sae.train(config, report=False)
    sae.formats.save(result.sae, folder / "theirs", "saelens")
    return result


def test_any_sae_is_measured_as_its_own_run_measures_it(run, tmp_path):
    for path in ("run", "theirs"):
        found = evaluate_elsewhere(run.out.parent / path, json.dumps(TOY), 3000).metrics
        assert found == pytest.approx(run.metrics, rel=1e-4, abs=1e-5), path
    assert found["recovery/mcc"] > found["recovery/mcc_chance"]


def test_the_source_may_stand_in_a_file(run, tmp_path, run_cli):
    before = (run.out / "result.json").read_text()
    (tmp_path / "other.yaml").write_text(json.dumps({"source": TOY | {"seed": 1}}))
    outcome = run_cli("eval", run.out.parent / "theirs", "--source", tmp_path / "other.yaml", "--n-samples", 2000)
    assert outcome.code == 0, outcome.err
    assert "recovery/mcc" in outcome.out
    assert "nothing was written" in outcome.out
    assert (run.out / "result.json").read_text() == before
    assert sorted(path.name for path in (run.out.parent / "theirs").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_what_does_not_fit_is_told(run, tmp_path, run_cli):
    theirs = run.out.parent / "theirs"
    wide = json.dumps(TOY | {"d_hidden": 6})
    run_cli("eval", theirs, "--source", wide).assert_refused("maps 5 dimensions to 5, the source has 6 and 6")
    run_cli("eval", theirs, "--source", "{kind: tony}").assert_refused("unknown kind 'tony'; did you mean 'toy'?")
    run_cli("eval", theirs, "--source", "{kind: toy, n_feats: 3}").assert_refused("unknown key 'n_feats'")
    run_cli("eval", theirs, "--source", "toy").assert_refused("must be a mapping", "got 'toy'")
    run_cli("eval", theirs, "--source", "{kind: [").assert_refused("--source {kind: [")
    run_cli("eval", theirs, "--n-samples", 5).assert_refused("--n-samples goes with --source")
    run_cli("eval", theirs, "--source", json.dumps(TOY), "--n-samples", 0).assert_refused("at least 1, got 0")
    run_cli("eval", theirs, "--source", json.dumps(TOY), "--diagnose").assert_refused("leave --source out")
    run_cli("eval", tmp_path, "--source", json.dumps(TOY)).assert_refused("holds no SAE that is known")
    with pytest.raises(UsageError, match="must be a mapping"):
        source_from("null")


def test_latents_of_another_library_are_shown(tiny, tmp_path, run_cli):
    torch.manual_seed(0)
    config = sae.TrainConfig(
        source=tiny.section(),
        sae={"kind": "topk", "d_sae": 20, "k": 3},
        train={"n_samples": 4096, "batch_size": 128},
        out=tmp_path / "run",
    )
    result = sae.train(config, report=False)
    sae.formats.save(result.sae, tmp_path / "theirs", "saelens")
    words = json.dumps(tiny.section())
    assert run_cli("latents", tmp_path / "run", "--n-latents", 4).code == 0
    assert run_cli("latents", tmp_path / "theirs", "--n-latents", 4, "--source", words).code == 0
    ours, theirs = (json.loads((tmp_path / name / "latents.json").read_text()) for name in ("run", "theirs-latents"))
    assert [latent["latent"] for latent in ours["latents"]] == [latent["latent"] for latent in theirs["latents"]]
    assert ours["latents"][0]["examples"][0]["tokens"] == theirs["latents"][0]["examples"][0]["tokens"]
    other = json.dumps(tiny.section(module="transformer.h.1.mlp.c_fc"))
    run_cli("latents", tmp_path / "theirs", "--source", other).assert_refused("reads 16 dimensions", "have 64")
    found = evaluate_elsewhere(tmp_path / "theirs", words, 300).metrics
    assert found["metrics/ce_recovered"] == pytest.approx(result.metrics["metrics/ce_recovered"], abs=0.2)
