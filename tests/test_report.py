"""The report of made-up runs: what it says, that it loads nothing, and that a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fabricated_runs import fabricate, fabricate_demo
from safetensors.torch import load_file, save_file

from sae.errors import UsageError
from sae.report import html, write_report
from sae.report.keys import SHAPES

pytest.importorskip("plotly")
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """What tests ask of a page: its headings, its text, its attributes, its figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.figures: list[dict[str, Any]] = []
        self.inside: list[tuple[str, str | None]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link"):
            self.inside.append((tag, dict(attrs).get("type")))

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, kind = self.inside[-1] if self.inside else ("", None)
        if tag in ("h1", "h2"):
            self.headings.append(data)
        if kind == "application/json":
            self.figures.append(json.loads(data))
        elif tag not in ("script", "style"):
            self.words.append(data)

    def maps(self) -> list[np.ndarray]:
        """The matrices of cosines, as the page unpacks them."""
        packed = [trace["z"] for figure in self.figures for trace in figure["data"] if trace["type"] == "heatmap"]
        rows = [np.frombuffer(b64decode(z["cosines"]), np.int8).reshape(-1, z["columns"]) for z in packed]
        return [matrix / 127 for matrix in rows]


KNOWN = ["Final metrics", "Before and after", "Recovery against frequency", "Training", "Firing density"]


def test_one_run_has_every_section_in_order(tmp_path: Path) -> None:
    path = write_report([fabricate(tmp_path / "mine")])
    page = Page(path)
    assert path == tmp_path / "mine" / "report.html"
    assert page.headings == [
        "TopK: 64 latents in 16 dimensions",
        *KNOWN,
        "Missed features",
        "Polysemanticity, before and after",
        "Configuration",
    ]
    assert path.stat().st_size < 6e6


def test_headline_tells_what_was_found_against_chance(tmp_path: Path) -> None:
    run = fabricate(tmp_path, n_missed=5)
    found = int((load_file(run / "evaluation.safetensors")["feature/matched_cosine"] > 0.9).sum())
    mcc = json.loads((run / "result.json").read_text())["recovery/mcc"]
    text = Page(write_report([run])).text
    assert f"{found} of 64 true features have a latent of their own" in text
    assert f"(MCC) is {mcc:.3f}, where a random dictionary with as many latents scores 0.329" in text
    assert f"{64 - found} of 64 features are missed." in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "transcoder", "base": {"kind": "batchtopk", "k": 2.5}}, "latents, k = 2.5, trained"),
        ({"kind": "gated", "l0": 3.0}, "latents, l0 = 3, l1 coefficient = 0.1, trained"),
    ],
    ids=["base", "l0"],
)
def test_options_that_are_not_given_are_not_told(tmp_path: Path, options: dict, said: str) -> None:
    run = fabricate(tmp_path, sae=options | {"d_sae": 64})
    assert said in Page(write_report([run])).text


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            {"kind": "world", "path": "a.yaml"},
            "activations of the world a.yaml, which has 64 features in 16 dimensions;",
        ),
        ({"kind": "array", "path": "acts.npy"}, "trained on the activations in acts.npy;"),
        (None, "trained on activations that were passed in from Python;"),
    ],
    ids=["world", "array", "python"],
)
def test_where_the_activations_are_from(tmp_path: Path, source: dict | None, said: str) -> None:
    run = fabricate(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"source": source}))
    assert said in Page(write_report([run])).text


