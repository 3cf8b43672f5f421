"""What the documentation says is held against the code: examples run, tables are complete, imports point up."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Literal, get_args, get_origin

import pytest
import torch
import yaml
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from safetensors.torch import load_file
from test_architecture import PATHS, imports

import sae
from sae import SAEConfig, SourceConfig, TrainConfig, UsageError
from sae.config import parse_config
from sae.sweep.plan import SweepSection, parse_sweep

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXAMPLE = DOCS / "examples" / "my_sparsifier.py"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
CHANCE_AND_TRUTH = re.compile(r"_(chance|chance_sd|truth|difference)$")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_and_yaml_blocks_parse(page):
    assert read(page).count("```") % 2 == 0
    for block in blocks(page, "python"):
        ast.parse(block)
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(page)):
        assert target.startswith("http") or (page.parent / target).exists(), target


# The tutorial


def test_the_tutorial_prints_what_it_says(tmp_path, monkeypatch, capsys):
    """Digits may differ from one processor to the next; what follows from them may not."""
    monkeypatch.chdir(tmp_path)
    script = "\n".join(blocks(DOCS / "tutorial.md", "python"))
    exec(compile(script, "tutorial.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^# (.*)$", script, flags=re.MULTILINE)
    assert len(promised) == 8
    for ours, theirs in zip(printed, promised, strict=False):
        words, numbers = (re.split(r"[\d.]+", ours), re.findall(r"\d+\.?\d*", ours))
        assert words == re.split(r"[\d.]+", theirs)
        expected = [pytest.approx(float(number), rel=0.15, abs=0.05) for number in re.findall(r"\d+\.?\d*", theirs)]
        assert [float(number) for number in numbers] == expected
    assert len(printed) > len(promised), "the last one says which outputs depend on a latent"


# The example sparsifier


@pytest.fixture
def example(monkeypatch):
    """The module as a user imports it; its kind is forgotten afterwards."""
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    monkeypatch.delitem(sys.modules, EXAMPLE.stem, raising=False)
    monkeypatch.setattr(SAEConfig, "kinds", dict(SAEConfig.kinds))
    return __import__(EXAMPLE.stem)


def test_the_page_shows_the_example_as_it_is():
    assert read(EXAMPLE) in blocks(DOCS / "sparsifiers.md", "python")


def test_the_example_selects_the_largest_of_each_group(example):
    pre = torch.tensor([[1.0, 3.0, -1.0, -2.0, 0.5, 0.0], [-1.0, -3.0, 2.0, 4.0, 5.0, 6.0]])
    expected = torch.tensor([[0, 3, 0, 0, 0.5, 0], [0, 0, 0, 4, 0, 6]])
    assert torch.equal(example.GroupMax(3)(pre).dense(), expected)


def test_the_example_trains_saves_and_loads(example, tmp_path):
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(
        sae={"kind": "groupmax", "d_sae": 24, "n_groups": 4},
        train={"n_samples": 6400, "batch_size": 64},
        log={"every": 10},
        out=tmp_path / "run",
    )
    result = sae.train(config, source=x, report=False)
    lines = [json.loads(line) for line in read(tmp_path / "run" / "metrics.jsonl").splitlines()]
    assert lines[-1]["metrics/fvu"] < 0.8 * lines[0]["metrics/fvu"]
    loaded = sae.load(tmp_path / "run")
    assert torch.equal(loaded(x), result.sae(x))
    assert loaded.encode(x).counts.max() <= 4

    SAEConfig.kinds.pop("groupmax")
    with pytest.raises(UsageError, match="unknown kind 'groupmax'"):
        sae.load(tmp_path / "run")


def test_the_example_says_which_groups_fit(example):
    with pytest.raises(UsageError, match="n_groups must divide d_sae=24, got 7"):
        parse_config({"sae": {"kind": "groupmax", "d_sae": 24, "n_groups": 7}})


# The configuration


def rule(field: FieldInfo) -> str:
    """The values that a field takes, as the page writes them."""
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return " ".join(f"`{choice}`" for choice in get_args(annotation))
    options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    name = next(option for option in options if option is not type(None)).__name__.lower()
    signs = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Le: ("le", "≤")}
    bounds = [
        f"{sign} {getattr(m, key):g}" for m in field.metadata for kind, (key, sign) in signs.items() if type(m) is kind
    ]
    return " ".join([name.replace("str", "text"), ", ".join(bounds)]).strip()


def field_row(name: str, field: FieldInfo) -> str:
    """The first three cells of a field's row: its dotted name, its rule, its default."""
    default = (
        "required" if field.is_required() else json.dumps(field.default, default=str, ensure_ascii=False).strip('"')
    )
    return f"| `{name}` | {rule(field)} | {default} |"


