"""Stores from what is on disk already: arrays, another store, activations that SAELens cached."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.arrays import open_parts
from sae.errors import UsageError
from sae.locks import held
from sae.stores.files import MANIFEST, TOKENS, DtypeName, Shard, Store, is_store
from sae.stores.writer import StoreWriter, checked, discard_store
from toymodels.files import save_tensors, sha256, write_text

logger = logging.getLogger("sae")

ROWS_AT_ONCE = 16_384
SAELENS = "dataset_info.json"
"""In a folder that `datasets` saved, as SAELens does with activations."""


def write_store(path: Path, out: Path, dtype: DtypeName | None, key: str | None, overwrite: bool) -> None:
    """Writes what is at `path` as a store.

    That is a store, which is copied into another dtype; a folder of activations that SAELens cached; or arrays, .npy,
    .npz or .safetensors, [rows, d] or [inputs, positions, d]. Rows of one input are held out together. `key` names the
    array or the column where there are several.

    Raises:
        UsageError: it cannot be read, its rows are not finite, or `out` holds a store.
    """
    if (out / MANIFEST).exists() and not overwrite:
        raise UsageError(f"{out} already holds a store; give another --out, or --overwrite")
    if out.exists() and path.exists() and out.samefile(path):
        raise UsageError(f"{out} would be read and written at once; give another --out")
    with held(out):
        if is_store(path):
            _recast(Store(path), out, dtype)
            return
        with StoreWriter(out, {"converted_from": str(path)}, dtype, anew=True) as writer:
            for acts in _cached(path, key) if (path / SAELENS).is_file() else _arrays(path, key):
                n_each = acts.shape[1] if acts.ndim == 3 else 1
                writer.append({"acts": acts.reshape(-1, acts.shape[-1])}, [n_each] * len(acts))
            writer.finish()


def _arrays(path: Path, key: str | None) -> Iterator[Tensor]:
    parts, names = open_parts(path, key)
    for part, name in zip(parts, names, strict=True):
        if part.ndim not in (2, 3) or not part.is_floating_point():
            raise UsageError(
                f"{name} is {list(part.shape)} of {part.dtype}; it must be [rows, d] or [inputs, positions, d] in "
                "floating point"
            )
    if parts[0].ndim == 2:
        logger.info(
            "each row is held out by itself; where rows beside each other are of one text, save [texts, rows, d]"
        )
    for part in parts:
        yield from part.split(max(1, ROWS_AT_ONCE // (part.shape[1] if part.ndim == 3 else 1)))


def _cached(path: Path, key: str | None) -> Iterator[Tensor]:
    """Activations [contexts, positions, d] that SAELens cached with `datasets`."""
    try:
        import datasets  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise UsageError("reading what SAELens cached needs datasets; pip install 'sae[harvest]'") from error
    rows: Any = datasets.load_from_disk(str(path))
    if not isinstance(rows, datasets.Dataset):
        raise UsageError(f"{path} holds several splits, {', '.join(rows)}; give the folder of one")
    wide = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Array2D)]
    if (key is None and len(wide) != 1) or (key is not None and key not in wide):
        raise UsageError(f"{path} has activations {', '.join(wide) or 'nowhere'}; give one of them as --key")
    table = rows.select_columns([key or wide[0]]).with_format("torch")
    length = rows.features[key or wide[0]].shape[0]
    for batch in table.iter(max(1, ROWS_AT_ONCE // length)):
        yield batch[key or wide[0]]


def _recast(store: Store, out: Path, dtype: DtypeName | None) -> None:
    """The same rows, splits and shards in another dtype."""
    was = store.manifest
    name: DtypeName = dtype or was.dtype
    shards = []
    for number, (shard, tensors) in enumerate(store.files.items()):
        cast = {
            key: checked(tensor, name, f"{store.path / shard} {key}") if tensor.is_floating_point() else tensor
            for key, tensor in tensors.items()
        }
        if not number:
            discard_store(out)
        partial = out / f"{shard}.partial"
        save_tensors(partial, cast)
        rows = was.shards[number].rows
        shards.append(Shard(file=shard, rows=rows, n_bytes=partial.stat().st_size, sha256=sha256(partial)))
        os.replace(partial, out / shard)
    if (store.path / TOKENS).exists():
        (out / TOKENS).write_bytes((store.path / TOKENS).read_bytes())
    manifest = was.model_copy(update={"dtype": name, "shards": tuple(shards)})
    write_text(out / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
