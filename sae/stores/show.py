"""`sae store info` and `sae store verify`: what a store says it holds, and whether that is true."""

from __future__ import annotations

from pathlib import Path

from sae.console import print_table
from sae.errors import UsageError
from sae.stores.files import SPLITS, Store

# Rows that a look at the norms reads.
N_LOOKED_AT = 16_384


def summary(path: Path) -> str:
    """One line on what a store holds."""
    manifest = Store(path).manifest
    n_held_out = sum(manifest.n_rows(split) for split in SPLITS if split != "training")
    n_bytes = sum(shard.n_bytes for shard in manifest.shards)
    width = f"d_in={manifest.d_in}" + ("" if manifest.d_out is None else f", d_out={manifest.d_out}")
    whole = "" if manifest.complete else "; NOT WRITTEN TO ITS END"
    return (
        f"{path}: {manifest.n_rows('training'):,} rows to train on, {n_held_out:,} held out, {width}, "
        f"{manifest.dtype}, {n_bytes / 2**30:.2f} GiB{whole}"
    )


def print_info(path: Path) -> None:
    """Sizes, splits, the norms of some rows, and where they are from."""
    store = Store(path)
    manifest = store.manifest
    print(summary(path))
    rows = []
    for split in SPLITS:
        n = manifest.n_rows(split)
        norms = store.rows(split).read(0, min(n, N_LOOKED_AT)).float()[:, : manifest.d_in].norm(dim=1) if n else None
        shown = ["–", "–"] if norms is None else [f"{norms.median():.4g}", f"{norms.max():.4g}"]
        rows.append([split, f"{n:,}", *shown])
    print_table(f"rows of {manifest.n_inputs:,} inputs", ["", "rows", "median norm", "largest"], rows)
    for key, value in manifest.origin.items():
        if value is not None:
            print(f"{key}: {value}")


def verify(path: Path) -> None:
    """Checks every shard against the checksum taken when it was written.

    Raises:
        UsageError: one differs.
    """
    store = Store(path)
    found = dict(store.verify())
    wrong = [f"{file}: {fault}" for file, fault in found.items() if fault is not None]
    if wrong:
        raise UsageError(f"{path} is damaged: {'; '.join(wrong)}; copy the store again, or harvest it again")
    print(f"{path}: {len(found)} files are as they were written")
    if not store.manifest.complete:
        print("it is incomplete: continue its `sae harvest` with --resume")
