"""What a run of experiments writes and says, with an experiment that takes no time."""

import json
import sys
from multiprocessing import active_children

import pytest
import torch
from safetensors.torch import load_file

from toymodels import cli, experiments, gallery, runner
from toymodels.errors import UsageError
from toymodels.experiments import NAMES, experiment
from toymodels.experiments.base import Claims, Context, Experiment, Outcome, Picture


@pytest.mark.parametrize(
    ("relation", "arguments", "holding", "failing"),
    [
        ("within", (2.0, 0.5), (1.5, 2.5), (1.49, 2.51)),
        ("at_least", (2.0,), (2.0, 9.0), (1.99,)),
        ("at_most", (2.0,), (2.0, -9.0), (2.01,)),
        ("equals", (2,), (2,), (2.01, 3)),
    ],
)
def test_a_claim_holds_when_its_relation_does(relation, arguments, holding, failing):
    for measured in (*holding, *failing, float("nan"), float("inf"), torch.tensor(float("nan"))):
        claims = Claims("1a")
        getattr(claims, relation)("name", "text", measured, *arguments, "RUN")
        assert claims.made[0].holds == (measured in holding)
        assert claims.made[0].row == "1a"


def made_up(measured=1.0, draws=True, fails=False):
    """An experiment without training."""
    from toymodels import plots

    def run(context: Context) -> Outcome:
        if fails:
            raise RuntimeError("it broke")
        context.expect(2)
        context.tick()
        context.tick()
        claims = Claims("1")
        claims.within("size", "the size <of it>", measured, 1.0, 0.1, "DERIVED")
        W = torch.rand(3, 4, 2, generator=context.stream("W"))
        return Outcome(claims.made, {"a/W": W, "a/b": W[..., 0]}, {"a": {"feature_prob": 0.5}}, 3)

    def draw(outcome):
        if not draws:
            raise RuntimeError("no ink")
        figure, axes = plots.figure()
        axes[0, 0].plot(outcome.tensors["a/b"][0])
        return [Picture("curve", figure, "A curve & its caption.")]

    return Experiment("antipodal", "1", "A pair", "Two share one.", "A paper", 1, run, draw)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts another experiment in the place of `antipodal`."""

    def put(**options):
        chosen = made_up(**options)
        for module in (experiments, runner, gallery):
            monkeypatch.setattr(module, "experiment", lambda name: chosen)

    return put


def test_files_say_what_was_found(tmp_path, stand_in):
    stand_in()
    told = []
    result = runner.run_experiment("antipodal", tmp_path / "one", 5, True, lambda *progress: told.append(progress))
    written = json.loads((tmp_path / "one" / "result.json").read_text())
    assert written == result
    assert set(written) == {
        *("claims", "conditions", "fast", "figures", "hardware", "n_seeds", "name", "row", "seconds", "seed")
    }
    assert written["seed"] == 5
    assert written["n_seeds"] == 3
    assert written["claims"] == [
        {
            "row": "1",
            "name": "size",
            "text": "the size <of it>",
            "measured": 1.0,
            "relation": "within",
            "target": 1.0,
            "tolerance": 0.1,
            "source": "DERIVED",
            "holds": True,
        }
    ]
    assert load_file(tmp_path / "one" / "weights.safetensors").keys() == {"a/W", "a/b"}
    assert (tmp_path / "one" / "curve.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "one" / "curve.svg").read_text()
    assert told[0] == (0, 2)
    assert told[-1] == (2, 2)


def test_the_same_seed_writes_the_same_files(tmp_path, stand_in):
    stand_in()
    for name in ("first", "second"):
        runner.run_experiment("antipodal", tmp_path / name, 0, True)
    runner.run_experiment("antipodal", tmp_path / "other", 1, True)
    for file in ("weights.safetensors", "curve.png", "curve.svg"):
        first, second, other = ((tmp_path / name / file).read_bytes() for name in ("first", "second", "other"))
        assert first == second != other


def test_a_drawing_that_fails_loses_no_measurement(tmp_path, stand_in):
    stand_in(draws=False)
    with pytest.raises(RuntimeError, match="no ink"):
        runner.run_experiment("antipodal", tmp_path, 0, True)
    assert json.loads((tmp_path / "result.json").read_text())["claims"][0]["holds"]
    assert (tmp_path / "weights.safetensors").exists()


def test_what_is_not_a_number_is_null(tmp_path, stand_in):
    stand_in(measured=float("nan"))
    claim = runner.run_experiment("antipodal", tmp_path, 0, True)["claims"][0]
    assert claim["measured"] is None
    assert not claim["holds"]


def test_the_page_shows_claims_figures_and_failures(tmp_path, stand_in):
    stand_in()
    runner.run_experiment("antipodal", tmp_path / "antipodal", 0, True)
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear" / "error.txt").write_text("Traceback: <boom>")
    page = gallery.write_gallery(tmp_path).read_text()
    for expected in (
        "1 experiment: the claim holds. 1 ended with an error: linear.",
        "the size &lt;of it&gt;",
        "1 ± 0.1",
        "A curve &amp; its caption.",
        "data:image/svg+xml;base64,",
        "Traceback: &lt;boom&gt;",
    ):
        assert expected in page
    assert "default-src 'none'; style-src" in page
    assert "<script" not in page


def test_one_failure_does_not_stop_the_others(tmp_path):
    """Through processes, as the command line does: a folder in the place of a figure fails one of two."""
    names = ("antipodal", "linear")
    runner.check(names, tmp_path, 0)
    (tmp_path / "linear" / "linear.png").mkdir(parents=True)
    ended = {}
    runs = runner.run_all(names, tmp_path, 0, True, on_end=lambda one: ended.setdefault(one.name, one))
    assert [one.name for one in runs] == list(names)
    assert ended["antipodal"].ok
    assert not ended["linear"].ok
    assert "Error" in (tmp_path / "linear" / "error.txt").read_text()


def run_cli(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["toymodels", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "antipodl"], "unknown experiment 'antipodl'; did you mean 'antipodal'?"),
        (["run", "antipodal", "--seed", "-1"], "seed must not be negative, got -1"),
        (["run", "antipodal", "--out", "/proc/none"], "cannot write to /proc/none/antipodal"),
        ([], "give a command, one of list, run; see `toymodels --help`"),
        (["ruun"], "unknown command 'ruun'; did you mean 'run'?"),
        (["run"], "missing from toymodels run: STR A name from `toymodels list`, or all. (required)"),
        (["run", "polygons", "antipodal"], "unrecognized options: antipodal; see `toymodels run --help`"),
        (["run", "all", "--seed", "abc"], "--seed: invalid literal"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(monkeypatch, capsys, words, message):
    assert run_cli(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("toymodels: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_the_claims_hold(monkeypatch, capsys, tmp_path, holds, code):
    claims = [{"holds": holds, "text": "size", "measured": 3, "relation": "at_most", "target": 2}]
    one = runner.Ended("antipodal", {"claims": claims, "seconds": 1.0})
    monkeypatch.setattr(runner, "run_all", lambda *_: [one])
    assert run_cli(monkeypatch, "run", "antipodal", "--out", str(tmp_path)) == code
    assert ("fails: size: 3, at_most 2" in capsys.readouterr().out) == (not holds)


def test_list_names_every_experiment(monkeypatch, capsys):
    assert run_cli(monkeypatch, "list") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES)


def test_names_are_those_of_the_modules():
    for name in NAMES:
        chosen = experiment(name)
        assert chosen.name == name
        assert chosen.claim.endswith(".")
        assert chosen.seconds > 0
    with pytest.raises(UsageError, match="did you mean 'uniform'"):
        experiment("unifrom")


def test_a_killed_process_does_not_stop_the_others(tmp_path):
    """The first experiment that says how far it is loses its process."""
    killed = []

    def kill(name, done, expected):
        if not killed:
            killed.append(name)
            for child in active_children():
                if "Manager" not in child.name:
                    child.kill()

    ended = runner.run_all(("antipodal", "linear"), tmp_path, 0, True, on_progress=kill)
    assert killed
    assert [one.name for one in ended] == ["antipodal", "linear"]
    assert sum(one.ok for one in ended) >= 1
    page = gallery.write_gallery(tmp_path).read_text()
    assert all(one.ok or "its process was killed" in page for one in ended)
