"""From a mapping, such as a YAML file holds, to frozen dataclasses: every key known, every value of its type.

A field whose type is a union of dataclasses is told apart by `kind`; each of them names its own in `KIND`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from toymodels.errors import UsageError, nearest

Described = TypeVar("Described")


def read_mapping(cls: type[Described], mapping: Any, where: str = "") -> Described:
    """The dataclass that the mapping describes; `where` is its dotted name.

    Raises:
        UsageError: it is no mapping, has an unknown key or lacks one, or a value has the wrong type or breaks a rule.
    """
    known = {own.name: own for own in fields(cls)}  # type: ignore[arg-type]
    given = _mapping(mapping, where)
    for key in given:
        if key not in known:
            raise UsageError(f"unknown key {_dotted(where, key)!r}{nearest(key, known)}")
    for name, own in known.items():
        if name not in given and _required(own):
            raise UsageError(f"{_dotted(where, name)} is required")
    types = get_type_hints(cls)
    values = {name: _value(types[name], value, _dotted(where, name)) for name, value in given.items()}
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}" if where else str(error)) from error


def _required(own: Field[Any]) -> bool:
    return own.default is MISSING and own.default_factory is MISSING


def _dotted(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where or 'a world'} must be a mapping of keys to values, got {value!r}")
    return value


def _value(wanted: Any, value: Any, where: str) -> Any:
    """The value as the type wants it: a number, a flag, a word, or a section."""
    options = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    sections: dict[str | None, Any] = {option.KIND: option for option in options if hasattr(option, "KIND")}
    if sections and isinstance(value, Mapping):
        kind = None if None in sections else value.get("kind")
        if kind not in sections:
            raise UsageError(f"{where} needs a kind, got {kind!r}{nearest(kind, map(str, sections))}")
        return read_mapping(sections[kind], {k: v for k, v in value.items() if k != "kind" or kind is None}, where)
    if type(value) in options:  # exactly: True is no whole number
        fits = not isinstance(value, float) or math.isfinite(value)
    elif float in options and type(value) in (int, str):
        try:
            value = float(value)  # YAML reads 5e-4, without a point, as a word
            fits = math.isfinite(value)
        except ValueError:
            fits = False
    else:
        fits = False
    if fits:
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "null"}
    words = [names[option] for option in options if option in names] + ["a mapping"] * bool(sections)
    raise UsageError(f"{where} must be {' or '.join(words)}, got {value!r}")
