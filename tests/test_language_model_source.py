"""Language models as sources: which tokens are read, that rows are the model's own, and what the model loses."""

import json
import os
import shutil
import signal
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language_model import N_POSITIONS, D
from torch import Tensor

import sae
from sae.config import SourceConfig
from sae.errors import Interrupted, UsageError
from sae.networks.harvest import harvest_model
from sae.networks.source import ModelSource, ModelSourceConfig
from sae.networks.texts import Contexts, contexts_of, texts
from sae.sources import SharedSource
from sae.stopping import stop_requested
from sae.stores import Store
from sae.stores.writer import EVERY, StoreWriter
from sae.sweep.group import Ended, Group, Logged, opener
from sae.sweep.plan import parse_sweep
from sae.sweep.run import run_sweep


def open_source(tiny, **more):
    return SourceConfig.of_kind(tiny.section(**more)).open()


def hidden(tiny, tokens: Tensor, layer: int) -> Tensor:
    """The residual stream in front of a layer, as `transformers` itself says."""
    with torch.no_grad():
        return tiny.network()(tokens.long(), output_hidden_states=True).hidden_states[layer]


def sorted_rows(rows: Tensor) -> Tensor:
    return torch.from_numpy(np.unique(rows.numpy(), axis=0))


# Texts


@pytest.mark.parametrize("bos", [True, False])
def test_texts_are_cut_into_contexts_one_after_the_other(tiny, bos):
    tokenizer = tiny.tokenizer()
    stream = [token for text in tiny.texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    step = 12 - bos
    expected = [[tokenizer.bos_token_id] * bos + stream[i * step : (i + 1) * step] for i in range(500)]
    found = contexts_of(iter(tiny.texts), tokenizer, 12, 6000, bos)
    assert found.tolist() == expected
    whole = contexts_of(iter(tiny.texts), tokenizer, 12, 10**9, bos)
    assert len(whole) == len(stream) // step  # what fills no context is dropped
    assert torch.equal(whole[:500], found)


def test_texts_come_from_files_of_any_kind(tiny, tmp_path):
    expected = tiny.texts[:30]
    for number, text in enumerate(expected):
        (tmp_path / f"{number:02d}.txt").write_text(text)
    rows = [{"text": text} for text in expected]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    (tmp_path / "all.csv").write_text("\n".join(["text", *expected]))
    pandas.DataFrame(rows).to_parquet(tmp_path / "all.parquet")
    for pattern in ("*.txt", "all.json", "all.csv", "all.parquet"):
        assert list(texts(str(tmp_path / pattern), None, "train", "text")) == expected, pattern
    assert list(islice(texts(tiny.jsonl, None, "train", "text"), 30)) == expected


def test_special_tokens_and_the_first_positions_are_left_out(tiny):
    source = open_source(tiny, skip=2)
    tokens, end = source.contexts.tokens, tiny.tokenizer().eos_token_id
    kept = source.contexts.kept(tokens)
    assert not kept[:, :2].any()
    assert torch.equal(kept[:, 2:], tokens[:, 2:] != end)
    assert (tokens[:, 2:] == end).sum() > 0
    assert torch.equal(source.contexts.n_rows, kept.sum(dim=1))
    everything = open_source(tiny, skip=0, keep_special=True).contexts
    assert everything.kept(tokens).all()


# Rows


@pytest.mark.parametrize(("more", "layer"), [({}, 2), ({"reads": "input"}, 1)])
def test_an_epoch_is_every_row_of_the_training_contexts_once(tiny, more, layer):
    source = open_source(tiny, contexts_at_once=16, window_rows=70 * 12, **more)  # of 450 contexts, in 70s
    own = source.order["training"]
    tokens = source.contexts.tokens[own]
    expected = hidden(tiny, tokens, layer)[source.contexts.kept(tokens)]
    assert len(expected) == source.n_training_rows
    n = source.n_training_rows // 64
    epoch = torch.cat(list(islice(source.batches(64, 0), n)))
    found, rows = sorted_rows(epoch.round(decimals=4)), sorted_rows(expected.round(decimals=4))
    assert len(set(map(tuple, found.tolist())) - set(map(tuple, rows.tolist()))) < 0.01 * len(rows)  # of rounding
    assert len(found) > 0.95 * len(rows)


def test_a_batch_depends_on_its_number_and_the_seed_alone(tiny):
    source = open_source(tiny, window_rows=70 * 12)
    n = 2 * source.n_training_rows // 64
    all_of_them = list(islice(source.batches(64, 3), n))
    for start in (1, 17, n // 2, n - 1):
        for number, batch in enumerate(islice(source.batches(64, 3, start), 20), start):
            assert number >= n or torch.equal(batch, all_of_them[number]), (start, number)
    assert not torch.equal(next(source.batches(64, 4)), all_of_them[0])
    assert not torch.equal(all_of_them[0][:20], all_of_them[n // 2][:20])


def test_contexts_are_on_one_side_each(tiny):
    source = open_source(tiny)
    sides = [set(own.tolist()) for own in source.order.values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 500
    assert [len(side) for side in sides] == [450, 25, 25]
    for purpose in ("calibration", "evaluation"):
        tokens = source.contexts.tokens[source.order[purpose]]
        expected = hidden(tiny, tokens, 2)[source.contexts.kept(tokens)]
        torch.testing.assert_close(source.held_out(purpose, 10**6).x, expected)
        torch.testing.assert_close(source.held_out(purpose, 30).x, expected[:30])


def test_a_transcoder_reads_what_goes_in_and_writes_what_comes_out(tiny):
    source = open_source(tiny, module="transformer.h.1.mlp", reads="input", target="transformer.h.1.mlp")
    held, network = source.held_out("evaluation", 40), tiny.network()
    with torch.no_grad():
        torch.testing.assert_close(held.target, network.transformer.h[1].mlp(held.x))
    x, y = next(source.batches(32, 0))
    with torch.no_grad():
        torch.testing.assert_close(y, network.transformer.h[1].mlp(x))


def test_tokens_instead_of_texts(tiny, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 290, (60, 9))
    np.save(tmp_path / "tokens.npy", tokens)
    source = open_source(tiny, texts=None, tokens=tmp_path / "tokens.npy", n_tokens=450)
    assert source.contexts.tokens.tolist() == tokens[:50].tolist()
    assert source.contexts.n_rows.unique().tolist() == [8]  # no tokenizer says which are special
    open_source(tiny, texts=None, tokens=tmp_path / "tokens.npy", context_length=2, skip=4)  # these have nine


# Harvests


def test_a_harvest_is_what_the_source_gives(tiny, run_cli, tmp_path):
    source = open_source(tiny)
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps({"source": tiny.section(), "sae": {"kind": "topk", "d_sae": 8, "k": 2}}))
    outcome = run_cli("harvest", config, "--out", tmp_path / "acts")
    assert outcome.code == 0, outcome.err
    store = Store(tmp_path / "acts")
    assert f"{store.manifest.n_rows('training'):,} rows to train on" in outcome.out
    harvested = sae.open_store(tmp_path / "acts")
    for purpose in ("calibration", "evaluation"):
        torch.testing.assert_close(harvested.held_out(purpose, 10**6).x, source.held_out(purpose, 10**6).x)
    rows = store.rows("training")
    own = source.contexts.tokens[source.order["training"]]
    expected = hidden(tiny, own, 2)[source.contexts.kept(own)]
    torch.testing.assert_close(rows.read(0, len(rows)), expected)
    # Every row says where it is from.
    tokens = load_file(tmp_path / "acts" / "tokens.safetensors")["tokens"]
    context, position = (store.column("evaluation", name) for name in ("context", "position"))
    there = hidden(tiny, tokens, 2)[context.long(), position.long()]
    torch.testing.assert_close(harvested.held_out("evaluation", 10**6).x, there)


def test_several_modules_in_one_pass(tiny, run_cli, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps({"source": tiny.section()}))
    modules = ("transformer.h.0", "transformer.h.2.mlp")
    assert run_cli("harvest", config, "--out", tmp_path / "acts", "--modules", *modules).code == 0
    for module in modules:
        alone = open_source(tiny, module=module).held_out("evaluation", 10**6).x
        torch.testing.assert_close(sae.open_store(tmp_path / "acts" / module).held_out("evaluation", 10**6).x, alone)
    again = run_cli("harvest", config, "--out", tmp_path / "acts", "--modules", *modules, "--resume")
    assert again.code == 0
    run_cli(
        "harvest", config, "--out", tmp_path / "acts", "--modules", *modules, "--resume", "--dtype", "float16"
    ).assert_refused("dtype was 'float32', now 'float16'")
    run_cli(
        "harvest", config, "--out", tmp_path / "acts", "--modules", *modules, "--resume", "--source.n_tokens", 99
    ).assert_refused("n_tokens was 6000, now 99")


def test_stores_that_are_at_different_batches_end_alike(tiny, tmp_path, monkeypatch):
    """A kill between the shards of two stores leaves one ahead."""
    monkeypatch.setattr("sae.stores.writer.SHARD_BYTES", 30_000)  # a shard every other batch of contexts
    config, modules = SourceConfig.of_kind(tiny.section()), ("transformer.h.0", "transformer.h.2")
    harvest_model(config, tmp_path / "whole", modules)
    append, calls = StoreWriter.append, []

    def killed(writer, *given):
        calls.append(writer.path)
        if len(calls) == 2 * 4:
            raise MemoryError
        append(writer, *given)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", killed)
        with pytest.raises(MemoryError):
            harvest_model(config, tmp_path / "parts", modules)
    begun = [Store(tmp_path / "parts" / module).manifest.n_batches for module in modules]
    assert begun[0] > begun[1] > 0
    read: list[int] = []
    harvest_model(config, tmp_path / "parts", modules, resume=True, on_begin=lambda n: read.append)
    assert sum(read) == 500  # those that were there, and the others
    assert len(read) < 2 + 16  # the first batches were not read again
    for module in modules:
        whole, parts = (Store(tmp_path / name / module).rows("training") for name in ("whole", "parts"))
        assert torch.equal(whole.read(0, len(whole)), parts.read(0, len(parts)))


# What the model loses


def train_config(tiny, tmp_path, **more):
    return sae.TrainConfig(
        source=tiny.section(**more),
        sae={"kind": "topk", "d_sae": 24, "k": 4},
        train={"n_samples": 4096, "batch_size": 128, "warmup_steps": 5},
        evaluation={"n_samples": 150},
        out=tmp_path / "run",
    )


def test_training_ends_with_what_the_model_loses(tiny, tmp_path):
    result = sae.train(train_config(tiny, tmp_path), report=False)
    source = open_source(tiny)
    n_contexts = int((source.contexts.n_rows[source.order["evaluation"]].cumsum(0) < 150).sum()) + 1
    tokens = source.contexts.tokens[source.order["evaluation"][:n_contexts]]
    judge = sae.metrics.Spliced(tiny.network(), "transformer.h.1", result.sae)
    judge.update(tokens.long(), source.contexts.kept(tokens))
    for name, value in judge.compute().items():
        assert result.metrics[f"metrics/{name}"] == pytest.approx(value, rel=1e-4), name
    assert result.metrics["metrics/kl"] > 0
    assert sae.evaluate_run(tmp_path / "run").metrics == result.metrics


def test_a_disk_without_room_is_told_at_the_first_batch(tiny, tmp_path, monkeypatch):
    config = SourceConfig.of_kind(tiny.section())
    contexts = config.read()
    free = int(contexts.n_rows.sum()) * (4 * D + 8)  # floats, and two numbers that say whose the row is
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free - 1))
    with pytest.raises(UsageError, match=r"GiB more, but the disk of .*acts has .*; lower source.n_tokens"):
        harvest_model(config, tmp_path / "acts")
    assert not (tmp_path / "acts/manifest.json").exists()
    harvest_model(config, tmp_path / "acts", dtype="float16")  # half as much
    with pytest.raises(UsageError, match="GiB more"):
        harvest_model(config, tmp_path / "both", ("transformer.h.0", "transformer.h.1"), dtype="float16")
    harvest_model(config, tmp_path / "acts", dtype="float32", overwrite=True)  # in place of the other


def test_long_tokenizing_tells_how_far_it_is(tiny, monkeypatch, caplog):
    monkeypatch.setattr("sae.networks.texts.SECONDS_BETWEEN_LINES", 0)
    with caplog.at_level("INFO", "sae"):
        SourceConfig.of_kind(tiny.section()).read()
    assert "texts are tokenized: 6000 of 6000 tokens" in caplog.text


def test_a_store_knows_its_model(tiny, run_cli, tmp_path):
    config = train_config(tiny, tmp_path)
    live = sae.train(config, report=False)
    expected = open_source(tiny).downstream(live.sae, 150)
    harvest_model(config.source, tmp_path / "acts")
    config = config.model_copy(
        update={"source": sae.StoreSourceConfig(path=tmp_path / "acts"), "out": tmp_path / "stored"}
    )
    stored = sae.train(config, report=False)
    assert "metrics/kl" not in stored.metrics
    live.sae.save(tmp_path / "stored")
    assert run_cli("eval", tmp_path / "stored", "--downstream").code == 0
    found = json.loads((tmp_path / "stored" / "result.json").read_text())
    for name, value in expected.items():
        assert found[f"metrics/{name}"] == pytest.approx(value, rel=1e-4), name
    run_cli("eval", tmp_path / "stored")
    assert json.loads((tmp_path / "stored" / "result.json").read_text())["metrics/kl"] == found["metrics/kl"]
    plain = tmp_path / "plain"
    np.save(tmp_path / "acts.npy", np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32))
    array = {"kind": "array", "path": tmp_path / "acts.npy"}
    sae.train(
        sae.TrainConfig(
            source=array,
            sae={"kind": "topk", "d_sae": 8, "k": 2},
            train={"n_samples": 512, "batch_size": 64},
            out=plain,
        ),
        report=False,
    )
    run_cli("eval", plain, "--downstream").assert_refused("sae harvest", "sae.metrics.Spliced")


@pytest.mark.parametrize("by_way_of", ["model", "store"])
def test_other_libraries_are_told_which_network(tiny, run_cli, tmp_path, by_way_of):
    config = train_config(tiny, tmp_path)
    if by_way_of == "store":
        harvest_model(config.source, tmp_path / "acts")
        config = config.model_copy(update={"source": sae.StoreSourceConfig(path=tmp_path / "acts")})
    sae.train(config, report=False)
    assert run_cli("convert", tmp_path / "run", "--metadata", "{model_name: gpt2}").code == 0
    said = json.loads((tmp_path / "run-saelens" / "cfg.json").read_text())["metadata"]
    assert said.items() >= {"model_name": "gpt2", "hook_name": "transformer.h.1", "context_size": 12}.items()
    assert run_cli("convert", tmp_path / "run", "--to", "dictionary_learning").code == 0
    trainer = json.loads((tmp_path / "run-dictionary_learning" / "config.json").read_text())["trainer"]
    assert (trainer["lm_name"], trainer["submodule_name"]) == (tiny.model, "transformer.h.1")


def test_an_sae_is_kept_where_the_loss_cannot_be_measured(tiny, tmp_path, caplog):
    result = sae.train(train_config(tiny, tmp_path, context_length=2), report=False)  # no two tokens beside each other
    assert "what the model loses was not measured: no token was predicted" in caplog.text
    assert "metrics/kl" not in result.metrics
    assert sae.load(tmp_path / "run").d_sae == 24


def test_a_signal_is_heard_while_the_model_reads(tiny):
    source = open_source(tiny)
    with stop_requested():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped while the model was reading; continue with --resume"):
            next(source.batches(64, 0))
    next(source.batches(64, 0))


def test_rows_that_are_not_finite_are_told(tiny):
    source = open_source(tiny)
    with torch.no_grad():
        source.model.model.transformer.wte.weight[int(source.contexts.tokens[0, 3])] = torch.nan
    with pytest.raises(UsageError, match=r"transformer.h.1 of .* holds NaN or infinity"):
        next(source.batches(64, 0))


def test_shared_sources_measure_too(tiny):
    source = open_source(tiny)
    shared = SharedSource(source)
    assert shared.stays
    assert shared.downstream(lambda x: 0 * x, 50) == source.downstream(lambda x: 0 * x, 50)
    assert open_source(tiny, target="transformer.h.1").stays


MODULES = ["transformer.h.0", "transformer.h.2", "transformer.h.1.mlp"]


def sweep_of(tiny, tmp_path, **sweep):
    source = tiny.section(contexts_at_once=16, window_rows=1500)
    train = {"n_samples": 6400, "batch_size": 64, "warmup_steps": 5}
    base = {"source": source, "sae": {"kind": "topk", "d_sae": 24, "k": 3}, "train": train}
    base |= {"evaluation": {"n_samples": 150}, "checkpoint": {"every_steps": 30}, "log": {"every": 10}}
    return parse_sweep(base | {"out": str(tmp_path / "sweep"), "sweep": sweep})


def counted(monkeypatch) -> list[int]:
    """How many contexts the model reads, from here on, for the windows that are trained on."""
    read, window = [], ModelSource.window

    def counting(self, which, *ranks):
        if len(which) > 60:
            read.append(len(which))
        return window(self, which, *ranks)

    monkeypatch.setattr(ModelSource, "window", counting)
    return read


def test_a_sweep_over_modules_reads_the_texts_once(tiny, tmp_path, monkeypatch):
    """Each member ends with the bits of a run by itself; one reads less, one has a target."""
    monkeypatch.setattr("sae.run.N_CALIBRATION", 300)
    every = [{"source.module": module} for module in MODULES]
    every += [
        {"source.module": MODULES[2], "source.reads": "input", "source.target": MODULES[2], "sae.kind": "transcoder"}
    ]
    every += [{"source.module": MODULES[0], "train.n_samples": 3200, "sae.k": 2}]
    plan = sweep_of(tiny, tmp_path, list=every)
    assert len({member.stream for member in plan.members}) == 1
    loaded, load = [], ModelSourceConfig.load
    monkeypatch.setattr(ModelSourceConfig, "load", lambda config: loaded.append(config) or load(config))
    read = counted(monkeypatch)
    outcome = run_sweep(plan)
    assert not outcome.not_done, outcome.rows
    assert len(loaded) == 1
    together = sum(read)
    read.clear()
    for member in plan.members:
        alone = member.config.model_copy(update={"out": tmp_path / "alone" / member.name})
        sae.train(alone, report=False)
        outs = member.config.out, alone.out
        one, other = ((out / "sae.safetensors").read_bytes() for out in outs)
        assert one == other, member.name
        found, expected = (json.loads((out / "result.json").read_text()) for out in outs)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), member.name
    assert 4.4 * together < sum(read) < 4.6 * together  # one of five stops half way


