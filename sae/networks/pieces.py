"""Rows of activations, batch by batch of inputs: what a store is written from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor, nn

from sae.errors import UsageError
from sae.hooks import first_tensor, module_named
from sae.networks.reader import Reader, Site
from sae.stores.writer import Columns

logger = logging.getLogger("sae")

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Arrange = Callable[[Tensor], Tensor]
"""Activations as the network has them -> [inputs, ..., d], the axis of the width last."""


class Piece(NamedTuple):
    """What one batch of inputs gave at each of some sites."""

    columns: dict[Site, Columns]
    rows_per_input: list[int]


def pieces_of(
    reader: Reader, inputs: Iterable[Any], start: int, where: Site, target: Site | None, arrange: Arrange | None
) -> Iterator[Piece]:
    """For any network on any inputs, from batch `start` on: the activations at `where`, and at its target if any.

    Raises:
        UsageError: the inputs end before batch `start`, or activations are not [inputs, ..., d].
    """
    if isinstance(inputs, Tensor):
        raise UsageError("inputs are batches, got one tensor; pass a list of them, as inputs.split(32)")
    batches = iter(inputs)
    n_skipped = sum(1 for _ in islice(batches, start))
    if n_skipped < start:
        raise UsageError(f"the inputs end after {n_skipped} batches, but {start} had been read; give the same inputs")
    for number, batch in enumerate(batches, start):
        n_inputs = n_inputs_of(batch)
        found = {
            site: _arranged(acts, n_inputs, arrange, f"batch {number} at {site}")
            for site, acts in reader(batch).items()
        }
        if number == start:
            _tell(reader, found)
        shapes = {tuple(acts.shape[:-1]) for acts in found.values()}
        if len(shapes) > 1:
            raise UsageError(
                f"batch {number} has a target with other axes: {sorted(shapes)}; give rows= that aligns them"
            )
        (n_rows, *others), rows_each = shapes.pop(), 1
        for n in others:
            rows_each *= n
        rows = {site: acts.reshape(-1, acts.shape[-1]) for site, acts in found.items()}
        yield Piece({where: columns_of(rows, where, target)}, [rows_each] * n_rows)


def _tell(reader: Reader, found: Mapping[Site, Tensor]) -> None:
    """Logs what counts as a row: for a convolution the last axis is hardly intended."""
    for site, acts in found.items():
        images = isinstance(module_named(reader.model, site.module), CONVOLUTIONS)
        level, what = (
            (logging.WARNING, "; is it another axis? set rows=") if images and acts.ndim > 2 else (logging.INFO, "")
        )
        logger.log(level, "%s: %s, rows of width %d%s", site, list(acts.shape), acts.shape[-1], what)


def columns_of(rows: Mapping[Site, Tensor], where: Site, target: Site | None) -> Columns:
    """The activations of a site, with its target's."""
    return {"acts": rows[where]} | ({} if target is None else {"target": rows[target]})


def n_inputs_of(batch: Any) -> int | None:
    """How many inputs a batch has, if its first tensor shows it."""
    one = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    first = first_tensor(one.values() if isinstance(one, Mapping) else [one])
    return None if first is None or not first.ndim else len(first)


def _arranged(acts: Tensor, n_inputs: int | None, arrange: Arrange | None, name: str) -> Tensor:
    rows = acts if arrange is None else arrange(acts)
    if rows.ndim < 2 or not rows.is_floating_point() or (n_inputs is not None and len(rows) != n_inputs):
        of_inputs = "inputs" if n_inputs is None else f"{n_inputs} inputs"
        raise UsageError(
            f"{name} is {list(rows.shape)} of {rows.dtype}, but must be [{of_inputs}, ..., d] in floating point; "
            "give rows=, a function that arranges it"
        )
    return rows
