"""Descriptions from files: what is read, and what is refused in one line."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from toymodels import load_world
from toymodels.correlations import LowRank
from toymodels.dictionaries import OrthogonalisedDictionary
from toymodels.errors import UsageError
from toymodels.firing import ConstantFiring, FoldedNormalOver, LinearOver, Magnitudes, Over, ZipfFiring
from toymodels.hierarchies import Hierarchy
from toymodels.mappings import read_mapping
from toymodels.synthetic import WorldDescription

WORLDS = Path(__file__).parent.parent / "configs" / "worlds"


def test_the_worlds_that_come_along():
    small = WorldDescription.read(WORLDS / "synth1k.yaml")
    assert small == WorldDescription(
        1024,
        128,
        OrthogonalisedDictionary(50, mean_max_overlap=0.28),
        ZipfFiring(0.5, 0.43, 0.002),
        Magnitudes("rectified_normal", LinearOver(5.0, 4.0), FoldedNormalOver(0.5, 0.5)),
        Hierarchy(32, 4, 3, 1.0, True, "factors"),
        LowRank(8, 0.1),
        0.5,
    )
    large = WorldDescription.read(WORLDS / "synth16k.yaml")
    assert large.firing == ZipfFiring(0.5, 0.4, 5e-4)
    assert large.correlation == LowRank(25, 0.1)


def test_numbers_may_be_written_without_a_point():
    described = read_mapping(
        WorldDescription, yaml.safe_load("{n_features: 4, d_hidden: 2, noise: 1, firing: {kind: constant, prob: 1e-2}}")
    )
    assert (described.noise, described.firing) == (1.0, ConstantFiring(0.01))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("{n_featurs: 3}", "unknown key 'n_featurs'; did you mean 'n_features'"),
        ("{n_features: null}", "n_features must be a whole number, got None"),
        ("{n_features: 2.5}", "n_features must be a whole number, got 2.5"),
        ("{n_features: true}", "n_features must be a whole number, got True"),
        ("{n_features: 0}", "n_features must be at least 1, got 0"),
        ("{bias: .nan}", "bias must be a number, got nan"),
        ("{bias: wide}", "bias must be a number, got 'wide'"),
        ("{bias: -1}", "bias must not be negative, got -1"),
        ("{noise: -0.5}", "noise must not be negative, got -0.5"),
        ("{firing: 0.1}", "firing must be a mapping, got 0.1"),
        ("{firing: {prob: 0.1}}", "firing needs a kind, got None"),
        ("{firing: {kind: zip}}", "firing needs a kind, got 'zip'; did you mean 'zipf'"),
        ("{firing: {kind: zipf, max_prb: 1}}", "unknown key 'firing.max_prb'; did you mean 'max_prob'"),
        ("{firing: {kind: constant, prob: 1.5}}", r"firing: prob must lie in \[0, 1\], got 1.5"),
        ("{firing: {kind: linear, max_prob: 0.1, min_prob: -0.1}}", r"min_prob must lie in \[0, 1\], got -0.1"),
        ("{firing: {kind: zipf, max_prob: 0.1, min_prob: 0.2}}", "max_prob must not lie below min_prob=0.2, got 0.1"),
        ("{firing: {kind: zipf, exponent: 0}}", "exponent must be positive, got 0"),
        ("{magnitudes: {kind: folded}}", "magnitudes: kind 'folded' is unknown; did you mean 'folded_normal'"),
        ("{magnitudes: {mean: -1}}", "magnitudes: mean must not be negative, got -1"),
        ("{magnitudes: {kind: rectified_normal, std: -1}}", "std must not be negative, got -1"),
        ("{magnitudes: {mean: {kind: linear, start: 1, end: -1}}}", "mean must not be negative"),
        (
            "{magnitudes: {mean: {kind: exponential, start: 0, end: 1}}}",
            "magnitudes.mean: start and end must be positive",
        ),
        ("{magnitudes: {std: {kind: folded_normal, std: -1}}}", "magnitudes.std: std must not be negative, got -1"),
        ("{magnitudes: {kind: exponential, std: 1}}", "exponential magnitudes have no std, got 1"),
        ("{magnitudes: {mean: 0}}", "mean of constant magnitudes must be positive"),
        ("{dictionary: {kind: overlap}}", "dictionary.mean_max is required"),
        ("{dictionary: {kind: coherence, coherence: 1.2}}", r"coherence must lie in \[0, 1\), got 1.2"),
        ("{hierarchy: {n_roots: 13}}", "hierarchy.n_roots must not exceed n_features=12, got 13"),
        ("{hierarchy: {n_roots: 0}}", "hierarchy: n_roots must be at least 1, got 0"),
        ("{hierarchy: {n_roots: 2, exclusive: 2}}", r"exclusive must lie in \[0, 1\], got 2"),
        ("{hierarchy: {n_roots: 2, compensation: exakt}}", "compensation 'exakt' is unknown; did you mean 'exact'"),
        ("{correlation: {kind: low_rank, scale: -1}}", "correlation: scale must not be negative, got -1"),
        ("{correlation: {kind: low_rank, rank: 0}}", "rank must be at least 1, got 0"),
        ("{correlation: {kind: groups, size: 1}}", "size must be at least 2, got 1"),
        ("{correlation: {kind: groups, rho: 1.5}}", "rho must lie in .*, got 1.5"),
        ("{correlation: {kind: groups, size: 3, rho: -0.5}}", "a negative rho takes pairs, got -0.5 with size=3"),
        (
            "{hierarchy: {n_roots: 4, depth: 2}, correlation: {kind: groups, size: 5}}",
            "correlation.size must not exceed the 4 features without a parent, got 5",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path, changes, message):
    path = tmp_path / "world.yaml"
    path.write_text(yaml.safe_dump({"n_features": 12, "d_hidden": 4} | yaml.safe_load(changes)), encoding="utf-8")
    with pytest.raises(UsageError, match=message) as told:
        load_world(path)
    assert str(told.value).startswith(f"{path}: ")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{n_features: 3", "is not valid YAML"),
        ("3", "a world must be a mapping of keys to values, got 3"),
        ("{n_features: 3}", "d_hidden is required"),
        ("{n_features: 3, d_hidden: 2, kind: world}", "unknown key 'kind'"),
    ],
)
def test_a_file_that_describes_no_world(tmp_path, text, message):
    path = tmp_path / "world.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        load_world(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*nowhere.yaml: No such file"):
        load_world(tmp_path / "nowhere.yaml")


def world_with(**parts: object) -> WorldDescription:
    return read_mapping(WorldDescription, {"n_features": 12, "d_hidden": 4} | parts)


def test_compensation_that_cannot_be_exact():
    tree = {"n_roots": 2, "branching": 3, "exclusive": 1.0, "compensation": "exact"}
    with pytest.raises(UsageError, match=r"exclusive children of feature 0, which fires with 0.1, .* 0.3 in all"):
        world_with(firing={"kind": "constant", "prob": 0.1}, hierarchy=tree).build(0)
    chain = {"n_roots": 2, "branching": 1, "compensation": "exact"}
    weak = {"kind": "rectified_normal", "mean": 0.0, "std": 1.0}
    with pytest.raises(UsageError, match=r"feature 2 would have to draw with 2 to fire with 0.1 under a parent of 0.1"):
        world_with(firing={"kind": "constant", "prob": 0.1}, hierarchy=chain, magnitudes=weak).build(0)


def test_magnitudes_that_cannot_be():
    with pytest.raises(UsageError, match=r"must not reach below 0: feature 0 has mean 1 and std 0.9"):
        world_with(magnitudes={"kind": "uniform", "mean": 1.0, "std": 0.9}).build(0)
    tree = {"n_roots": 2, "scale_children": True}
    with pytest.raises(UsageError, match="feature 0 scales its children by x / mean, and its mean magnitude is 0"):
        world_with(magnitudes={"kind": "folded_normal", "mean": 0.0, "std": 1.0}, hierarchy=tree).build(0)


def test_factors_that_explain_too_much_are_scaled_down_and_told(caplog):
    world = world_with(correlation={"kind": "low_rank", "rank": 2, "scale": 5.0}).build(0)
    assert world.correlation.square().sum(1).max() <= 0.99 + 1e-6
    assert "of 12 features were scaled down" in caplog.text


def test_the_page_shows_every_kind():
    page = (Path(__file__).parent.parent / "docs" / "worlds.md").read_text(encoding="utf-8")
    shown = ("dictionary", "firing", "correlation", "magnitudes")
    hints = get_type_hints(WorldDescription)
    kinds = {option.KIND for name in shown for option in get_args(hints[name]) if hasattr(option, "KIND")}
    assert {"random", "zipf", "groups"} <= kinds
    for kind in kinds | {over.KIND for over in get_args(Over)}:
        assert f"{{kind: {kind}" in page, kind
    for kind in Magnitudes.KINDS:
        assert f"| `{kind}` |" in page
    for key in [own.name for part in (WorldDescription, Hierarchy) for own in fields(part)]:
        assert re.search(rf"`[^`]*\b{key}\b", page), key
