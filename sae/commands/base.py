"""What several commands share."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Protocol, get_type_hints, runtime_checkable

import tyro
from tyro.conf import Positional, arg


@runtime_checkable
class Command(Protocol):
    """A command: its fields are the arguments of the command line."""

    def run(self) -> None:
        """Runs the command."""


@dataclass(kw_only=True)
class SetsFields:
    """A command whose flags with a dot set values of the file that it reads."""

    overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """These flags and their values."""
    example: ClassVar[str] = "--sae.k 3"
    reads_all: ClassVar[bool] = True
    """The whole file is read, so that what is no section of it is refused there, as an unknown key."""

    @classmethod
    def flags(cls) -> list[str]:
        """Those of the command itself."""
        kinds = get_type_hints(cls, include_extras=True)
        marks = {field.name: getattr(kinds[field.name], "__metadata__", ()) for field in fields(cls)}
        own = [name for name, said in marks.items() if Positional not in said and tyro.conf.Suppress not in said]
        negations = [f"no-{name}" for name in own if kinds[name] is bool]
        return [f"--{name}" for name in (*own, *negations, "help")]

    @classmethod
    def sections(cls) -> list[str]:
        """What can be set, whole or a field of it."""
        from sae.config import TrainConfig  # noqa: PLC0415

        return [name for name in TrainConfig.model_fields if name != "out"]


@dataclass(kw_only=True)
class WithPlugins:
    """A command that may meet kinds that are not built in."""

    plugin: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, arg(metavar="FILE")] = ()
    """A Python file that defines kinds of your own; it is run. May be given several times."""

    def load_plugins(self) -> None:
        from sae.plugins import load_plugin  # noqa: PLC0415

        for path in self.plugin:
            load_plugin(path)


@dataclass
class FromFile(WithPlugins, SetsFields):
    """A command that trains as a file says, in a directory that may already hold part of the result."""

    config: Positional[Path]
    out: Path | None = None
    """Output directory; default the file's."""
    resume: bool = False
    """Continue what the output directory holds, bit for bit."""
    overwrite: bool = False
    """Discard what the output directory holds."""

    @property
    def words(self) -> tuple[str, ...]:
        """What the command line sets in the file."""
        return (*self.overrides, "--out", json.dumps(str(self.out))) if self.out is not None else self.overrides
