"""Several processes that train one SAE: the judge is one process that takes as many parts of each batch."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from several import SAE, ended, started

import sae
from sae import UsageError
from sae.parts import parts_of
from sae.ranks import ALONE, Ranks, here, joined

D = 6
X = torch.randn(4000, D, generator=torch.Generator().manual_seed(0)) @ torch.randn(
    D, D, generator=torch.Generator().manual_seed(1)
)
SPARSE = {"d_sae": 24, "k": 3}
PAID = {"d_sae": 24, "l1_coefficient": 0.02}
RUNS = {
    "topk": ({"kind": "topk", **SPARSE, "k_start": 9.0}, {}),
    "batchtopk": ({"kind": "batchtopk", "d_sae": 24, "k": 2.5, "resample_every": 640}, {"dead_after_samples": 200}),
    "matryoshka": ({"kind": "matryoshka", **SPARSE}, {"clip_norm": 0.05}),
    "matching_pursuit": ({"kind": "matching_pursuit", **SPARSE}, {}),
    "skip_transcoder": ({"kind": "skip_transcoder", **SPARSE}, {"moments": "int8"}),
    "relu": ({"kind": "relu", **PAID}, {}),
    "gated": ({"kind": "gated", "d_sae": 24, "l0": 2.5}, {}),
    "jumprelu": ({"kind": "jumprelu", "d_sae": 24, "l0": 2.5}, {}),
    "p_annealing": ({"kind": "p_annealing", "d_sae": 24, "l0": 2.5, "anneal_start": 0.1}, {}),
}
EACH = """
import json, logging, sys, torch, sae
logging.basicConfig(level=logging.INFO)
x, out, runs = torch.from_numpy(__import__("numpy").load(sys.argv[1])), sys.argv[2], json.loads(sys.argv[3])
for name, sections in runs.items():
    config = sae.TrainConfig(**sections, out=f"{out}/{name}")
    source = (x, x[:, :4] ** 2) if "transcoder" in name else x
    result = sae.train(config, source, report=False)
    again = {key: tensor.sum().item() for key, tensor in result.sae.state_dict().items()}
    print(json.dumps([again, result.metrics]))
"""


def sections(options, train=None, accumulate=1):
    usual = {"n_samples": 3200, "batch_size": 64, "warmup_steps": 5, "accumulate": accumulate}
    every = {"checkpoint": {"every_steps": 20, "keep": 9}, "log": {"every": 10}, "evaluation": {"n_samples": 500}}
    return {"sae": options, "train": usual | (train or {}), **every}


def record(out):
    """All that a run left but the time it took."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["details/samples_per_second"]
    state = load_file(out / "checkpoints/step-000000050/state.safetensors")
    return lines, json.loads((out / "result.json").read_text()), state, load_file(out / "sae.safetensors")