def own(kinds: dict[str, type[BaseModel]]) -> list[type[BaseModel]]:
    return [member for member in kinds.values() if member.__module__.startswith("sae.")]


def field_rows() -> Iterator[str]:
    for section, field in TrainConfig.model_fields.items():
        family = {"source": own(SourceConfig.kinds), "sae": own(SAEConfig.kinds)}
        if isinstance(field.default, BaseModel):
            family[section] = [type(field.default)]
        elif section not in family:
            yield field_row(section, field)
        for member in family.get(section, []):
            yield from (field_row(f"{section}.{name}", inner) for name, inner in member.model_fields.items())


def test_every_field_has_its_row():
    page = read(DOCS / "configuration.md")
    missing = [row for row in dict.fromkeys(field_rows()) if row not in page]
    assert not missing, "docs/configuration.md lacks\n" + "\n".join(missing)


def test_every_field_of_a_sweep_has_its_row():
    page = read(DOCS / "sweeps.md")
    fields = {field.alias or name: field for name, field in SweepSection.model_fields.items()}
    rows = {f"sweep.{name}": field_row(f"sweep.{name}", field) for name, field in fields.items()}
    assert [row for row in rows.values() if row not in page] == []
    assert set(re.findall(r"^\| `(sweep\.\w+)` \|[^|\n]*\|[^|\n]*\|", page, flags=re.MULTILINE)) == rows.keys()


def test_the_sweeps_shown_are_valid():
    examples = blocks(DOCS / "sweeps.md", "yaml")
    assert examples
    for block in examples:
        parse_sweep(yaml.safe_load(block))


def test_no_row_without_a_field():
    known = {row.split("`")[1] for row in field_rows()}
    row = r"^\| `((?:source|sae|train|evaluation|log|checkpoint)\.\w+)` \|[^|\n]*\|[^|\n]*\|"
    named = set(re.findall(row, read(DOCS / "configuration.md"), flags=re.MULTILINE))
    assert named == known - {"out"}


def test_the_configurations_shown_are_valid():
    examples = blocks(DOCS / "configuration.md", "yaml")
    assert examples
    for block in examples:
        parse_config(yaml.safe_load(block))


# What a run leaves


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run that knows its truth, and has every kind of file."""
    config = TrainConfig(
        source={"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 20},
        sae={"kind": "topk", "d_sae": 24, "k": 3},
        train={"n_samples": 640, "batch_size": 64},
        evaluation={"n_samples": 300},
        log={"every": 5},
        checkpoint={"every_steps": 5},
        out=tmp_path_factory.mktemp("docs") / "run",
    )
    return sae.train(config, report=False).out


def test_every_logged_key_is_documented(finished_run):
    page = read(DOCS / "configuration.md")
    for key in json.loads(read(finished_run / "metrics.jsonl").splitlines()[0]):
        assert f"`{key}`" in page, key


def test_every_file_and_tensor_of_a_run_is_documented(finished_run):
    page = read(DOCS / "configuration.md")
    names = {path.name + "/" * path.is_dir() for path in finished_run.iterdir()}
    names |= load_file(finished_run / "evaluation.safetensors").keys()
    names |= load_file(finished_run / "sae.safetensors").keys()
    names |= {path.name for path in finished_run.glob("checkpoints/*/*")}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_every_metric_is_documented(finished_run):
    page = read(DOCS / "metrics.md")
    for key in json.loads(read(finished_run / "result.json")):
        name = CHANCE_AND_TRUTH.sub("", key.split("/")[1])
        name = re.sub("^(latent|neuron)_", "", name) if key.startswith("polysemanticity/") else name
        assert f"`{name}`" in page, key


# The architecture


def test_the_table_of_modules_is_complete_and_imports_point_up_in_it():
    rows = re.findall(r"^\| (\d+) \| `([\w.]+)` \|", read(DOCS / "architecture.md"), flags=re.MULTILINE)
    level = {name: int(number) for number, name in rows}
    assert level.keys() == PATHS.keys()
    down = [
        f"{name} imports {other}"
        for name in level
        for other in imports(name) & level.keys()
        if level[other] > level[name]
    ]
    assert down == []
