"""Harvests: what a network computes is written into stores, once, and resumes after a stop."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sae.directory import require_out
from sae.errors import Interrupted, UsageError
from sae.hooks import fingerprint
from sae.locks import held
from sae.names import CONFIG
from sae.networks.pieces import Arrange, Piece, pieces_of
from sae.networks.reader import Reader, Reads, Site
from sae.networks.source import ModelSourceConfig, divided, order_of
from sae.sources import PairSource
from sae.stopping import CONTINUE, stop_requested
from sae.stores.files import MANIFEST, DtypeName
from sae.stores.source import StoreSource, open_store
from sae.stores.writer import StoreWriter, is_complete

logger = logging.getLogger("sae")

OnRows = Callable[[int], object]
"""Called with the number of inputs read since the last call."""


def harvest(
    model: nn.Module,
    module: str,
    inputs: Iterable[Any],
    out: str | Path,
    *,
    reads: Reads = "output",
    target: str | None = None,
    rows: Arrange | None = None,
    dtype: DtypeName | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> StoreSource | PairSource:
    """Writes the activations of any network for any inputs into the folder `out`, and returns them as a source.

    `inputs` are batches, each a tensor, a mapping of keyword arguments, or a tuple whose first entry counts. What comes
    out of `module` (or goes into it, for reads="input") is [inputs, ..., d]: the last axis is the width, and all axes
    before it are rows. Where it is not, as in convolutions, `rows` rearranges it: `lambda acts: acts.flatten(2).mT`.
    `target` is a module whose output a transcoder writes. Whole inputs are held out, one in twenty for each purpose.

    With `resume` a harvest that was stopped continues; the inputs must be the same, and those already read are skipped.

    Raises:
        UsageError: the network has no such module, its activations are not finite, or `out` holds a store already.
        Interrupted: a signal came; what had been read was written first.
    """
    site, target_site = Site(module, reads), None if target is None else Site(target)
    reader = Reader(model, [site] if target_site is None else [site, target_site])
    origin = {"network": type(model).__name__, "module": module, "reads": reads, "target": target}
    origin["weights"] = fingerprint(model)

    def pieces(start: int) -> Iterator[Piece]:
        return pieces_of(reader, inputs, start, site, target_site, rows)

    path = Path(out)
    _check_out(path, resume, overwrite)
    write_stores({site: path}, pieces, {site: origin}, dtype, resume=resume, overwrite=overwrite)
    return open_store(path)


def harvest_model(
    config: ModelSourceConfig,
    out: Path,
    modules: tuple[str, ...] = (),
    dtype: DtypeName | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_begin: Callable[[int], OnRows] | None = None,
) -> list[Path]:
    """Writes the rows of a source of kind `model` into a store; with `modules`, each of them into a separate one, in
    one pass: the folders `out/<module>`.

    Raises:
        UsageError: as `harvest`.
        Interrupted: as `harvest`.
    """
    if modules and config.target is not None:
        raise UsageError(
            f"--modules cannot be combined with source.target, got {config.target!r}; harvest one pair at a time"
        )
    wanted = [config.model_copy(update={"module": name}) for name in dict.fromkeys(modules)] or [config]
    paths = {one.site: out / one.module if modules else out for one in wanted}
    for path in paths.values():
        _check_out(path, resume, overwrite)
    if resume and all(is_complete(paths[one.site], one.fields, dtype) for one in wanted):
        logger.info("%s is complete; nothing to resume", out)
        return list(paths.values())
    model = config.load()
    model.require_sites([*paths, *config.sites[1:]])
    contexts = config.read()
    model.require(contexts)
    order, weights = order_of(contexts), fingerprint(model.model)
    divided(contexts, order)

    def pieces(start: int) -> Iterator[Piece]:
        return model.pieces(list(paths), config.target_site, contexts, order, start)

    write_stores(
        paths,
        pieces,
        {one.site: one.origin(contexts) | {"weights": weights} for one in wanted},
        dtype,
        resume=resume,
        overwrite=overwrite,
        on_rows=None if on_begin is None else on_begin(len(order)),
        tokens=contexts.tokens,
        n_rows=int(contexts.n_rows.sum()),
    )
    return list(paths.values())


def _check_out(path: Path, resume: bool, overwrite: bool) -> None:
    """Refuses a folder that holds a store, unless that is to be resumed or overwritten."""
    require_out(path, "store", MANIFEST, resume, overwrite, {CONFIG: "run"})
    if resume and not (path / MANIFEST).exists():
        logger.warning("nothing to resume in %s: starting the harvest", path)


def write_stores(
    paths: Mapping[Site, Path],
    pieces: Callable[[int], Iterable[Piece]],
    origins: Mapping[Site, Mapping[str, Any]],
    dtype: DtypeName | None,
    *,
    resume: bool,
    overwrite: bool,
    on_rows: OnRows | None = None,
    tokens: Tensor | None = None,
    n_rows: int | None = None,
) -> None:
    """A store for each site, from pieces that start at any batch; with n_rows each, if that is known.

    Raises:
        UsageError: the disk has no room for them.
    """
    with ExitStack() as stack:
        for path in paths.values():
            stack.enter_context(held(path))
        writers = {
            site: stack.enter_context(StoreWriter(path, origins[site], dtype, tokens, overwrite))
            for site, path in paths.items()
        }
        start = min(writer.n_batches for writer in writers.values())
        if on_rows is not None and start:
            on_rows(min(writer.division.n_inputs for writer in writers.values()))
        stop = stack.enter_context(stop_requested())
        for number, piece in enumerate(pieces(start), start):
            for site, writer in writers.items():
                if number >= writer.n_batches:  # after a kill, one may be ahead of another
                    writer.append(piece.columns[site], piece.rows_per_input)
            if number == start and n_rows is not None:
                _require_room(list(writers.values()), n_rows)
            if on_rows is not None:
                on_rows(len(piece.rows_per_input))
            if stop():
                for writer in writers.values():
                    writer.flush()
                raise Interrupted(f"stopped after batch {number + 1}; {CONTINUE}", stop())
        for writer in writers.values():
            writer.finish()


def _require_room(writers: Sequence[StoreWriter], n_rows: int) -> None:
    """Refuses what will not fit: better to report it at the first batch than hours later."""
    path = writers[0].path
    size = sum(writer.row_bytes * (n_rows - writer.n_written_rows) for writer in writers)
    free = shutil.disk_usage(path).free + sum(writer.n_discarded_bytes for writer in writers)
    if size > free:
        raise UsageError(
            f"{n_rows} rows take {size / 2**30:.3g} GiB more, but the disk of {path} has {free / 2**30:.3g}; lower "
            "source.n_tokens, set --dtype float16, or give another --out"
        )