def same(ours, theirs, tolerance=0.0):
    for found, expected in zip(ours, theirs, strict=True):
        if isinstance(found, list):
            same(found, expected, tolerance)
            continue
        assert found.keys() == expected.keys()
        for name, value in found.items():
            one, other = torch.as_tensor(value).double(), torch.as_tensor(expected[name]).double()
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance / 10, equal_nan=True, msg=name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every run by two processes, one after the other, and what each process has of them."""
    folder = tmp_path_factory.mktemp("two")
    np.save(folder / "x.npy", X.numpy())
    runs = {name: sections(options, train) for name, (options, train) in RUNS.items()}
    first, second = ended(started(EACH, folder / "x.npy", folder, json.dumps(runs)))
    assert first.code == 0, first.err
    assert second.code == 0, second.err
    assert "2 processes train together" in first.err
    assert not second.err
    return folder, first.out.splitlines(), second.out.splitlines()


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one_that_takes_two_parts(trained, tmp_path, name):
    """Bit for bit; sums that a step leaves for the next ones (p-annealing) are added up in another order."""
    options, train = RUNS[name]
    source = (X, X[:, :4] ** 2) if "transcoder" in name else X
    sae.train(sae.TrainConfig(**sections(options, train, 2), out=tmp_path / name), source, report=False)
    tolerance = 1e-3 if name == "p_annealing" else 0.0
    same(record(trained[0] / name), record(tmp_path / name), tolerance)


def test_each_process_ends_with_the_same(trained):
    _, first, second = trained
    assert len(first) == len(RUNS)
    assert first == second


def test_three_processes_in_two_parts_each(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    options = RUNS["topk"][0]
    runs = {"three": sections(options, {"kernels": "torch"}, 2)}
    for one in ended(started(EACH, tmp_path / "x.npy", tmp_path, json.dumps(runs), n=3)):
        assert one.code == 0, one.err
    config = sae.TrainConfig(**sections(options, {"kernels": "torch"}, 6), out=tmp_path / "six")
    sae.train(config, X, report=False)
    same(record(tmp_path / "three")[:1], record(tmp_path / "six")[:1], 1e-3)


def write(tmp_path, **train):
    """A configuration as a file, of 50 steps."""
    np.save(tmp_path / "x.npy", X.numpy())
    given = sections(RUNS["topk"][0], train) | {"source": {"kind": "array", "path": str(tmp_path / "x.npy")}}
    (tmp_path / "c.yaml").write_text(sae.TrainConfig(**given, out=tmp_path / "run").to_yaml())
    return "train", tmp_path / "c.yaml"


def until(condition, processes, seconds=90.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.01)


def saved(out):
    return sorted(path.name for path in (out / "checkpoints").glob("step-*[0-9]"))


def test_a_signal_to_one_stops_all_at_one_step(tmp_path):
    words = write(tmp_path, n_samples=64 * 20_000, kernels="torch")
    processes = started(SAE, *words)
    until(lambda: len(saved(tmp_path / "run")) > 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    first, second = ended(processes)
    assert (first.code, second.code) == (128 + signal.SIGTERM, 128 + signal.SIGTERM), first.err + second.err
    step = int(saved(tmp_path / "run")[-1].removeprefix("step-"))
    assert f"sae: stopped at step {step}; continue with --resume" in first.err
    assert not second.err
    assert not second.out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    words = (*write(folder, n_samples=64 * 1500), "--checkpoint.every_steps", 500, "--log.every", 500)
    for one in ended(started(SAE, *words)):
        assert one.code == 0, one.err
    return folder / "run", words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_resumed_run_is_the_whole_one(whole, tmp_path, number):
    """What a killed process leaves its peers alone with is saved, too. Others need not see that: what rank 0 begins
    with goes to them."""
    words, folders = (*whole[1], "--out", "run"), [tmp_path, tmp_path / "another_machine"]
    folders[1].mkdir()
    processes = started(SAE, *words, folders=folders)
    until(lambda: saved(tmp_path / "run"), processes)
    time.sleep(0.2)  # so that it is between two checkpoints
    processes[1].send_signal(number)
    first, second = ended(processes)
    assert second.code == (-number if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGKILL:
        assert first.code == 2, first.err
        assert "sae: error: another process of this run ended, or cannot be reached" in first.err
        assert len(first.err.strip().splitlines()[-1]) < 500
    at = int(saved(tmp_path / "run")[-1].removeprefix("step-"))
    assert 500 <= at < 1500
    assert at % 500  # saved as it ended
    first, second = ended(started(SAE, *words, "--resume", folders=folders))
    assert first.code == 0, first.err
    assert second.code == 0, second.err
    assert f"goes on after step {at} of 1500" in first.err
    assert not list(folders[1].iterdir())
    for name in ("sae.safetensors", "result.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole[0] / name).read_bytes()


def test_what_one_refuses_is_told_once(tmp_path):
    words = write(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("of a run")
    first, second = ended(started(SAE, *words))
    assert (first.code, second.code) == (2, 2)
    assert "already holds a run; continue it with --resume" in first.err.splitlines()[-1]
    assert not second.err
    (tmp_path / "run/config.yaml").unlink()
    (tmp_path / "x.npy").unlink()  # every process finds that
    first, second = ended(started(SAE, *words))
    assert (first.code, second.code) == (2, 2)
    assert "x.npy" in first.err.splitlines()[-1]
    assert not second.err
    assert not list((tmp_path / "run").iterdir())


def test_one_that_was_started_otherwise_is_refused(tmp_path):
    words = write(tmp_path)
    first, second = ended(started(SAE, *words, but={1: (*words, "--sae.k", 4)}))
    assert (first.code, second.code) == (2, 2)
    assert second.err == (
        "sae, process 1: error: its configuration is not that of process 0; start all with the same command\n"
    )
    assert not (tmp_path / "run").exists()


def test_torchrun_starts_them(tmp_path):
    words = write(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    run = subprocess.run(
        [*launcher, "-m", "sae", *map(str, words)], env=own, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("held-out activations") == 1
    assert run.stdout.count("every metric is in its result.json") == 1
    assert json.loads((tmp_path / "run/result.json").read_text())["metrics/l0"] == pytest.approx(3, abs=0.1)


SHARED = """
import json, sys, torch, sae
from sae.networks.language_model import LanguageModel
n_read, rows = [0], LanguageModel.rows
def counted(model, sites, tokens, kept):
    n_read[0] += len(tokens)
    return rows(model, sites, tokens, kept)