def test_a_run_that_began_with_another_sae_says_so(tmp_path: Path) -> None:
    run = fabricate(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"]["start_from"] = "runs/old"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "it began with the weights of runs/old." in Page(write_report([run])).text


@pytest.mark.parametrize(
    ("fvu", "said"),
    [
        (0.07, "It leaves 7.0% of the variance unexplained, with"),
        (4331926.4, "It reconstructs worse than the mean activation does (FVU 4.332e+06), with"),
    ],
)
def test_an_error_above_the_variance_is_told_in_words(tmp_path: Path, fvu: float, said: str) -> None:
    run = fabricate(tmp_path)
    result = json.loads((run / "result.json").read_text()) | {"metrics/fvu": fvu}
    (run / "result.json").write_text(json.dumps(result))
    page = Page(write_report([run]))
    assert said in page.text
    assert "4331926" not in page.text.partition("Every metric")[0]


def test_what_hardly_changes_is_drawn_on_a_linear_axis(tmp_path: Path) -> None:
    run = fabricate(tmp_path)

    def l0_axis(*values: float) -> dict[str, Any]:
        lines = [{"step": step, "losses/overall_loss": 1.0, "metrics/l0": l0} for step, l0 in enumerate(values)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        _, l0, _ = [figure for figure in Page(write_report([run])).figures if figure["data"][0].get("mode") == "lines"][
            :3
        ]
        return l0["layout"]["yaxis"]

    for values in ((12.0, 12.0), (30.0, 6.0)):
        assert l0_axis(*values)["rangemode"] == "tozero"
        assert "type" not in l0_axis(*values)
    assert l0_axis(61.0, 12.0)["type"] == "log"


def test_map_of_latents_is_a_diagonal_in_the_order_of_the_match(tmp_path: Path) -> None:
    run = fabricate(tmp_path, n_missed=0)
    tables = load_file(run / "evaluation.safetensors")
    before, after = Page(write_report([run])).maps()
    order = tables["feature/frequency"].argsort(descending=True, stable=True).numpy()
    matched = tables["feature/matched_latent"].numpy()[order] >= 0
    cosine = tables["feature/matched_cosine"].numpy()[order]
    rows = np.arange(64)[matched]
    assert np.allclose(after[rows, np.arange(len(rows))], cosine[matched], atol=1 / 127)
    assert np.allclose(before, tables["truth"].numpy()[order], atol=1 / 127)


def test_nothing_missed_is_said(tmp_path: Path) -> None:
    run = fabricate(tmp_path)
    tables = load_file(run / "evaluation.safetensors")
    save_file(tables | {"feature/found": torch.ones(64, dtype=torch.bool)}, run / "evaluation.safetensors")
    assert "None is missed: each of the 64 features has a latent" in Page(write_report([run])).text


def test_demo_summarises_methods_and_draws_their_runs(tmp_path: Path) -> None:
    run = fabricate_demo(tmp_path)
    rows = json.loads((run / "summary.json").read_text())
    page = Page(write_report([run]))
    mcc = [row["recovery/mcc"] for row in rows if row["method"] == "l1"]
    assert f"L1 2 {fmean(mcc):.3f} ± {stdev(mcc):.3f} 0.329" in page.text
    assert "ICA 1 0.420 0.329" in page.text
    (methods, *_) = re.findall(r'aria-label="Methods">.*?</table>', page.source, re.DOTALL)
    bars = [
        [bool(re.search('class="(no-)?bar"', cell)) for cell in row.split("</t")] for row in methods.split("<tr>")[1:]
    ]
    assert {row.index(True) for row in bars} == {4}  # narrow pages leave the whole column out, head included
    lines = [[trace.get("name") for trace in figure["data"]] for figure in page.figures]
    every = [f"{method}-{seed}" for method in ("topk", "batchtopk", "l1", "l1_low") for seed in (0, 1)]
    assert lines.count(every) == 3  # loss, L0, MCC
    assert len(page.maps()) == 5  # the neurons, and one seed of each method


def test_baselines_of_a_demo_add_what_its_summary_lacks(tmp_path: Path) -> None:
    run = fabricate_demo(tmp_path, n_seeds=1)
    rows = [{"method": method, "seed": 0, "recovery/mcc": 0.6} for method in ("topk", "pca", "ksvd")]
    (run / "baselines.json").write_text(json.dumps(rows))
    page = Page(write_report([run]))
    more = page.text.partition("Further baselines beside topk-0")[2].partition("Every metric")[0]
    assert "K-SVD 0.600" in more
    assert "PCA" not in more
    assert "TopK" not in more
    assert "What the first table has already is not repeated." in more
    (run / "baselines.json").write_text(json.dumps(rows[:2]))
    assert "Further baselines" not in Page(write_report([run])).text


def test_legends_look_as_what_they_name(tmp_path: Path) -> None:
    page = Page(write_report([fabricate_demo(tmp_path, n_seeds=1)]))
    keys = re.findall(r'<ul class="key">.*?</ul>', page.source)
    assert [key.count("<line") for key in keys] == [0, 4, 4]  # frequency, training, density
    points = next(figure["data"] for figure in page.figures if figure["data"][0].get("mode") == "markers")
    shapes = [trace["marker"]["symbol"] for trace in points]
    assert shapes == ["circle", "square", "diamond", "triangle-up"]
    assert re.findall('<path d="(.*?)"', keys[0]) == [SHAPES[shape] for shape in shapes]
    assert all(trace["marker"]["opacity"] < 0.5 for trace in points)


def test_runs_are_compared_and_unlike_ones_too(tmp_path: Path) -> None:
    known, other = fabricate(tmp_path / "a"), fabricate(tmp_path / "b", known=False, seed=1)
    page = Page(write_report([known, other], tmp_path / "both.html"))
    assert page.headings[:6] == ["2 dictionaries compared", *KNOWN]
    assert "a: TopK with 64 latents, k = 3" in page.text
    assert len(page.maps()) == 2
    assert [len(figure["data"]) for figure in page.figures if len(figure["data"]) == 2] == [2, 2, 2, 2]


def test_unknown_truth_leaves_recovery_out(tmp_path: Path) -> None:
    run = fabricate(tmp_path, known=False, source={"kind": "array", "path": "acts.npy"})
    page = Page(write_report([run]))
    assert page.headings[1:] == ["Final metrics", "Training", "Firing density", "Configuration"]
    assert "The true features of these activations are not known" in page.text
    assert "MCC" not in page.text


def test_known_directions_without_activations_are_matched(tmp_path: Path) -> None:
    run = fabricate(tmp_path)
    tables = load_file(run / "evaluation.safetensors")
    kept = {name: tensor for name, tensor in tables.items() if not name.startswith("feature/")}
    save_file(kept, run / "evaluation.safetensors")
    page = Page(write_report([run]))
    assert "Recovery against frequency" not in page.headings
    assert "magnitude" not in page.text
    found = int((tables["feature/matched_cosine"] > 0.9).sum())
    assert f"{found} of 64 true features have a latent of their own" in page.text


def test_two_dimensions_are_drawn(tmp_path: Path) -> None:
    run = fabricate(tmp_path, n_features=5, d_in=2, n_missed=0)
    page = Page(write_report([run]))
    assert "Geometry" in page.headings
    [arrows] = [figure for figure in page.figures if figure["data"][0].get("name") == "true feature"]
    tips = torch.tensor([arrows["data"][0][axis][1::3] for axis in "xy"]).T
    assert torch.allclose(tips, load_file(run / "evaluation.safetensors")["truth"])


def test_what_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    run = fabricate(tmp_path)
    tables = load_file(run / "evaluation.safetensors")
    save_file(tables | {"feature/f1": torch.full((64,), torch.nan)}, run / "evaluation.safetensors")
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 650, "losses/overall_loss": float("nan")}) + "\n")
    assert len(Page(write_report([run])).figures) == 8


