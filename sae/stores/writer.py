"""Writes an activation store: piece by piece, a shard at a time; resumes after a stop."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.errors import UsageError
from sae.stores.files import MANIFEST, SPLITS, TOKENS, DtypeName, Manifest, Shard, Split, read_manifest
from toymodels.errors import nearest
from toymodels.files import save_tensors, sha256, write_text

logger = logging.getLogger("sae")

SHARD_BYTES = 2**28
# Of twenty inputs one is held out for calibration and one for evaluation, up to so many rows each.
EVERY, HELD_OUT_ROWS = 20, 50_000
HELD_OUT: Mapping[int, Split] = {0: "calibration", EVERY // 2: "evaluation"}
Columns = Mapping[str, Tensor]
"""What is known about some rows: acts [n, d_in], and perhaps target [n, d_out], context [n], position [n]."""


class Division:
    """Which inputs are held out. All rows of a text or an image are on one side: they resemble each other."""

    def __init__(self, n_inputs: int = 0, n_rows: Mapping[Split, int] | None = None) -> None:
        self.n_inputs = n_inputs
        self.n_rows = dict(n_rows) if n_rows is not None else dict.fromkeys(SPLITS, 0)

    def next(self, rows_per_input: Sequence[int]) -> list[Split]:
        """The splits of the next inputs, given how many rows each of them has."""
        splits: list[Split] = []
        for n in rows_per_input:
            split = HELD_OUT.get(self.n_inputs % EVERY, "training")
            if split != "training" and self.n_rows[split] >= HELD_OUT_ROWS:
                split = "training"
            self.n_rows[split] += n
            self.n_inputs += 1
            splits.append(split)
        return splits

    def require_rows(self, remedy: str) -> None:
        """Refuses inputs that leave a split without rows.

        Raises:
            UsageError: they do.
        """
        empty = [split for split in SPLITS if not self.n_rows[split]]
        if empty:
            raise UsageError(
                f"{self.n_inputs} inputs leave no rows for {' or '.join(empty)}, as every {EVERY // 2}th is held out; "
                f"{remedy}"
            )


class StoreWriter:
    """Takes rows and writes them in shards of about SHARD_BYTES; the manifest follows every shard.

    Where the folder holds the beginning of a store from the same origin, writing continues after it: `n_batches` says
    how many batches it has. Rows are in the order in which they came, whatever the stops in between. With `anew` an
    existing store is discarded when the first shard of the new one is written. On exit no shard is half-written;
    pending rows are dropped unless `flush` or `finish` was called.
    """

    def __init__(
        self,
        path: Path,
        origin: Mapping[str, Any],
        dtype: DtypeName | None,
        tokens: Int[Tensor, "n_contexts length"] | None = None,
        anew: bool = False,
    ) -> None:
        if dtype is not None and dtype not in get_args(DtypeName):
            raise UsageError(f"dtype {dtype!r} is not one that a store can have{nearest(dtype, get_args(DtypeName))}")
        self.path, self.origin, self.tokens = path, dict(origin), tokens
        self.dtype: DtypeName | None = dtype
        self.widths: dict[str, int] = {}
        self.tokens_sha256: str | None = None
        self.shards: list[Shard] = []
        self.division = Division()
        self.n_batches = self.n_waiting_bytes = self.row_bytes = 0
        self.waiting: dict[Split, list[Columns]] = {split: [] for split in SPLITS}
        # A shard is hashed and written while the network computes the next one.
        self.pool, self.under_way = ThreadPoolExecutor(1, "shards"), Future[None]()
        self.under_way.set_result(None)
        require_own(path)
        if (path / MANIFEST).exists() and not anew:
            self._go_on(read_manifest(path))

    @property
    def n_written_rows(self) -> int:
        """Rows already in shards."""
        return sum(sum(shard.rows.values()) for shard in self.shards)

    @property
    def n_discarded_bytes(self) -> int:
        """Bytes of the store that the first shard replaces."""
        return 0 if self.shards else sum(file.stat().st_size for file in self.path.glob("*") if file.is_file())

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True)

    def _go_on(self, was: Manifest) -> None:
        require_same_origin(self.path, was.origin, self.origin)
        require_same_origin(self.path, {"dtype": was.dtype}, {"dtype": self.dtype or was.dtype})
        self.dtype, self.shards, self.n_batches = was.dtype, list(was.shards), was.n_batches
        self.tokens_sha256 = was.tokens_sha256
        self.widths = {"acts": was.d_in} | ({} if was.d_out is None else {"target": was.d_out})
        self.division = Division(was.n_inputs, {split: was.n_rows(split) for split in SPLITS})

    def append(self, columns: Columns, rows_per_input: Sequence[int]) -> None:
        """The rows of one more batch of inputs, input after input.

        Raises:
            UsageError: they are not finite, also in the store's dtype, or differ in width from those before.
        """
        if self.dtype is None:
            floating = [tensor.dtype for tensor in columns.values() if tensor.is_floating_point()]
            self.dtype = _name(reduce(torch.promote_types, floating, columns["acts"].dtype))
        kept = {name: self._checked(name, tensor) for name, tensor in columns.items()}
        self.row_bytes = sum(tensor[:1].nbytes for tensor in kept.values())
        splits = self.division.next(rows_per_input)
        for split in dict.fromkeys(splits):
            own = torch.repeat_interleave(torch.tensor([one == split for one in splits]), torch.tensor(rows_per_input))
            self._wait(split, kept, own)
        self.n_batches += 1
        if self.n_waiting_bytes >= SHARD_BYTES:
            self._hand_over()

    def _begin(self) -> None:
        """The manifest comes first: it says whose the files beside it are."""
        discard_store(self.path)
        if self.tokens is not None:
            save_tensors(self.path / TOKENS, {"tokens": self.tokens})
            self.tokens_sha256 = sha256(self.path / TOKENS)
        self._write_manifest(0, 0, complete=False)

    def _wait(self, split: Split, columns: Columns, own: Bool[Tensor, " rows"]) -> None:
        part = {name: tensor[own] for name, tensor in columns.items()}
        self.waiting[split].append(part)
        self.n_waiting_bytes += sum(tensor.nbytes for tensor in part.values())

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(torch.int32).cpu()
        width = self.widths.setdefault(name, tensor.shape[1])
        if tensor.shape[1] != width:
            raise UsageError(
                f"batch {self.n_batches} has {name} of width {tensor.shape[1]}, those before it {width}; give one width"
            )
        assert self.dtype is not None
        return checked(tensor, self.dtype, f"{name} of batch {self.n_batches}")

    def flush(self) -> None:
        """Writes pending rows as a shard, and returns when it is written."""
        self._hand_over()
        self.under_way.result()

    def _hand_over(self) -> None:
        """Hands pending rows over to be written as a shard."""
        waiting, self.waiting, self.n_waiting_bytes = self.waiting, {split: [] for split in SPLITS}, 0
        self.under_way.result()  # one at a time: its error is told, and memory is bounded
        if any(waiting.values()):
            self.under_way = self.pool.submit(self._write, waiting, self.division.n_inputs, self.n_batches)

    def _write(self, waiting: Mapping[Split, Sequence[Columns]], n_inputs: int, n_batches: int) -> None:
        tensors = {
            f"{split}/{name}": torch.cat([part[name] for part in parts])
            for split, parts in waiting.items()
            if parts
            for name in parts[0]
        }
        if not self.shards:
            self._begin()
        file = f"shard-{len(self.shards):05d}.safetensors"
        save_tensors(self.path / file, tensors)
        rows = {split: len(tensors.get(f"{split}/acts", ())) for split in SPLITS}
        n_bytes = (self.path / file).stat().st_size
        self.shards.append(Shard(file=file, rows=rows, n_bytes=n_bytes, sha256=sha256(self.path / file)))
        self._write_manifest(n_inputs, n_batches, complete=False)

    def finish(self) -> None:
        """Writes the last shard, and marks the store complete.

        Raises:
            UsageError: there is nothing to hold out.
        """
        self.division.require_rows(f"give at least {EVERY}, or pass the activations to sae.train as a tensor")
        self.flush()
        self._write_manifest(self.division.n_inputs, self.n_batches, complete=True)
        for file in self.path.glob("shard-*.partial"):  # of a process that was killed
            file.unlink()

    def _write_manifest(self, n_inputs: int, n_batches: int, complete: bool) -> None:
        assert self.dtype is not None
        manifest = Manifest(
            d_in=self.widths["acts"],
            d_out=self.widths.get("target"),
            dtype=self.dtype,
            complete=complete,
            n_inputs=n_inputs,
            n_batches=n_batches,
            shards=tuple(self.shards),
            tokens_sha256=self.tokens_sha256,
            origin=self.origin,
        )
        write_text(self.path / MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def is_complete(path: Path, fields: Mapping[str, Any], dtype: DtypeName | None) -> bool:
    """Whether a folder holds a whole store.

    Raises:
        UsageError: the store has a different origin: a field has another value.
    """
    if not (path / MANIFEST).exists() or not (was := read_manifest(path)).complete:
        return False
    require_same_origin(path, {key: was.origin.get(key) for key in fields}, fields)
    require_same_origin(path, {"dtype": was.dtype}, {"dtype": dtype or was.dtype})
    return True


def require_same_origin(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to continue a store that was begun with other values; names every one that differs."""
    both = {key: (was.get(key), now.get(key)) for key in dict.fromkeys([*was, *now])}
    said = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in both.items() if old != new)
    if said:
        raise UsageError(f"{path} was begun with other values: {said}; use the same values, or another --out")


