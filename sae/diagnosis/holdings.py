"""Which true features a latent is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toymodels.sparse_coding import sparse_code
from toymodels.streams import generator

PENALTY, MAX_PARTS = 0.1, 8
# A share says something by itself above what one in twenty random directions shows, within these bounds.
LEAST_PART, MOST_PART = 0.2, 0.4
N_RANDOM, CHANCE_QUANTILE = 256, 0.95
LATENTS_AT_ONCE = 512


class Holdings(NamedTuple):
    """Part e says that latent[e] holds feature[e] with share[e]; parts of a latent from the largest down."""

    latent: Int[Tensor, " parts"]
    feature: Int[Tensor, " parts"]
    share: Float[Tensor, " parts"]
    least: float
    """From where a share says something by itself."""

    def kept(self, which: Bool[Tensor, " parts"]) -> Holdings:
        """Some of the parts."""
        return Holdings(self.latent[which], self.feature[which], self.share[which], self.least)

    def pairs(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """All ordered pairs of different parts of one latent, by their places."""
        n_parts = self.latent.bincount()[self.latent]
        first = torch.arange(len(self.latent))
        start = torch.where(self.latent.diff(prepend=self.latent[:1] - 1) != 0, first, 0).cummax(0).values
        one = first.repeat_interleave(n_parts)
        within = torch.arange(len(one)) - torch.nn.functional.pad(n_parts.cumsum(0), (1, 0))[:-1][one]
        other = start[one] + within
        return one[one != other], other[one != other]

    def main(self, n_features: int) -> Int[Tensor, " n_features"]:
        """Of each feature the place of its largest part in any latent, -1 where none holds it."""
        order = self.share.argsort(descending=True, stable=True)
        order = order[self.feature[order].argsort(stable=True)]
        owner = self.feature[order]
        first = owner.diff(prepend=owner[:1] - 1) != 0
        place = torch.full((n_features,), -1)
        place[owner[first]] = order[first]
        return place

    def largest(self) -> Int[Tensor, " latents"]:
        """Places of each latent's largest part."""
        return (self.latent.diff(prepend=self.latent[:1] - 1) != 0).nonzero().squeeze(1)


def parts_of(rows: Float[Tensor, "d_sae d"], features: Float[Tensor, "n_features d"]) -> Holdings:
    """w_j ≈ Σ_i m_ij d_i with few m_ij >= 0, unit rows on both sides: sparse coding of the latents by the features.

    At most MAX_PARTS features explain a latent, chosen with a penalty and refitted without. Interference between
    features, which cosines mistake for likeness, is explained away. Shares above .2 are parts. One that exceeds `least`
    says something by itself: `least` is the largest share of 95 % of random directions, but at least .2 and at most .4.
    """
    k = min(MAX_PARTS, len(features))
    random = torch.randn(N_RANDOM, features.shape[1], generator=generator(0, "diagnosis", "random directions"))
    chance = sparse_code(torch.nn.functional.normalize(random, dim=1), features, PENALTY, k=k).amax(dim=1)
    least = min(max(float(chance.quantile(CHANCE_QUANTILE)), LEAST_PART), MOST_PART)
    parts: list[tuple[Tensor, ...]] = [(torch.zeros(0, dtype=torch.int64),) * 2 + (torch.zeros(0),)]
    for start in range(0, len(rows), LATENTS_AT_ONCE):
        share, feature = sparse_code(rows[start : start + LATENTS_AT_ONCE], features, PENALTY, k=k).topk(k, dim=1)
        latent, slot = (share > LEAST_PART).nonzero().unbind(dim=1)
        parts.append((start + latent, feature[latent, slot], share[latent, slot]))
    latent, feature, share = (torch.cat(column) for column in zip(*parts, strict=True))
    return Holdings(latent, feature, share, least)
