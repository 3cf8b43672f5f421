"""The base of a section of the configuration: a frozen pydantic model, strict about keys and numbers, with kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, field_validator

from toymodels.errors import nearest


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about its keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _a_number_is_no_truth_value(cls, value: object, info: Any) -> object:
        """pydantic would take true for 1."""
        wrong = _truth_for_a_number(value, cls.model_fields[info.field_name].annotation)
        if wrong is not None:
            raise ValueError(f"must be a number, got {str(wrong).lower()}; give one")
        return value


def _truth_for_a_number(value: object, annotation: Any) -> bool | None:
    """true or false where a number is expected; also inside a list."""
    kinds = list(_alternatives(annotation))
    if isinstance(value, bool):
        numbers = any(kind in (int, float) for kind in kinds)
        truths = any(kind in (bool, Any, object) or get_origin(kind) is Literal for kind in kinds)
        return value if numbers and not truths else None
    if isinstance(value, list | tuple):
        inner = [part for kind in kinds if get_origin(kind) in (list, tuple) for part in get_args(kind)]
        found = (_truth_for_a_number(item, part) for item in value for part in inner)
        return next((wrong for wrong in found if wrong is not None), None)
    return None


def _alternatives(annotation: Any) -> Iterator[Any]:
    """What a value may be: the members of a union, without what is said about them."""
    if get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _alternatives(part)
    else:
        yield annotation


class Family(Section):
    """A section that comes in kinds. Subclasses with a `kind: Literal["name"] = "name"` join their family."""

    kinds: ClassVar[dict[str, type[Family]]]
    kind: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        kind = cls.model_fields["kind"].default
        if Family in cls.__bases__:
            cls.kinds = {}
        elif isinstance(kind, str):
            cls.kinds[kind] = cls

    @classmethod
    def of_kind(cls, value: Any) -> Any:
        """A mapping with a `kind` becomes the member of that kind; anything else passes through."""
        if not isinstance(value, Mapping):
            return value
        kind = value.get("kind")
        if kind is None:
            raise ValueError(f"needs a kind, one of {', '.join(sorted(cls.kinds))}")
        if not isinstance(kind, str) or kind not in cls.kinds:
            own = "a kind of your own needs --plugin FILE (in Python: sae.load_plugin)"
            raise ValueError(f"unknown kind {kind!r}{nearest(kind, cls.kinds)}; {own}")
        member = cls.kinds[kind]
        for key in value:
            if key not in member.model_fields:
                raise ValueError(f"unknown key {key!r} for kind {kind!r}{nearest(key, member.model_fields)}")
        return member.model_validate(value)
