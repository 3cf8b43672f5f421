"""Files that are whole or absent, and checksums that detect damage."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def sha256(path: Path) -> str:
    """The checksum of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name to write under, which becomes `path` at the end: a reader never sees half a file."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, readable by whom the user's umask allows (the library keeps it to the owner).

    Raises:
        OSError: it cannot be written; safetensors' own error has the reason in its text only.
    """
    with replaced(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        partial.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")
