"""Kinds from a file named on the command line: they run like built-in ones, and what is wrong is one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sae
from sae import SAEConfig, UsageError, plugins
from sae.bench import memory, ours
from sae.bench.shapes import Shape, parse_kinds
from sae.config import parse_config

EXAMPLE = Path(__file__).parent.parent / "docs/examples/my_sparsifier.py"
SMALL = Shape("small", 8, 16, 2, 32)


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """What a test loads is gone after it."""
    monkeypatch.setattr(SAEConfig, "kinds", dict(SAEConfig.kinds))
    monkeypatch.setattr(plugins, "LOADED", [])
    yield
    for name in [name for name in sys.modules if name.startswith("plugin ")]:
        del sys.modules[name]


@pytest.fixture
def toy_config():
    return {
        "source": {"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 20},
        "train": {"n_samples": 640, "batch_size": 64},
        "evaluation": {"n_samples": 200},
    }


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_plugin_in_python():
    assert sae.load_plugin(EXAMPLE) == ("groupmax",)
    assert plugins.LOADED == [EXAMPLE]
    assert parse_config({"sae": {"kind": "groupmax", "d_sae": 24, "n_groups": 4}}).sae.build().n_groups == 4
    assert sae.load_plugin(str(EXAMPLE)) == ("groupmax",), "again, as after an edit"
    assert plugins.LOADED == [EXAMPLE]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\n", "defines no kind; subclass sae.SAEConfig with its own kind"),
        ("x = 1\ny = x / 0\n", "fails in line 2: ZeroDivisionError: division by zero"),
        ("x = 1\ndef f(:\n", "fails in line 2: SyntaxError: "),
        ("import no_such_module\n", "fails in line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("import sys\nsys.exit('bye')\n", "fails in line 2: SystemExit: bye"),
        ("raise ValueError('two\\nlines')\n", "fails in line 1: ValueError: two lines"),
        (
            EXAMPLE.read_text().replace('"groupmax"', '"topk"'),
            "defines kind 'topk', which sae.sparsifiers.topk",
        ),
        (EXAMPLE.read_text() + "\n1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_plugin_that_does_not_work_leaves_nothing_behind(text, told, tmp_path):
    before = dict(SAEConfig.kinds)
    with pytest.raises(UsageError) as error:
        sae.load_plugin(write(tmp_path / "mine.py", text))
    assert str(error.value).startswith(f"plugin {tmp_path / 'mine.py'} ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert before == SAEConfig.kinds
    assert plugins.LOADED == []


def test_a_missing_plugin(tmp_path, run_cli):
    for path in (tmp_path / "mine.py", tmp_path):
        code, _, err = run_cli("eval", tmp_path, "--plugin", path)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith(f"sae: error: plugin {path}: no such file")


def test_two_files_cannot_define_the_same_kind(tmp_path):
    sae.load_plugin(EXAMPLE)
    with pytest.raises(UsageError, match=r"defines kind 'groupmax', which plugin .*my_sparsifier.py defines"):
        sae.load_plugin(write(tmp_path / "my_sparsifier.py", EXAMPLE.read_text()))


def test_commands_with_a_plugin(tmp_path, run_cli):
    sections = {
        "source": {"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 20},
        "sae": {"kind": "groupmax", "d_sae": 24, "n_groups": 4},
        "train": {"n_samples": 640, "batch_size": 64},
        "evaluation": {"n_samples": 200},
    }
    path, out = write(tmp_path / "run.yaml", yaml.safe_dump(sections)), tmp_path / "run"
    code, _, err = run_cli("train", path, "--out", out)
    assert code == 2
    assert "unknown kind 'groupmax'" in err
    assert "--plugin FILE" in err
    assert run_cli("train", path, "--out", out, "--plugin", EXAMPLE, "--sae.n_groups", "6")[0] == 0
    assert sae.load(out).config.n_groups == 6

    SAEConfig.kinds.pop("groupmax")
    first = json.loads((out / "result.json").read_text())
    assert run_cli("eval", out)[0] == 2
    assert run_cli("eval", out, "--plugin", EXAMPLE)[0] == 0
    assert json.loads((out / "result.json").read_text()) == first
    (out / "report.html").unlink()
    SAEConfig.kinds.pop("groupmax")
    assert run_cli("report", out, "--plugin", EXAMPLE)[0] == 0
    assert "groupmax" in (out / "report.html").read_text()


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_sweep_with_a_plugin(tmp_path, run_cli, monkeypatch, n_jobs):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sections = {
        "source": {"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 20},
        "sae": {"kind": "groupmax", "d_sae": 24, "n_groups": 4},
        "train": {"n_samples": 640, "batch_size": 64},
        "evaluation": {"n_samples": 200},
        "sweep": {"grid": {"sae.n_groups": [4, 6]}, "n_jobs": n_jobs},
    }
    path, out = write(tmp_path / "sweep.yaml", yaml.safe_dump(sections)), tmp_path / "sweep"
    assert "--plugin FILE" in run_cli("sweep", path, "--out", out)[2]
    assert run_cli("sweep", path, "--plugin", EXAMPLE, "--out", out)[0] == 0
    assert [sae.load(out / name).config.n_groups for name in ("n_groups4", "n_groups6")] == [4, 6]


def test_a_configuration_names_no_code(tmp_path, run_cli):
    config = {"sae": {"kind": "topk", "d_sae": 24, "k": 3}, "plugin": str(EXAMPLE)}
    code, _, err = run_cli("train", write(tmp_path / "run.yaml", yaml.safe_dump(config)))
    assert code == 2
    assert "unknown key 'plugin'" in err
    assert "groupmax" not in SAEConfig.kinds


# Bench


def test_kinds_with_options():
    words = ["topk", "topk:multi_k=8", "matryoshka:prefixes=[4, 16]:k_start=3"]
    assert parse_kinds(f"{words[0]}, {words[1]} {words[2]}") == words
    config = ours.config(words[2], SMALL, 1e-3, "cpu").sae
    assert (config.kind, config.k, config.prefixes, config.k_start) == ("matryoshka", 2, (4, 16), 3)
    with pytest.raises(UsageError, match="an option of kind 'topk' is name=value, got 'multi_k'"):
        parse_kinds("topk:multi_k")
    with pytest.raises(UsageError, match=r"unknown kind 'groupmax'.*--plugin FILE"):
        parse_kinds("groupmax:n_groups=8")


def test_bench_times_a_plugins_kind(tmp_path, run_cli):
    words = ("--shapes", "8,16,2,32", "--rounds", "1", "--steps", "1", "--rivals", "--plugin", EXAMPLE)
    out = tmp_path / "bench.json"
    assert run_cli("bench", "steps", "stages", "--kinds", "groupmax:n_groups=4", *words, "--out", out)[0] == 0
    rows = json.loads(out.read_text())["steps"]
    assert [(row["kind"], row["name"]) for row in rows] == [("groupmax:n_groups=4", "sae")]
    code, shown, err = run_cli("bench", "steps", "--kinds", "topk,groupmax", *words)
    assert (code, shown, err.count("\n")) == (2, "", 1), "told before anything runs"
    assert "kind groupmax: sae.n_groups is required" in err


def test_memory_of_a_plugins_kind():
    job = memory.Job("sae, steps alone", "groupmax:n_groups=4", SMALL, 1e-3, "cpu", 1, 2, (str(EXAMPLE),))
    assert memory.measure(job).peak > 0


def test_importing_sae_loads_no_plugin():
    script = "import sae; assert not sae.plugins.LOADED; assert 'groupmax' not in sae.SAEConfig.kinds"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return pre_latents.relu()", "Mine.forward must return sae.SparseCodes, got Tensor"),
        ("return SparseCodes(pre_latents, None, 24)", "codes must not be negative, Mine.forward gave -"),
    ],
)
def test_a_sparsifier_that_breaks_its_promise(tmp_path, run_cli, toy_config, body, told):
    text = f"""
from typing import Literal
import torch
from sae import SAEConfig, SparseCodes, Sparsifier

class Mine(Sparsifier):
    def forward(self, pre_latents):
        {body}

class MineConfig(SAEConfig):
    kind: Literal["mine"] = "mine"
    def build(self):
        return Mine()
"""
    plugin = write(tmp_path / "mine.py", text)
    config = write(tmp_path / "run.yaml", yaml.safe_dump(toy_config | {"sae": {"kind": "mine", "d_sae": 24}}))
    code, _, err = run_cli("train", config, "--plugin", plugin, "--out", tmp_path / "run")
    assert code == 2
    assert told in err