def checked(tensor: Tensor, dtype: DtypeName, name: str) -> Tensor:
    """In the store's dtype, on the CPU.

    Raises:
        UsageError: it is not finite there.
    """
    stored = tensor.to(getattr(torch, dtype)).cpu()
    # The sum of a row is not finite when one of its values is not.
    if bool(stored.float().sum(dim=1).isfinite().all()) or bool(stored.isfinite().all()):
        return stored
    if not bool(tensor.isfinite().all()):
        raise UsageError(f"{name} holds NaN or infinity; check the inputs")
    largest = float(tensor.abs().max())
    remedy = "use --dtype bfloat16 or float32" if dtype == "float16" else "scale them down"
    raise UsageError(f"{name} is up to {largest:.3g}, more than {dtype} can hold; {remedy}")


def discard_store(path: Path) -> None:
    """Deletes a store's files and nothing else, the manifest last, since it says what they are. What is being written
    stays."""
    if (path / MANIFEST).exists():
        for file in [*path.glob("shard-*.safetensors"), path / TOKENS, path / MANIFEST]:
            file.unlink(missing_ok=True)


def require_own(path: Path) -> None:
    """Refuses a folder with files that a store would replace but that belong to no store.

    Raises:
        UsageError: there are such files.
    """
    if not (path / MANIFEST).exists():
        foreign = sorted(file.name for file in [*path.glob("shard-*.safetensors"), *path.glob(TOKENS)])
        if foreign:
            raise UsageError(f"{path} holds {foreign[0]}, which belongs to no store; give another --out")


def _name(dtype: torch.dtype) -> DtypeName:
    names: dict[torch.dtype, DtypeName] = {
        torch.float32: "float32",
        torch.float16: "float16",
        torch.bfloat16: "bfloat16",
    }
    if dtype == torch.float64:
        logger.info("activations are float64 and are kept as float32")
        return "float32"
    if dtype not in names:
        raise UsageError(f"activations must be floating point, got {dtype}; read another module")
    return names[dtype]
