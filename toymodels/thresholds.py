"""One threshold for all codes, above which a feature counts as read: that of highest F1."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def best_threshold(z: Float[Tensor, "batch n"], fires: Bool[Tensor, "batch n"]) -> tuple[float, float]:
    """The threshold t >= 0 of highest macro F1, z > t against `fires`, and that F1.

    F1 = 2tp / (2tp + fp + fn) is averaged over the features that fire. t is the largest code that does not count,
    or 0.
    """
    z, fires = z.cpu(), fires.cpu()
    row, column = (z > 0).nonzero(as_tuple=True)
    value, hit, n_active = z[row, column], fires[row, column], fires.sum(dim=0)
    threshold = threshold_of_highest_f1(column, value, hit, n_active.double(), 0.0)
    above = value > threshold
    n_fires, n_hits = (column[entries].bincount(minlength=z.shape[1]) for entries in (above, above & hit))
    f1 = 2 * n_hits / (n_fires + n_active).clamp(min=1)
    return threshold, float(f1[n_active > 0].mean()) if bool(hit.any()) else 0.0


def threshold_of_highest_f1(
    column: Int[Tensor, " entries"],
    value: Float[Tensor, " entries"],
    hit: Bool[Tensor, " entries"],
    n_active: Float[Tensor, " columns"],
    floor: float,
    order: tuple[Int[Tensor, " entries"], Int[Tensor, " entries"]] | None = None,
) -> float:
    """The threshold t >= floor for all columns that maximises Σ_i F1_i, column i firing where its value > t.

    Entry e, above the floor, is a value of column `column[e]` in a sample where that column's feature fires
    (`hit[e]`) or not; `n_active` is how often each does. Exact: values are added from the largest to the
    smallest, and each changes the F1 of its own column. The answer is the largest value that does not fire;
    the floor where nothing is ever hit. `order`: the `orders` of the entries, where they are known.
    """
    if not hit.any():
        return floor
    descending, by_column = orders(column, value, len(n_active)) if order is None else order
    own, hits = column[by_column], hit[by_column].double()
    starts = torch.ones_like(own, dtype=torch.bool)
    starts[1:] = own[1:] != own[:-1]
    start = starts.nonzero().squeeze(1)[starts.cumsum(0) - 1]

    n_fires = torch.arange(1, len(own) + 1, device=own.device) - start
    n_hits = hits.cumsum(0) - (hits.cumsum(0) - hits)[start]
    f1 = 2 * n_hits / (n_fires + n_active[own])
    gain = torch.empty_like(f1)
    gain[by_column] = f1 - torch.where(starts, 0.0, f1.roll(1))

    value, total = value[descending], gain[descending].cumsum(0)
    next_value = torch.cat([value[1:], value.new_tensor([floor])])
    total = torch.where(value > next_value, total, -torch.inf)  # equal values fire together
    return float(next_value[total.argmax()])


def orders(
    column: Int[Tensor, " entries"], value: Float[Tensor, " entries"], n_columns: int
) -> tuple[Int[Tensor, " entries"], Int[Tensor, " entries"]]:
    """The entries from the largest value to the smallest, and those of each column likewise, column after column."""
    # numpy sorts several times as fast as torch, small integers by their digits.
    descending = torch.from_numpy(np.argsort(-value.numpy()))
    small = np.uint16 if n_columns <= 2**16 else np.int64
    return descending, descending[torch.from_numpy(np.argsort(column[descending].numpy().astype(small), kind="stable"))]
