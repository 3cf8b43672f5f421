"""What several commands share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import tyro
from tyro.conf import Positional, arg


@runtime_checkable
class Runs(Protocol):
    """A command: its fields are what the command line says."""

    def run(self) -> None:
        """Does it."""


@dataclass(kw_only=True)
class SetsFields:
    """A command whose flags with a dot set values of the file that it reads."""

    overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """These flags and their values."""


@dataclass(kw_only=True)
class WithPlugins:
    """A command that may meet kinds which are not built in."""

    plugin: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, arg(metavar="FILE")] = ()
    """A Python file that defines kinds of your own; it is run. May be given several times."""

    def load_plugins(self) -> None:
        from sae.plugins import load_plugin  # noqa: PLC0415

        for path in self.plugin:
            load_plugin(path)


@dataclass
class FromFile(WithPlugins, SetsFields):
    """What trains as a file says, in a directory that may hold a part of it already."""

    config: Positional[Path]
    out: Path | None = None
    """Directory for what is trained; default what the file says."""
    resume: bool = False
    """Continue what the output directory holds, bit for bit."""
    overwrite: bool = False
    """Discard what the output directory holds."""

    @property
    def words(self) -> tuple[str, ...]:
        """What the command line sets in the file."""
        return (*self.overrides, "--out", json.dumps(str(self.out))) if self.out is not None else self.overrides
