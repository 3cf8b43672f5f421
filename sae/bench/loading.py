"""Importing other libraries, which may be missing, broken, or loud."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

logger = logging.getLogger("sae")


class RivalFailed(Exception):
    """A rival that cannot be measured; the message says which and why in one line."""


def load(name: str) -> Any:
    """A module of a rival.

    A package's front page (its `__init__`) may import what the trainer does not need and what is missing or broken
    here, such as nnsight or torchvision. The package is then entered without it, and a line says so.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        package = name.partition(".")[0]
        spec = None if package == name else importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise
        _forget(package)
        front = ModuleType(package)
        front.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = front
        try:
            module = importlib.import_module(name)
        except Exception:
            _forget(package)
            raise error from None
        logger.info("%s is loaded without its __init__, which fails: %s", package, first_line(error))
        return module


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Some libraries print and warn while they are imported and set up."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def first_line(error: Exception) -> str:
    """Its kind and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