def test_text_is_escaped(tmp_path: Path) -> None:
    attack = "</script><script>alert(1)</script><b>&"
    run = fabricate(tmp_path / "<b>&amp;", source={"kind": "array", "path": attack})
    rows = [{"method": attack, "seed": 0, "recovery/mcc": 0.5}]
    (run / "summary.json").write_text(json.dumps(rows), encoding="utf-8")
    page = Page(write_report([run]))
    assert "<script>alert" not in page.source
    assert "<b>" not in page.source.split("plotly.js v")[0]
    assert attack in page.text


def test_nothing_is_loaded(tmp_path: Path) -> None:
    page = Page(write_report([fabricate_demo(tmp_path, n_seeds=1)]))
    loading = {value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")}
    assert loading == {"data:,"}
    own = page.source.replace(html.plotly_js(), "")
    assert not re.search(r"https?:|@import|url\(", own)
    assert "default-src 'none'" in own


def test_missing_extra_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    html.plotly_js.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UsageError, match=r"pip install 'sae\[report\]'"):
        write_report([fabricate(tmp_path)])
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("lost", ["result.json", "sae.safetensors", "metrics.jsonl"])
def test_unfinished_run_is_refused(tmp_path: Path, lost: str) -> None:
    (fabricate(tmp_path) / lost).unlink()
    with pytest.raises(UsageError, match=f"{lost} is missing"):
        write_report([tmp_path])


