"""Texts, from files or from the Hub, as contexts of tokens."""

from __future__ import annotations

import glob
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.errors import UsageError
from sae.extras import require

logger = logging.getLogger("sae")

# What `datasets` calls a reader of such files. A .txt file is one text, the others hold many.
READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
TEXTS_AT_ONCE = 256
SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class Contexts:
    """What a language model reads, and at which tokens its activations are kept."""

    tokens: Int[Tensor, "n_contexts length"]
    special: Int[Tensor, " n_special"]
    """Tokens that occur in no text, whose activations are left out."""
    skip: int
    """Positions at the start of each context that are left out."""

    def kept(self, tokens: Int[Tensor, "n length"]) -> Bool[Tensor, "n length"]:
        """Where activations are kept."""
        kept = ~torch.isin(tokens, self.special)
        kept[:, : self.skip] = False
        return kept

    @cached_property
    def n_rows(self) -> Int[Tensor, " n_contexts"]:
        """How many activations each context gives."""
        return torch.cat([self.kept(part).sum(dim=1) for part in self.tokens.split(4096)])


def texts(path: str, subset: str | None, split: str, column: str) -> Iterator[str]:
    """The texts of some files (one, or a glob of them), of a folder, or of a dataset on the Hub, in their order.

    Raises:
        UsageError: there are none, or they have no such column.
    """
    datasets = _datasets()
    folder = Path(path)
    if folder.is_dir() and any(folder.glob("*.txt")):
        raise UsageError(
            f"source.texts {path!r} is a folder of .txt files; give '{folder / '*.txt'}', one text per file"
        )
    files = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())
    suffixes = sorted({Path(name).suffix for name in files})
    if not files and (folder.suffix in READERS or glob.has_magic(path)):
        raise UsageError(f"no file matches source.texts {path!r}; give {', '.join(READERS)} files, or a Hub dataset")
    if len(suffixes) > 1 or not set(suffixes) <= set(READERS):
        kinds = ", ".join(suffix or "without suffix" for suffix in suffixes)
        raise UsageError(f"source.texts {path!r}: files are {kinds}; give files of one kind, {', '.join(READERS)}")
    empty = [name for name in files if not Path(name).stat().st_size]
    if empty:
        raise UsageError(f"source.texts: {empty[0]} is empty (0 bytes); remove it")

    def rows() -> Iterator[dict[str, Any]]:
        if not files:
            return iter(datasets.load_dataset(path, subset, split=split, streaming=True))
        whole: dict[str, Any] = {"sample_by": "document"} if suffixes == [".txt"] else {}
        return iter(
            datasets.load_dataset(READERS[suffixes[0]], data_files=files, split="train", streaming=True, **whole)
        )

    n_read = 0
    for n_read, row in enumerate(_told(rows, f"source.texts {path!r}"), 1):
        if column not in row:
            known = ", ".join(row)
            raise UsageError(f"source.texts {path!r} has no column {column!r}; set source.column, one of {known}")
        if not isinstance(row[column], str):
            raise UsageError(
                f"source.texts {path!r}: {column} of row {n_read - 1} is {row[column]!r}, not a text; set source.column"
            )
        yield row[column]
    if not n_read:
        raise UsageError(f"source.texts {path!r} holds no text; give other files")


def _told(rows: Callable[[], Iterator[dict[str, Any]]], name: str) -> Iterator[dict[str, Any]]:
    """The rows; whatever the library raises for a missing file, a network or a setting becomes one line."""
    try:
        yield from rows()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{name} cannot be read: {reason[:300]}; give other files, or a dataset on the Hub") from error


def contexts_of(given: Iterator[str], tokenizer: Any, length: int, n_tokens: int, bos: bool) -> Int[Tensor, "n length"]:
    """Contexts [n, length]: texts one after the other with an end-of-text token between them, cut into pieces.

    With `bos` each context begins with the tokenizer's beginning-of-sequence token, if it has one. A remainder that
    does not fill a context is dropped.

    Raises:
        UsageError: the texts do not fill one context.
    """
    start = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    step, n_wanted = length - len(start), max(n_tokens // length, 1)
    cut: list[np.ndarray] = []
    n_cut, left, told = 0, np.zeros(0, dtype=np.int32), time.monotonic()
    while n_cut < n_wanted and (batch := list(islice(given, TEXTS_AT_ONCE))):
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        left = np.concatenate([left, *(np.array([*ids, *end], dtype=np.int32) for ids in encoded)])
        n_new = min(len(left) // step, n_wanted - n_cut)
        pieces, left = left[: n_new * step].reshape(n_new, step), left[n_new * step :]
        cut.append(np.concatenate([np.full((n_new, len(start)), start, dtype=np.int32), pieces], axis=1))
        n_cut += n_new
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            logger.info("texts are tokenized: %d of %d tokens", n_cut * length, n_wanted * length)
    if not n_cut:
        raise UsageError(f"the texts have {len(left)} tokens, but a context has {length}; lower source.context_length")
    if n_cut < n_wanted:
        logger.info("the texts end after %d tokens of source.n_tokens=%d", n_cut * length, n_tokens)
    return torch.from_numpy(np.concatenate(cut))


def open_tokens(path: Path, n_tokens: int) -> Int[Tensor, "n length"]:
    """Contexts that were tokenized before: an array of whole numbers [n, length] in a .npy file.

    Raises:
        UsageError: it cannot be read, or is something else.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"source.tokens {path} cannot be read ({error}); give a .npy file [contexts, length]"
        ) from error
    if array.ndim != 2 or array.shape[1] < 2 or not len(array) or not np.issubdtype(array.dtype, np.integer):
        raise UsageError(
            f"source.tokens {path} is {list(array.shape)} of {array.dtype}; it must be whole numbers [contexts, "
            "length], length at least 2"
        )
    return torch.from_numpy(np.array(array[: max(n_tokens // array.shape[1], 1)], dtype=np.int32))


def special_tokens(tokenizer: Any) -> Int[Tensor, " n"]:
    """Special tokens such as end-of-text; not the one for unknown words, which stands for a word."""
    frame = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    special = {token for token in tokenizer.all_special_ids if token in frame or token != tokenizer.unk_token_id}
    return torch.tensor(sorted(special), dtype=torch.int32)


def _datasets() -> Any:
    require("datasets", "harvest", "reading texts", "give source.tokens")
    import datasets  # noqa: PLC0415 - an extra, and slow to import

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets
