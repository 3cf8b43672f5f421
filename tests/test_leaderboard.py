"""A leaderboard: who takes part and on what terms, its rows, its ranks, its page, and how it goes on."""

import json
import os
import re
import signal
import subprocess
from contextlib import contextmanager
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from scipy import stats
from test_docs import DOCS, EXAMPLE
from test_report import CHROMIUM, Page

import sae
from sae import SAEConfig, baselines, console
from sae.config_text import config_path
from sae.errors import UsageError
from sae.leaderboard import Recipe, read_recipe, run_leaderboard
from sae.leaderboard.recipe import definite
from sae.leaderboard.run import sweep_of
from sae.leaderboard.show import print_standings
from sae.locks import held
from sae.report.standings import Leaderboard, read_leaderboard, stand
from sae.sweep.group import Ended, Logged

WORLD = {"n_features": 16, "d_hidden": 6, "firing": {"kind": "constant", "prob": 0.12}}
RECIPE = {
    "world": "world.yaml",
    "seeds": 2,
    "train": {"n_samples": 1280, "batch_size": 64, "warmup_steps": 5, "data_seed": 0},
    "evaluation": {"n_samples": 500},
    "log": {"every": 5},
    "entries": [{"kind": "topk", "k": "l0"}, {"kind": "relu", "l0": "l0"}],
    "baselines": ["random", "oracle"],
}
TIMES = ("seconds", "details/samples_per_second")


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    """A plugin's kind is forgotten after its test."""
    monkeypatch.setattr(SAEConfig, "kinds", dict(SAEConfig.kinds))
    monkeypatch.setattr(sae.plugins, "LOADED", [])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a small world and a recipe for it."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "world.yaml").write_text(yaml.safe_dump(WORLD))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def read(files: Path, *words: str, add: tuple[str, ...] = (), world: Path | None = None) -> Recipe:
    return read_recipe(files / "recipe.yaml", world, words, add)


@pytest.fixture(scope="module")
def board(files, tmp_path_factory) -> Path:
    """A whole leaderboard, to be looked at."""
    out = tmp_path_factory.mktemp("boards") / "board"
    run_leaderboard(read(files), out)
    return out


def rows(out: Path) -> dict[tuple[str, int], dict]:
    """What there is, without what a clock said."""
    found = json.loads((out / "leaderboard.json").read_text())["rows"]
    return {(row["method"], row["seed"]): {k: v for k, v in row.items() if k not in TIMES} for row in found}