def test_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fabricate(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("sae.report.data.os.access", lambda path, mode: path.name != "sae.safetensors")
        with pytest.raises(UsageError, match=r"sae\.safetensors cannot be read: permission denied"):
            write_report([run])
    (run / "config.yaml").write_text("a: [1")
    with pytest.raises(UsageError, match=r"config\.yaml is not valid YAML") as raised:
        write_report([run])
    assert "train the run again" not in str(raised.value)


def test_nothing_to_report_is_refused() -> None:
    with pytest.raises(UsageError, match="got none"):
        write_report([])


def test_import_is_light() -> None:
    code = "import sys, sae.report; assert not {'plotly', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_browser_draws_every_figure_without_complaint(tmp_path: Path) -> None:
    path = write_report([fabricate_demo(tmp_path, n_seeds=1)])
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=9000"
    command = [
        str(CHROMIUM),
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    n_plots = len(re.findall(r'class="plot (?:wide|square)', done.stdout))
    assert n_plots == len(Page(path).figures)
    assert done.stdout.count('class="plot-container plotly') == n_plots
    assert 'class="modebar-btn' not in done.stdout  # where nothing hovers they would stand over the data for good
    assert len(re.findall(r'<image [^>]*href="data:image/png', done.stdout)) == 5


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Steps this small spend their time at the barriers between threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.usefixtures("one_thread")
def test_overview_is_a_picture_of_the_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from sae.report.overview import HEIGHT, LEFT_OF_LATENTS, MAP, TOP, WIDTH, draw_overview

    draw_overview(fabricate(tmp_path / "mine", n_missed=0), tmp_path / "overview.png")
    picture = imread(tmp_path / "overview.png")[..., :3]
    assert picture.shape == (HEIGHT, WIDTH, 3)
    after = picture[TOP : TOP + MAP, LEFT_OF_LATENTS : LEFT_OF_LATENTS + MAP].mean(axis=2)
    cells = after.reshape(64, MAP // 64, 64, MAP // 64).mean(axis=(1, 3))
    assert (np.diff(cells.argmin(axis=1)) == 1).mean() > 0.9  # the darkest cells are a diagonal


def test_overview_needs_the_truth(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from sae.report.overview import draw_overview

    with pytest.raises(UsageError, match="not known"):
        draw_overview(fabricate(tmp_path, known=False), tmp_path / "overview.png")


def test_runs_that_differ_in_their_seed_alone_are_shown_over_seeds(tmp_path: Path) -> None:
    runs = [fabricate(tmp_path / f"topk-{seed}", seed=seed, n_missed=3 + seed) for seed in range(3)]
    other = fabricate(tmp_path / "relu", sae={"kind": "relu", "d_sae": 64, "l1_coefficient": 0.1})
    text = write_report([*runs, other]).read_text()
    assert "topk-0 and its other seeds" in text
    assert "Every metric over the 3 seeds of topk-0, topk-1 and topk-2" in text
    mcc = [json.loads((run / "result.json").read_text())["recovery/mcc"] for run in runs]
    assert f"{fmean(mcc):.3f}" in text
    assert f"± {stdev(mcc):.3f}" in text
    assert (
        "over the" not in write_report([runs[0], other]).read_text().partition("Before and after")[0].split("Final")[1]
    )
