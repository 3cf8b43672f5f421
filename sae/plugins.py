"""User-defined kinds, from Python files that are named explicitly: a configuration never names code to run."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import traceback
from pathlib import Path

from sae.config import Family, SAEConfig, SourceConfig
from sae.errors import UsageError

LOADED: list[Path] = []
"""The files loaded so far, for processes that are started later."""


def load_plugin(path: str | Path) -> tuple[str, ...]:
    """Runs a Python file that defines kinds (subclasses of `SAEConfig` or `SourceConfig`); returns their names.

    Raises:
        UsageError: there is no such file, it raises, it defines no kind, or one that something else defines.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise UsageError(f"plugin {path}: no such file; give a Python file that defines a kind")
    families: tuple[type[Family], ...] = (SAEConfig, SourceConfig)
    before = [dict(family.kinds) for family in families]
    name = f"plugin {path}"
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks there for what annotations mean
    try:
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UsageError(f"plugin {path} fails{_line(error, path)}: {_said(error)}") from error
        new = [
            (kind, had.get(kind))
            for family, had in zip(families, before, strict=True)
            for kind, member in family.kinds.items()
            if had.get(kind) is not member
        ]
        if not new:
            raise UsageError(f"plugin {path} defines no kind; subclass sae.SAEConfig with its own kind")
        for kind, earlier in new:
            if earlier is not None and getattr(sys.modules[earlier.__module__], "__file__", None) != str(path):
                raise UsageError(
                    f"plugin {path} defines kind {kind!r}, which {earlier.__module__} defines; give it another name"
                )
    except UsageError:
        del sys.modules[name]
        for family, had in zip(families, before, strict=True):
            family.kinds.clear()
            family.kinds.update(had)
        raise
    if path not in LOADED:
        LOADED.append(path)
    return tuple(kind for kind, _ in new)


def _line(error: BaseException, path: Path) -> str:
    """Where in the file it happened."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f" in line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" in line {lines[-1]}" if lines else ""


def _said(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
