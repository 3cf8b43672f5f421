"""Rows of activations, batch by batch of inputs: what a store is written from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from sae.errors import UsageError
from sae.networks.reader import Reader, Site
from sae.stores.writer import Columns

Arrange = Callable[[Tensor], Tensor]
"""Activations as the network has them -> [inputs, ..., d], the axis of the width last."""


class Piece(NamedTuple):
    """What one batch of inputs gave at each of some sites."""

    columns: dict[Site, Columns]
    rows_per_input: list[int]


def pieces_of(
    reader: Reader, inputs: Iterable[Any], start: int, targets: dict[Site, Site], arrange: Arrange | None
) -> Iterator[Piece]:
    """Of any network on any inputs, from batch `start` on; `targets` names the target of a site that has one."""
    for number, batch in enumerate(islice(inputs, start, None), start):
        found = {site: _arranged(acts, arrange, f"batch {number} at {site}") for site, acts in reader(batch).items()}
        shapes = {tuple(acts.shape[:-1]) for acts in found.values()}
        if len(shapes) > 1:
            raise UsageError(
                f"batch {number} has activations of different axes: {sorted(shapes)}; read one site a time"
            )
        n_inputs, *others = shapes.pop()
        rows_each = 1
        for n in others:
            rows_each *= n
        rows = {site: acts.reshape(-1, acts.shape[-1]) for site, acts in found.items()}
        yield Piece(columns_of(rows, targets), [rows_each] * n_inputs)


def columns_of(rows: dict[Site, Tensor], targets: dict[Site, Site]) -> dict[Site, Columns]:
    """The activations of each site that is no other's target, and that one's beside them."""
    own = [site for site in rows if site not in targets.values()]
    return {site: {"acts": rows[site]} | ({"target": rows[targets[site]]} if site in targets else {}) for site in own}


def _arranged(acts: Tensor, arrange: Arrange | None, name: str) -> Tensor:
    rows = acts if arrange is None else arrange(acts)
    if rows.ndim < 2 or not rows.is_floating_point() or len(rows) != len(acts):
        raise UsageError(
            f"{name} is {list(rows.shape)} of {rows.dtype}, and must be [inputs, ..., d] in floating point; give "
            "rows=, a function that arranges it"
        )
    return rows
