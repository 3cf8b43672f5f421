"""SAEs on the Hub: read from it and put there, by its own client, from a server on this machine."""

import json
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub

import sae
from sae import hub
from sae.errors import UsageError

constants = pytest.importorskip("huggingface_hub.constants")
X = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
TOY = {"kind": "toy", "n_features": 12, "d_hidden": 8, "feature_prob": 0.1, "n_steps": 20}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The Hub, with a cache that is empty."""
    there = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", there.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", there.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield there
    there.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = sae.TrainConfig(
        sae={"kind": "topk", "d_sae": 16, "k": 3},
        train={"n_samples": 20_000, "batch_size": 256},
        out=tmp_path_factory.mktemp("runs") / "run",
    )
    return sae.train(config, X, report=False)


@pytest.mark.parametrize(
    ("words", "address"),
    [
        ("hf://me/saes", ("me/saes", None, "")),
        ("hf://me/saes/", ("me/saes", None, "")),
        ("hf://me/saes/layer_8/width_16k", ("me/saes", None, "layer_8/width_16k")),
        ("hf://me/saes@v1/8.pt", ("me/saes", "v1", "8.pt")),
        ("hf://me/saes@refs/pr/3/a", ("me/saes", "refs/pr/3", "a")),
        ("hf://models/me/saes/a", ("me/saes", None, "a")),
        (Path("hf://me/saes/a"), ("me/saes", None, "a")),
        ("hf://me/saes@refs%2Fpr%2F3/a", ("me/saes", "refs/pr/3", "a")),
        ("hf://me/saes/a//b/", ("me/saes", None, "a/b")),
        ("hf://me/saes/models/b", ("me/saes", None, "models/b")),
        ("runs/mine", None),
        ("hf", None),
    ],
)
def test_what_is_an_address(words, address):
    found = hub.address_of(words)
    assert (found and tuple(found)) == address
    if address is not None and not {"models", "%", "//b"} & {
        part for part in ("models", "%", "//b") if part in str(words)
    }:
        assert hub.said(words) == str(words).replace("hf:/", "hf://").replace("///", "//").rstrip("/")


@pytest.mark.parametrize("words", ["hf://", "hf://me", "hf://datasets/me/texts", "hf://me/sa es", "hf://me/saes/../a"])
def test_what_is_none(words):
    with pytest.raises(UsageError, match="must name a model's repository"):
        hub.address_of(words)


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "sparsify"])
def test_reads_what_any_library_put_there(server, run, tmp_path, format, monkeypatch):
    sae.formats.save(run.sae, tmp_path / "theirs", format)
    (tmp_path / "theirs" / "activations.bin").write_bytes(b"much that nobody asked for")
    server.put("me/saes", tmp_path / "theirs", "layer_8/width_16k")
    model = sae.formats.load("hf://me/saes/layer_8/width_16k")
    assert torch.equal(model.encode(X).dense(), sae.formats.load(tmp_path / "theirs").encode(X).dense())
    assert not list((tmp_path / "cache").rglob("activations.bin"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # and from the cache without a network
    assert sae.formats.load("hf://me/saes/layer_8/width_16k").d_sae == 16


def test_reads_a_file_and_a_revision(server, tmp_path):
    weights = {"pre_bias": torch.zeros(4), "encoder.weight": torch.randn(6, 4), "latent_bias": torch.zeros(6)}
    weights |= {"decoder.weight": weights["encoder.weight"].T.contiguous(), "activation": "ReLU"}
    counters = {name: torch.zeros(6) for name in ("stats_last_nonzero", "latents_activation_frequency")}
    counters["latents_mean_square"] = torch.zeros(6)
    torch.save(weights | counters, tmp_path / "8.pt")
    server.put("me/saes", tmp_path / "8.pt", "resid/8.pt", revision="v1")
    model = sae.formats.load("hf://me/saes@v1/resid/8.pt")
    assert torch.equal(model.W_dec, weights["encoder.weight"])
    with pytest.raises(UsageError, match=r"resid/8.pt has none of .*, nor has any other folder"):
        sae.formats.load("hf://me/saes/resid/8.pt")
    with pytest.raises(UsageError, match=r"hf://me/saes@v2/resid/8.pt cannot be read: .*is the name right"):
        sae.formats.load("hf://me/saes@v2/resid/8.pt")


def test_puts_an_sae_there_and_takes_it_back(server, run, run_cli, caplog):
    caplog.set_level("INFO", "sae")
    outcome = run_cli("convert", run.out, "--out", "hf://me/saes/layer_8", "--metadata", "{model_name: openai/gpt2}")
    assert outcome.code == 0, outcome.err
    assert "wrote hf://me/saes/layer_8/: topk" in outcome.out
    files = server.repos["me/saes"]["main"]
    assert set(files) == {"README.md", "layer_8/cfg.json", "layer_8/sae_weights.safetensors"}
    assert server.private == {"me/saes"}
    assert "created hf://me/saes, which is private" in caplog.text
    caplog.clear()
    card = files["README.md"].decode()
    assert "library_name: saelens" in card
    assert "base_model: openai/gpt2" in card
    assert 'SAE.from_pretrained("me/saes", "layer_8")' in card
    assert torch.equal(sae.formats.load("hf://me/saes/layer_8").encode(X).dense(), run.sae.encode(X).dense())

    run_cli("convert", run.out, "--out", "hf://me/saes/layer_8").assert_refused(
        "hf://me/saes/layer_8 holds cfg.json, sae_weights.safetensors; give another --out, or --overwrite"
    )
    server.repos["me/saes"]["main"]["README.md"] = b"what its owner says"
    again = run_cli("convert", run.out, "--to", "sae", "--out", "hf://me/saes/own")
    assert again.code == 0, again.err
    assert not caplog.text
    assert set(files) - {"README.md"} == {
        *("layer_8/cfg.json", "layer_8/sae_weights.safetensors", "own/sae.json", "own/sae.safetensors")
    }
    assert files["README.md"] == b"what its owner says"
    assert len(server.commits) == 2
    assert torch.equal(sae.load("hf://me/saes/own").W_dec, run.sae.W_dec)
    assert run_cli("convert", run.out, "--to", "sae", "--out", "hf://me/saes/own", "--overwrite").code == 0


def test_what_cannot_be_put_there_leaves_nothing_behind(server, run, run_cli, tmp_path):
    run_cli("convert", run.out, "--to", "sae", "--out", "hf://me/new@v9/x").assert_refused(
        "hf://me/new@v9/x: there is no such repository, and a new one has no revisions"
    )
    assert not server.repos
    run.sae.save("hf://me/saes/own")
    assert torch.equal(sae.load("hf://me/saes/own").W_dec, run.sae.W_dec)
    run_cli("convert", run.out, "--out", "hf://me/saes/own").assert_refused("of another format; give another folder")
    new = {"train": {"n_samples": 512}, "sae": {"kind": "topk", "d_sae": 16, "k": 3}, "source": TOY}
    (tmp_path / "new.yaml").write_text(json.dumps(new))
    run_cli("train", tmp_path / "new.yaml", "--out", "hf://me/saes/run").assert_refused(
        "is on the Hub; give a directory"
    )
    with pytest.raises(ValueError, match=r"hf://gpt2 must name a model's repository"):
        sae.TrainConfig(sae=new["sae"], train={"start_from": "hf://gpt2"})


def test_no_path_of_this_machine_is_published(server, run, run_cli, tmp_path, caplog):
    caplog.set_level("INFO", "sae")
    origin = {"kind": "model", "model": str(tmp_path), "module": "h.1", "texts": "me/texts", "context_length": 8}
    origin |= {"bos": True, "reads": "output", "target": None}
    folder = tmp_path / "run"
    run.sae.save(folder)
    (folder / "config.yaml").write_text(json.dumps({"source": origin}))
    assert run_cli("convert", folder, "--out", "hf://me/saes/a").code == 0
    said = json.loads(server.repos["me/saes"]["main"]["a/cfg.json"])["metadata"]
    assert said["dataset_path"] == "me/texts"
    assert "model_name" not in said
    assert "left out model_name, a local path" in caplog.text


def test_what_is_made_of_one_lies_in_the_working_directory(server, run, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sae.formats.save(run.sae, "hf://me/saes/width.16", "saelens")
    assert run_cli("convert", "hf://me/saes/width.16", "--to", "sae").code == 0
    assert torch.equal(sae.load("width.16-sae").encode(X).dense(), run.sae.encode(X).dense())
    assert hub.beside("hf://me/saes/resid/8.pt", "sae") == Path("8-sae")
    assert hub.beside("hf://me/saes", "sae") == Path("saes-sae")


def test_a_run_begins_with_one_and_one_is_measured(server, run, run_cli, tmp_path):
    sae.formats.save(run.sae, "hf://me/saes/a", "saelens")
    config = sae.TrainConfig(
        source=TOY,
        sae={"kind": "topk", "d_sae": 16, "k": 3},
        train={"n_samples": 512, "batch_size": 256, "start_from": "hf://me/saes/a", "lr": 1e-9},
        out=tmp_path / "new",
    )
    result = sae.train(config, report=False)
    torch.testing.assert_close(result.sae.W_dec, run.sae.W_dec, atol=1e-5, rtol=1e-5)
    assert "start_from: hf://me/saes/a\n" in (tmp_path / "new" / "config.yaml").read_text()
    assert sae.load_config(tmp_path / "new" / "config.yaml").train.start_from == Path("hf://me/saes/a")
    outcome = run_cli("eval", "hf://me/saes/a", "--source", json.dumps(TOY), "--n-samples", 500)
    assert "recovery/mcc" in outcome.out
    assert "hf://me/saes/a on other activations" in outcome.out


def test_what_cannot_be_read_is_told_with_where_it_might_be(server, run, run_cli, tmp_path, monkeypatch):
    for layer in (3, 8, 12):
        sae.formats.save(run.sae, f"hf://me/saes/layer_{layer}/width_16k", "saelens")
    run_cli("convert", "hf://me/saes/layer_8/width_32k").assert_refused(
        "hf://me/saes/layer_8/width_32k has none of", "they are in layer_8/width_16k, layer_"
    )
    run_cli("convert", "hf://me/nothing").assert_refused("hf://me/nothing cannot be read: 404", "hf auth login")
    run_cli("convert", run.out, "--out", "hf://me").assert_refused("must name a model's repository")
    with pytest.raises(UsageError, match=r"none of sae.json, sae.safetensors, nor has .* sae.formats.load reads"):
        sae.load("hf://me/saes/layer_8/width_16k")
    new = {"train": {"start_from": "hf://me/saes/none"}, "sae": {"kind": "topk", "d_sae": 16, "k": 3}, "source": TOY}
    (tmp_path / "new.yaml").write_text(json.dumps(new | {"out": str(tmp_path / "new")}))
    run_cli("train", tmp_path / "new.yaml").assert_refused("train.start_from: hf://me/saes/none has none of")
    sae.formats.load("hf://me/saes/layer_8/width_16k")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    run_cli("convert", "hf://me/other").assert_refused("hf://me/other cannot be read")
    run_cli("convert", "hf://me/saes/layer_9").assert_refused("hf://me/saes/layer_9 is not in the cache")
    run_cli("convert", run.out, "--out", "hf://me/other").assert_refused("hf://me/other cannot be")


def test_without_the_library_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(
        UsageError, match=r"huggingface_hub is not installed, and the Hub needs it; pip install 'sae\[hub\]'"
    ):
        sae.load("hf://me/saes")
