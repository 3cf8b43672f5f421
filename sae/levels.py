"""Which readings of a nested dictionary each latent takes part in; with sorted prefixes, how often each fires."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.config import SAEConfig
from sae.kernels import Codes

# What a count of firings is worth at the next look, ten steps later.
DECAY = 0.9


class Levels:
    """Reading l takes the latents whose level is at most l.

    Level l holds the latents from the end of prefix l - 1 to that of prefix l: in the order of the rows or, with
    `sort_prefixes`, in that of `frequency`, the most frequent first. `look_` sorts them anew.
    """

    def __init__(self, config: SAEConfig, device: torch.device) -> None:
        self.weights, self.detached, self.sorts = config.shares, config.detach_prefixes, config.sort_prefixes
        ends = torch.tensor(config.widths, device=device)
        self.by_rank = torch.bucketize(torch.arange(config.d_sae, device=device), ends, right=True, out_int32=True)
        self.of = self.by_rank.clone()
        self.frequency = torch.zeros(config.d_sae, dtype=torch.float64, device=device)
        self.counted = torch.zeros(config.d_sae, dtype=torch.int64, device=device)

    @property
    def several(self) -> bool:
        """Codes are read more than once."""
        return len(self.weights) > 1

    def split(self, codes: Codes) -> Codes:
        """The codes with the level of each slot, where there are several readings."""
        if not self.several:
            return codes
        own = self.of.index_select(0, codes.latents)
        return codes._replace(levels=own, weights=self.weights, detached=self.detached)

    def count_(self, firing: Int[Tensor, " d_sae"]) -> None:
        """Adds what a counter of firings has grown by since it was last seen."""
        if not self.sorts:
            return
        self.frequency += firing - self.counted
        self.counted.copy_(firing)

    def look_(self, firing: Int[Tensor, " d_sae"]) -> None:
        """Sorts the latents by how often they fired of late. No host waits here."""
        if self.sorts:
            self.count_(firing)
            self.of[by_frequency(self.frequency)] = self.by_rank
            self.frequency *= DECAY

    def saved(self) -> dict[str, Tensor]:
        """What later looks depend on."""
        return {"level": self.of, "frequency": self.frequency, "counted": self.counted} if self.sorts else {}

    def restore(self, tensors: dict[str, Any]) -> None:
        """Puts back what `saved` gave."""
        if self.sorts:
            for own, name in ((self.of, "level"), (self.frequency, "frequency"), (self.counted, "counted")):
                own.copy_(tensors[name])


def by_frequency(frequency: Float[Tensor, " d_sae"]) -> Int[Tensor, " d_sae"]:
    """The latents, the most frequent first; those of one frequency as they lie."""
    return frequency.argsort(descending=True, stable=True)
