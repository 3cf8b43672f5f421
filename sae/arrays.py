"""Arrays on disk and in memory as one memory-mapped table of rows, with errors that name the file and row."""

from __future__ import annotations

import glob
import json
import logging
import warnings
import zipfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.errors import UsageError

logger = logging.getLogger("sae")

# safetensors' names of the floating types. NumPy has no bfloat16: its bits are mapped as int16 and viewed.
SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Rows:
    """Tensors [rows_i, d_in] one after the other, read as one table. Those from files are memory-mapped."""

    def __init__(self, parts: Sequence[Tensor], names: Sequence[str]) -> None:
        self.parts, self.names = list(parts), list(names)
        for part, name in zip(parts, names, strict=True):
            _check_part(part, name, parts[0], names[0])
        self.starts = [0, *accumulate(len(part) for part in parts)]
        self.d_in, self.dtype = parts[0].shape[1], parts[0].dtype
        self.row_bytes = self.d_in * parts[0].element_size()

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def name(self) -> str:
        """The name of the whole table."""
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} to {self.names[-1]}"

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.parts[0].device

    def sent(self, indices: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The indices on the rows' device; the host does not wait for it."""
        if self.device.type == "cpu":
            return indices
        return indices.pin_memory().to(self.device, non_blocking=True)

    def read(self, start: int, stop: int) -> Float[Tensor, "rows d_in"]:
        """Consecutive rows, checked, in the dtype they are stored in."""
        pieces: list[Tensor] = []
        number = bisect_right(self.starts, start) - 1
        while number < len(self.parts) and (not pieces or self.starts[number] < stop):
            first = self.starts[number]
            pieces.append(self.parts[number][max(start - first, 0) : max(stop - first, 0)])
            number += 1
        rows = torch.cat(pieces)
        self._check_finite(rows, start)
        return rows

    def take(self, indices: Int[Tensor, " rows"]) -> Float[Tensor, "rows d_in"]:
        """Any rows, in any order, as float32."""
        if len(self.parts) == 1:
            return self.parts[0][indices].float()
        result = torch.empty(len(indices), self.d_in)
        owner = torch.bucketize(indices, torch.tensor(self.starts[1:]), right=True)
        for number in owner.unique().tolist():
            slots = (owner == number).nonzero().squeeze(1)
            result[slots] = self.parts[number][indices[slots] - self.starts[number]].float()
        return result

    def check_all(self, chunk_rows: int = 65536) -> None:
        """Reads every row once.

        Raises:
            UsageError: a row holds NaN or infinity.
        """
        for start in range(0, len(self), chunk_rows):
            self.read(start, min(start + chunk_rows, len(self)))

    def _check_finite(self, rows: Float[Tensor, "rows d_in"], start: int) -> None:
        # The sum of a row is not finite when one of its values is not: one number a row to look at.
        if bool(rows.float().sum(dim=1).isfinite().all()):
            return
        bad = (~rows.float().isfinite().all(dim=1)).nonzero().squeeze(1).tolist()
        if bad:
            part = bisect_right(self.starts, start + bad[0]) - 1
            row = rows[bad[0]]
            what = "a number that float32 cannot hold" if bool(row.isfinite().all()) else "NaN or infinity"
            more = f" (and {len(bad) - 1} more near it)" if len(bad) > 1 else ""
            raise UsageError(
                f"{self.names[part]} row {start + bad[0] - self.starts[part]} holds {what}{more}; remove such rows"
            )


class Pairs:
    """Two tables as one: each row of the first, followed by the same row of the second."""

    def __init__(self, left: Rows, right: Rows) -> None:
        if len(left) != len(right):
            raise UsageError(
                f"{right.name} has {len(right)} rows, but {left.name} has {len(left)}; each row needs its own target"
            )
        self.left, self.right, self.name = left, right, left.name
        self.d_in, self.row_bytes = left.d_in + right.d_in, left.row_bytes + right.row_bytes
        self.dtype = torch.promote_types(left.dtype, right.dtype)

    def __len__(self) -> int:
        return len(self.left)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.left.device

    def sent(self, indices: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The indices on the rows' device; the host does not wait for it."""
        return self.left.sent(indices)

    def read(self, start: int, stop: int) -> Float[Tensor, "rows d_both"]:
        """Consecutive rows, checked, in a dtype that holds both."""
        return torch.cat([self.left.read(start, stop), self.right.read(start, stop)], dim=1)

    def take(self, indices: Int[Tensor, " rows"]) -> Float[Tensor, "rows d_both"]:
        """Any rows, in any order, as float32."""
        return torch.cat([self.left.take(indices), self.right.take(indices)], dim=1)

    def check_all(self) -> None:
        """Reads every row of both once."""
        self.left.check_all()
        self.right.check_all()


def table(data: object, name: str) -> Rows:
    """A tensor, an array, or a list of them one after the other.

    Raises:
        UsageError: it is none of these, or its rows are not activations.
    """
    given = data if isinstance(data, list) else [data]
    names = [f"part {number} of {name}" if len(given) > 1 else name for number in range(len(given))]
    parts = []
    for part, part_name in zip(given, names, strict=True):
        if isinstance(part, np.ma.MaskedArray):
            raise UsageError(f"{part_name} is a masked array; pass the rows that are to be used as a plain one")
        tensor = as_tensor(part, part_name) if isinstance(part, np.ndarray) else part
        if isinstance(tensor, Tensor) and (tensor.layout != torch.strided or tensor.is_meta):
            kind = "has no values (meta)" if tensor.is_meta else f"is {tensor.layout}"
            raise UsageError(f"{part_name} {kind}; pass a dense tensor")
        if not isinstance(tensor, Tensor):
            raise UsageError(f"{part_name} is a {type(part).__name__}; it must be a tensor or an array")
        parts.append(tensor.detach())
    if not parts:
        raise UsageError(f"{name} is an empty list; pass a tensor, an array, or a list of them")
    return Rows(parts, names)


def flat_rows(batch: object) -> object:
    """A batch of activations with the axes before the last, such as sequence and position, made one."""
    if isinstance(batch, Tensor | np.ndarray) and batch.ndim > 2:
        return batch.reshape(-1, batch.shape[-1])
    return batch


def rebatch(pieces: Iterable[Tensor], batch_size: int) -> Iterator[Float[Tensor, "batch d_in"]]:
    """The same rows in batches of exactly batch_size; a remainder that does not fill a batch is dropped."""
    waiting: list[Tensor] = []
    n_waiting = 0
    for piece in pieces:
        waiting.append(piece)
        n_waiting += len(piece)
        if n_waiting < batch_size:
            continue
        rows = torch.cat(waiting) if len(waiting) > 1 else piece
        *full, rest = rows.split(batch_size) if n_waiting % batch_size else (*rows.split(batch_size), rows[:0])
        yield from full
        waiting, n_waiting = [rest], len(rest)


def as_tensor(array: np.ndarray, name: str) -> Tensor:
    """The same memory as a tensor.

    Raises:
        UsageError: torch has no such dtype.
    """
    try:
        with warnings.catch_warnings():
            # Read-only arrays draw a warning about writing, which never happens here.
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(array)
    except (TypeError, ValueError):
        rule = f"{name} holds {array.dtype}; it must be floating point, convert it to float32"
        if array.dtype.kind == "f" and not array.dtype.isnative:
            rule = f"{name} holds {array.dtype}, the bytes of another machine; convert it to {array.dtype.name}"
        elif array.dtype.kind == "f" and array.itemsize <= 8:
            rule = f"{name} runs backwards through memory, strides {list(array.strides)}; pass a copy of it"
        raise UsageError(rule) from None


def open_rows(pattern: str | Path, key: str | None = None) -> Rows:
    """Maps the file, or every file of a glob in order of name: .npy, .npz or .safetensors.

    `key` names the array inside .npz and .safetensors; it may be left out when there is only one.

    Raises:
        UsageError: no such file, or one that is empty, truncated, of another shape or not of floating point.
    """
    return Rows(*open_parts(pattern, key))


def open_parts(pattern: str | Path, key: str | None = None) -> tuple[list[Tensor], list[str]]:
    """Those arrays, of any shape, and their names."""
    path = Path(pattern)
    if path.is_file():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not files:
        remedy = "give a .npy, .npz or .safetensors file, or a glob of them"
        if (path / "store.json").exists():
            remedy = "it is an activation store: set source.kind to store, in Python sae.open_store"
        raise UsageError(f"no file matches {str(pattern)!r}; {remedy}")
    return [_open(file, key) for file in files], [str(file) for file in files]


def open_truth(pattern: str | Path) -> Float[Tensor, "n_features d"]:
    """Directions of true features from a file. Zero rows are reported and kept: they count as missed."""
    rows = open_rows(pattern)
    truth = rows.read(0, len(rows)).float()
    n_zero = int((truth == 0).all(dim=1).sum())
    if n_zero:
        logger.warning("%s: %d of %d true features are 0 everywhere and count as missed", pattern, n_zero, len(truth))
    return truth


def _open(path: Path, key: str | None) -> Tensor:
    openers = {".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors}
    if path.suffix not in openers:
        raise UsageError(f"{path}: cannot read {path.suffix or 'a file without suffix'!r}; known: {', '.join(openers)}")
    if path.stat().st_size == 0:
        raise UsageError(f"{path} is empty (0 bytes); write it again")
    try:
        return openers[path.suffix](path, key)
    except UsageError:
        raise
    except PermissionError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    except (ValueError, OSError, EOFError, LookupError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        if "Python objects" in reason or "Object arrays" in reason:
            raise _objects(str(path)) from error
        if "pickled" in reason:  # NumPy's advice would run whatever is in it
            reason = f"it does not begin as {path.suffix} files do"
        raise UsageError(f"{path} is truncated or damaged ({reason}); write it again") from error


def _objects(name: str) -> UsageError:
    return UsageError(f"{name} holds Python objects; they are not loaded, as that could run code: save float32")


def _open_npy(path: Path, key: str | None) -> Tensor:
    return as_tensor(np.load(path, mmap_mode="r", allow_pickle=False), str(path))


def _open_npz(path: Path, key: str | None) -> Tensor:
    """Maps the member if it is stored uncompressed; a compressed one has to be unpacked into memory."""
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        info = archive.getinfo(members[_only_key(path, key, list(members))])
        if info.compress_type != zipfile.ZIP_STORED:
            with archive.open(info) as file:
                return as_tensor(np.lib.format.read_array(file, allow_pickle=False), str(path))
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = np.frombuffer(file.read(4), dtype="<u2")
        file.seek(info.header_offset + 30 + int(name_bytes) + int(extra_bytes))
        shape, fortran, dtype = _read_npy_header(file)
        mapped: np.ndarray = np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    return as_tensor(mapped, str(path))


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _open_safetensors(path: Path, key: str | None) -> Tensor:
    """Maps one tensor."""
    header, first_byte = safetensors_header(path)
    entry = header[_only_key(path, key, list(header))]
    if entry["dtype"] not in SAFETENSORS_TYPES:
        raise UsageError(f"{path} holds {entry['dtype']}; it must be one of {', '.join(SAFETENSORS_TYPES)}")
    begin, end = (first_byte + offset for offset in entry["data_offsets"])
    if end > path.stat().st_size:
        raise ValueError(f"the tensor ends at byte {end}, the file at {path.stat().st_size}")
    dtype = SAFETENSORS_TYPES[entry["dtype"]]
    bits = np.int16 if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
    return as_tensor(np.memmap(path, bits, "r", begin, tuple(entry["shape"])), str(path)).view(dtype)


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Each tensor's dtype, shape and place after the header, and where the header ends.

    8 bytes give the header's length, then comes JSON that lists the tensors, then their bytes.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > path.stat().st_size:
            raise ValueError("the header runs past the end of the file")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    return header, 8 + header_bytes


def _only_key(path: Path, key: str | None, keys: list[str]) -> str:
    if key is None and len(keys) == 1:
        return keys[0]
    if key not in keys:
        given = "no key was given" if key is None else f"there is no {key!r}"
        raise UsageError(
            f"{path} holds {', '.join(sorted(keys)) or 'nothing'} and {given}; set source.key, or source.target_key"
        )
    return key


def _check_part(part: Tensor, name: str, first: Tensor, first_name: str) -> None:
    if part.ndim != 2:
        remedy = "flatten the leading axes" if part.ndim > 2 else "each row must be a vector"
        raise UsageError(f"{name} must have shape [rows, d_in], got {list(part.shape)}; {remedy}")
    if 0 in part.shape:
        raise UsageError(f"{name} has no values: its shape is {list(part.shape)}; give other rows")
    if not part.is_floating_point():
        raise UsageError(f"{name} holds {part.dtype}; it must be floating point, convert it to float32")
    if part.shape[1] != first.shape[1] or part.dtype != first.dtype:
        raise UsageError(
            f"{name} holds {list(part.shape)} of {part.dtype}, but {first_name} holds {list(first.shape)} of "
            f"{first.dtype}; all parts must share d_in and dtype: convert them, or narrow the glob"
        )
