"""Configurations as text: YAML files, command-line words, and what is wrong with either, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sae.errors import UsageError
from toymodels.errors import nearest
from toymodels.plain_yaml import parse_yaml


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        mapping = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}; give a YAML file") from error
    except UnicodeDecodeError as error:
        remedy = f"give a YAML file, which names data as source: {{kind: array, path: {path}}}"
        raise UsageError(f"{path} is not a text file; {remedy}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict):
        raise UsageError(f"{path} must hold a mapping of sections (sae:, train:, ...), got {type(mapping).__name__}")
    unnamed = [name for name in mapping if not isinstance(name, str)]
    if unnamed:
        raise UsageError(f"{path} must hold sections by name (sae:, train:, ...), got {', '.join(map(repr, unnamed))}")
    return mapping


def config_path(name: str) -> Path:
    """A recipe of `configs/`: next to the packages in a checkout, inside this one when installed from a wheel."""
    package = Path(__file__).parent
    return next(path for path in (package.parent / "configs" / name, package / "configs" / name) if path.is_file())


def flags(words: Sequence[str]) -> dict[str, Any]:
    """Dotted names and their values from the words `--name value` and `--name=value`."""
    values: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--") or word == "--":
            raise UsageError(f"expected a flag such as --sae.k 3, got {word!r}")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise UsageError(f"--{name} needs a value, as in --{name} VALUE")
            text = queue.pop(0)
        if not text:
            raise UsageError(f"--{name} has an empty value; is a shell variable unset? For none, write null")
        try:
            values[name.replace("-", "_")] = text if text.startswith("*") else parse_yaml(text)  # a glob, no alias
        except yaml.YAMLError as error:
            raise UsageError(f"--{name} {text}: the value is not valid YAML") from error
    return values


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Every error of a validation in one line, each with its key, its rule and the given value."""
    return "; ".join(_explain_one(dict(item), model) for item in error.errors(include_url=False))


def _explain_one(item: dict[str, Any], model: type[BaseModel]) -> str:
    *parents, name = [str(part) for part in item["loc"]] or [""]
    path = ".".join([*parents, name])
    if item["type"] == "extra_forbidden":
        section = model.model_fields[parents[0]].annotation if parents else model
        fields = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
        return f"unknown key {path!r}{nearest(name, [field.alias or own for own, field in fields.items()])}"
    if item["type"] == "missing":
        return f"{path} is required"
    if item["type"] == "model_type":
        return f"{path}: must be a section with fields of its own, got {item['input']!r}"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = "" if item["type"] == "value_error" else f", got {item['input']!r}"
    return f"{path}: {message}{given}" if path else f"{message}{given}"
