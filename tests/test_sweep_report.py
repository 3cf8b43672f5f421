"""The page of a sweep, of made-up members: what it says, what it draws, and that a browser draws it."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fabricated_runs import fabricate
from scipy import stats
from test_report import CHROMIUM, Page

from sae.errors import UsageError
from sae.report import write_report
from sae.report.pareto import Point, pareto, trade_off

pytest.importorskip("plotly")

SETTINGS = {
    "topk-k2": ({"kind": "topk", "d_sae": 64, "k": 2}, 2.0, 0.2),
    "topk-k4": ({"kind": "topk", "d_sae": 64, "k": 4}, 4.0, 0.1),
    "relu-l1_coefficient0.1": ({"kind": "relu", "d_sae": 64, "l1_coefficient": 0.1}, 5.0, 0.15),
}


def fabricate_sweep(out: Path, *, known: bool = True, ends: dict[str, tuple[str, str]] | None = None) -> Path:
    """A sweep of three settings with two seeds; `ends` says which members ended badly, and why."""
    members: list[dict[str, Any]] = []
    for setting, (sae, l0, fvu) in SETTINGS.items():
        for seed in (0, 1):
            name = f"{setting}-seed{seed}"
            run = fabricate(out / name, sae=sae, seed=seed, known=known)
            result = json.loads((run / "result.json").read_text())
            result |= {"metrics/l0": l0 + seed / 10, "metrics/fvu": fvu + seed / 100}
            (run / "result.json").write_text(json.dumps(result))
            status, reason = (ends or {}).get(name, ("done", ""))
            if status != "done":
                (run / "result.json").unlink()
            values = {f"sae.{key}": value for key, value in sae.items() if key != "d_sae"} | {"train.seed": seed}
            members.append({"name": name, "values": values, "status": status, "reason": reason})
    varies = ["sae.kind", "sae.k", "sae.l1_coefficient", "train.seed"]
    (out / "sweep.json").write_text(json.dumps({"name": "mine", "varies": varies, "members": members}))
    return out


def test_every_member_has_a_row_and_a_point_that_leads_to_it(tmp_path: Path) -> None:
    page = Page(write_report([fabricate_sweep(tmp_path)]))
    assert page.headings == [
        "Sweep mine: 6 dictionaries",
        "What sparsity costs",
        "Members",
        "Training",
        "Configuration",
    ]
    names = [f"{setting}-seed{seed}" for setting in SETTINGS for seed in (0, 1)]
    rows = [value for tag, name, value in page.attributes if (tag, name) == ("span", "id")]
    assert rows == [f"member-{name}" for name in names]
    for figure in page.figures[:2]:
        points = [trace for trace in figure["data"] if trace["mode"] == "markers"]
        assert [name for trace in points for name in trace["customdata"]] == names
        assert [len(trace["x"]) for trace in points] == [4, 2]
    assert [len(figure["data"]) for figure in page.figures[2:]] == [6, 6, 6]
    assert [key.count("<line") for key in re.findall(r'<ul class="key">.*?</ul>', page.source)] == [0, 2]
    assert "6 of 6 members are done ." in page.text
    assert "sae.kind (topk, relu), sae.k (2, 4), sae.l1_coefficient (0.1) and train.seed (0, 1)" in page.text


def test_the_best_setting_is_that_of_the_best_mean_over_seeds(tmp_path: Path) -> None:
    sweep = fabricate_sweep(tmp_path)
    scores = {"topk-k2": (0.99, 0.5), "topk-k4": (0.9, 0.94), "relu-l1_coefficient0.1": (0.6, 0.6)}
    for setting, of_seeds in scores.items():
        for seed, mcc in enumerate(of_seeds):
            path = tmp_path / f"{setting}-seed{seed}/result.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"recovery/mcc": mcc}))
    text = Page(write_report([sweep])).text
    assert (
        "The best recovery is that of TopK, k = 4: MCC 0.920 ± 0.028 over 2 seeds, at L0 4.05, where a random" in text
    )
    assert "The lowest error" not in text
    for seed in (0, 1):
        (tmp_path / f"relu-l1_coefficient0.1-seed{seed}/result.json").write_text(
            json.dumps(json.loads(path.read_text()) | {"metrics/fvu": 0.01})
        )
    text = Page(write_report([sweep])).text
    assert "The lowest error is that of ReLU, l1 coefficient = 0.1: FVU 0.010 ± 0.000 over 2 seeds, MCC 0.600." in text


def test_a_sweep_called_sweep_is_named_once(tmp_path: Path) -> None:
    summary = tmp_path / "sweep.json"
    fabricate_sweep(tmp_path)
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"name": "sweep"}))
    assert Page(write_report([tmp_path])).headings[0] == "Sweep: 6 dictionaries"


def test_lines_join_means_over_seeds(tmp_path: Path) -> None:
    fvu, *_ = Page(write_report([fabricate_sweep(tmp_path)])).figures
    lines = [trace for trace in fvu["data"] if trace["mode"] == "lines" and trace.get("name") != "front"]
    assert [(trace["x"], trace["y"]) for trace in lines] == [([2.05, 4.05], [0.205, 0.105]), ([5.05], [0.155])]


def test_the_front_is_what_no_member_beats(tmp_path: Path) -> None:
    places = {"a": (1.0, 0.3), "b": (2.0, 0.2), "c": (2.0, 0.25), "d": (3.0, 0.2), "e": (4.0, 0.1), "f": (1.0, 0.3)}
    points = [
        Point(name, "g", "", name, True, {"metrics/l0": l0, "metrics/fvu": fvu}, [])
        for name, (l0, fvu) in places.items()
    ]
    assert pareto(points, "metrics/fvu") == {"a", "b", "e", "f"}
    front = trade_off(points, "metrics/fvu", "FVU", log=True)["data"][0]
    assert (front["x"], front["y"]) == ([1, 1, 2, 4], [0.3, 0.3, 0.2, 0.1])
    on_two = [replace(point, source=str(point.name in "cf")) for point in points]
    assert pareto(on_two, "metrics/fvu") == {"a", "b", "c", "e", "f"}  # c lies behind b alone, which is on others
    fronts = [
        trace for trace in trade_off(on_two, "metrics/fvu", "FVU", log=True)["data"] if trace.get("name") == "front"
    ]
    assert [trace["x"] for trace in fronts] == [[1, 2], [1, 2, 4]]
    rounded = replace(points[1], name="r", result={"metrics/l0": 2 - 1e-12, "metrics/fvu": 0.21})
    assert "r" not in pareto([*points, rounded], "metrics/fvu")
    page = Page(write_report([fabricate_sweep(tmp_path)]))
    assert re.findall(r"front (\w+)", page.text.partition("Members")[2]) == ["done"] * 2


@pytest.mark.parametrize(("widest", "kind", "x"), [(4.0, None, 2.0), (40.0, "log", 0.30103)])
def test_the_l0_of_the_truth_stands_at_its_place_on_either_axis(widest: float, kind: str | None, x: float) -> None:
    points = [
        Point(str(l0), "g", "", str(l0), True, {"metrics/l0": l0, "metrics/fvu": 0.1}, []) for l0 in (1.0, widest)
    ]
    layout = trade_off(points, "metrics/fvu", "FVU", log=True, truth=2.0)["layout"]
    (words,) = layout["annotations"]
    assert words["x"] == pytest.approx(x)
    assert layout["xaxis"].get("type") == kind
    assert layout["yaxis"]["rangemode"] == "tozero"


def test_members_that_ended_badly_are_told_and_not_drawn_among_the_results(tmp_path: Path) -> None:
    ends = {
        "topk-k4-seed1": ("diverged", "the loss is not finite at step 50"),
        "topk-k2-seed1": ("interrupted", ""),
        "topk-k2-seed0": ("stopped", "99.0% of its latents are dead"),
    }
    page = Page(write_report([fabricate_sweep(tmp_path, ends=ends)]))
    assert "3 of 6 members are done , 1 stopped, 1 diverged and 1 interrupted." in page.text
    assert "topk-k4-seed1 diverged: the loss is not finite at step 50" in page.text
    points = [trace for trace in page.figures[0]["data"] if trace["mode"] == "markers"]
    assert [len(trace["x"]) for trace in points] == [1, 2]
    assert len(page.figures[2]["data"]) == 6  # their curves are


def test_a_sweep_without_results_or_truth(tmp_path: Path) -> None:
    page = Page(write_report([fabricate_sweep(tmp_path / "unknown", known=False)]))
    assert len(page.figures) == 3
    assert "MCC" not in page.text
    names = [f"{setting}-seed{seed}" for setting in SETTINGS for seed in (0, 1)]
    ends = dict.fromkeys(names, ("unfinished", ""))
    page = Page(write_report([fabricate_sweep(tmp_path / "begun", ends=ends)]))
    assert page.headings[1:] == ["Members", "Training", "Configuration"]
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/sweep.json").write_text('{"name": "n", "varies": [], "members": [{"name": "a"}]}')
    with pytest.raises(UsageError, match="no member of this sweep has begun"):
        write_report([tmp_path / "nothing"])
    (tmp_path / "nothing/sweep.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(UsageError, match="is a sweep, which has a page of its own"):
        write_report([tmp_path / "begun", tmp_path / "unknown"])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_browser_draws_every_figure_and_follows_a_point(tmp_path: Path) -> None:
    path = write_report([fabricate_sweep(tmp_path)])
    click = """<script>addEventListener("load", () => setTimeout(() => {
      document.querySelector(".plot").emit("plotly_click", {points: [{customdata: "topk-k4-seed1"}]});
      document.title = location.hash;
    }, 1000));</script></body>"""
    path.write_text(path.read_text().replace("</body>", click))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=9000"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [str(CHROMIUM), *flags.split(), profile, "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    n_plots = len(re.findall(r'class="plot (?:wide|square)', done.stdout))
    assert n_plots == 5
    assert done.stdout.count('class="plot-container plotly') == n_plots
    assert "<title>#member-topk-k4-seed1</title>" in done.stdout


def test_bars_are_intervals_over_three_seeds_and_more() -> None:
    def bars(n: int) -> dict[str, Any] | None:
        values = [0.1, 0.2, 0.4][:n]
        points = [
            Point(f"a{seed}", "A", "A", "A", True, {"metrics/l0": 2.0, "metrics/fvu": fvu}, [])
            for seed, fvu in enumerate(values)
        ]
        (line,) = [trace for trace in trade_off(points, "metrics/fvu", "FVU", log=False)["data"] if "line" in trace]
        return line.get("error_y")

    assert bars(2) is None
    three = bars(3)
    assert three is not None
    low, high = stats.ttest_1samp([0.1, 0.2, 0.4], 0.0).confidence_interval(0.95)
    assert three["array"] == pytest.approx([(high - low) / 2], rel=1e-3)


def test_settings_are_shown_over_seeds(tmp_path: Path) -> None:
    text = write_report([fabricate_sweep(tmp_path)]).read_text()
    assert "<h3>Settings over seeds</h3>" in text
    assert "Every metric over the 2 seeds of TopK, k = 2" in text
    assert "2.05" in text  # the mean of L0 2.0 and 2.1
