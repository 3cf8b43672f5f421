"""What a sweep trains: a training configuration with a section `sweep` that says what varies in it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from sae import plugins
from sae.config import TrainConfig, override, parse_config
from sae.config_base import Section
from sae.config_text import explain, flags, read_yaml
from sae.errors import UsageError

SECTIONS = tuple(name for name in TrainConfig.model_fields if name != "out")


class SweepSection(Section):
    """What varies, how the work is shared, and when a member is stopped."""

    grid: dict[str, list[Any]] = Field(default={})
    """Dotted names of fields, with the values of each: every combination is a member."""
    settings: list[dict[str, Any]] = Field(default=[], alias="list")
    """Members one by one, each as dotted names and values; with a grid, each of them at every point of the grid."""
    n_jobs: int = Field(default=1, gt=0)
    """Processes that share the members; each gets its part of the cores."""
    together: int | None = Field(default=None, gt=0)
    """Maximum number of members that a process holds in memory at once; default all that share a stream."""
    ray: bool = False
    """Train on the machines of a Ray cluster instead of in local processes; needs the extra `ray`."""
    stop_dead: float | None = Field(default=0.95, ge=0, le=1)
    """Stop a member when more than this fraction of its latents is dead after the warm-up; null: never."""
    stop_fvu: float | None = Field(default=1.0, gt=0)
    """Stop a member whose FVU is above this in the second half of its run; null: never."""
    stop_lines: int = Field(default=3, gt=0)
    """Consecutive logged lines at which a rule must hold before the member is stopped."""

    @field_validator("grid")
    @classmethod
    def _grid_has_values(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in grid.items():
            _require_field(key)
            if not values:
                raise ValueError(f"{key} has no values; give at least one")
        return grid

    @field_validator("settings")
    @classmethod
    def _settings_name_fields(cls, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for setting in settings:
            for key in setting:
                _require_field(key)
        return settings

    @model_validator(mode="after")
    def _each_key_once(self) -> SweepSection:
        if not self.grid and not self.settings:
            raise ValueError("nothing varies; give a grid, as in grid: {sae.k: [2, 3]}, or a list")
        twice = [key for key in self.grid if any(key in setting for setting in self.settings)]
        if twice:
            raise ValueError(f"{twice[0]} is in the grid and in the list; keep it in one of them")
        return self


def _require_field(key: str) -> None:
    section, _, name = key.partition(".")
    if section not in SECTIONS or not name:
        raise ValueError(f"{key!r} is not a field; name one of {', '.join(SECTIONS)} and a field of it, as in sae.k")


class _File(Section):
    sweep: SweepSection


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    """The name of its directory, from what varies: `topk-k3-seed0`."""
    values: dict[str, Any]
    """What varies between members, by dotted names; a field that its kind does not have is absent."""
    config: TrainConfig

    @property
    def stream(self) -> str:
        """Members with the same stream see the same batches."""
        source = self.config.source
        what = [source.stream if source else None, self.config.train.batch_size, self.config.data_seed]
        return json.dumps(what, sort_keys=True)

    def __reduce__(self) -> tuple[Any, ...]:
        """As plain data for other processes, which load the plugins of this one first: they may define its kinds."""
        return _received, (self.name, self.values, self.config.model_dump(mode="json"), tuple(plugins.LOADED))


def _received(name: str, values: dict[str, Any], config: dict[str, Any], files: Sequence[Path]) -> Member:
    for path in files:
        if path not in plugins.LOADED:
            plugins.load_plugin(path)
    return Member(name, values, parse_config(config))


@dataclass(frozen=True)
class Plan:
    """A whole sweep."""

    out: Path
    section: SweepSection
    varies: tuple[str, ...]
    """Dotted names of the fields in which members differ."""
    members: tuple[Member, ...]


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Reads a sweep's file; `overrides` are command-line words, as for a run.

    Raises:
        UsageError: the file cannot be read, or a key or a value breaks a rule, in at least one member.
    """
    return parse_sweep(read_yaml(path), overrides, str(path))


def parse_sweep(mapping: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "sweep") -> Plan:
    """Every member's configuration, validated, and its name."""
    given = flags(overrides)
    base = override(mapping, given)
    if "sweep" not in base:
        raise UsageError(f"{where} has no section sweep:, as in sweep: {{grid: {{sae.k: [2, 3]}}}}; add one")
    try:
        section = _File.model_validate({"sweep": base.pop("sweep")}).sweep
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error, _File)}") from error
    points = _product(section)
    swept = list(dict.fromkeys([*(key for setting in section.settings for key in setting), *section.grid]))
    for key in swept:
        if key in given:
            raise UsageError(f"--{key} sets what the sweep varies; change it in --sweep.grid or --sweep.list instead")
    out = Path(str(base.pop("out", None) or "runs/sweep"))
    log = {"group": out.name, **{key: value for key, value in (base.get("log") or {}).items() if value is not None}}

    differing = [key for key in swept if len({_text(point.get(key)) for point in points}) > 1]
    configs = []
    for point in points:
        label = f"{where}, member {_name(point, differing or swept)}"
        configs.append(parse_config(override({**base, "log": log, "out": str(out)}, point), where=label))
    resolved = [{key: value for key in swept for value in _resolved(config, key)} for config in configs]
    varies = tuple(key for key in swept if len({_text(values.get(key, _ABSENT)) for values in resolved}) > 1)
    # The kind comes first, as it says what the others mean.
    varies = tuple(sorted(varies, key=lambda key: not key.endswith(".kind")))
    members: dict[str, Member] = {}
    for config, values in zip(configs, resolved, strict=True):
        own = {key: values[key] for key in varies if key in values}
        name = _name(own, varies) or config.sae.kind
        if name in members:
            said = "; ".join(f"{key}: {_text(value)}" for key, value in own.items()) or "nothing varies"
            raise UsageError(f"{where}: two members would have the directory {out / name} ({said}); remove one of them")
        members[name] = Member(name, own, config.model_copy(update={"out": out / name}))
    return Plan(out, section, varies, tuple(members.values()))


_ABSENT = object()


def _product(section: SweepSection) -> list[dict[str, Any]]:
    grid = [dict(zip(section.grid, values, strict=True)) for values in itertools.product(*section.grid.values())]
    return [{**setting, **point} for setting in section.settings or [{}] for point in grid]


def _resolved(config: TrainConfig, key: str) -> list[Any]:
    """The field's value, in a list of one; an empty list where the member's kind does not have the field."""
    section, _, name = key.partition(".")
    values = config.model_dump(mode="json").get(section) or {}
    return [values[name]] if name in values else []


def _text(value: Any) -> str:
    return "" if value is _ABSENT else json.dumps(value, default=str)


def _name(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """`topk-k3-seed0`: last parts of dotted names, whole ones where two are alike, and values."""
    short = [key.rpartition(".")[2] for key in keys]
    parts = []
    for key, word in zip(keys, short, strict=True):
        if key not in values:
            continue
        label = word if short.count(word) == 1 else key.replace(".", "_")
        value = _word(values[key])
        plain = key == "sae.kind"
        parts.append(value if plain else f"{label}{value}" if value[:1].isdigit() else f"{label}_{value}")
    return "-".join(parts)


def _word(value: Any) -> str:
    """A value in characters that any file system takes."""
    match value:
        case bool() | None:
            text = json.dumps(value)
        case float():
            text = f"{value:.12g}"
        case list() | tuple():
            text = "_".join(_word(item) for item in value)
        case _:
            text = str(value)
    return re.sub(r"[^\w.+]+", "_", text).strip("._") or "_"
