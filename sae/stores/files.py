"""An activation store: a folder of shards, each of them whole or absent, and a manifest that says what they hold.

store.json                 widths, dtype, where the rows are from; rows, size and checksum of each shard
shard-00000.safetensors    training/acts [n, d_in], and the same for calibration and evaluation, which are held out;
                           beside acts, where there are such: target [n, d_out], context [n], position [n]
tokens.safetensors         tokens [n_contexts, length]: what a language model read, a row for each context
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from pydantic import ValidationError
from torch import Tensor

from sae.arrays import SAFETENSORS_TYPES, Pairs, Rows, safetensors_header
from sae.config_base import Section
from sae.config_text import explain
from sae.errors import UsageError
from toymodels.files import sha256

MANIFEST, TOKENS = "store.json", "tokens.safetensors"
Split = Literal["training", "calibration", "evaluation"]
SPLITS: tuple[Split, ...] = get_args(Split)
DtypeName = Literal["float32", "float16", "bfloat16"]
# What a shard's tensors may be, in safetensors' names.
TYPES = SAFETENSORS_TYPES | {"I32": torch.int32}


class Shard(Section):
    """One file of rows."""

    file: str
    rows: dict[Split, int]
    """How many rows each split has in it."""
    n_bytes: int
    sha256: str


class Manifest(Section):
    """What a store holds."""

    format: Literal[1] = 1
    d_in: int
    d_out: int | None = None
    """Width of the targets, if there are any."""
    dtype: DtypeName
    complete: bool
    """False while the store is being written, and after a stop."""
    n_inputs: int
    """Number of texts, images, or whatever the network read one by one, behind the rows."""
    n_batches: int
    """Number of batches of inputs read."""
    shards: tuple[Shard, ...]
    tokens_sha256: str | None = None
    """Checksum of the file of tokens, if there is one."""
    origin: dict[str, Any]
    """Where the rows are from, as far as is known."""

    def n_rows(self, split: Split) -> int:
        return sum(shard.rows[split] for shard in self.shards)


class Store:
    """An existing store. Its files are mapped, and read when rows are needed."""

    def __init__(self, path: str | Path) -> None:
        """Reads the manifest and checks every file's size; `verify` reads them whole.

        Raises:
            UsageError: it is not a store, or files are missing or truncated.
        """
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        for shard in self.manifest.shards:
            self._check_size(shard)
        if self.manifest.tokens_sha256 is not None and not (self.path / TOKENS).is_file():
            raise UsageError(f"{self.path / TOKENS} is missing; copy the store again, or harvest it again")
        self.files = {shard.file: _mapped(self.path / shard.file) for shard in self.manifest.shards}

    def rows(self, split: Split) -> Rows | Pairs:
        """The activations of a split, with their targets if there are any.

        Raises:
            UsageError: the split has no rows.
        """
        if not self.manifest.n_rows(split):
            n = self.manifest.n_inputs
            raise UsageError(f"{self.path} has no rows for {split}, from {n} inputs; harvest 20 or more")
        acts = self._table(split, "acts")
        return acts if self.manifest.d_out is None else Pairs(acts, self._table(split, "target"))

    def column(self, split: Split, name: Literal["context", "position"]) -> Tensor:
        """What else is known about each row [n]: its context (a row of `tokens`) and its position in it."""
        parts = [tensors[f"{split}/{name}"] for tensors in self._with_rows(split).values()]
        return torch.cat(parts)

    def tokens(self) -> Int[Tensor, "n_contexts length"]:
        """What the language model behind the rows read.

        Raises:
            UsageError: there is no such model, or the file is missing or damaged.
        """
        if self.manifest.tokens_sha256 is None:
            raise UsageError(
                f"{self.path} has no texts: its rows are not a language model's; give a store written by `sae harvest`"
            )
        return _mapped(self.path / TOKENS)["tokens"]

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Reads every file, and yields its name with what is wrong, or None."""
        written = {shard.file: shard.sha256 for shard in self.manifest.shards}
        if self.manifest.tokens_sha256 is not None:
            written[TOKENS] = self.manifest.tokens_sha256
        for file, checksum in written.items():
            found = sha256(self.path / file)
            yield file, None if found == checksum else f"its checksum is {found}, written was {checksum}"

    def _table(self, split: Split, name: str) -> Rows:
        files = self._with_rows(split)
        return Rows([tensors[f"{split}/{name}"] for tensors in files.values()], [str(self.path / f) for f in files])

    def _with_rows(self, split: Split) -> dict[str, Mapping[str, Tensor]]:
        return {shard.file: self.files[shard.file] for shard in self.manifest.shards if shard.rows[split]}

    def _check_size(self, shard: Shard) -> None:
        path = self.path / shard.file
        if not path.is_file():
            raise UsageError(f"{path} is missing, but {MANIFEST} names it; copy the store again, or harvest it again")
        if path.stat().st_size != shard.n_bytes:
            raise UsageError(
                f"{path} has {path.stat().st_size} bytes, but {MANIFEST} says {shard.n_bytes}; copy the store again, "
                "or harvest it again"
            )


def is_store(path: Path) -> bool:
    """Whether the folder holds one, finished or not."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        UsageError: there is none, or it cannot be understood.
    """
    file = path / MANIFEST
    try:
        return Manifest.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path} holds no activation store ({MANIFEST}); `sae harvest` writes one") from error
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}; check its permissions") from error
    except ValidationError as error:
        raise UsageError(
            f"{file} is damaged, or from another version: {explain(error, Manifest)}; harvest again"
        ) from error
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}); harvest again") from error


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. However many files are mapped like this, none of them stays open."""
    try:
        header, first_byte = safetensors_header(path)
        whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        tensors = {}
        for name, entry in header.items():
            begin, end = (first_byte + offset for offset in entry["data_offsets"])
            tensors[name] = whole[begin:end].view(TYPES[entry["dtype"]]).view(entry["shape"])
        return tensors
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UsageError(f"{path} is damaged ({error}); copy the store again, or harvest it again") from error
