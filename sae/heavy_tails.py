"""Rows far from all others: how much they weigh, and how they are pulled in.

A row dominates the gradient with the square of its distance, and a budget over a batch goes to the rows with large
codes. Where a few rows are many times as far from the centre as most, only these are learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae import losses


@dataclass(frozen=True)
class Ball:
    """x <- c + (x - c) min(1, R / |x - c|): directions, which a dictionary is made of, stay."""

    centre: Float[Tensor, " d"]
    radius: float

    @classmethod
    def around(cls, rows: Float[Tensor, "rows d"], times: float) -> Ball:
        """Around their geometric median, `times` the median distance from it."""
        centre = losses.geometric_median(rows).to(rows)
        distances = torch.cat([(part - centre).norm(dim=1) for part in rows.split(8192)])
        return cls(centre, times * float(distances.median()))

    def draw_in(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        """The rows; those inside as they are, to the bit."""
        offsets = x - self.centre
        shares = self.radius / offsets.norm(dim=1, keepdim=True)
        return torch.where(shares < 1, self.centre + offsets * shares, x)

    def to(self, device: torch.device) -> Ball:
        """On the device where rows are."""
        return Ball(self.centre.to(device), self.radius)


def share_of_heaviest(x: Float[Tensor, "batch d"], share: float) -> float:
    """The share of sum |x - mean x|^2 carried by this share of the rows (at least one), those farthest from the
    mean."""
    mean = x.mean(dim=0)
    squares = torch.cat([(part - mean).square().sum(dim=1, dtype=torch.float64) for part in x.split(8192)])
    n = max(round(share * len(x)), 1)
    return float(squares.topk(n).values.sum() / squares.sum())
