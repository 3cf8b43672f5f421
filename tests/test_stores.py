"""Activation stores: what is written is what is read, damage is told, and other files become stores."""

import json

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae
from sae.errors import UsageError
from sae.sources import as_source
from sae.stores import Store
from sae.stores.writer import HELD_OUT_ROWS, Division, StoreWriter
from toymodels.streams import generator

N, LENGTH, D = 60, 5, 4


def numbered() -> torch.Tensor:
    """Inputs [N, LENGTH, D], each row with a number of its own."""
    return torch.arange(N * LENGTH * D, dtype=torch.float32).view(N, LENGTH, D)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Three shards of 20 inputs each."""
    monkeypatch.setattr("sae.stores.writer.SHARD_BYTES", 20 * LENGTH * (D + 1) * 4)
    writer = StoreWriter(tmp_path / "store", {"made": "here"}, None)
    (tmp_path / "store").mkdir()
    for part in numbered().split(10):
        context = part[:, :, 0].flatten().int() // (LENGTH * D)
        writer.append({"acts": part.flatten(0, 1), "context": context}, [LENGTH] * 10)
    writer.finish()
    return tmp_path / "store"


def rows_of(path, split="training"):
    rows = Store(path).rows(split)
    return rows.read(0, len(rows))


def test_what_is_written_is_read(store):
    x, number = numbered(), torch.arange(N) % 20
    assert [shard.rows for shard in Store(store).manifest.shards] == [
        {"training": 90, "calibration": 5, "evaluation": 5}
    ] * 3
    assert torch.equal(rows_of(store), x[(number != 0) & (number != 10)].flatten(0, 1))
    assert torch.equal(rows_of(store, "calibration"), x[number == 0].flatten(0, 1))
    assert torch.equal(rows_of(store, "evaluation"), x[number == 10].flatten(0, 1))
    assert Store(store).column("evaluation", "context").unique().tolist() == [10, 30, 50]
    first = load_file(store / "shard-00000.safetensors")  # any library reads it
    assert torch.equal(first["calibration/acts"], x[0])


def test_training_sees_every_training_row_and_no_other(store):
    source = sae.open_store(store)
    epoch = torch.cat([next(source.batches(27, 0, start)) for start in range(10)])
    assert torch.equal(epoch[epoch[:, 0].argsort()], rows_of(store))
    assert torch.equal(source.held_out("calibration", 7).x, rows_of(store, "calibration")[:7])


def test_large_stores_are_read_in_windows(store, monkeypatch):
    monkeypatch.setattr("sae.sources.EXACT_SHUFFLE_BYTES", 100)
    monkeypatch.setattr("sae.sources.BLOCK_BYTES", 160)
    monkeypatch.setattr("sae.sources.WINDOW_BYTES", 640)
    source = sae.open_store(store)
    assert not source.exact
    epoch = torch.cat([next(source.batches(27, 0, start)) for start in range(10)])
    assert torch.equal(epoch[epoch[:, 0].argsort()], rows_of(store))


def test_held_out_rows_have_a_limit():
    division = Division()
    n = 20 * 30
    splits = division.next([HELD_OUT_ROWS // 10] * n)
    assert splits.count("calibration") == splits.count("evaluation") == 10
    assert splits[0] == "calibration"
    assert splits[10] == "evaluation"
    assert splits[20 * 10] == splits[20 * 10 + 10] == "training"
    again = Division(13, {"training": 0, "calibration": 0, "evaluation": 0})
    assert again.next([1] * 20) == splits[13:33]


# Damage


def test_files_that_are_gone_or_cut_short_are_told(store, run_cli):
    shard = store / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    run_cli("store", "info", store).assert_refused("shard-00001.safetensors has", str(len(whole)))
    shard.unlink()
    run_cli("store", "verify", store).assert_refused("shard-00001.safetensors is missing")
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(UsageError, match="is damaged"):
        sae.open_store(store)


def test_one_changed_bit_is_found(store, run_cli):
    assert "3 files are as they were written" in run_cli("store", "verify", store).out
    shard = store / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    sae.open_store(store)  # it looks whole
    run_cli("store", "verify", store).assert_refused("shard-00002.safetensors: its checksum is")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda text: "", "is damaged"),
        (lambda text: text[:-20], "is damaged"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format"),
        (lambda text: text.replace('"d_in": 4', '"d_in": "wide"'), "d_in"),
        (lambda text: text.replace('"dtype"', '"type"'), "type"),
    ],
)
def test_manifests_that_cannot_be_understood_are_told(store, run_cli, change, part):
    manifest = store / "store.json"
    manifest.write_text(change(json.dumps(json.loads(manifest.read_text()))))
    run_cli("store", "info", store).assert_refused("store.json", part)


def test_tokens_are_checked_too(store, tmp_path, run_cli):
    (tmp_path / "texts").mkdir()
    with StoreWriter(tmp_path / "texts", {}, None, tokens=torch.arange(60, dtype=torch.int32).view(20, 3)) as writer:
        writer.append({"acts": torch.ones(20, 3)}, [1] * 20)
        writer.finish()
    texts = tmp_path / "texts" / "tokens.safetensors"
    assert Store(tmp_path / "texts").tokens().tolist() == torch.arange(60).view(20, 3).tolist()
    assert "2 files" in run_cli("store", "verify", tmp_path / "texts").out
    content = bytearray(texts.read_bytes())
    content[-3] ^= 1
    texts.write_bytes(content)
    run_cli("store", "verify", tmp_path / "texts").assert_refused("tokens.safetensors: its checksum is")
    texts.unlink()
    run_cli("store", "info", tmp_path / "texts").assert_refused("tokens.safetensors is missing")
    with pytest.raises(UsageError, match="has no texts"):
        Store(store).tokens()


def test_what_is_no_store_is_told(store, tmp_path, run_cli):
    run_cli("store", "info", tmp_path).assert_refused("holds no activation store", "sae harvest")
    run_cli("store", "info", tmp_path / "nothing").assert_refused("holds no activation store")
    with pytest.raises(UsageError, match=r"it is an activation store: set source.kind to store.*sae.open_store"):
        as_source(store)
    run_cli("store", "verify", store, "--dtype", "float16").assert_refused("--dtype is for `sae store convert`")


def test_nothing_is_left_of_a_shard_that_could_not_be_written(store, monkeypatch):
    writer = StoreWriter(store / "more", {}, None)
    (store / "more").mkdir()
    writer.append({"acts": torch.ones(8, 3)}, [1] * 8)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("toymodels.files.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        writer.flush()
    assert list((store / "more").iterdir()) == []


# Other files


def test_info_says_what_is_there(store, run_cli):
    out = run_cli("store", "info", store).out
    assert "270 rows to train on, 30 held out, d_in=4, float32" in out
    assert "made: here" in out
    assert f"{rows_of(store)[:, :D].norm(dim=1).max():.4g}" in out


def test_arrays_become_stores(tmp_path, run_cli, caplog):
    caplog.set_level("INFO", "sae")
    x = torch.randn(N, LENGTH, D, generator=generator(0, "test", "store"))
    np.save(tmp_path / "texts.npy", x.numpy())
    outcome = run_cli("store", "convert", tmp_path / "texts.npy")
    assert outcome.code == 0
    number = torch.arange(N) % 20
    assert torch.equal(rows_of(tmp_path / "texts-store", "calibration"), x[number == 0].flatten(0, 1))
    save_file({"a": x.flatten(0, 1).half(), "b": x.flatten(0, 1)}, tmp_path / "rows.safetensors")
    run_cli("store", "convert", tmp_path / "rows.safetensors").assert_refused("holds a, b")
    outcome = run_cli("store", "convert", tmp_path / "rows.safetensors", "--key", "a", "--out", tmp_path / "rows")
    assert "each row is held out by itself" in caplog.text
    assert torch.equal(rows_of(tmp_path / "rows", "evaluation"), x.flatten(0, 1)[10::20].half())
    assert outcome.code == 0
    run_cli("store", "convert", tmp_path / "texts.npy", "--out", tmp_path / "rows").assert_refused("already holds")
    bad = ("--out", tmp_path / "rows", "--overwrite")
    np.save(tmp_path / "bad.npy", np.full((30, 4), np.nan))
    run_cli("store", "convert", tmp_path / "bad.npy", *bad).assert_refused("NaN or infinity")
    np.save(tmp_path / "bad.npy", np.zeros((3, 4), dtype=int))
    run_cli("store", "convert", tmp_path / "bad.npy", *bad).assert_refused("[3, 4] of torch.int64")
    np.save(tmp_path / "bad.npy", np.zeros((3, 0, 4)))
    run_cli("store", "convert", tmp_path / "bad.npy", *bad).assert_refused("[3, 0, 4]")
    assert run_cli("store", "verify", tmp_path / "rows").code == 0  # what was there is there
    save_file({"a": x.half()}, tmp_path / "mixed-0.safetensors")
    save_file({"a": x}, tmp_path / "mixed-1.safetensors")
    mixed = tmp_path / "mixed-*.safetensors"
    run_cli("store", "convert", mixed, "--out", tmp_path / "mixed").assert_refused("torch.float32, but", "float16")
    run_cli("store", "convert", mixed).assert_refused("--out")


def test_a_store_is_named_after_what_it_is_from(tmp_path, run_cli, monkeypatch):
    (tmp_path / "pythia-1.4b").mkdir()
    monkeypatch.chdir(tmp_path / "pythia-1.4b")
    run_cli("store", "convert", ".").assert_refused("no file matches")
    (tmp_path / "pythia-1.4b" / "store.json").write_text("{}")
    run_cli("store", "convert", ".").assert_refused("store.json is damaged")


def test_stores_change_their_dtype(store, tmp_path, run_cli):
    assert run_cli("store", "convert", store, "--dtype", "bfloat16").code == 0
    for split in ("training", "calibration", "evaluation"):
        assert torch.equal(rows_of(tmp_path / "store-store", split), rows_of(store, split).bfloat16())
    assert Store(tmp_path / "store-store").column("training", "context").dtype == torch.int32
    assert run_cli("store", "verify", tmp_path / "store-store").code == 0
    run_cli("store", "convert", store, "--out", store, "--overwrite").assert_refused("both read and written")
    large = tmp_path / "large"
    large.mkdir()
    with StoreWriter(large, {}, None) as writer:
        for scale in (1, 1e6):  # a shard each: the second does not fit
            writer.append({"acts": scale * torch.ones(40, D)}, [1] * 40)
            writer.flush()
        writer.finish()
    onto = ("--out", tmp_path / "store-store", "--overwrite", "--dtype", "float16")
    run_cli("store", "convert", large, *onto).assert_refused("shard-00001.safetensors", "acts is up to 1e+06")
    assert run_cli("store", "verify", tmp_path / "store-store").code == 0
    assert run_cli("store", "convert", large, *onto[:3]).code == 0
    assert Store(tmp_path / "store-store").manifest.n_rows("training") == 72


def test_what_saelens_cached_becomes_a_store(tmp_path, run_cli):
    x = torch.randn(N, LENGTH, D, generator=generator(0, "test", "store"))
    hook = "blocks.1.hook_resid_post"
    features = datasets.Features(
        {
            hook: datasets.Array2D(shape=(LENGTH, D), dtype="float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=LENGTH),
        }
    )
    tokens = np.zeros((N, LENGTH), dtype=np.int32)
    cached = datasets.Dataset.from_dict({hook: x.numpy(), "token_ids": tokens}, features=features)
    cached.save_to_disk(tmp_path / "cached")
    assert run_cli("store", "convert", tmp_path / "cached", "--out", tmp_path / "ours").code == 0
    number = torch.arange(N) % 20
    assert torch.equal(rows_of(tmp_path / "ours"), x[(number != 0) & (number != 10)].flatten(0, 1))
    half = cached.cast_column(hook, datasets.Array2D(shape=(LENGTH, D), dtype="float16"))
    half.save_to_disk(tmp_path / "half")
    assert run_cli("store", "convert", tmp_path / "half", "--out", tmp_path / "half-store").code == 0
    assert Store(tmp_path / "half-store").manifest.dtype == "float16"
    (tmp_path / "half" / "state.json").unlink()
    run_cli("store", "convert", tmp_path / "half", "--out", tmp_path / "none").assert_refused("cannot be read")
    assert not (tmp_path / "none").exists()
    run_cli("store", "convert", tmp_path / "cached", "--key", "blocks.2", "--overwrite").assert_refused(hook, "--key")
