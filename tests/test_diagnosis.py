"""Diagnoses of dictionaries whose faults are known, because they were made by hand."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sae
from sae import HeldOut, TrainConfig, UsageError
from sae.again import evaluate_run
from sae.cli import main
from sae.codes import SparseCodes
from sae.diagnosis import Diagnosis, diagnose, diagnose_source
from sae.diagnosis.gaps import jackknife
from sae.diagnosis.holdings import parts_of
from sae.diagnosis.reasons import REASONS, attributes, rate
from sae.diagnosis.structure import CoFiring, Structure, declared_structure, observed_structure, partners
from sae.evaluation import evaluate
from sae.metrics import recovery
from toymodels.co_firing import Exclusive, Tree
from toymodels.features import FeatureBatch, Features
from toymodels.firing import ConstantFiring, Magnitudes
from toymodels.hierarchies import Hierarchy
from toymodels.models import ToyModel
from toymodels.sparse_coding import sparse_code
from toymodels.streams import generator
from toymodels.synthetic import WorldDescription
from toymodels.worlds import ToyWorld

DOCS = Path(__file__).parent.parent / "docs"
# What is special about the features of the hand-made world; all others fire alone, at a tenth.
PARENT, CHILDREN, PAIR, APART, RARE, WEAK, PLAIN = 0, (1, 2, 3), (4, 5), (6, 7), (8, 9), (10, 11), 20
N, D = 32, 64
TRUTH = F.normalize(torch.randn(N, D, generator=generator(0, "truth")), dim=1)


def hand_made(n: int, name: str) -> HeldOut:
    u = torch.rand(n, N, generator=generator(0, name))
    on = u < 0.1
    on[:, PARENT] = u[:, PARENT] < 0.32
    for place, child in enumerate(CHILDREN):
        on[:, child] = on[:, PARENT] & (u[:, 1] >= place / 4) & (u[:, 1] < (place + 1) / 4)
    on[:, PAIR[1]] = torch.where(u[:, 13] < 0.8, on[:, PAIR[0]], on[:, PAIR[1]])
    on[:, APART[0]], on[:, APART[1]] = u[:, 6] < 0.15, u[:, 6] > 0.85
    on[:, RARE] = u[:, RARE] < 0.02
    a = on * (1 + torch.rand(n, N, generator=generator(1, name)))
    a[:, WEAK] *= 0.3
    return HeldOut(a @ TRUTH, FeatureBatch.from_dense(a))


VALIDATION, ROWS = hand_made(1000, "validation"), hand_made(4000, "rows")
ACTS = ROWS.acts.dense()


class Coder:
    """A dictionary that reads its codes by sparse coding, so that its encoder loses nothing."""

    def __init__(self, W_dec: Tensor) -> None:
        self.W_dec = W_dec

    def encode(self, x: Tensor) -> SparseCodes:
        return SparseCodes(sparse_code(x, self.W_dec, 0.05), None, len(self.W_dec))

    def decode(self, codes: SparseCodes, x: Tensor) -> Tensor:
        return codes.decode(self.W_dec)

    def pre_latents(self, x: Tensor) -> Tensor:
        return x @ self.W_dec.T


class Changed(Coder):
    """The same with its codes changed afterwards."""

    def __init__(self, W_dec: Tensor, change) -> None:
        self.W_dec, self.change = W_dec, change

    def encode(self, x: Tensor) -> SparseCodes:
        return SparseCodes(self.change(super().encode(x).dense()), None, len(self.W_dec))


def diagnosed(W_dec: Tensor) -> Diagnosis:
    return diagnose(Coder(W_dec), TRUTH, VALIDATION, ROWS)


def without(*features: int) -> list[int]:
    return [i for i in range(N) if i not in features]


def reasons_of(found: Diagnosis) -> dict[int, str]:
    return {i: reason for i, reason in enumerate(found.features["reason"]) if reason}


def merged(*features: int) -> Tensor:
    return F.normalize(TRUTH[list(features)].sum(dim=0, keepdim=True), dim=1)


STRAY = F.normalize(torch.randn(1, D, generator=generator(3, "stray")), dim=1)
FAULTS = {
    "nothing": (TRUTH, {}),
    "the rare ones are dropped": (TRUTH[without(*RARE)], dict.fromkeys(RARE, "rare")),
    "the weak ones are dropped": (TRUTH[without(*WEAK)], dict.fromkeys(WEAK, "weak")),
    "a plain one is dropped": (TRUTH[without(PLAIN)], {PLAIN: "nobody"}),
    "a parent is in its children's latents": (
        torch.cat([TRUTH[without(PARENT, *CHILDREN)], *(merged(PARENT, child) for child in CHILDREN)]),
        {PARENT: "absorbed"} | dict.fromkeys(CHILDREN, "ancestor"),
    ),
    "a parent is its children's sum": (
        torch.cat([TRUTH[without(PARENT)], merged(*CHILDREN)]),
        {PARENT: "absorbed"},
    ),
    "a child is in its parent's latent": (
        torch.cat([TRUTH[without(PARENT, CHILDREN[0])], merged(PARENT, CHILDREN[0])]),
        {PARENT: "absorbed", CHILDREN[0]: "ancestor"},
    ),
    "a child's latent is off, and leans a little towards its parent": (
        torch.cat([TRUTH[without(3)], F.normalize(0.85 * TRUTH[[3]] + 0.36 * TRUTH[[PARENT]] + 0.45 * STRAY, dim=1)]),
        {3: "ancestor"},
    ),
    "a plain latent is off, and leans a little towards another feature": (
        torch.cat([TRUTH[without(PLAIN)], F.normalize(0.85 * TRUTH[[20]] + 0.36 * TRUTH[[21]] + 0.45 * STRAY, dim=1)]),
        {PLAIN: "inexact"},
    ),
    "two children share a latent": (
        torch.cat([TRUTH[without(*CHILDREN[:2])], merged(*CHILDREN[:2])]),
        dict.fromkeys(CHILDREN[:2], "siblings"),
    ),
    "correlated features share a latent": (
        torch.cat([TRUTH[without(*PAIR)], merged(*PAIR)]),
        dict.fromkeys(PAIR, "correlated"),
    ),
    "exclusive features share a latent": (
        torch.cat([TRUTH[without(*APART)], merged(*APART)]),
        dict.fromkeys(APART, "siblings"),
    ),
    "unrelated features share a latent": (
        torch.cat([TRUTH[without(PLAIN, PLAIN + 1)], merged(PLAIN, PLAIN + 1)]),
        dict.fromkeys((PLAIN, PLAIN + 1), "mixed"),
    ),
    "a feature has two latents": (
        torch.cat([TRUTH[without(PLAIN)], F.normalize(TRUTH[[PLAIN]] + torch.cat([STRAY, -STRAY]) * 0.6, dim=1)]),
        {PLAIN: "split"},
    ),
    "a latent is off": (
        torch.cat([TRUTH[without(PLAIN)], F.normalize(TRUTH[[PLAIN]] + 0.6 * STRAY, dim=1)]),
        {PLAIN: "inexact"},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_reason_is_what_was_done(name: str) -> None:
    W_dec, expected = FAULTS[name]
    order = torch.randperm(len(W_dec), generator=generator(4, "order"))
    found = diagnosed(3.0 * W_dec[order])
    assert reasons_of(found) == expected
    counts = {key.removeprefix("diagnosis/missed_"): value for key, value in found.metrics.items() if "missed_" in key}
    assert counts == {reason: list(expected.values()).count(reason) for reason in REASONS}
    assert found.metrics["diagnosis/missed"] == len(expected) == found.features["status"].count("missed")


def test_features_that_are_never_on_or_alike_are_told() -> None:
    truth = torch.cat([TRUTH, F.normalize(TRUTH[[PLAIN]] + 0.5 * STRAY, dim=1), STRAY])
    rows = [HeldOut(part.x, FeatureBatch.from_dense(F.pad(part.acts.dense(), (0, 2)))) for part in (VALIDATION, ROWS)]
    more = rows[1].acts.dense()
    more[:, N] = ACTS[:, PLAIN + 1].roll(1)  # the twin fires, and has no latent
    held_out = HeldOut(more @ truth, FeatureBatch.from_dense(more))
    found = diagnose(Coder(TRUTH), truth, rows[0], held_out)
    assert reasons_of(found) == {N: "alike", N + 1: "silent"}


def test_a_dictionary_without_latents_that_fire_misses_everything() -> None:
    found = diagnose(Changed(TRUTH, torch.zeros_like), TRUTH, VALIDATION, ROWS)
    assert found.metrics["diagnosis/f1"] == found.metrics["diagnosis/f1_learned_coded"] == 0
    assert found.metrics["diagnosis/dictionary_gap"] == pytest.approx(found.metrics["diagnosis/f1_truth_coded"])
    assert found.metrics["diagnosis/size_gap"] == pytest.approx(found.metrics["diagnosis/f1_truth_coded"])
    assert found.metrics["diagnosis/missed"] == N


# Where the F1 went


def number(found: Diagnosis, name: str) -> float:
    return found.metrics[f"diagnosis/{name}"]


def check_sums(found: Diagnosis) -> None:
    for limit in ("", "_k"):
        parts = (number(found, f"{gap}{limit}") for gap in ("unreachable", "dictionary_gap", "amortisation_gap"))
        assert number(found, "f1") + sum(parts) == pytest.approx(1)


def test_the_true_dictionary_with_sparse_coding_loses_nothing() -> None:
    found = diagnosed(TRUTH)
    check_sums(found)
    assert number(found, "f1_truth_coded") > 0.98
    for gap in ("dictionary_gap", "amortisation_gap", "dictionary_gap_k"):
        assert number(found, gap) == pytest.approx(0, abs=0.02)
    assert "diagnosis/size_gap" not in found.metrics
    assert number(found, "misread") == 0


def test_half_of_the_truth_is_the_dictionarys_fault_and_its_size_alone() -> None:
    found = diagnosed(TRUTH[: N // 2])
    check_sums(found)
    assert number(found, "dictionary_gap") > 0.5
    assert number(found, "size_gap") == pytest.approx(number(found, "dictionary_gap"), abs=0.15)
    # It fires for what it has no latents for, weakly: a matter of the threshold.
    assert abs(number(found, "amortisation_gap") - number(found, "threshold_gap")) < 0.05


def test_beside_a_few_found_features_not_everything_is_rare() -> None:
    found = diagnosed(TRUTH[[PARENT, APART[0]]]).features  # the two that are on most often
    rare = [feature for feature, reason in zip(found["feature"], found["reason"], strict=True) if reason == "rare"]
    assert 0 < len(rare) <= len(RARE)
    assert {*rare} <= {*RARE}


def test_a_smaller_truth_keeps_its_strongest_features() -> None:
    found = diagnosed(TRUTH[without(*RARE, *WEAK)])
    assert number(found, "f1_small_truth_coded") == pytest.approx(number(found, "f1_learned_coded"), abs=0.005)
    assert number(found, "size_gap") == pytest.approx(4 / N, abs=0.02)


def test_an_encoder_that_stays_silent_is_the_encoders_fault() -> None:
    found = diagnose(Changed(TRUTH, lambda z: z * (torch.arange(len(z))[:, None] % 2 == 0)), TRUTH, VALIDATION, ROWS)
    check_sums(found)
    assert number(found, "dictionary_gap") == pytest.approx(0, abs=0.01)
    assert number(found, "amortisation_gap") == pytest.approx(1 - 2 / 3, abs=0.03)
    assert abs(number(found, "threshold_gap")) < 0.01
    # Where the SAE says nothing, the limited codes may say nothing either.
    assert number(found, "f1_truth_coded_k") == pytest.approx(2 / 3, abs=0.02)
    assert number(found, "unreachable_k") == pytest.approx(1 / 3, abs=0.03)


def test_weak_firing_everywhere_is_the_thresholds_fault() -> None:
    found = diagnose(Changed(TRUTH, lambda z: z + 0.02), TRUTH, VALIDATION, ROWS)
    assert number(found, "f1") < 0.3
    assert number(found, "threshold_gap") > 0.6
    assert number(found, "threshold_gap") == pytest.approx(number(found, "amortisation_gap"), abs=0.03)


def test_a_limit_of_k_codes_is_not_taken_for_a_fault() -> None:
    def two_largest(z: Tensor) -> Tensor:
        largest = z.topk(2, dim=1)
        return torch.zeros_like(z).scatter(1, largest.indices, largest.values)

    found = diagnose(Changed(TRUTH, two_largest), TRUTH, VALIDATION, ROWS)
    assert number(found, "amortisation_gap") > 0.2
    assert number(found, "amortisation_gap_k") == pytest.approx(0, abs=0.03)
    assert number(found, "l0_truth_coded_k") <= number(found, "l0") + 1e-9 < number(found, "l0_truth_coded")


def test_scores_are_those_of_the_metrics() -> None:
    """f1, r2 and fvu of the SAE and of the sparse codes, as `recovery` has them on the same rows."""
    coder = Coder(torch.cat([TRUTH[without(*PAIR)], 2 * merged(*PAIR)]))
    rows = next(ROWS.pieces(4096))
    found = diagnose(coder, TRUTH, VALIDATION, rows)
    whole = evaluate(coder, rows, TRUTH).metrics
    for key in ("recovery/f1", "recovery/r2", "metrics/fvu", "metrics/l0"):
        assert number(found, key.split("/")[1]) == pytest.approx(whole[key], abs=1e-5)
    scores = recovery(coder.W_dec, TRUTH, codes=coder.encode(rows.x), acts=rows.acts)
    assert number(found, "f1") == pytest.approx(scores["f1"], abs=1e-5)


def test_standard_errors_are_those_of_the_mean() -> None:
    """Of a mean of blocks the jackknife is the standard error itself; and F1 varies by it between halves."""
    blocks = torch.randn(10, generator=generator(0, "blocks"), dtype=torch.float64)
    left = (blocks.sum() - blocks) / 9
    assert jackknife(left) == pytest.approx(float(blocks.std() / 10**0.5))
    one, other = (
        diagnose(Coder(TRUTH[:20]), TRUTH, VALIDATION, HeldOut(ROWS.x[half], ROWS.acts[half])) for half in HALVES
    )
    error = number(one, "amortisation_gap_se")
    assert 0 < abs(number(one, "amortisation_gap") - number(other, "amortisation_gap")) < 6 * error


HALVES = (slice(0, 2000), slice(2000, 4000))


# What the features are to each other


def test_structure_is_read_off_the_samples() -> None:
    seen = observed_structure(CoFiring(ROWS.acts))
    expected = [PARENT if i in CHILDREN else -1 for i in range(N)]
    assert seen.parent.tolist() == expected
    assert seen.n_children.tolist() == [3 * (i == PARENT) for i in range(N)]
    assert seen.exclusive_parent.nonzero().flatten().tolist() == [PARENT]
    group = seen.group.tolist()
    assert {i for i in range(N) if group[i] >= 0} == {*CHILDREN, *APART}
    assert len({group[i] for i in CHILDREN}) == 1 != len({group[i] for i in (*CHILDREN, *APART)})
    words = [seen.relation(i, k) for i, k in ((1, 0), (0, 1), (1, 2), (6, 7), (4, 5))]
    assert words == ["parent", "child", "sibling", "sibling", "other"]


def test_what_a_world_declares_is_what_its_samples_show() -> None:
    description = WorldDescription(
        n_features=30,
        d_hidden=16,
        firing=ConstantFiring(0.3),
        magnitudes=Magnitudes("constant", 1.0, 0.0),
        hierarchy=Hierarchy(n_roots=4, branching=2, depth=2, exclusive=1.0),
    )
    world = description.build(0)
    declared = declared_structure(world)
    acts = world.sample(20_000, generator(0, "sample")).acts
    seen = observed_structure(CoFiring(acts))
    assert declared is not None
    assert (declared.declared, seen.declared) == (True, False)
    assert seen.parent.tolist() == declared.parent.tolist()
    same = [
        [(group[i] == group[k] and group[i] >= 0) for i in range(30) for k in range(30) if i != k]
        for group in (seen.group.tolist(), declared.group.tolist())
    ]
    assert same[0] == same[1]
    grandchild = int((declared.parent[declared.parent.clamp(min=0)] >= 0).nonzero()[-1])
    assert declared.relation(grandchild, int(declared.parent[declared.parent[grandchild]])) == "ancestor"


def test_toy_worlds_declare_trees_and_groups() -> None:
    def declared(co_firing, signed: bool = False):
        features = Features(6, 0.1, co_firing=co_firing, signed=signed)
        return declared_structure(ToyWorld(ToyModel(6, 3, generator=generator(0, "toy")), features))

    tree = declared(Tree(n_roots=2, branching=2, exclusive=True))
    assert tree.parent.tolist() == tree.group.tolist() == [-1, -1, 0, 0, 1, 1]
    assert declared(Exclusive(3)).group.tolist() == [0, 0, 0, 1, 1, 1]
    assert declared(None).group.tolist() == [-1] * 6
    assert declared(None, signed=True) is None  # what fires above zero excludes what fires below


def test_partners_are_those_of_the_correlation_matrix() -> None:
    seen = CoFiring(ROWS.acts)
    partner, phi = partners(seen)
    expected = np.corrcoef((ACTS > 0).numpy().T.astype(float)) - np.eye(N)
    for i in (*PAIR, PARENT, *CHILDREN, *APART):
        assert int(partner[i]) == int(np.abs(expected[i]).argmax())
        assert float(phi[i]) == pytest.approx(expected[i, partner[i]], abs=1e-9)
    assert float(phi[APART[0]]) < -0.1
    counts = seen.together(torch.tensor([4, 0]), torch.tensor([5, 1]))
    assert counts.tolist() == [float(((ACTS[:, i] > 0) & (ACTS[:, k] > 0)).sum()) for i, k in ((4, 5), (0, 1))]


def test_holdings_are_what_latents_were_made_of() -> None:
    shares = torch.tensor([[0.8, 0.6, 0.0], [0.0, 0.5, 0.9], [0.0, 1.0, 0.0]])
    norms = (shares @ TRUTH[:3]).norm(dim=1, keepdim=True)
    held = parts_of((shares @ TRUTH[:3]) / norms, TRUTH)
    found = torch.zeros(3, N).index_put((held.latent, held.feature), held.share)
    torch.testing.assert_close(found[:, :3], shares / norms, atol=1e-3, rtol=0)
    assert not found[:, 3:].any()
    assert held.latent[held.main(N)[:3]].tolist() == [0, 2, 1]
    assert held.feature[held.largest()].tolist() == [0, 2, 1]
    one, other = held.pairs()
    assert {(int(held.feature[i]), int(held.feature[k])) for i, k in zip(one, other, strict=True)} == {
        *((0, 1), (1, 0), (1, 2), (2, 1))
    }


def test_rates_have_newcombes_interval_and_hold_frequency_still() -> None:
    """56 of 70 against 48 of 80: Newcombe 1998, table II, method 10, has .0524 to .3339."""
    holds = torch.arange(150) < 70
    missed = torch.where(holds, torch.arange(150) < 56, torch.arange(150) < 118)
    found = rate(holds, missed, torch.ones(150))
    assert (found.difference, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    # Rare features are missed, and more of them have the property: that is all.
    frequency = torch.arange(1000.0)
    rare = frequency < 500
    holds = torch.where(rare, torch.arange(1000) % 10 < 8, torch.arange(1000) % 10 < 2)
    found = rate(holds, rare, frequency)
    assert found.difference == pytest.approx(0.6)
    assert found.same_frequency == 0
    assert rate(holds, holds, frequency).same_frequency == 1


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy = {"kind": "toy", "n_features": 24, "d_hidden": 8, "feature_prob": 0.1, "n_steps": 50}
    config = TrainConfig(
        source=toy,
        sae={"kind": "topk", "d_sae": 32, "k": 3},
        train={"n_samples": 6400, "batch_size": 64},
        evaluation={"n_samples": 600},
        out=tmp_path_factory.mktemp("diagnosis") / "run",
    )
    return sae.train(config, report=False).out


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["sae", *map(str, words)])
    main()


def test_a_run_is_diagnosed_and_a_later_evaluation_leaves_that(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "eval", run, "--diagnose")
    result = json.loads((run / "result.json").read_text())
    with (run / "features.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((run / "diagnosis.json").read_text())
    assert len(rows) == 24
    assert (
        sum(bool(row["reason"]) for row in rows)
        == result["diagnosis/missed"]
        == 24 * (1 - result["recovery/coverage_0.9"])
    )
    assert sum(reason["n"] for reason in summary["reasons"]) == result["diagnosis/missed"]
    assert len(summary["units"]["neuron"]["purity"]) == 8
    page = (DOCS / "diagnosis.md").read_text()
    for key in result:
        if key.startswith("diagnosis/"):
            name = re.sub(r"^missed_|(_k)?(_se)?$", "", key.removeprefix("diagnosis/"))
            assert f"`{name}`" in page, key
    for name in (*rows[0], *REASONS):
        assert f"`{re.sub('_k$', '', name)}`" in page, name

    pytest.importorskip("plotly")
    command(monkeypatch, "report", run)
    text = (run / "report.html").read_text()
    for words in (
        "Where the F1 went",
        "Missed features, and why",
        "hidden units of the toy model (before)",
        "Spectrum",
    ):
        assert words in text

    before = (run / "features.csv").read_bytes()
    assert evaluate_run(run).metrics["diagnosis/f1"] == result["diagnosis/f1"]
    assert (run / "features.csv").read_bytes() == before
    assert json.loads((run / "result.json").read_text()) == result


def test_a_report_draws_what_was_diagnosed(run: Path) -> None:
    pytest.importorskip("plotly")
    from sae.report import diagnosis_figures as figures
    from sae.report.data import read_run

    result = evaluate_run(run, diagnose=True).metrics
    read = read_run(run, "run", "topk")
    for limit in ("", "_k"):
        bars = figures.waterfall(read, limit)["data"]
        ends = [bar["base"][0] + bar["x"][0] for bar in bars]
        assert ends[0] == pytest.approx(result["diagnosis/f1"], abs=1e-4)
        assert ends[-1] == pytest.approx(1, abs=1e-4)
        assert [bar["base"][0] for bar in bars[1:]] == pytest.approx(ends[:-1], abs=1e-4)
    counts = figures.reason_bars(read)["data"][0]["x"]
    assert sum(counts) == result["diagnosis/missed"]
    assert sum(len(trace["x"]) for trace in figures.reason_points(read)["data"]) == 24
    alive = read.tables["latent/frequency"] > 0
    mean = np.mean(figures._dimensionality(figures._alive(read)))
    assert mean == pytest.approx(result["dimensionality/feature_dimensionality"], abs=1e-5)
    assert len(figures.dimension_curves(read)["data"][1]["x"]) == alive.sum()


def test_few_missed_features_are_told_as_counts_and_do_not_fill_the_panel(run: Path) -> None:
    pytest.importorskip("plotly")
    from sae.report import diagnosis_figures as figures
    from sae.report.data import read_run

    evaluate_run(run, diagnose=True)
    read = read_run(run, "run", "topk")
    assert read.diagnosis is not None
    few = {"reasons": [{"name": "rare", "means": "rare", "n": 1}], "features": read.diagnosis["features"] * 4}
    read = replace(read, diagnosis=read.diagnosis | few, result=read.result | {"diagnosis/missed": 1.0})
    (note,) = figures.predictors(read)["layout"]["annotations"]
    assert (note["text"], note["xanchor"]) == ("all: 1 of 96", "left")
    (note,) = figures.predictors(replace(read, result={"diagnosis/missed": 95.0}))["layout"]["annotations"]
    assert (note["text"], note["xanchor"]) == ("all: 95 of 96", "right")
    layout = figures.reason_bars(read)["layout"]
    assert layout["xaxis"]["dtick"] == 1
    assert layout["xaxis"]["range"][1] >= 5
    assert layout["yaxis"]["range"] == [4.5, -0.5]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_no_table_of_a_diagnosis_is_cut_off(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    from sae.report import write_report

    evaluate_run(run, diagnose=True)
    page = write_report([run], tmp_path / "page.html")
    count = """<script>document.title = "cut off: " + [...document.querySelectorAll(".scroll")]
      .filter((box) => box.scrollWidth > box.clientWidth).map((box) => box.ariaLabel);</script></body>"""
    page.write_text(page.read_text().replace("</body>", count))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --window-size=1250,900 --virtual-time-budget=5000"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>cut off: </title>" in done.stdout


def test_properties_of_one_set_of_features_have_one_row() -> None:
    def structure(*groups: int) -> Structure:
        return Structure(torch.tensor([-1, 0, 0, -1]), torch.tensor(groups), declared=True)

    table = {name: torch.ones(4) for name in ("frequency", "magnitude", "nearest_feature_cosine")}
    family = ("parent", "parent of an exclusive group", "child", "member of an exclusive group")
    same = attributes(table, structure(-1, 0, 0, -1), torch.ones(4))
    assert [name for name in family if name in same] == ["parent", "child"]
    other = attributes(table, structure(-1, 0, 0, 0), torch.ones(4))
    assert [name for name in family if name in other] == ["parent", "child", "member of an exclusive group"]


def test_what_cannot_be_diagnosed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    np.save(tmp_path / "x.npy", torch.randn(400, 6, generator=generator(0, "x")).numpy())
    config = TrainConfig(
        source={"kind": "array", "path": tmp_path / "x.npy"},
        sae={"kind": "topk", "d_sae": 8, "k": 2},
        train={"n_samples": 640, "batch_size": 64},
        out=tmp_path / "run",
    )
    sae.train(config, report=False)
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "eval", tmp_path / "run", "--diagnose")
    assert ended.value.code == 2
    assert "a diagnosis needs the true features and when they are on" in capsys.readouterr().err

    with pytest.raises(UsageError, match="pass truth, and rows with their true activations"):
        diagnose(Coder(TRUTH), TRUTH, VALIDATION, HeldOut(ROWS.x))
    nothing = FeatureBatch.from_dense(torch.zeros(1000, N))
    with pytest.raises(UsageError, match="no true feature is on in the rows of a diagnosis"):
        diagnose(Coder(TRUTH), TRUTH, HeldOut(VALIDATION.x, nothing), ROWS)


def test_a_source_brings_its_own_rows_and_structure(run: Path) -> None:
    config = sae.load_config(run / "config.yaml")
    source, model = config.source.open(), sae.load(run)
    evaluation = evaluate(model, source.held_out_stream("evaluation", 600), source.truth)
    found = diagnose_source(model, source, evaluation, 600)
    again = diagnose(
        model,
        source.truth,
        source.held_out("calibration", 1024),
        source.held_out("evaluation", 600),
        structure=declared_structure(source.world),
    )
    assert found.metrics == again.metrics
    assert found.features == again.features
    assert found.summary["structure"] == "declared by the world"