def test_a_sweep_over_modules_goes_on_as_if_it_had_not_stopped(tiny, tmp_path, monkeypatch):
    plan = sweep_of(tiny, tmp_path / "whole", grid={"source.module": MODULES[:2]})
    run_sweep(plan)
    parts = sweep_of(tiny, tmp_path / "parts", grid={"source.module": MODULES[:2]})

    def stop(event):
        if isinstance(event, Logged) and event.step == 50 and event.name.endswith("h.2"):
            signal.raise_signal(signal.SIGTERM)

    assert run_sweep(parts, on_event=stop).signal_number == signal.SIGTERM
    shutil.rmtree(parts.members[0].config.out / "checkpoints/step-000000050")  # as after a kill between two saves
    assert not run_sweep(parts, resume=True).not_done
    for one, other in zip(plan.members, parts.members, strict=True):
        files = [member.config.out / "sae.safetensors" for member in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_modules_that_are_not_there_are_told_beside_those_that_are(tiny, tmp_path):
    plan = sweep_of(tiny, tmp_path, grid={"source.module": ["transformer.h.0", "transformer.h.9"]})
    with pytest.raises(UsageError, match=r"member module_transformer.h.9: .*transformer.h.9"):
        run_sweep(plan)
    ends = []
    Group(plan.members, plan.section, resume=False).run(opener(), ends.append, lambda: 0)  # as another process does it
    found = {end.name: (end.status, end.reason[:30]) for end in ends if isinstance(end, Ended)}
    first, second = (member.name for member in plan.members)
    assert found[first] == ("done", "")
    assert found[second] == ("failed", "the model has no module 'trans")


def test_the_loss_is_measured_in_parts_that_fit(tiny, tmp_path, monkeypatch):
    model = sae.train(train_config(tiny, tmp_path), report=False).sae
    source = open_source(tiny)
    whole = source.downstream(model, 10**6)
    monkeypatch.setattr("sae.networks.losses.PREDICTIONS", 3 * 12 * 290)
    assert source.downstream(model, 10**6) == pytest.approx(whole, rel=1e-4)


def test_a_transcoder_replaces_what_comes_out(tiny):
    module = "transformer.h.1.mlp"
    source = open_source(tiny, module=module, reads="input", target=module)
    lost = source.downstream(tiny.network().transformer.h[1].mlp, 10**6)  # the module itself: nothing is lost
    assert lost["kl"] < 1e-6
    assert lost["ce_spliced"] == pytest.approx(lost["ce_clean"], abs=1e-4)
    assert open_source(tiny, reads="input").downstream(lambda x: x, 100) == {}


# Mistakes


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"module": "transformer.h.9"}, ["no module 'transformer.h.9'", "transformer.h.0"]),
        ({"module": "lm_head.x"}, ["no module"]),
        ({"model": "/nowhere/at/all"}, ["source.model /nowhere/at/all: there is no such folder"]),
        ({"texts": "none-*.jsonl"}, ["no file matches source.texts 'none-*.jsonl'"]),
        ({"texts": None}, ["reads texts or tokens, got neither"]),
        ({"column": "body"}, ["no column 'body'", "text, n"]),
        ({"column": "n"}, ["n of row 0 is", "not a text"]),
        ({"context_length": N_POSITIONS + 1}, [f"too long for a model of {N_POSITIONS} positions"]),
        ({"context_length": 4000, "n_tokens": 10**6}, ["too long"]),
        ({"skip": 12}, ["skip must lie below context_length=12, got 12"]),
        ({"n_tokens": 60}, ["5 inputs leave no rows for evaluation", "raise source.n_tokens"]),
        ({"kind": [1]}, ["unknown kind [1]"]),
        ({"device": "tpu"}, ["source.device"]),
        ({"n_tokns": 1}, ["unknown key 'n_tokns' for kind 'model'; did you mean 'n_tokens'?"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(tiny, run_cli, tmp_path, more, parts):
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps({"source": tiny.section(**more), "sae": {"kind": "topk", "d_sae": 8, "k": 2}}))
    run_cli("train", config, "--out", tmp_path / "run").assert_refused(*parts)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_models_own_code_is_not_run(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "own"
    shutil.copytree(tiny.model, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UsageError, match="it comes with code of its own, which is not run"):
        open_source(tiny, model=str(folder))
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_missing_are_told(tiny, tmp_path):
    folder = tmp_path / "less"
    shutil.copytree(tiny.model, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".h.1.mlp." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 4 weights, which would be random: transformer.h.1.mlp"):
        open_source(tiny, model=str(folder))


def test_texts_that_cannot_be_read_are_told(tiny, tmp_path):
    def read(pattern):
        return list(texts(str(tmp_path / pattern), None, "train", "text"))

    (tmp_path / "a.txt").write_text("one text")
    with pytest.raises(UsageError, match=r"a folder of .txt files; give '.*\*.txt'"):
        read("")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "b"')
    with pytest.raises(UsageError, match=r"b.jsonl' cannot be read"):
        read("b.jsonl")
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"c.jsonl is empty"):
        read("c.jsonl")
    (tmp_path / "d.parquet").write_text("no parquet")
    with pytest.raises(UsageError, match=r"d.parquet' cannot be read"):
        read("d.parquet")
    (tmp_path / "e.csv").write_text("text\na")
    with pytest.raises(UsageError, match=r"files are .csv, .txt"):
        read("[ae].*")


def test_odd_tokens_are_told(tiny, tmp_path):
    for array, part in [
        (np.zeros((30, 9)), "float64"),
        (np.full((30, 9), 290), "tokens 290 to 290 do not fit a model that knows 0 to 289"),
        (np.full((30, 9), -1), "do not fit"),
        (np.zeros(30, dtype=int), r"\[30\] of int64"),
    ]:
        np.save(tmp_path / "tokens.npy", array)
        with pytest.raises(UsageError, match=part):
            open_source(tiny, texts=None, tokens=tmp_path / "tokens.npy")


def test_harvests_read_the_source_alone(tiny, run_cli, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps({"source": tiny.section()}))
    out = ("--out", tmp_path / "acts")
    run_cli("harvest", config, *out, "--sae.k", 3).assert_refused("unknown flag '--sae.k'", "--source.n_tokens")
    run_cli("harvest", config, *out, "--source.kind", "toy").assert_refused("kind 'toy' has no network to harvest")
    config.write_text(json.dumps({"sorce": tiny.section()}))
    run_cli("harvest", config, *out).assert_refused("unknown key 'sorce'; did you mean 'source'?")
    config.write_text("{}")
    run_cli("harvest", config, *out).assert_refused("source is required")


def test_contexts_count_their_rows():
    tokens = torch.randint(0, 5, (9000, 6), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    contexts = Contexts(tokens, torch.tensor([1, 3], dtype=torch.int32), skip=2)
    expected = [sum(token not in (1, 3) for token in row[2:]) for row in tokens.tolist()]
    assert contexts.n_rows.tolist() == expected
    assert EVERY == 20
