"""The command line as a user meets it: what works exits 0, what is wrong is one line and exit code 2."""

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from tqdm import tqdm

from sae import cli
from sae.commands import results
from sae.console import progress
from sae.directory import _differences
from sae.kernels.build import CannotBuild

FILES = [".lock", "config.yaml", "evaluation.safetensors", "metrics.jsonl", "report.html", "result.json", "sae.json"]
TOY = {
    "source": {"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 50},
    "sae": {"kind": "topk", "d_sae": 24, "k": 3},
    "train": {"n_samples": 2048, "batch_size": 64, "warmup_steps": 5},
    "evaluation": {"n_samples": 500},
    "log": {"every": 8},
}


@pytest.fixture
def toy(tmp_path) -> Path:
    return write_config(tmp_path / "toy.yaml", TOY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that ended, to copy from."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder / "toy.yaml", TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sae", "train", str(config), "--out", str(folder / "run")])
        cli.main()
    return folder / "run"


def write_config(path: Path, sections: dict) -> Path:
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def activations(shape=(200, 6), dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def with_value(value: float, row: int) -> np.ndarray:
    array = activations()
    array[row, 2] = value
    return array


def test_train_shows_few_metrics_and_says_where_all_are(run_cli, toy, tmp_path):
    outcome = run_cli("train", toy, "--out", tmp_path / "run")
    lines = [line.strip() for line in outcome.out.splitlines()]
    shown = [line.split()[0] for line in lines if line.startswith(("metrics/", "recovery/"))]
    assert shown == [
        "metrics/fvu",
        "metrics/l0",
        "recovery/mmcs",
        "recovery/mcc",
        "recovery/coverage_0.9",
        "recovery/f1",
    ]
    assert outcome.out.rstrip().endswith("every metric is in its result.json")


def test_train_leaves_what_it_promises(run_cli, toy, tmp_path):
    outcome = run_cli("train", toy, "--out", tmp_path / "run", "--sae.k", "2", "--train.lr=1e-3")
    assert outcome.code == 0
    assert "recovery/mcc" in outcome.out
    assert str(tmp_path / "run") in outcome.out
    assert sorted(FILES) == [name for name in sorted(contents(tmp_path / "run")) if name != "sae.safetensors"]
    resolved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (resolved["sae"]["k"], resolved["train"]["lr"]) == (2, 1e-3)


def test_resuming_a_complete_run_changes_nothing(run_cli, toy, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = contents(tmp_path / "run")
    outcome = run_cli("train", toy, "--out", tmp_path / "run", "--resume")
    assert outcome.code == 0
    assert "recovery/mcc" in outcome.out
    assert contents(tmp_path / "run") == before


def test_overwrite_starts_again(run_cli, toy, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    assert run_cli("train", toy, "--out", tmp_path / "run", "--overwrite", "--train.seed", "1").code == 0
    ours, theirs = (load_file(folder / "sae.safetensors")["W_dec"] for folder in (tmp_path / "run", finished))
    assert not ours.equal(theirs)


def test_eval_measures_the_same_again(run_cli, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    outcome = run_cli("eval", tmp_path / "run")
    assert outcome.code == 0
    assert "metrics/fvu" in outcome.out
    assert json.loads((tmp_path / "run/result.json").read_text()) == json.loads((finished / "result.json").read_text())


def test_report_of_two_runs(run_cli, finished, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(finished, tmp_path / name)
    outcome = run_cli("report", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both.html")
    assert outcome.code == 0
    assert "both.html" in outcome.out
    assert "</html>" in (tmp_path / "both.html").read_text()


def test_a_comparison_leaves_the_report_of_the_first_run(run_cli, finished, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(finished, tmp_path / name)
    own = (tmp_path / "one/report.html").read_text()
    outcome = run_cli("report", tmp_path / "one", tmp_path / "two")
    assert f"wrote {tmp_path / 'one/comparison.html'}" in outcome.out
    assert "2 dictionaries compared" in (tmp_path / "one/comparison.html").read_text()
    assert (tmp_path / "one/report.html").read_text() == own
    assert not (tmp_path / "two/comparison.html").exists()


@pytest.mark.parametrize("words", [(), ("demo",), ("train",), ("eval",), ("report",)])
def test_help(run_cli, words):
    outcome = run_cli(*words, "--help")
    assert outcome.code == 0
    assert "usage: sae" in outcome.out
    assert not outcome.err


ARRAYS = {
    "three axes": (activations((4, 5, 6)), "must have shape [rows, d_in], got [4, 5, 6]"),
    "one axis": (activations((30,)), "must have shape [rows, d_in], got [30]"),
    "no rows": (activations((0, 6)), "has no values: its shape is [0, 6]"),
    "few rows": (activations((3, 6)), "has 3 rows"),
    "integers": (np.ones((50, 6), dtype=np.int64), "holds torch.int64; it must be floating point"),
    "text": (np.full((50, 6), "x"), "it must be floating point"),
    "nan": (with_value(np.nan, 37), "acts.npy row 37 holds NaN or infinity"),
    "inf": (with_value(-np.inf, 199), "acts.npy row 199 holds NaN or infinity"),
    "constant": (np.ones((200, 6), dtype=np.float32), "no variance"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_bad_arrays(run_cli, tmp_path, case):
    array, message = ARRAYS[case]
    np.save(tmp_path / "acts.npy", array)
    train_on(run_cli, tmp_path, "acts.npy").assert_refused(message)


@pytest.mark.parametrize(("n_bytes", "message"), [(0, "is empty"), (1000, "truncated"), (40, "truncated")])
def test_empty_and_truncated_files(run_cli, tmp_path, n_bytes, message):
    np.save(tmp_path / "acts.npy", activations())
    os.truncate(tmp_path / "acts.npy", n_bytes)
    train_on(run_cli, tmp_path, "acts.npy").assert_refused(str(tmp_path / "acts.npy"), message)
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_named_in_the_file_that_holds_them(run_cli, tmp_path):
    np.save(tmp_path / "a.npy", activations())
    np.save(tmp_path / "b.npy", with_value(np.inf, 3))
    train_on(run_cli, tmp_path, "*.npy").assert_refused("b.npy row 3 holds NaN or infinity")


def test_files_of_different_widths(run_cli, tmp_path):
    np.save(tmp_path / "a.npy", activations())
    np.save(tmp_path / "b.npy", activations((200, 7)))
    train_on(run_cli, tmp_path, "*.npy").assert_refused("b.npy holds [200, 7]", "all parts must share d_in")


def test_no_file_matches(run_cli, tmp_path):
    train_on(run_cli, tmp_path, "nothing*.npy").assert_refused("no file matches")


def train_on(run_cli, folder: Path, pattern: str):
    config = TOY | {"source": {"kind": "array", "path": str(folder / pattern)}}
    return run_cli("train", write_config(folder / "array.yaml", config), "--out", folder / "run")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--sae.k", "25"], ["k must lie in 1..d_sae=24, got 25", "lower k"]),
        (["--sae.k", "0"], ["k", "greater than 0", "got 0"]),
        (["--sae.d_sea", "32"], ["unknown key 'd_sea'", "did you mean 'd_sae'?"]),
        (["--trian.lr", "1"], ["unknown key 'trian'", "did you mean 'train'?"]),
        (["--train.leraning_rate", "1"], ["unknown key 'train.leraning_rate'", "known:", "lr"]),
        (["--sae.kind", "topl"], ["unknown kind 'topl'", "did you mean 'topk'?"]),
        (["--source.kind", "arrays"], ["unknown kind 'arrays'", "did you mean 'array'?"]),
        (["--train.lr", "fast"], ["train.lr", "'fast'"]),
        (["--train.device", "gpu0"], ["train.device 'gpu0' cannot be used; this machine has cpu", "try cpu"]),
        (["--train.device", "hpu"], ["train.device 'hpu' cannot be used; this machine has cpu", "try cpu"]),
        (["--source", "toy"], ["source: must be a section with fields of its own, got 'toy'"]),
        (["--train", "5"], ["train: must be a section with fields of its own, got 5"]),
        (["--sae.kind", "mine"], ["unknown kind 'mine'", "a kind of your own needs --plugin FILE"]),
        (["--sae.k"], ["--sae.k needs a value, as in --sae.k VALUE"]),
        (["stray"], ["'stray'"]),
        (["--resume", "--overwrite"], ["give one of them"]),
    ],
)
def test_bad_configurations(run_cli, toy, tmp_path, words, parts):
    run_cli("train", toy, "--out", tmp_path / "run", *words).assert_refused(*parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", [None, "a: [1", "- 1", ""])
def test_files_that_are_no_configuration(run_cli, tmp_path, text):
    if text is not None:
        (tmp_path / "odd.yaml").write_text(text)
    run_cli("train", tmp_path / "odd.yaml", "--out", tmp_path / "run").assert_refused("odd.yaml")


@pytest.mark.parametrize("words", [[], ["--resume", "--overwrite"], ["--resume", "--sae.k", "2"]])
def test_a_run_is_not_touched_unasked(run_cli, toy, finished, tmp_path, words):
    shutil.copytree(finished, tmp_path / "run")
    before = contents(tmp_path / "run")
    run_cli("train", toy, "--out", tmp_path / "run", *words).assert_refused()
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_place_that_cannot_be_written(run_cli, toy, finished, tmp_path, out):
    (tmp_path / "file").write_text("mine")
    run_cli("train", toy, "--out", tmp_path / out).assert_refused(str(tmp_path / out))
    run_cli("report", finished, "--out", tmp_path / "file/x.html").assert_refused("cannot write")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["eval", "report"])
@pytest.mark.parametrize("what", ["absent", "empty", "file"])
def test_directories_that_hold_no_run(run_cli, tmp_path, command, what):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    run_cli(command, tmp_path / what).assert_refused(str(tmp_path / what), "is missing")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file"]


def test_flags_that_a_command_does_not_have(run_cli, finished):
    run_cli("eval", finished, "--sae.k", "3").assert_refused("--sae.k", "sae eval --help")
    run_cli("report").assert_refused("at least one run directory")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["give a command, one of demo, train, sweep, "]),
        (["evaluate"], ["unknown command 'evaluate'", "did you mean 'eval'?"]),
        (["train"], ["missing from sae train: PATH config", "see `sae train --help`"]),
        (["sweep", "--resume"], ["missing from sae sweep: PATH config", "see `sae sweep --help`"]),
        (["--overwrite"], ["expected one of {demo, train,", "see `sae --help`"]),
        (["--overwrite", "demo"], ["unknown argument '--overwrite'", "see `sae demo --help`"]),
        (["demo", "letters"], ["{features,digits}: unknown 'letters'", "known: digits, features"]),
        (["demo", "--seed", "x"], ["--seed: ", "'x'", "see `sae demo --help`"]),
        (["bench", "--out"], ["missing value for argument '--out'"]),
        (["demo", "--out", ""], ["a word of `sae demo --out ''` is empty; is a shell variable unset?"]),
        (["train", "a.yaml", "--out="], ["a word of `sae train a.yaml --out=` is empty"]),
        (["train", "--reusme", "a.yaml"], ["unknown flag '--reusme'; did you mean '--resume'?"]),
        (["train", "--sae", "{k: 2}", "--out=a=", "a.yaml"], ["cannot read a.yaml"]),
        (["train", "--no-resume", "--plugin=x.py", "a.yaml"], ["x.py"]),
        (["train", "a.yaml", "--reusme"], ["unknown flag '--reusme'; did you mean '--resume'?", "--sae.k 3"]),
        (["train", "a.yaml", "--sweep", "{}"], ["unknown flag '--sweep'"]),
        (["sweep", "a.yaml", "--sweep", "{}"], ["cannot read a.yaml"]),
    ],
)
@pytest.mark.parametrize("columns", ["20", "200"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_words_that_make_no_command_are_one_line(run_cli, monkeypatch, words, parts, columns, encoding):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding=encoding))  # decides how tyro draws its frames
    run_cli(*words).assert_refused(*parts)


def test_flags_may_stand_before_the_file(run_cli, toy, tmp_path):
    words = ("--sae.k", "2", "--train.lr=1e-3", toy, "--out", tmp_path / "run", "--train.n_samples", "64")
    assert run_cli("train", *words).code == 0
    resolved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (resolved["sae"]["k"], resolved["train"]["lr"], resolved["train"]["n_samples"]) == (2, 1e-3, 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.kernels", "reference", "--train.precision", "bf16"], "the reference kernels compute in fp32"),
        (["--train.kernels", "torch", "--train.precision", "exact"], "exact is a mode of the native kernels"),
    ],
)
def test_what_cannot_compute_is_refused_before_the_source_is_read(run_cli, toy, tmp_path, words, message):
    source = ("--source.kind", "array", "--source.path", tmp_path / "absent.npy")
    run_cli("train", toy, "--out", tmp_path / "run", *source, *words).assert_refused(message)


def test_a_resume_names_the_fields_that_differ(run_cli, toy, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")

    def refused(*words: str) -> str:
        outcome = run_cli("train", toy, "--out", tmp_path / "run", "--resume", *words)
        outcome.assert_refused(f"{tmp_path / 'run'} cannot be resumed: ", "or another --out")
        return outcome.err.partition("resumed: ")[2].rpartition("; use")[0]

    assert refused("--train.lr", "1e-3") == "train.lr was null, now 0.001"
    assert refused("--sae.kind", "relu") == "sae.kind was topk, now relu"
    assert refused("--source.seed", "1", "--sae.k", "2") == "source.seed was 0, now 1; sae.k was 3, now 2"
    assert refused("--log.every", "2", "--train.device", "cpu:0") == "train.device was cpu, now cpu:0"


def test_differences_reach_into_sections():
    was = {"source": None, "sae": {"kind": "own", "inner": {"a": 1, "b": [2]}}}
    now = {"source": {"kind": "toy", "seed": 0}, "sae": {"kind": "own", "inner": {"a": 1, "b": [3]}}}
    assert _differences(was, now) == ["source was null, now of kind toy", "sae.inner.b was [2], now [3]"]


def test_a_resume_without_its_kernels_is_refused_alone(run_cli, toy, tmp_path, monkeypatch, caplog):
    def no_compiler(real: str) -> None:
        raise CannotBuild("no compiler")

    words = ("train", toy, "--out", tmp_path / "run", "--checkpoint.every_steps", "8")
    assert run_cli(*words).code == 0
    (tmp_path / "run/result.json").unlink()
    monkeypatch.setattr("sae.kernels.selection.library", no_compiler)
    caplog.clear()
    run_cli(*words, "--resume").assert_refused(
        "began with native kernels in ", "and must continue with them: ", "no compiler"
    )
    assert caplog.records == []


def test_a_demo_is_not_resumed(run_cli, finished):
    outcome = run_cli("demo", "--out", finished)
    outcome.assert_refused("already holds a run; discard it with --overwrite")
    assert "--resume" not in outcome.err


def test_a_demo_that_cannot_be_written_is_told_at_once(run_cli, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    run_cli("demo", "--out", tmp_path / "demo").assert_refused("Read-only file system", "give another --out")


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "x.json"),
            ["x.json: No space left", "make room", "--resume"],
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), ["x: Permission denied", "you may read and write"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["error: No space left on device; make room"]),
        (MemoryError(), ["not enough memory", "lower train.batch_size or sae.d_sae"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["not enough memory"]),
    ],
)
def test_what_the_machine_refuses_is_one_line(run_cli, monkeypatch, error, parts):
    monkeypatch.setattr(results.Eval, "run", raising(error))
    run_cli("eval", "run").assert_refused(*parts)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("a fault of ours")])
def test_other_faults_keep_their_traceback(run_cli, monkeypatch, error):
    monkeypatch.setattr(results.Eval, "run", raising(error))
    with pytest.raises(type(error)):
        run_cli("eval", "run")


def test_ctrl_c_is_one_line(run_cli, monkeypatch):
    monkeypatch.setattr(results.Eval, "run", raising(KeyboardInterrupt()))
    assert run_cli("eval", "run") == (130, "", "sae: stopped\n")


def raising(error: BaseException) -> Callable[..., None]:
    def run(self: object) -> None:
        raise error

    return run


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_without_steps_leaves_nothing_to_stick_to(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress("training", 10):
        tqdm.write("a line of the log", file=sys.stderr)
    written = capsys.readouterr().err
    assert "training:   0%" in written
    assert written.endswith("\r" if terminal else "\n")


def test_a_bar_that_was_never_drawn_writes_nothing(capsys):
    with progress("training", 10):
        pass
    assert capsys.readouterr().err == ""


def test_wandb_that_is_not_installed(run_cli, toy, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)
    )
    outcome = run_cli("train", toy, "--out", tmp_path / "run", "--log.wandb", "offline")
    outcome.assert_refused("wandb is not installed", "pip install 'sae[wandb]'")
    assert not (tmp_path / "run").exists()


def test_a_process_of_its_own(tmp_path):
    """What the other tests see in this process is what a shell sees."""
    ended = subprocess.run(command("eval", tmp_path), capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("sae: error: ")
    assert "holds no SAE" in ended.stderr


def test_a_terminated_run_resumes_to_the_same_weights(run_cli, tmp_path):
    n_steps = 240
    config = TOY | {"train": TOY["train"] | {"n_samples": 64 * n_steps}, "log": {"every": 4}}
    path = write_config(tmp_path / "long.yaml", config)
    out, lines = tmp_path / "killed", tmp_path / "killed/metrics.jsonl"

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command("train", path, "--out", out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (lines.exists() and lines.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, 2)
    assert "continue with --resume" in err
    assert "Traceback" not in err
    (saved,) = (out / "checkpoints").iterdir()
    assert 0 < json.loads((saved / "state.json").read_text())["n_steps_done"] < n_steps
    assert not (out / "result.json").exists()

    assert run_cli("train", path, "--out", out, "--resume").code == 0
    assert run_cli("train", path, "--out", tmp_path / "whole").code == 0
    resumed, whole = (load_file(folder / "sae.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(resumed[name].equal(whole[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in lines.read_text().splitlines()]
    assert steps == list(range(4, n_steps + 1, 4))


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "sae", *map(str, words)]


@pytest.mark.parametrize(("own", "spins"), [({}, "6000"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_waiting_threads_sleep_soon_unless_the_user_says_how_they_wait(own, spins):
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | own
    code = "import os, sae; print(os.environ.get('GOMP_SPINCOUNT'))"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == str(spins)
