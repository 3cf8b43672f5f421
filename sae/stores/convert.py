"""Stores from data on disk: arrays, another store, activations cached by SAELens."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.arrays import open_parts
from sae.errors import UsageError
from sae.extras import require
from sae.locks import held
from sae.stores.files import MANIFEST, TOKENS, DtypeName, Store, is_store
from sae.stores.writer import StoreWriter, checked, discard_store, require_own
from toymodels.files import save_tensors, sha256, write_text

logger = logging.getLogger("sae")

ROWS_AT_ONCE = 16_384
SAELENS = "dataset_info.json"
"""In a folder saved by `datasets`, which SAELens uses for activations."""


def write_store(path: Path, out: Path, dtype: DtypeName | None, key: str | None, overwrite: bool) -> None:
    """Writes what is at `path` as a store.

    That is a store, which is copied into another dtype; a folder of activations cached by SAELens; or arrays, .npy,
    .npz or .safetensors, [rows, d] or [inputs, positions, d]. Rows of one input are held out together. `key` names the
    array or the column where there are several.

    Raises:
        UsageError: it cannot be read, its rows are not finite, or `out` holds a store.
    """
    if (out / MANIFEST).exists() and not overwrite:
        raise UsageError(f"{out} already holds a store; give another --out, or --overwrite")
    if out.exists() and path.exists() and out.samefile(path):
        raise UsageError(f"{out} would be both read and written; give another --out")
    store = Store(path) if is_store(path) else None
    acts = None if store is not None else _cached(path, key) if (path / SAELENS).is_file() else _arrays(path, key)
    with held(out):
        require_own(out)
        if acts is None:
            assert store is not None
            _recast(store, out, dtype)
            return
        with StoreWriter(out, {"converted_from": str(path)}, dtype, anew=True) as writer:
            for part in acts:
                n_each = part.shape[1] if part.ndim == 3 else 1
                writer.append({"acts": part.reshape(-1, part.shape[-1])}, [n_each] * len(part))
            writer.finish()


def _arrays(path: Path, key: str | None) -> Iterator[Tensor]:
    """Arrays on disk, [rows, d] or [inputs, positions, d], some inputs at a time."""
    parts, names = open_parts(path, key)
    for part, name in zip(parts, names, strict=True):
        if part.ndim not in (2, 3) or 0 in part.shape or not part.is_floating_point():
            raise UsageError(
                f"{name} is {list(part.shape)} of {part.dtype}; it must be [rows, d] or [inputs, positions, d] in "
                "floating point"
            )
        if (part.dtype, part.ndim) != (parts[0].dtype, parts[0].ndim):
            raise UsageError(
                f"{name} is {list(part.shape)} of {part.dtype}, but {names[0]} is {list(parts[0].shape)} of "
                f"{parts[0].dtype}; convert them separately"
            )
    if parts[0].ndim == 2:
        logger.info("each row is held out by itself; if neighbouring rows belong to one text, save [texts, rows, d]")
    at_once = max(1, ROWS_AT_ONCE // (parts[0].shape[1] if parts[0].ndim == 3 else 1))
    return (piece for part in parts for piece in part.split(at_once))


def _cached(path: Path, key: str | None) -> Iterator[Tensor]:
    """Activations [contexts, positions, d] cached by SAELens with `datasets`, in their dtype there."""
    require("datasets", "harvest", "reading SAELens's cached activations")
    import datasets  # noqa: PLC0415 - an extra, and slow to import

    try:
        rows: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the library raises for a damaged file
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}; cache it again") from error
    if not isinstance(rows, datasets.Dataset):
        raise UsageError(f"{path} holds several splits, {', '.join(rows)}; give the folder of one of them")
    wide = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Array2D)]
    if (key is None and len(wide) != 1) or (key is not None and key not in wide):
        raise UsageError(f"{path} has activations {', '.join(wide) or 'nowhere'}; give one of them as --key")
    name = key or wide[0]
    table = rows.select_columns([name]).with_format("numpy")
    at_once, dtype = max(1, ROWS_AT_ONCE // rows.features[name].shape[0]), rows.features[name].dtype
    return (torch.from_numpy(np.asarray(batch[name], dtype=dtype)) for batch in table.iter(at_once))


def _recast(store: Store, out: Path, dtype: DtypeName | None) -> None:
    """The same rows, splits and shards in another dtype."""
    was = store.manifest
    name: DtypeName = dtype or was.dtype
    shards = []
    for shard, tensors in zip(was.shards, store.files.values(), strict=True):
        cast = {
            key: checked(tensor, name, f"{store.path / shard.file} {key}") if tensor.is_floating_point() else tensor
            for key, tensor in tensors.items()
        }
        partial = out / f"{shard.file}.partial"
        save_tensors(partial, cast)
        shards.append(shard.model_copy(update={"n_bytes": partial.stat().st_size, "sha256": sha256(partial)}))
    # All of it is there and good: now it takes the place of what was.
    discard_store(out)
    for shard in shards:
        os.replace(out / f"{shard.file}.partial", out / shard.file)
    if was.tokens_sha256 is not None:
        shutil.copyfile(store.path / TOKENS, out / TOKENS)
    manifest = was.model_copy(update={"dtype": name, "shards": tuple(shards)})
    write_text(out / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
