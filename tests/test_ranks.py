"""Several processes that train one SAE: the judge is one process that takes as many parts of each batch."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from several import LOCAL, SAE, ended, started

import sae
from sae import UsageError
from sae.parts import parts_of
from sae.ranks import ALONE, joined
from sae.sources import as_source
from sae.start import start

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
    "refined": ({"kind": "refined", **SPARSE}, {}),
    "lista_matryoshka": ({"kind": "lista_matryoshka", **SPARSE}, {}),
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
    for place, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(found, list):
            for one, other in zip(found, expected, strict=True):
                same([one], [other], tolerance)
            continue
        if place == 1:  # metrics: what rounding leaves of a 0 hangs on where in memory it was added up
            assert found == pytest.approx(expected, rel=max(tolerance, 1e-6), abs=1e-9)
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
    assert not told(second.err)
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
    assert first == second  # what the first measured


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


def told(err):
    """What we say on stderr; libraries may warn there of a machine's network."""
    return [line for line in err.replace("\r", "\n").splitlines() if line.startswith(("sae", "INFO:sae", "Traceback"))]


def until(condition, processes, seconds=200.0):
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
    assert not told(second.err)
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
        assert "sae: error: another process of this run ended or cannot be reached" in first.err
        assert len(first.err.strip().splitlines()[-1]) < 500
    at = int(saved(tmp_path / "run")[-1].removeprefix("step-"))
    assert 500 <= at < 1500
    assert at % 500  # saved as it ended
    first, second = ended(started(SAE, *words, "--resume", folders=folders))
    assert first.code == 0, first.err
    assert second.code == 0, second.err
    assert f"continues after step {at} of 1500" in first.err
    assert not list(folders[1].iterdir())
    assert (tmp_path / "run/sae.safetensors").read_bytes() == (whole[0] / "sae.safetensors").read_bytes()
    found, expected = (json.loads((out / "result.json").read_text()) for out in (tmp_path / "run", whole[0]))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_what_one_refuses_is_told_once(tmp_path):
    words = write(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("of a run")
    first, second = ended(started(SAE, *words))
    assert (first.code, second.code) == (2, 2)
    assert "already holds a run; continue it with --resume" in told(first.err)[-1]
    assert not told(second.err)
    (tmp_path / "run/config.yaml").unlink()
    (tmp_path / "x.npy").unlink()  # every process finds that
    first, second = ended(started(SAE, *words))
    assert (first.code, second.code) == (2, 2)
    assert "x.npy" in told(first.err)[-1]
    assert not told(second.err)
    assert not list((tmp_path / "run").iterdir())


def test_one_that_was_started_otherwise_is_refused(tmp_path):
    words = write(tmp_path)
    first, second = ended(started(SAE, *words, but={1: (*words, "--sae.k", 4)}))
    assert (first.code, second.code) == (2, 2)
    assert told(second.err) == [
        "sae, process 1: error: its settings are not those of process 0; start all with the same command"
    ]
    assert not (tmp_path / "run").exists()


def test_torchrun_starts_them(tmp_path):
    words = write(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | LOCAL
    run = subprocess.run(
        [*launcher, "-m", "sae", *map(str, words)], env=own, capture_output=True, text=True, timeout=300, check=False
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


PLUGIN = """
import json, os, sys, torch, sae
from typing import Literal
from sae.sparsifiers import Sparsifier

class Moving(Sparsifier):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean_cut", torch.tensor(0.0))
        self.register_buffer("last_cut", torch.tensor(0.0))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("n_seen", torch.tensor(0))

    def forward(self, pre_latents):
        values, indices = pre_latents.relu().topk(3)
        if self.training and torch.is_grad_enabled():
            cut = values.detach()[:, -1].mean()
            self.mean_cut.lerp_(cut, 0.5)
            self.last_cut.copy_(cut)
            self.n_seen += len(values)
        return sae.SparseCodes(values, indices, pre_latents.shape[1])

class MovingConfig(sae.SAEConfig):
    kind: Literal["moving"] = "moving"
    def build(self):
        return Moving()

x = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0))
train = {"n_samples": 4096, "batch_size": 64}
config = sae.TrainConfig(sae={"kind": "moving", "d_sae": 24}, train=train, out=sys.argv[1])
found = []
follow = sae.trainer.Trainer.follow
def looked(trainer, ranks):
    found.append({name: buffer.tolist() for name, buffer in trainer.sae.sparsifier.named_buffers()})
    follow(trainer, ranks)
sae.trainer.Trainer.follow = looked
sae.train(config, x, report=False)
print(json.dumps(found[-1]))
"""


def test_buffers_of_a_kind_of_ones_own_stay_the_same_in_all(tmp_path):
    """What a step sets or averages is that of the first process; it is not added up."""
    first, second = ended(started(PLUGIN, tmp_path / "run"))
    assert first.code == 0, first.err
    assert first.out == second.out
    buffers = json.loads(first.out)
    assert 0.1 < buffers["mean_cut"] < 1
    assert 0.1 < buffers["last_cut"] < 1
    assert buffers["n_seen"] == 64 * 32  # of its rows
    assert buffers["mask"] == [0, -torch.inf]


ENDS_EARLY = """
import os, sys, time, torch, sae
rank, how = int(os.environ["RANK"]), sys.argv[2]
x = torch.randn(20_000, 6, generator=torch.Generator().manual_seed(rank if how == "other rows" else 0))

def batches():
    for number, batch in enumerate(x.split(100)):
        if how == "ends" and rank == 1 and number == 150:
            return
        if how == "bad rows" and rank == 1 and number == 150:
            batch = batch * torch.nan
        yield batch

def on_line(step, values):
    if how == "on_line" and step == 30:
        raise ValueError("mine")

options, train = {"kind": "topk", "k": 3, "d_sae": 24}, {"n_samples": 10_000, "batch_size": 64}
config = sae.TrainConfig(sae=options, train=train, log={"every": 10}, out=sys.argv[1])
try:
    result = sae.train(config, batches(), report=False, on_line=on_line)
    print(float(result.sae.W_dec.sum()), sorted(result.metrics.items())[:3])
except Exception as error:
    print(type(error).__name__, error)
time.sleep(0 if how == "ends" else 3)  # it lives on, and must not be waited for
"""


@pytest.mark.parametrize("how", ["ends", "bad rows", "other rows", "on_line"])
def test_what_happens_to_one_ends_all(tmp_path, how):
    first, second = ended(started(ENDS_EARLY, tmp_path / "run", how))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    expected = {
        "bad rows": (
            "OtherProcess a batch could not be drawn in another process",
            "UsageError batch 150 row 0 holds NaN",
        ),
        "other rows": ("OtherProcess process 1: its held-out rows are not", "UsageError its held-out rows are not"),
        "on_line": ("ValueError mine", "UsageError another process of this run ended or cannot be reached"),
    }
    if how == "ends":
        assert first.out == second.out
        assert "dimensionality/capacity" in first.out
        return
    for one, words in zip((first, second), expected[how], strict=True):
        assert one.out.startswith(words), one


OWN_GROUP = """
import datetime, os, sys, time, torch, torch.distributed as dist, sae
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=3))
x = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0))
def slow(step, values):
    time.sleep(4 if step == 10 else 0)
for out in ("one", "two"):
    config = sae.TrainConfig(
        sae={"kind": "topk", "k": 3, "d_sae": 24}, train={"n_samples": 1280, "batch_size": 64, "device": "auto"},
        log={"every": 10}, out=f"{sys.argv[1]}/{out}"
    )
    result = sae.train(config, x, report=False, on_line=slow)
counted = torch.ones(())
dist.all_reduce(counted)  # the group is still theirs
print(int(counted), float(result.sae.W_dec.sum()))
if dist.get_rank():
    os.chdir("/")
again = sae.train(config, x, report=False, resume=True)  # it is complete
print(float(again.sae.W_dec.sum()) == float(result.sae.W_dec.sum()), again.metrics == result.metrics)
"""


def test_a_process_group_of_the_users_own_is_left_alone(tmp_path):
    """Its timeout is not ours. A complete run is given to all, though its directory is seen by the first alone."""
    folders = [tmp_path, tmp_path / "another_machine"]
    folders[1].mkdir()
    first, second = ended(started(OWN_GROUP, "runs", folders=folders))
    assert first.code == 0, first.err
    assert second.code == 0, second.err
    assert first.out == second.out
    assert first.out.startswith("2 ")
    assert first.out.endswith("True True\n")
    assert not list(folders[1].iterdir())


SLOW_SAVE = """
import sys, time, sae.checkpoint
save = sae.checkpoint.save
def slowly(folder, step, *rest):
    time.sleep(3 if step % 20 else 0)
    save(folder, step, *rest)
sae.checkpoint.save = slowly
sys.argv[0] = "sae"
from sae.cli import main
main()
"""


def test_the_others_wait_until_the_first_has_saved(tmp_path):
    """Whoever started them may end those that are left once one has gone."""
    words = write(tmp_path, n_samples=64 * 20_000)
    processes = started(SLOW_SAVE, *words, "--checkpoint.every_steps", 20)
    until(lambda: len(saved(tmp_path / "run")) > 1, processes)
    processes[1].send_signal(signal.SIGTERM)
    processes[1].wait(200)
    there = saved(tmp_path / "run")
    first, _ = ended(processes)
    assert first.code == 128 + signal.SIGTERM
    assert saved(tmp_path / "run") == there


def test_torchrun_starts_them_again(tmp_path):
    words = (*write(tmp_path, n_samples=64 * 3000), "--checkpoint.every_steps", 200, "--resume")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", "2"]
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | LOCAL
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen([*launcher, "-m", "sae", *map(str, words)], env=own, **pipes)
    try:
        until(lambda: len(saved(tmp_path / "run")) > 1, [run])
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        out, err = run.communicate(timeout=300)
    finally:
        run.terminate()
    assert run.returncode == 0, err
    assert "continues after step" in err
    assert "every metric is in its result.json" in out


def test_a_step_that_failed_behind_its_look_is_taken_again_without_it(tmp_path):
    """Looking twice would raise the biases of dead latents twice."""
    options = {"kind": "batchtopk", "d_sae": 64, "k": 2.0}
    made = sae.TrainConfig(**sections(options, {"dead_after_samples": 300}), out=tmp_path / "run")
    source = as_source(X)

    def trainer():
        return start(made, source, source.held_out("calibration", 300))

    whole, part, later = trainer(), trainer(), trainer()
    batches = list(islice(source.batches(64, 0), 40))
    for batch in batches:
        whole.step(batch)
    for batch in batches[:30]:
        part.step(batch)
    assert len(part.dead)
    part.advance = lambda *batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        part.step(batches[30])
    later.load_state(*part.state())
    for batch in batches[30:]:
        later.step(batch)
    (ours, values), (theirs, expected) = later.state(), whole.state()
    assert values == expected
    for name, tensor in ours.items():
        assert torch.equal(tensor.nan_to_num(), theirs[name].nan_to_num()), name


@pytest.mark.parametrize("words", [("sweep", "c.yaml"), ("demo",), ("eval", "runs/x"), ("bench",)], ids=str)
def test_commands_that_share_nothing_refuse_several_processes(run_cli, monkeypatch, words):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    run_cli(*words).assert_refused(f"`sae {words[0]}` is not shared by processes, and 4 were started")


@pytest.fixture
def meeting(monkeypatch):
    """Process groups that nobody makes; the devices that were taken."""
    taken = []
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr("sae.ranks.resolve_device", {"auto": "cuda"}.get)
    monkeypatch.setattr("sae.ranks._meet", lambda: None)
    dist = "torch.distributed"
    monkeypatch.setattr(f"{dist}.new_group", lambda backend, timeout: backend)
    monkeypatch.setattr(f"{dist}.get_rank", lambda: 1)
    monkeypatch.setattr(f"{dist}.get_world_size", lambda: 2)
    monkeypatch.setattr(f"{dist}.barrier", lambda group: None)
    monkeypatch.setattr(f"{dist}.destroy_process_group", lambda *group: None)
    return taken


def test_each_process_takes_a_device_of_its_own(meeting, monkeypatch):
    taken = meeting
    monkeypatch.setattr("sae.ranks.resolve_device", lambda device: "cuda" if device == "auto" else device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for device in ("cuda", "auto"):
        with joined(device) as ranks:
            assert (ranks.rank, ranks.n, ranks.lead) == (1, 2, False)
            assert (ranks.host, ranks.device) == ("gloo", "nccl")  # the host's exchanges never wait for the device
    assert taken == [1, 1]
    with joined("cpu") as ranks:
        assert (ranks.host, ranks.device) == ("gloo", None)
    with pytest.raises(UsageError, match="'cuda:0' would be every process's; give cuda"), joined("cuda:0"):
        pass
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # one on each machine
    with joined("cuda:0"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(UsageError, match="process 3 on this machine finds 3 CUDA devices"), joined("cuda"):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each sees its own alone
    with joined("cuda"):
        pass
    with pytest.raises(UsageError, match="'mps' is not shared by processes"), joined("mps"):
        pass


def test_alone_nothing_is_exchanged():
    """Without a process group every exchange would fail."""
    given = torch.arange(3.0)
    ALONE.add_up_([given])
    ALONE.gather_(given, [0, 3])
    assert ALONE.of_lead("value") == "value"
    assert ALONE.of_all(lambda: 7) == 7
    assert ALONE.tensors_of_lead({"a": given}, given.device)["a"] is given
    assert ALONE.agreed(lambda: 15)() == 15
    assert list(ALONE.in_step(iter([1, 2]))) == [1, 2]
    with joined("cpu") as ranks:
        assert ranks == ALONE


@pytest.mark.parametrize(("n_samples", "n_parts"), [(10, 3), (7, 7), (100, 1), (64, 6)])
def test_parts_are_the_batch(n_samples, n_parts):
    rows = [list(range(n_samples))[part] for part in parts_of(n_samples, n_parts)]
    assert [row for part in rows for row in part] == list(range(n_samples))
    assert len(rows) == n_parts
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
