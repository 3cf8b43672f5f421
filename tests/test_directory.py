"""One process at a time trains in a directory; the others are told so before they touch anything."""

import errno
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import sae
from sae import UsageError, again, locks
from sae.directory import check_out, discard
from sae.ensemble import Diverged
from sae.locks import DEMO_LOCK, LOCK, held, hold
from sae.names import OWN
from sae.sources import as_source
from sae.sweep import run_sweep
from sae.sweep.plan import parse_sweep
from sae.world_source import ToySourceConfig
from toymodels import ToyModel

SECTIONS = {
    "source": {"kind": "toy", "n_features": 12, "d_hidden": 5, "n_steps": 20},
    "sae": {"kind": "topk", "d_sae": 12, "k": 2},
    "train": {"n_samples": 640, "batch_size": 64, "warmup_steps": 1},
    "evaluation": {"n_samples": 200},
    "log": {"every": 5},
}
HELD = "another process is at work in .*; wait until it ends, or give another --out"


def config(out: Path, **sections: object) -> sae.TrainConfig:
    return sae.TrainConfig.model_validate({**SECTIONS, **sections, "out": out})


def written(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_what_trains_elsewhere_is_left_alone(tmp_path, how):
    told = []

    def intrude(step, values):
        before = written(tmp_path / "run")
        with pytest.raises(UsageError, match=HELD) as raised:
            sae.train(config(tmp_path / "run"), report=False, **how)
        assert written(tmp_path / "run") == before
        told.append(raised)

    result = sae.train(config(tmp_path / "run"), report=False, on_line=intrude)
    assert len(told) == 2
    assert sae.train(config(tmp_path / "run"), report=False, resume=True).metrics == result.metrics


def test_two_that_begin_at_once_do_not_share_a_directory(tmp_path, monkeypatch):
    """Both have found it free; the one that opens its data faster has it."""
    monkeypatch.setattr("sae.run.check_out", lambda *given: None)

    def intrude(step, values):
        with pytest.raises(UsageError, match=HELD):
            sae.train(config(tmp_path / "run"), report=False)

    sae.train(config(tmp_path / "run"), report=False, on_line=intrude)
    assert (tmp_path / "run/result.json").exists()


def test_what_ended_badly_gives_its_directory_up(tmp_path):
    with pytest.raises(Diverged):
        sae.train(config(tmp_path / "run", train=SECTIONS["train"] | {"lr": 1e30}), report=False)
    hold(tmp_path / "run").release()


def test_another_process_is_told(tmp_path):
    lock = hold(tmp_path)
    program = "import sys; from pathlib import Path; from sae.locks import hold; hold(Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another process is at work in" in refused.stderr
    lock.release()
    assert subprocess.run(command, check=False).returncode == 0
    hold(tmp_path).release()  # that process has ended without a word


def test_a_sweep_has_its_directory_for_itself(tmp_path):
    plan = parse_sweep({**SECTIONS, "out": str(tmp_path / "s"), "sweep": {"grid": {"sae.k": [2, 3]}}})
    told = []

    def intrude(event):
        with pytest.raises(UsageError, match=HELD):
            run_sweep(plan, overwrite=True)
        member = plan.members[0].config
        if not (member.out / "result.json").exists():
            with pytest.raises(UsageError, match=HELD):
                sae.train(member, resume=True)
            told.append(member)

    outcome = run_sweep(plan, on_event=intrude)
    assert [row["status"] for row in outcome.rows] == ["done", "done"]
    assert told
    assert run_sweep(plan, overwrite=True).not_done == []


def test_what_is_held_is_told_before_data_are_opened(tmp_path, monkeypatch):
    sae.train(config(tmp_path / "run"), report=False)
    plan = parse_sweep({**SECTIONS, "out": str(tmp_path / "s"), "sweep": {"grid": {"sae.k": [2]}}})
    run_sweep(plan)
    monkeypatch.setattr("sae.world_source.ToySourceConfig.open", lambda self: pytest.fail("opened"))
    with held(tmp_path / "run"), pytest.raises(UsageError, match=HELD):
        sae.train(config(tmp_path / "run"), overwrite=True)
    for held_too in (tmp_path / "s", plan.members[0].config.out):
        with held(held_too), pytest.raises(UsageError, match=HELD):
            run_sweep(plan, overwrite=True)


def test_what_fails_as_it_begins_gives_its_directory_up_at_once(tmp_path, monkeypatch):
    """Not when the exception is forgotten: a notebook keeps it."""
    monkeypatch.setattr("sae.run.RunLog", lambda *given, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        sae.train(config(tmp_path / "run"), report=False)
    hold(tmp_path / "run").release()
    assert kept.value.__traceback__ is not None


def test_a_run_is_not_measured_while_it_is_overwritten(tmp_path, monkeypatch):
    sae.train(config(tmp_path / "run"), report=False)
    with held(tmp_path / "run"), pytest.raises(UsageError, match=HELD):
        sae.evaluate_run(tmp_path / "run")
    measure, tried = again.evaluate_on, []

    def intrude(*given):
        with pytest.raises(UsageError, match=HELD):
            sae.train(config(tmp_path / "run"), overwrite=True)
        tried.append(given)
        return measure(*given)

    monkeypatch.setattr(again, "evaluate_on", intrude)
    sae.evaluate_run(str(tmp_path / "run"))
    assert tried


def test_a_sweep_discards_nothing_while_a_member_is_trained_by_hand(tmp_path, monkeypatch):
    plan = parse_sweep({**SECTIONS, "out": str(tmp_path / "s"), "sweep": {"grid": {"sae.k": [2, 3]}}})
    run_sweep(plan)
    before = written(tmp_path / "s")
    monkeypatch.setattr("sae.sweep.run.check_out", lambda *given: None)  # it was free then
    with held(plan.members[1].config.out), pytest.raises(UsageError, match=HELD):
        run_sweep(plan, overwrite=True)
    assert written(tmp_path / "s") == before


def test_a_finished_run_needs_no_right_to_write(tmp_path, monkeypatch):
    result = sae.train(config(tmp_path / "run"), report=False)

    def denied(out, name):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(locks, "_acquired", denied)
    assert sae.train(config(tmp_path / "run"), resume=True).metrics == result.metrics
    with pytest.raises(UsageError, match=r"cannot write to .*: Permission denied; give another --out"):
        sae.train(config(tmp_path / "run"), overwrite=True)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_nothing_can_be_locked_a_line_says_so(tmp_path, monkeypatch, caplog, number):
    def refuse(self, *given, **options):
        raise OSError(number, "no locks")

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    hold(tmp_path).release()
    assert "is on a file system without locks; make sure only one process writes there" in caplog.text


def test_another_thread_may_release(tmp_path):
    lock = hold(tmp_path)
    thread = threading.Thread(target=lock.release)
    thread.start()
    thread.join()
    assert not lock.is_locked
    hold(tmp_path).release()


def test_a_demo_has_its_directory_for_itself(run_cli, tmp_path):
    for words in (["demo"], ["demo", "digits"]):
        with held(tmp_path / "demo", DEMO_LOCK):
            run_cli(*words, "--out", tmp_path / "demo").assert_refused("another process is at work in")
        assert [path.name for path in (tmp_path / "demo").iterdir()] == [DEMO_LOCK]


def test_discarding_leaves_what_no_run_wrote(tmp_path):
    for name in OWN:
        (tmp_path / name).write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    lock = hold(tmp_path)
    discard(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", LOCK}
    lock.release()
    check_out(tmp_path, resume=False, overwrite=False)


def test_a_directory_whose_place_is_taken(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write to .*: Not a directory; give another --out"):
        hold(tmp_path / "file/run")


def test_what_was_trained_stays_when_it_cannot_be_measured(run_cli, tmp_path):
    """All held-out rows are zero."""
    x = torch.zeros(400, 4)
    source = tmp_path / "x.npy"
    given = as_source(torch.arange(400.0)[:, None].expand(400, 4).contiguous())
    held = given.held_out("evaluation", 400).x[:, 0].long()
    x[:] = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    x[held] = 0
    np.save(source, x.numpy())
    words = {"source": {"kind": "array", "path": str(source)}, "sae": {"kind": "topk", "d_sae": 8, "k": 2}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(words | {"train": {"n_samples": 6400, "batch_size": 64}}))
    outcome = run_cli("train", tmp_path / "run.yaml", "--out", tmp_path / "run")
    said = outcome.err.splitlines()[-1]
    assert (outcome.code, "Traceback" in outcome.err) == (2, False)
    assert "sae: error: fvu needs activations that vary, got" in said
    assert "identical rows; evaluate on more samples" in said
    assert sae.load(tmp_path / "run").d_sae == 8
    run_cli("eval", tmp_path / "run").assert_refused("fvu needs activations that vary")


def test_a_toy_model_is_found_where_its_run_is_now(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy = {"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 50}
    ToyModel(16, 6).save("toy.safetensors")
    Path("made").mkdir()
    run = config(Path("made/run"))
    run = run.model_copy(update={"source": ToySourceConfig(**toy, weights=Path("toy.safetensors"))})
    before = sae.train(run, report=False).metrics
    Path("toy.safetensors").rename("made/toy.safetensors")
    Path("made").rename("moved")
    monkeypatch.chdir("/")
    assert sae.evaluate_run(tmp_path / "moved" / "run").metrics == before
