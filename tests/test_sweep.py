"""A sweep: its members and their names, one stream for many, and what happens when some of them end badly."""

import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tqdm import tqdm

import sae
from sae import checkpoint, cli, plugins
from sae.errors import UsageError
from sae.members import Members
from sae.sweep import group, run_sweep, workers
from sae.sweep.group import Ended, Group
from sae.sweep.plan import Plan, SweepSection, parse_sweep
from sae.sweep.rules import verdict
from sae.sweep.workers import in_processes
from sae.trainer import Trainer
from sae.world_source import WorldSource

BASE = {
    "source": {"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 50},
    "sae": {"kind": "topk", "d_sae": 24, "k": 3},
    "train": {"n_samples": 1280, "batch_size": 64, "warmup_steps": 5, "data_seed": 0},
    "evaluation": {"n_samples": 500},
    "log": {"every": 5},
    "checkpoint": {"every_steps": 7},
}
KINDS = [
    {"sae.kind": "topk", "sae.k": 2},
    {"sae.kind": "batchtopk", "sae.k": 2.5},
    {"sae.kind": "relu", "sae.l1_coefficient": 0.1},
    {"sae.kind": "topk", "sae.k": 3, "train.n_samples": 640},
]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Here and in worker processes: sums depend on how many threads share them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def plan(out: Path | None = None, sections: dict | None = None, **sweep: object) -> Plan:
    return parse_sweep({**BASE, **(sections or {}), "out": str(out), "sweep": sweep})


def names(**sweep: object) -> list[str]:
    return [member.name for member in plan(**sweep).members]


def statuses(out: Path) -> dict[str, str]:
    return {row["name"]: row["status"] for row in json.loads((out / "sweep.json").read_text())["members"]}


def lines(run: Path) -> list[dict[str, float]]:
    """The log without its clock."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "per_second" not in key} for line in read]


def assert_same(run: Path, other: Path) -> None:
    """Two runs ended with the same bits; sums of metrics may be taken by another number of threads."""
    ours, theirs = (load_file(folder / "sae.safetensors") for folder in (run, other))
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), (run, name)
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (run, other))
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    assert lines(run) == lines(other)


# What a sweep trains


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ({"grid": {"sae.k": [2, 3]}}, ["k2", "k3"]),
        ({"grid": {"sae.k": [2], "train.seed": [0, 1]}}, ["seed0", "seed1"]),
        (
            {"grid": {"sae.k": [2, 3], "train.seed": [0, 1], "sae.kind": ["topk", "batchtopk"]}},
            [f"{kind}-k{k}-seed{seed}" for k in (2, 3) for seed in (0, 1) for kind in ("topk", "batchtopk")],
        ),
        (
            {"list": KINDS[:3], "grid": {"train.seed": [7, 8]}},
            [
                *("topk-k2-seed7", "topk-k2-seed8", "batchtopk-k2.5-seed7", "batchtopk-k2.5-seed8"),
                *("relu-l1_coefficient0.1-seed7", "relu-l1_coefficient0.1-seed8"),
            ],
        ),
        ({"list": [{"sae.k": 5}, {"sae.kind": "relu"}]}, ["topk-k5", "relu"]),
        ({"grid": {"train.lr": [1e-3, 0.00025, None]}}, ["lr0.001", "lr0.00025", "lr_null"]),
        ({"grid": {"source.seed": [1, 2], "train.seed": [3]}}, ["seed1", "seed2"]),
        (
            {"grid": {"source.seed": [1, 2], "train.seed": [3, 4]}},
            [f"source_seed{a}-train_seed{b}" for a in (1, 2) for b in (3, 4)],
        ),
        ({"grid": {"sae.prefixes": [None, [8, 24]], "sae.tied_init": [True]}}, ["prefixes_null", "prefixes8_24"]),
        ({"list": [{"source.weights": "toys/a b.safetensors"}, {}]}, ["weights_toys_a_b.safetensors", "weights_null"]),
        ({"grid": {"sae.k": [3]}}, ["topk"]),
    ],
)
def test_names_say_what_varies(sweep, expected):
    assert names(**sweep) == expected


def test_members_are_resolved_and_know_their_group(tmp_path):
    made = plan(tmp_path / "many", list=KINDS, grid={"train.seed": [4]})
    first, *_, last = made.members
    assert (first.config.sae.k, first.config.train.seed, first.config.log.group) == (2, 4, "many")
    assert last.config.out == tmp_path / "many" / last.name
    assert last.config.n_steps == 10
    assert "k" not in type(made.members[2].config.sae).model_fields  # the file's k is not an option of relu
    assert made.varies[0] == "sae.kind"
    assert plan(sections={"log": {"group": "mine"}}, grid={"sae.k": [1, 2]}).members[0].config.log.group == "mine"


def test_streams_are_told_apart():
    def n_streams(**grid: list) -> int:
        return len({member.stream for member in plan(grid=grid).members})

    assert n_streams(**{"train.seed": [0, 1], "sae.k": [1, 2], "train.lr": [0.1, 0.2]}) == 1
    assert n_streams(**{"train.data_seed": [0, 1]}) == n_streams(**{"train.batch_size": [64, 32]}) == 2
    assert n_streams(**{"train.data_seed": [None], "train.seed": [0, 1, 2]}) == 3
    assert n_streams(**{"source.seed": [0, 1]}) == 2


@pytest.mark.parametrize(
    ("sweep", "parts"),
    [
        ({"grid": {"sae.k": [2, 300]}}, ["member k300", "k must lie in 1..d_sae=24, got 300"]),
        ({"grid": {"sae.kind": ["topk", "topl"]}}, ["member topl", "unknown kind 'topl'"]),
        ({"grid": {"sae.kind": ["topk", "relu"], "sae.k": [1, 2]}}, ["member relu-k1", "unknown key 'k'"]),
        ({"grid": {"sae.kk": [1, 2]}}, ["member kk1", "unknown key 'kk'"]),
        ({"grid": {"sae.k": [3, 3]}}, ["two members would have the directory", "remove one"]),
        ({"list": [{"sae.k": 2}, {"sae.k": 2}]}, ["two members would have the directory"]),
        ({"grid": {"sae.k": 3}}, ["sweep.grid.sae.k", "list", "got 3"]),
        ({"grid": {"sae.k": []}}, ["sae.k has no values"]),
        ({"grid": {"k": [1]}}, ["'k' is not a field", "as in sae.k"]),
        ({"list": [{"out": "x"}]}, ["'out' is not a field"]),
        ({"grid": {"sae.k": [1]}, "list": [{"sae.k": 2}]}, ["sae.k is in the grid and in the list"]),
        ({}, ["nothing varies"]),
        ({"grid": {"sae.k": [1]}, "n_job": 2}, ["unknown key 'sweep.n_job'", "did you mean 'n_jobs'"]),
        ({"grid": {"sae.k": [1]}, "n_jobs": 0}, ["sweep.n_jobs", "greater than 0", "got 0"]),
        ({"grid": {"sae.k": [1]}, "stop_dead": 2.0}, ["sweep.stop_dead", "less than or equal to 1"]),
    ],
)
def test_bad_sweeps_are_one_line(sweep, parts):
    with pytest.raises(UsageError) as caught:
        plan(**sweep)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_win_over_the_file_but_not_over_what_varies():
    mapping = BASE | {"sweep": {"grid": {"sae.k": [1, 2]}}}
    made = parse_sweep(mapping, ["--train.n_samples", "64", "--sweep.grid", "{sae.k: [3, 4, 5]}", "--sweep.n_jobs=2"])
    assert [member.name for member in made.members] == ["k3", "k4", "k5"]
    assert (made.members[0].config.n_steps, made.section.n_jobs) == (1, 2)
    with pytest.raises(UsageError, match=r"--sae\.k sets what the sweep varies"):
        parse_sweep(mapping, ["--sae.k", "4"])
    with pytest.raises(UsageError, match="has no section sweep"):
        parse_sweep(BASE)


def test_the_recipe_is_a_sweep():
    recipe = yaml.safe_load((Path(__file__).parent.parent / "configs/sweep.yaml").read_text())
    made = parse_sweep(recipe)
    assert len({member.stream for member in made.members}) == 1
    assert len(made.members) > 10


# One stream for many


def test_members_on_one_stream_end_with_the_bits_of_runs_by_themselves(tmp_path, monkeypatch):
    drawn = []
    batches = WorldSource.batches
    monkeypatch.setattr(
        WorldSource, "batches", lambda *args, **named: (drawn.append(args[1:3]), batches(*args, **named))[1]
    )
    made = plan(tmp_path / "sweep", list=KINDS, grid={"train.seed": [0, 1]})
    outcome = run_sweep(made)
    assert drawn == [(64, 0)]
    assert not outcome.not_done
    assert set(statuses(tmp_path / "sweep").values()) == {"done"}
    for member in made.members:
        alone = member.config.model_copy(update={"out": tmp_path / "alone" / member.name})
        sae.train(alone, report=False)
        assert_same(member.config.out, alone.out)
    weights = [load_file(member.config.out / "sae.safetensors")["W_dec"] for member in made.members[:2]]
    assert not torch.equal(*weights)  # seeds differ in their start


def test_members_step_side_by_side_and_end_as_runs_by_themselves(tmp_path, monkeypatch):
    steps, step = [], Members.step
    monkeypatch.setattr(
        Members,
        "step",
        lambda self, trainers, *batch: (
            steps.append((self.pool is not None, len(trainers))),
            step(self, trainers, *batch),
        )[1],
    )
    made = plan(tmp_path / "sweep", list=KINDS)
    torch.set_num_threads(2)
    assert not run_sweep(made).not_done
    assert steps == [(True, 4)] * 10 + [(True, 3)] * 10  # the short one ends
    for member in made.members:
        alone = member.config.model_copy(update={"out": tmp_path / "alone" / member.name})
        sae.train(alone, report=False)
        assert_same(member.config.out, alone.out)
    assert (False, 1) in steps  # of a single run


def test_members_read_one_stream_of_pairs(tmp_path):
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).numpy()
    np.save(tmp_path / "in.npy", rows)
    np.save(tmp_path / "out.npy", rows[:, :4] ** 2)
    source = {"kind": "array", "path": str(tmp_path / "in.npy"), "target": str(tmp_path / "out.npy")}
    base = {"kind": "transcoder", "d_sae": 24, "k": 3}
    made = plan(
        tmp_path / "sweep", {"source": source, "sae": base}, grid={"sae.kind": ["transcoder", "skip_transcoder"]}
    )
    assert not run_sweep(made).not_done
    for member in made.members:
        alone = member.config.model_copy(update={"out": tmp_path / "alone" / member.name})
        sae.train(alone, report=False)
        assert_same(member.config.out, alone.out)


def test_members_that_are_not_held_at_once_end_the_same(tmp_path):
    run_sweep(plan(tmp_path / "all", list=KINDS))
    run_sweep(plan(tmp_path / "two", list=KINDS, together=2))
    for name in statuses(tmp_path / "all"):
        assert_same(tmp_path / "two" / name, tmp_path / "all" / name)


@pytest.mark.parametrize(("n_saved", "n_steps"), [(2, 1), (5, 2), (6, 3)])
def test_a_killed_sweep_resumes_to_the_same_bits(tmp_path, monkeypatch, n_saved, n_steps):
    """Killed while checkpoints are written, so that members of one stream stand at different steps."""
    run_sweep(plan(tmp_path / "whole", list=KINDS))
    made, save, saved = plan(tmp_path / "parts", list=KINDS), checkpoint.save, []

    def save_some(*args: object) -> None:
        if len(saved) == n_saved:
            raise KeyboardInterrupt
        saved.append(args[1])
        save(*args)

    monkeypatch.setattr(checkpoint, "save", save_some)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(made)
    monkeypatch.setattr(checkpoint, "save", save)
    assert len(set(saved)) == n_steps
    done = [member.config.out for member in made.members if (member.config.out / "result.json").exists()]
    before = [(out / "result.json").stat().st_mtime_ns for out in done]
    assert len(done) == (n_saved > 4)  # the short one

    assert not run_sweep(made, resume=True).not_done
    assert [(out / "result.json").stat().st_mtime_ns for out in done] == before
    for member in made.members:
        assert_same(member.config.out, tmp_path / "whole" / member.name)


def test_processes_share_members_and_end_the_same(tmp_path):
    run_sweep(plan(tmp_path / "one", list=KINDS))
    heard = []
    outcome = run_sweep(plan(tmp_path / "two", list=KINDS, n_jobs=2), on_event=heard.append)
    assert not outcome.not_done
    assert sorted(message.name for message in heard if isinstance(message, Ended)) == sorted(statuses(tmp_path / "two"))
    for name in statuses(tmp_path / "one"):
        assert_same(tmp_path / "two" / name, tmp_path / "one" / name)


def test_members_are_sent_with_the_plugins_that_know_their_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(sae.SAEConfig, "kinds", dict(sae.SAEConfig.kinds))
    monkeypatch.setattr(plugins, "LOADED", [])
    sae.load_plugin(Path(__file__).parent.parent / "docs/examples/my_sparsifier.py")
    kind = {"kind": "groupmax", "d_sae": 24}
    made = plan(tmp_path / "out", {"sae": kind}, list=[{"sae.n_groups": 4}, *KINDS])
    sent = ForkingPickler.dumps(made.members)
    sae.SAEConfig.kinds.pop("groupmax")
    plugins.LOADED.clear()
    received = ForkingPickler.loads(sent)
    assert [member.config.to_yaml() for member in received] == [member.config.to_yaml() for member in made.members]
    assert received[1:] == made.members[1:]
    assert len(plugins.LOADED) == 1


@pytest.mark.parametrize(
    ("section", "sizes"), [({"n_jobs": 2}, [2, 2]), ({"n_jobs": 3}, [2, 2]), ({"n_jobs": 2, "together": 1}, [1] * 4)]
)
def test_a_stream_is_cut_so_that_each_process_has_work(tmp_path, monkeypatch, section, sizes):
    given = []
    monkeypatch.setattr("sae.sweep.run.in_processes", lambda groups, *rest: given.extend(groups))
    run_sweep(plan(tmp_path, list=KINDS, **section))
    assert [len(group.members) for group in given] == sizes


class Wordy(Group):
    """A group whose process has something to say."""

    def run(self, open_source, tell, stop) -> None:
        logging.getLogger("sae").warning("a word from %s", self.members[0].name)
        tell(Ended(self.members[0].name, "done"))


def test_what_processes_log_is_told_by_their_parent(tmp_path, caplog):
    made = plan(tmp_path, grid={"sae.k": [1, 2]})
    in_processes([Wordy(made.members[:1], made.section, False)], 1, lambda message: None, lambda: 0)
    assert caplog.messages == ["a word from k1"]


def test_warnings_say_of_which_member_they_are(tmp_path, monkeypatch, caplog):
    conclude = group.conclude

    def warns(run, report):
        logging.getLogger("sae").warning("%d %% is much", 100 * run.config.sae.k)
        return conclude(run, report)

    monkeypatch.setattr(group, "conclude", warns)
    run_sweep(plan(tmp_path, grid={"sae.k": [1, 2]}))
    logging.getLogger("sae").warning("of nobody")
    said = [message for message in caplog.messages if "much" in message or "nobody" in message]
    assert said == ["k1: 100 % is much", "k2: 200 % is much", "of nobody"]


class Deadly(Group):
    """A group whose process is killed."""

    def run(self, open_source, tell, stop) -> None:
        tell(Ended(self.members[0].name, "done"))
        os._exit(9)


def test_a_killed_process_takes_its_own_group_only(tmp_path):
    made = plan(tmp_path, list=KINDS)
    groups = [
        Deadly(made.members[:2], made.section, False),
        *(Group((member,), made.section, False) for member in made.members[2:]),
    ]
    ends = {}
    in_processes(groups, 1, lambda message: ends.update({message.name: message}), lambda: 0)
    assert [ends[member.name].status for member in made.members] == ["done", "failed", "done", "done"]
    assert "its process was killed" in ends[made.members[1].name].reason


# Members that end badly


def run_cli(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*words), env=environment, capture_output=True, text=True, check=False)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "sae", *map(str, words)]


def write(path: Path, **sweep: object) -> Path:
    path.write_text(yaml.safe_dump({**BASE, "sweep": sweep}), encoding="utf-8")
    return path


def test_one_that_diverges_is_told_and_the_others_finish(tmp_path, monkeypatch, capsys):
    bad = {"sae.kind": "relu", "sae.l1_coefficient": 0.1, "train.lr": 1e30}
    path = write(tmp_path / "some.yaml", list=[KINDS[0], bad, KINDS[1]])
    monkeypatch.setattr(sys, "argv", ["sae", "sweep", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    err = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert err[-1] == "sae: 1 of 3 members are not done: relu-l1_coefficient0.1-lr1e+30 (diverged)"
    assert any("3 of 3 members" in line for line in err)
    assert list(statuses(tmp_path / "out").values()) == ["done", "diverged", "done"]
    alone = parse_sweep({**BASE, "out": str(tmp_path / "alone"), "sweep": {"list": [KINDS[0], KINDS[1]]}})
    run_sweep(alone)
    assert_same(tmp_path / "out/topk-k2-lr_null", tmp_path / "alone/topk-k2")
    # Nothing is left to resume: the same end, told again.
    again = run_cli("sweep", path, "--out", tmp_path / "out", "--resume")
    assert again.returncode == 1
    assert "Traceback" not in again.stderr


def test_what_is_logged_stands_above_the_bar(tmp_path):
    bad = {"sae.kind": "relu", "train.lr": 1e30}
    path = write(tmp_path / "some.yaml", list=[{"sae.k": 2}, bad], n_jobs=2)
    for n_jobs in (1, 2):
        ended = run_cli("sweep", path, "--out", tmp_path / f"{n_jobs}", "--sweep.n_jobs", n_jobs)
        said = [line for line in ended.stderr.replace("\r", "\n").splitlines() if "diverged" in line]
        assert len(said) == 2
        assert said[0].startswith("sae: relu-lr1e+30: diverged: the loss is not finite at step")


LINE = {"metrics/dead": 0.0, "metrics/fvu": 0.5}


@pytest.mark.parametrize(
    ("changes", "steps", "section", "reason"),
    [
        ({"metrics/dead": 0.99}, [6, 8, 10], {}, "99.0% of its latents are dead at step 10"),
        ({"metrics/dead": 0.99}, [4, 8, 10], {}, None),  # the warm-up lasts until 5
        ({"metrics/dead": 0.99}, [8, 10], {}, None),
        ({"metrics/dead": 0.99}, [8, 10], {"stop_lines": 2}, "dead"),
        ({"metrics/dead": 0.95}, [6, 8, 10], {}, None),
        ({"metrics/dead": 0.99}, [6, 8, 10], {"stop_dead": None}, None),
        ({"metrics/fvu": 1.2}, [11, 12, 13], {}, "its FVU is 1.2 at step 13 of 20"),
        ({"metrics/fvu": 1.2}, [10, 11, 12], {}, None),
        ({"metrics/fvu": 1.2}, [11, 12, 13], {"stop_fvu": 1.5}, None),
        ({"metrics/fvu": 1.2}, [18, 19, 20], {}, None),  # what is left is to measure it
    ],
)
def test_rules(changes, steps, section, reason):
    made = plan(grid={"sae.k": [2, 3]}, **section)
    said = verdict([LINE | changes | {"step": step} for step in steps], made.members[0].config, made.section)
    assert said is None if reason is None else reason in said


def test_one_good_line_resets_a_rule():
    made = plan(grid={"sae.k": [2, 3]})
    shares = [0.99, 0.99, 0.2, 0.99, 0.99]
    said = [LINE | {"metrics/dead": dead, "step": 6 + i} for i, dead in enumerate(shares)]
    assert verdict(said, made.members[0].config, made.section) is None


def test_a_stopped_member_goes_on_when_its_rule_is_lifted(tmp_path):
    made = plan(tmp_path / "rule", grid={"sae.k": [1, 2]}, stop_fvu=0.01, stop_lines=1)
    outcome = run_sweep(made)
    assert {row["status"] for row in outcome.rows} == {"stopped"}
    assert "sweep.stop_fvu is 0.01" in outcome.rows[0]["reason"]
    assert lines(tmp_path / "rule/k1")[-1]["step"] == 15
    assert {row["status"] for row in run_sweep(made, resume=True).rows} == {"stopped"}
    lifted = plan(tmp_path / "rule", grid={"sae.k": [1, 2]}, stop_fvu=None)
    assert not run_sweep(lifted, resume=True).not_done
    assert not (tmp_path / "rule/k1/status.json").exists()
    run_sweep(plan(tmp_path / "whole", grid={"sae.k": [1, 2]}))
    assert_same(tmp_path / "rule/k1", tmp_path / "whole/k1")


def test_rules_remember_the_lines_before_an_interruption(tmp_path, monkeypatch):
    """Above the threshold at 12 and 14, killed, and at 16: three lines in a row."""
    made = plan(tmp_path, {"log": {"every": 2}}, grid={"sae.k": [1, 2]}, stop_fvu=0.01)
    step = Trainer.step

    def step_until_15(self, x) -> None:
        if self.n_steps_done == 15:
            raise KeyboardInterrupt
        step(self, x)

    monkeypatch.setattr(Trainer, "step", step_until_15)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(made)
    monkeypatch.setattr(Trainer, "step", step)
    assert {row["status"] for row in run_sweep(made, resume=True).rows} == {"stopped"}
    assert lines(tmp_path / "k1")[-1]["step"] == 16


def test_bad_data_in_mid_run_fail_their_members(tmp_path, monkeypatch):
    batches = WorldSource.batches

    def broken(self, batch_size, seed, start=0):
        for number, x in enumerate(batches(self, batch_size, seed, start)):
            if batch_size == 32 and number == 9:
                raise UsageError("row 5 holds NaN")
            yield x

    monkeypatch.setattr(WorldSource, "batches", broken)
    outcome = run_sweep(plan(tmp_path, grid={"train.batch_size": [32, 64], "sae.k": [1, 2]}))
    assert [row["status"] for row in outcome.rows] == ["failed", "failed", "done", "done"]
    assert outcome.rows[0]["reason"] == "row 5 holds NaN"
    assert checkpoint.latest(tmp_path / "batch_size32-k1/checkpoints").name == "step-000000009"


# Signals


def interrupted(path: Path, out: Path, number: int) -> tuple[int, str]:
    """Sends a signal once a member has a checkpoint; returns the exit code and stderr when all processes are gone."""
    with subprocess.Popen(
        command("sweep", path, "--out", out), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not any(out.glob("*/checkpoints/step-*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return process.returncode, err
        assert time.monotonic() < deadline, "a process trains on without its parent"
        time.sleep(0.05)


LONG = {"train": BASE["train"] | {"n_samples": 64 * 300}, "log": {"every": 20}, "checkpoint": {"every_steps": 30}}
FOUR = {"sae.k": [2, 3], "train.seed": [0, 1]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A longer sweep that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run_cli("sweep", write_long(out / "long.yaml", 1), "--out", out / "out").check_returncode()
    return out / "out"


def write_long(path: Path, n_jobs: int) -> Path:
    path.write_text(yaml.safe_dump({**BASE, **LONG, "sweep": {"grid": FOUR, "n_jobs": n_jobs}}), encoding="utf-8")
    return path


@pytest.mark.parametrize(("number", "n_jobs"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 2)])
def test_a_sweep_that_was_stopped_resumes_to_the_same_bits(tmp_path, whole, number, n_jobs):
    path = write_long(tmp_path / "long.yaml", n_jobs)
    code, err = interrupted(path, tmp_path / "out", number)
    if number == signal.SIGTERM:
        assert code == 128 + signal.SIGTERM
        last = r"sae: \d of 4 members are not done: k.-seed. \(interrupted\).*; continue with --resume"
        assert re.fullmatch(last, err.splitlines()[-1])
        assert "interrupted" in statuses(tmp_path / "out").values()
    else:
        assert "unfinished" in statuses(tmp_path / "out").values()
    assert "Traceback" not in err
    assert run_cli("sweep", path, "--out", tmp_path / "out", "--resume", "--sweep.n_jobs", 1).returncode == 0
    for name in statuses(whole):
        assert_same(tmp_path / "out" / name, whole / name)


def test_no_process_trains_on_without_its_parent(tmp_path):
    """Not even one that has nothing to tell for hours."""
    endless = {**BASE, "train": BASE["train"] | {"n_samples": 64 * 1_000_000}, "log": {"every": 1_000_000}}
    path = tmp_path / "endless.yaml"
    path.write_text(yaml.safe_dump(endless | {"sweep": {"grid": {"sae.k": [1, 2]}, "n_jobs": 2}}), encoding="utf-8")
    interrupted(path, tmp_path / "out", signal.SIGKILL)


def test_a_process_whose_parent_died_before_it_began_trains_nothing(tmp_path, monkeypatch):
    made = plan(tmp_path, grid={"sae.k": [1]})
    monkeypatch.setattr(workers, "_Told", lambda connection: logging.NullHandler())
    monkeypatch.setattr(logging.getLogger("sae"), "propagate", True)
    ours, theirs = multiprocessing.Pipe()
    ours.send(Group(made.members, made.section, False))
    workers._work(theirs, os.getpid())  # not this process's parent: it was handed to another
    assert not (tmp_path / "k1").exists()


# Directories


def test_a_sweep_is_not_touched_unasked(tmp_path):
    made = plan(tmp_path / "out", grid={"sae.k": [1, 2]})
    run_sweep(made)
    (tmp_path / "out/k1/notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    with pytest.raises(UsageError, match="already holds a sweep; continue it with --resume"):
        run_sweep(made)
    with pytest.raises(UsageError, match="give one of them"):
        run_sweep(made, resume=True, overwrite=True)
    with pytest.raises(UsageError, match=r"cannot be resumed: train\.n_samples was 1280, now 64"):
        run_sweep(plan(tmp_path / "out", {"train": {"n_samples": 64}}, grid={"sae.k": [1, 2]}), resume=True)
    with pytest.raises(UsageError, match="has members that this sweep does not have, such as k2"):
        run_sweep(plan(tmp_path / "out", grid={"sae.k": [1, 3]}), resume=True)
    with pytest.raises(UsageError, match="holds a single run"):
        run_sweep(plan(tmp_path / "out/k1", grid={"sae.k": [1, 2]}), overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()} == before

    assert not run_sweep(plan(tmp_path / "out", grid={"sae.k": [1, 2, 3]}), resume=True).not_done
    run_sweep(plan(tmp_path / "out", grid={"sae.k": [3, 4]}), overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["k1", "k3", "k4"]
    assert {path.name for path in (tmp_path / "out/k1").iterdir()} == {"notes.txt", ".lock"}


def test_bad_data_do_not_cost_the_earlier_sweep(tmp_path):
    run_sweep(plan(tmp_path / "out", grid={"sae.k": [1, 2]}))
    gone = {"source": {"kind": "array", "path": str(tmp_path / "gone.npy")}}
    with pytest.raises(UsageError, match="no file matches"):
        run_sweep(plan(tmp_path / "out", gone, grid={"sae.k": [1, 2]}), overwrite=True)
    assert set(statuses(tmp_path / "out").values()) == {"done"}
    with pytest.raises(UsageError, match="member k1: the configuration has no source"):
        run_sweep(plan(tmp_path / "out", {"source": None}, grid={"sae.k": [1, 2]}))
    with pytest.raises(UsageError, match=r"member k1: train\.device 'gpu0'"):
        run_sweep(plan(tmp_path / "out", {"train": {"device": "gpu0"}}, grid={"sae.k": [1, 2]}))


# What is imported when it is asked for


class Ray(SimpleNamespace):
    """Enough of Ray to run tasks in this process, one after the other; the task number `lost` is lost."""

    __spec__ = ModuleSpec("ray", None)

    def __init__(self, lost: int) -> None:
        super().__init__(lost=lost, tasks=[], options=[], started=False, is_initialized=lambda: self.started)

    def init(self) -> None:
        self.started = True

    def remote(self, **options: object):
        self.options.append(options)
        return lambda function: SimpleNamespace(
            remote=lambda *args: self.tasks.append((function, args)) or len(self.tasks)
        )

    def wait(self, tasks: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        return tasks[-num_returns:], tasks[:-num_returns]

    def get(self, task: int) -> object:
        if task == self.lost:
            raise RuntimeError("the node died")
        function, args = self.tasks[task - 1]
        return function(*args)


def test_ray_gets_a_task_for_each_group(tmp_path, monkeypatch):
    ray = Ray(lost=2)
    monkeypatch.setitem(sys.modules, "ray", ray)
    made = plan(tmp_path / "out", grid={"train.data_seed": [0, 1], "sae.k": [2, 3]}, ray=True)
    outcome = run_sweep(made)
    assert ray.started
    assert ray.options == [{"num_cpus": 1, "num_gpus": 0, "max_retries": 0}] * 2
    assert [row["status"] for row in outcome.rows] == ["done", "done", "failed", "failed"]
    assert outcome.rows[2]["reason"] == "its task was lost: the node died"
    ray.lost = 0
    ray.tasks.clear()
    assert not run_sweep(made, resume=True).not_done
    assert len(ray.tasks) == 1


def test_ray_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr("sae.extras.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"ray is not installed, .*; pip install 'sae\[ray\]', or use sweep.n_jobs"):
        run_sweep(plan(tmp_path / "out", grid={"sae.k": [2, 3]}, ray=True))
    assert not (tmp_path / "out").exists()


def test_members_are_wandb_runs_of_one_group(tmp_path, monkeypatch):
    begun = {}

    def init(**options: object):
        steps: list[int] = []
        begun[options["name"]] = (options, steps)
        summary = SimpleNamespace(update=lambda values: None)
        return SimpleNamespace(
            log=lambda values, step, **rest: steps.append(step), finish=lambda: None, summary=summary
        )

    wandb = SimpleNamespace(init=init, Settings=dict, Histogram=list, Table=lambda **named: None)
    wandb.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logged = {"log": {"every": 5, "wandb": "offline"}}
    run_sweep(plan(tmp_path / "many", logged, grid={"sae.k": [2, 3]}))
    assert begun.keys() == {"k2", "k3"}
    for options, steps in begun.values():
        assert (options["group"], options["reinit"]) == ("many", "create_new")
        assert steps == [5, 10, 15, 20, 20]


def test_the_bar_counts_members_and_all_their_steps(tmp_path):
    from sae.sweep.show import progress

    made = plan(tmp_path / "out", list=KINDS)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tqdm, "close", lambda bar: seen.append((bar.n, bar.total, bar.desc)))
        with progress(made) as on_event:
            run_sweep(made, on_event=on_event)
    assert seen[-1] == (70, 70, "4 of 4 members: ")


def test_section_defaults_are_as_documented():
    section = SweepSection(grid={"sae.k": [1]})
    assert (section.stop_dead, section.stop_fvu, section.stop_lines) == (0.95, 1.0, 3)
