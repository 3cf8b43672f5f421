"""Compiles a file of C on the machine that runs it, once, and loads it: native.c, or another.

No torch headers and no build system: one file of C with what it includes from its folder, one call of the compiler.
The result is kept in the user's cache under a name made of everything that it depends on, or, where that cannot be
written, for the process alone.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger("sae")

SOURCE = Path(__file__).with_name("native.c")
FLAGS = "-O3 -march=native -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -fvisibility=hidden -fPIC"


class CannotBuild(Exception):
    """There is no compiler, or it failed; the message is one line."""


@cache
def library(real: str, source: Path = SOURCE) -> ctypes.CDLL:
    """The compiled functions of a source for `real`, "float" or "double".

    Raises:
        CannotBuild: no compiler was found, or it refused.
    """
    compiler = _compiler()
    try:
        return _kept(compiler, source, real, _folder())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        logger.warning(
            "native kernels cannot be kept (%s%s), and are compiled anew in every process; "
            "set XDG_CACHE_HOME to a directory that can be written",
            where,
            error.strerror or error,
        )
    try:
        with tempfile.TemporaryDirectory(prefix="sae-") as folder:
            return _kept(compiler, source, real, Path(folder))  # once loaded, it does not need its file
    except OSError as error:
        raise CannotBuild(f"cannot write to the temporary directory: {error.strerror or error}") from error


def _kept(compiler: list[str], source: Path, real: str, folder: Path) -> ctypes.CDLL:
    """The library in the folder, compiled when it is not there.

    Raises:
        CannotBuild: the compiler refused.
        OSError: the folder cannot be written.
    """
    target = folder / f"kernels-{real}-{_fingerprint(compiler, real, source)}.so"
    if not target.exists():
        _compile(compiler, real, target, source)
    try:
        return _declared(ctypes.CDLL(str(target)), source, real)
    except OSError:  # damaged: what was cut off, say, by a full disk
        target.unlink(missing_ok=True)
        _compile(compiler, real, target, source)
    try:
        return _declared(ctypes.CDLL(str(target)), source, real)
    except OSError as error:
        raise CannotBuild(f"{target} cannot be loaded: {error}") from error


def _declared(loaded: ctypes.CDLL, source: Path, real: str) -> ctypes.CDLL:
    """The types of each function, as its head in the source has them: a call then converts numbers by itself."""
    types = {"void": None, "long": ctypes.c_long, "real": ctypes.c_float if real == "float" else ctypes.c_double}
    for result, name, given in re.findall(r"^API (\w+) (\w+)\(([^)]*)\)", _text(source), re.M):
        function = getattr(loaded, name)
        function.restype = types[result]
        function.argtypes = [ctypes.c_void_p if "*" in one else types[one.split()[0]] for one in given.split(",")]
    return loaded


def _text(source: Path) -> str:
    """A source, and the files of its folder that it includes."""
    text = source.read_text(encoding="utf-8")
    return text + "".join(_text(source.with_name(name)) for name in re.findall(r'^#include "(.+)"', text, re.M))


def _compiler() -> list[str]:
    """CC, which may bring arguments (`ccache gcc`), or what is found under the usual names."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise CannotBuild(f"CC={os.environ['CC']!r} cannot be read: {error}") from error
    if named and shutil.which(named[0]) is None:
        raise CannotBuild(f"CC names {named[0]!r}, which is not there; correct it or unset CC")
    found = [named] if named else [[path] for path in map(shutil.which, ("cc", "gcc", "clang")) if path]
    if not found:
        raise CannotBuild("no C compiler found (cc, gcc or clang; CC may name another)")
    return found[0]


def _folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae"
    except RuntimeError as error:
        raise FileNotFoundError("there is no home directory") from error


def _fingerprint(compiler: list[str], real: str, source: Path = SOURCE) -> str:
    """What the binary depends on: source, flags, compiler, and the processor that -march=native means."""
    version = _call([*compiler, "--version"]).stdout.encode()
    parts = [
        _text(source).encode(),
        FLAGS.encode(),
        " ".join(compiler).encode(),
        version,
        real.encode(),
        _processor().encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))


def _compile(compiler: list[str], real: str, target: Path, source: Path = SOURCE) -> None:
    """Compiles and links apart: linked with -fopenmp, the library would bring an OpenMP runtime beside torch's own,
    and the two teams of threads would fight for the cores."""
    is_double = int(real == "double")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        what = [f"-DREAL={real}", f"-DREAL_IS_DOUBLE={is_double}", "-c", str(source), "-o", str(built)]
        _run([*compiler, *shlex.split(FLAGS), *what])
        _run([*compiler, "-shared", "-o", str(linked), str(built), "-lm"])
        os.replace(linked, target)


def _run(command: list[str]) -> None:
    ended = _call(command)
    if ended.returncode:
        full = os.strerror(errno.ENOSPC)
        if full in ended.stderr:
            raise OSError(errno.ENOSPC, full, command[command.index("-o") + 1])
        said = ended.stderr.splitlines() or [f"exit code {ended.returncode}"]
        raise CannotBuild(f"{command[0]} failed: {next((line for line in said if 'error' in line), said[0])}")


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotBuild(f"{command[0]} cannot be run: {error.strerror or error}") from error