LanguageModel.rows = counted
config = sae.TrainConfig(**json.loads(sys.argv[1]))
sae.train(config, report=False)
print(n_read[0])
"""


def test_processes_share_the_reading_of_a_language_model(tiny, tmp_path):
    """Each computes a part of every window, and all see the rows that one alone would see."""
    own = {"contexts_at_once": 16, "skip": 2}
    given = sections(RUNS["topk"][0]) | {"source": tiny.section(**own)}
    first, second = ended(started(SHARED, json.dumps(given | {"out": str(tmp_path / "two")})))
    assert first.code == 0, first.err
    assert second.code == 0, second.err
    alone = sections(RUNS["topk"][0], accumulate=2) | {"source": tiny.section(**own), "out": str(tmp_path / "one")}
    (one,) = ended(started(SHARED, json.dumps(alone), n=1))
    assert one.code == 0, one.err
    same(record(tmp_path / "two"), record(tmp_path / "one"))
    n_first, n_second, n_one = (int(ended.out) for ended in (first, second, one))
    n_contexts = 500 * 18 // 20  # those that are trained on
    assert n_one > n_contexts
    assert n_first + n_second == pytest.approx(2 * n_one - n_contexts, abs=60)


@pytest.mark.parametrize("words", [("sweep", "c.yaml"), ("demo",), ("eval", "runs/x"), ("bench",)], ids=str)
def test_commands_that_share_nothing_refuse_several_processes(run_cli, monkeypatch, words):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    run_cli(*words).assert_refused(f"`sae {words[0]}` is not shared by processes, and 4 were started")


def test_each_process_takes_a_device_of_its_own(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **_: None)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(UsageError, match="would be that of every process; say cuda"), joined("cuda:0"):
        pass
    with pytest.raises(UsageError, match="process 1 on this machine finds 1 CUDA devices"), joined("cuda"):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with joined("cuda") as ranks:
        assert here() == ranks == Ranks(1, 2)
        assert not ranks.lead
    assert taken == [1]
    assert here() == ALONE


def test_alone_nothing_is_exchanged():
    """Without a process group every exchange would fail."""
    given = torch.arange(3.0)
    ALONE.add_up_([given])
    ALONE.gather_(given, [0, 3])
    assert ALONE.of_lead("value") == "value"
    assert ALONE.of_all(lambda: 7) == 7
    assert ALONE.tensors_of_lead({"a": given}, given.device)["a"] is given
    assert ALONE.agreed(lambda: 15)() == 15
    with joined("cpu") as ranks:
        assert ranks == ALONE


@pytest.mark.parametrize(("n_samples", "n_parts"), [(10, 3), (7, 7), (100, 1), (64, 6)])
def test_parts_are_the_batch(n_samples, n_parts):
    rows = [list(range(n_samples))[part] for part in parts_of(n_samples, n_parts)]
    assert [row for part in rows for row in part] == list(range(n_samples))
    assert len(rows) == n_parts
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