def assert_same(ours: dict, theirs: dict) -> None:
    """Sums of metrics may be taken by another number of threads."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == (pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value), key


def missing(out: Path) -> dict[tuple[str, int], str]:
    found = json.loads((out / "leaderboard.json").read_text())["missing"]
    return {(row["method"], row["seed"]): row["status"] for row in found}


ALL = [*((kind, seed) for kind in ("topk", "relu") for seed in (0, 1)), ("random", 0), ("random", 1), ("oracle", 0)]


# Who takes part


def test_the_recipe_that_comes_along_leaves_nobody_out():
    recipe = read_recipe()
    built_in = {kind for kind, member in SAEConfig.kinds.items() if member.__module__.startswith("sae.")}
    assert {entry["kind"] for entry in recipe.entries} == built_in - {"transcoder", "skip_transcoder"}
    assert set(recipe.baselines) == {name for name in baselines.BASELINES if not name.startswith("sae_")}
    assert recipe.source.path.samefile(config_path("worlds/synth256.yaml"))
    assert (recipe.seeds, recipe.train.data_seed) == (3, 0)


def test_every_field_of_a_recipe_has_its_row():
    page = (DOCS / "leaderboard.md").read_text()
    rows = "\n".join(line for line in page.splitlines() if line.startswith("| `"))
    assert [name for name in ("world", *Recipe.model_fields) if f"`{name}`" not in rows] == []


def test_l0_in_an_entry_is_the_number_of_features_that_fire(files):
    sae.load_plugin(EXAMPLE)
    added = ("{kind: batchtopk, k: l0}", "{kind: jumprelu, l0: l0, initial_l0: 4}", "{kind: groupmax, n_groups: l0}")
    found = definite(read(files, add=added))
    acts = found.source.held_out("calibration", 65_536).acts
    assert found.l0_truth == pytest.approx(float((acts.values > 0).sum()) / 65_536, rel=0.005)
    assert found.l0_truth == pytest.approx(16 * 0.12, rel=0.02)
    l0 = found.l0_truth
    of_kind = {entry.name: entry.sae for entry in found.entries}
    assert [of_kind["topk"].k, of_kind["groupmax"].n_groups, found.k] == [2, 2, 2]
    assert [of_kind["batchtopk"].k, of_kind["relu"].l0, of_kind["jumprelu"].l0] == [l0, l0, l0]
    assert of_kind["jumprelu"].initial_l0 == 4
    assert {entry.sae.d_sae for entry in found.entries} == {16}


def test_flags_set_the_recipe(files):
    found = definite(
        read(files, "--seeds", "5", "--l0", "3.4", "--d_sae=20", "--train.n_samples", "640", "--source.seed", "4")
    )
    assert [found.recipe.seeds, found.recipe.train.n_samples, found.recipe.source.seed] == [5, 640, 4]
    assert [found.entries[0].sae.k, found.entries[1].sae.l0, found.entries[0].sae.d_sae] == [3, 3.4, 20]
    assert found.l0_truth == pytest.approx(1.92, rel=0.02)


def test_all_see_the_same_batches_and_differ_in_seed_and_kind_alone(files, tmp_path):
    members = sweep_of(definite(read(files)), tmp_path).members
    assert [member.name for member in members] == ["topk-seed0", "topk-seed1", "relu-seed0", "relu-seed1"]
    assert len({member.stream for member in members}) == 1
    assert [member.config.train.seed for member in members] == [0, 1, 0, 1]
    same = [m.config.train.model_dump(exclude={"seed"}) | m.config.evaluation.model_dump() for m in members]
    assert all(each == same[0] for each in same)


def test_a_world_is_a_description_a_folder_or_the_source_of_a_configuration(files, tmp_path):
    assert read(files).source.path.samefile(files / "world.yaml")
    toy = read(files, world=config_path("toy.yaml"))
    assert (toy.source.kind, toy.source.n_features) == ("toy", 256)
    assert toy.train.n_samples == RECIPE["train"]["n_samples"]
    (tmp_path / "saved").mkdir()
    assert read(files, world=tmp_path / "saved").source.model_dump(include={"kind", "path"}) == {
        "kind": "world",
        "path": tmp_path / "saved",
    }


def test_directions_alone_are_enough_where_an_l0_is_given(run_cli, files, tmp_path, caplog):
    stream = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(12, 5, generator=stream), dim=1)
    np.save(tmp_path / "truth.npy", truth.numpy())
    acts = (torch.rand(4000, 12, generator=stream) - 0.8).relu()
    np.save(tmp_path / "acts.npy", (acts @ truth).numpy())
    source = {"kind": "array", "path": str(tmp_path / "acts.npy"), "truth": str(tmp_path / "truth.npy")}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"source": source}))
    words = ["leaderboard", tmp_path / "mine.yaml", "--recipe", files / "recipe.yaml", "--out", tmp_path / "out"]
    run_cli(*words).assert_refused("so L0 is unknown; set it with --l0")
    with caplog.at_level("INFO", "sae"):
        assert run_cli(*words, "--l0", "2.4", "--seeds", "1").code == 0
    assert "which these need: oracle; they are omitted" in caplog.text
    found = rows(tmp_path / "out")
    assert list(found) == [("topk", 0), ("relu", 0), ("random", 0)]
    assert [found["topk", 0]["sae.k"], found["relu", 0]["sae.l0"]] == [2, 2.4]
    assert not any("recovery/f1" in row for row in found.values())
    page = Page(tmp_path / "out/report.html")
    assert "12 true features in 5 dimensions, of which it is not known when they fire." in page.text
    assert len(page.figures) == 2  # without F1 there is no figure of it against the error


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--add", "{kind: topk, k: 5}"], ["two entries are called 'topk'; give one a name, as in {name: topk_2"]),
        (["--add", "{kind: tpok, k: 5}"], ["entry tpok: unknown kind 'tpok'; did you mean 'topk'?", "--plugin FILE"]),
        (["--add", "{name: a, kind: topk, kk: 5}"], ["entry a: unknown key 'kk' for kind 'topk'; did you mean 'k'?"]),
        (["--add", "{name: a, kind: topk, k: 50}"], ["entry a", "k must lie in 1..d_sae=16, got 50"]),
        (
            ["--add", "{name: a, kind: topk, k: 5, d_sae: 9}"],
            ["d_sae=9 of topk: it is the same for all; set it with --d_sae"],
        ),
        (["--add", "{name: oracle, kind: topk, k: 5}"], ["called 'oracle', which is a baseline"]),
        (["--add", "{name: a/b, kind: topk, k: 5}"], ["got 'a/b'"]),
        (["--add", "topk"], ["--add topk: an entry is a mapping, as in '{kind: topk, k: 3}'"]),
        (["--add", "{kind"], ["--add {kind: not valid YAML"]),
        (["--add", "{k: 3}"], ["an entry needs a kind, as in {kind: topk, k: l0}, got {'k': 3}"]),
        (["--baselines", "[kvsd]"], ["unknown baseline 'kvsd'; did you mean 'ksvd'?"]),
        (["--baselines", "[sae_oracle]"], ["sae_oracle codes the dictionary of one run; leave it out"]),
        (["--baselines", "[]", "--entries", "[]"], ["there are no entries"]),
        (["--train.seed", "3"], ["seed=3 is what varies; leave it out, and set the number of seeds"]),
        (["--train.n_samples", "64"], ["n_samples=64 is a single batch of 64"]),
        (["--seeds", "0"], ["seeds: Input should be greater than 0, got 0"]),
        (["--sae.k", "3"], ["unknown key 'sae'"]),
        (["--seed", "3"], ["unknown flag '--seed'; did you mean '--seeds'?"]),
        (["--resume", "--overwrite"], ["give one of them"]),
        (["no/such.yaml"], ["cannot read no/such.yaml"]),
    ],
)
def test_mistakes_are_told_in_one_line(run_cli, files, tmp_path, words, parts):
    ended = run_cli("leaderboard", "--recipe", files / "recipe.yaml", "--out", tmp_path / "out", *words)
    ended.assert_refused(*parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        (
            "acts.yaml",
            {"source": {"kind": "array", "path": "acts.npy"}},
            "the source of kind 'array' knows no true features",
        ),
        (
            "pairs.yaml",
            {"source": {"kind": "array", "path": "acts.npy", "target": "acts.npy"}},
            "the source has a target",
        ),
        ("else.yaml", {"sae": {"kind": "topk"}}, "else.yaml is not a world: it has neither n_features and d_hidden"),
        ("bad.yaml", {"n_features": 4, "d_hidden": -1}, "d_hidden"),
    ],
)
def test_a_world_without_true_features_is_refused(run_cli, files, tmp_path, monkeypatch, name, content, part):
    monkeypatch.chdir(tmp_path)
    np.save("acts.npy", np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32))
    Path(name).write_text(yaml.safe_dump(content))
    run_cli("leaderboard", name, "--recipe", files / "recipe.yaml", "--out", "out").assert_refused(part)
    assert not Path("out").exists()


# Its rows


def test_every_method_and_seed_has_a_flat_row(board):
    found = json.loads((board / "leaderboard.json").read_text())
    assert [(row["method"], row["seed"]) for row in found["rows"]] == ALL
    assert found["missing"] == []
    for row in found["rows"]:
        assert not any(isinstance(value, dict | list) for value in row.values())
        assert {
            "recovery/mcc",
            "recovery/f1",
            "polysemanticity/latent_purity",
            "metrics/fvu",
            "metrics/l0",
        } <= row.keys()
        assert row["seconds"] >= 0
        assert (row["family"] == "sae") == ("details/samples_per_second" in row)
    topk, *_, oracle = found["rows"]
    assert [topk["sae.kind"], topk["sae.k"], topk["family"], oracle["family"]] == ["topk", 2, "sae", "oracle"]
    assert topk["seconds"] == pytest.approx(1280 / topk["details/samples_per_second"])
    assert found["world"]["n_features"] == found["d_sae"] == 16
    assert found["hardware"]["cpu"]
    assert found["versions"]["torch"] == torch.__version__
    assert {"command", "date", "l0", "k", "seeds", "n_samples", "n_evaluation"} <= found.keys()


def test_an_sae_is_that_of_a_run_by_itself(board, tmp_path):
    config = sae.load_config(board / "saes/relu-seed1/config.yaml", ["--out", str(tmp_path / "alone")])
    result = sae.train(config, report=False)
    ours, theirs = (load_file(out / "sae.safetensors") for out in (board / "saes/relu-seed1", tmp_path / "alone"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    row = rows(board)["relu", 1]
    assert {name: row[name] for name in result.metrics} == pytest.approx(result.metrics, rel=1e-9, abs=1e-12)


def test_a_baseline_is_what_sae_baselines_runs(board, files):
    source = read(files).source.open()
    (row,) = baselines.run(["random"], source, d_sae=16, k=2, seed=1, n_evaluation=500)
    ours = rows(board)["random", 1]
    for name in ("recovery/mcc", "recovery/f1", "metrics/fvu", "polysemanticity/latent_purity"):
        assert ours[name] == pytest.approx(row[name], rel=1e-9)


def test_the_recipe_it_leaves_is_the_whole_of_it(board):
    again = definite(read_recipe(board / "recipe.yaml"))
    assert again.recipe.to_yaml() == (board / "recipe.yaml").read_text()
    assert [entry.sae.kind for entry in again.entries] == ["topk", "relu"]
    other = definite(read_recipe(board / "recipe.yaml", overrides=["--l0", "5"]))  # the word l0 has stayed a word
    assert [getattr(entry.sae, "k", None) or getattr(entry.sae, "l0", None) for entry in other.entries] == [5, 5]


def test_a_kind_of_ones_own_takes_part(run_cli, files, tmp_path):
    out = tmp_path / "out"
    words = ["--recipe", files / "recipe.yaml", "--out", out, "--plugin", EXAMPLE, "--seeds", "1"]
    words += ["--add", "{name: mine, kind: groupmax, n_groups: l0}", "--entries", "[]", "--baselines", "[pca, oracle]"]
    ended = run_cli("leaderboard", *words)
    assert ended.code == 0, ended.err
    assert list(rows(out)) == [("mine", 0), ("pca", 0), ("oracle", 0)]
    assert rows(out)["mine", 0]["sae.n_groups"] == 2
    assert re.search(r"1 SAEs? and 2 other methods on world", ended.out)
    assert re.search(r"^ mine +1 ", ended.out, flags=re.MULTILINE)
    assert "One seed" in ended.out
    assert "±" not in ended.out


# How it goes on


def stopping_at(name: str, step: int):
    """Watches a sweep, and sends a signal when a member has come to a step."""

    @contextmanager
    def watch(plan):
        def on_event(message: Logged | Ended) -> None:
            if isinstance(message, Logged) and (message.name, message.step) == (name, step):
                os.kill(os.getpid(), signal.SIGTERM)

        yield on_event

    return watch


@contextmanager
def stopping_after_one(stage, n):
    """Watches a stage, and sends a signal after the first of the baselines."""
    yield (lambda: os.kill(os.getpid(), signal.SIGTERM)) if stage == "baselines" else (lambda: None)


def test_a_leaderboard_that_was_stopped_twice_ends_with_the_same_bits(board, files, tmp_path):
    out = tmp_path / "out"
    stopped = run_leaderboard(read(files), out, watch_sweep=stopping_at("relu-seed0", 10))
    assert (stopped.signal_number, stopped.rows) == (signal.SIGTERM, [])
    assert set(missing(out).values()) == {"interrupted", "unfinished"}
    stopped = run_leaderboard(read(files), out, resume=True, watch_stage=stopping_after_one)
    assert stopped.signal_number == signal.SIGTERM
    assert 4 < len(stopped.rows) < len(ALL)
    ended = run_leaderboard(read(files), out, resume=True)
    assert (ended.signal_number, ended.missing) == (0, [])
    for key, row in rows(board).items():
        assert_same(rows(out)[key], row)
    for name in ("topk-seed1", "relu-seed0"):
        ours, theirs = (load_file(where / "saes" / name / "sae.safetensors") for where in (out, board))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_resume_trains_what_is_new_and_leaves_the_rest(run_cli, files, tmp_path):
    out = tmp_path / "out"
    given = ["leaderboard", files / "world.yaml", "--out", out, "--seeds", "1"]
    assert run_cli(*given, "--recipe", files / "recipe.yaml", "--baselines", "[random]").code == 0
    before = json.loads((out / "leaderboard.json").read_text())
    weights = (out / "saes/topk-seed0/sae.safetensors").stat().st_mtime_ns
    ended = run_cli(*given, "--resume", "--add", "{kind: batchtopk, k: l0}", "--add", "{kind: topk, k: l0}")
    assert ended.code == 0, ended.err
    after = json.loads((out / "leaderboard.json").read_text())
    assert [row["method"] for row in after["rows"]] == ["topk", "relu", "batchtopk", "random"]
    assert after["rows"][-1] == before["rows"][-1]
    assert (out / "saes/topk-seed0/sae.safetensors").stat().st_mtime_ns == weights
    # All take their turns again beside the new one; where nothing is new, nobody does.
    assert [row[TIMES[1]] for row in after["rows"][:2]] != [row[TIMES[1]] for row in before["rows"][:2]]
    assert run_cli(*given, "--resume").code == 0
    assert json.loads((out / "leaderboard.json").read_text())["rows"] == after["rows"]
    assert {key[0]: row for key, row in rows(out).items() if key[0] == "relu"} == {
        "relu": {k: v for k, v in before["rows"][1].items() if k not in TIMES}
    }
    refused = run_cli(*given, "--resume", "--train.n_samples", "640")
    refused.assert_refused("cannot be resumed: train.n_samples was 1280, now 640; use the same value, or another --out")
    run_cli(*given).assert_refused(
        "already holds a leaderboard; continue it with --resume (in Python resume=True), discard it with --overwrite"
    )
    only = ["--recipe", files / "recipe.yaml", "--entries", "[]", "--baselines", "[oracle]"]
    assert run_cli(*given, *only, "--overwrite").code == 0
    assert list(rows(out)) == [("oracle", 0)]


def test_a_directory_of_something_else_or_in_use_is_refused(run_cli, board, files, tmp_path):
    words = ["leaderboard", "--recipe", files / "recipe.yaml", "--out"]
    run_cli(*words, board / "saes").assert_refused("holds a sweep; give another --out")
    run_cli(*words, board / "saes/topk-seed0").assert_refused("holds a run; give another --out")
    run_cli(*words, files / "world.yaml").assert_refused("is a file; give a directory as --out")
    with held(tmp_path / "busy"):
        run_cli(*words, tmp_path / "busy").assert_refused("another process is at work in")


def test_who_ends_badly_is_named_and_stops_nobody(run_cli, files, tmp_path):
    out = tmp_path / "out"
    words = ["--recipe", files / "recipe.yaml", "--out", out, "--seeds", "1", "--baselines", "[random, data_points]"]
    ended = run_cli("leaderboard", *words, "--train.lr", "1e30", "--d_sae", "30000", "--l0", "2")
    assert ended.code == 1
    assert missing(out) == {("topk", 0): "diverged", ("relu", 0): "diverged", ("data_points", 0): "failed"}
    assert list(rows(out)) == [("random", 0)]
    assert (
        "3 of 4 are not done: topk seed 0 (diverged), relu seed 0 (diverged), data_points seed 0 (failed)" in ended.err
    )
    page = Page(out / "report.html")
    assert "data_points, seed 0 is failed: data_points needs d_sae=30000 activations" in page.text


# Who is first


def row(method: str, seed: int, mcc: float, f1: float = 0.5, family: str = "sae") -> dict:
    return {"method": method, "seed": seed, "family": family, "recovery/mcc": mcc, "recovery/f1": f1, "sae.k": 3}


def test_ranks_are_by_mcc_then_f1_and_intervals_are_students():
    scores = {"b": (0.80, 0.82, 0.84), "a": (0.90, 0.91, 0.92), "c": (0.50, 0.89, 0.98), "d": (0.9104, 0.9104, 0.9104)}
    found = stand(
        [row("oracle", 0, 1.0, 1.0, "oracle")]
        + [
            row(name, seed, mcc, 0.7 if name == "a" else 0.6)
            for name, own in scores.items()
            for seed, mcc in enumerate(own)
        ]
    )
    assert [(each.method, each.rank) for each in found] == [("a", 1), ("d", 2), ("b", 3), ("c", 4), ("oracle", None)]
    half = stats.t.ppf(0.975, 2) * 0.01 / 3**0.5
    assert found[0].scores["recovery/mcc"][:3] == pytest.approx((0.91, 0.91 - half, 0.91 + half))
    assert "sae.k" not in found[0].scores
    # b ends at .82 + .0497 = .8697, below the first one's .8852; c is spread wide over it.
    assert [each.level for each in found] == [True, True, False, True, False]


def test_equal_methods_share_a_rank_and_one_seed_tells_nothing_apart():
    found = stand([row("a", 0, 0.9), row("b", 0, 0.9001), row("c", 0, 0.2)])
    assert [(each.rank, each.level) for each in found] == [(1, False), (1, False), (3, False)]
    assert found[0].scores["recovery/mcc"].half == inf


@pytest.mark.parametrize(("mcc", "doubted"), [((0.42, 0.44), True), ((0.42, 0.47), False)])
def test_a_board_where_all_are_at_chance_says_so(mcc, doubted):
    """Within three standard deviations of what random directions score."""
    chance = {"recovery/mcc_chance": 0.42, "recovery/mcc_chance_sd": 0.01}
    found = stand([row(name, seed, one) | chance for name, one in zip("ab", mcc, strict=True) for seed in (0, 1)])
    assert ("No SAE is above chance" in Leaderboard({}, found, "").doubt) == doubted
    assert not Leaderboard({}, stand([row("a", 0, 0.9)]), "").doubt  # chance is not known


def test_a_narrow_terminal_gets_whole_columns_and_is_told_of_the_others(board, monkeypatch, capsys):
    for width, spared in ((200, None), (60, "dim., k/s, dead")):
        monkeypatch.setattr(console, "_console", lambda width=width: Console(width=width))
        print_standings(read_leaderboard(board))
        shown = capsys.readouterr().out
        assert "…" not in shown
        assert ("There is no room here" in shown) == (spared is not None)
        assert spared is None or f"There is no room here for {spared}" in shown


# Its page


def test_the_page_ranks_draws_and_says_how_it_was_measured(board):
    page = Page(board / "report.html")
    assert page.headings == [
        "2 SAEs and 2 other methods on world",
        "Who found the features",
        "Standings",
        "What it costs",
        "How it was measured",
    ]
    standings = read_leaderboard(board).standings
    first = standings[0]
    assert f"MCC {first.scores['recovery/mcc'].mean:.3f} ± {first.scores['recovery/mcc'].half:.3f}" in page.text
    named = [value for tag, name, value in page.attributes if (tag, name) == ("span", "id")]
    assert named == [f"member-{each.method}" for each in standings]
    dots, error, cost = page.figures
    means = [trace for trace in dots["data"] if "error_x" in trace and trace["xaxis"] == "x"]
    drawn = {method: x for trace in means for method, x in zip(trace["customdata"], trace["x"], strict=True)}
    assert drawn == pytest.approx({each.method: each.scores["recovery/mcc"].mean for each in standings}, abs=1e-4)
    assert len(dots["layout"]["yaxis"]["ticktext"]) == len(standings)
    assert [sum(len(trace["x"]) for trace in figure["data"]) for figure in (error, cost)] == [
        4,
        3,
    ]  # oracles cost nothing
    assert f"torch {torch.__version__}" in page.text
    assert "kind: topk" in page.text
    assert sae.report.write_report([board]) == board / "report.html"
    with pytest.raises(UsageError, match="is a leaderboard, which has a page of its own"):
        sae.report.write_report([board, board / "saes/topk-seed0"])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_every_figure(board, tmp_path):
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=9000"
    done = subprocess.run(
        [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path}", "--dump-dom", (board / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert done.stdout.count('class="plot-container plotly') == 3
