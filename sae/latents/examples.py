"""Finds the contexts in which each latent fires most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import SparseCodes
from sae.evaluation import chunk_rows
from sae.latents.passages import Passage
from sae.model import SAE

NOWHERE = -1


@dataclass(frozen=True)
class Examples:
    """For each latent the contexts of its largest codes, one code of each context, in falling order.

    Where a latent fires in fewer contexts, what is left has value 0 and is NOWHERE.
    """

    frequency: Float[Tensor, " d_sae"]
    """Share of the rows for which it fires."""
    value: Float[Tensor, "d_sae n"]
    context: Int[Tensor, "d_sae n"]
    position: Int[Tensor, "d_sae n"]
    n_rows: int


@torch.no_grad()
def find_examples(sae: SAE, passages: Iterable[Passage], n: int) -> Examples:
    """The n contexts for each latent in which its largest code is largest; of equal codes the earliest counts."""
    d_sae = sae.d_sae
    value = torch.zeros(d_sae, n)
    place = torch.full((2, d_sae, n), NOWHERE)
    fired, n_rows = torch.zeros(d_sae, dtype=torch.int64), 0
    for passage in passages:
        codes = encode(sae, passage.x)
        fired += codes.firing()
        n_rows += len(codes)
        contexts, row_context = passage.context.unique_consecutive(return_inverse=True)
        row, latent, z = _entries(codes)
        peak, position = _peaks(
            latent * len(contexts) + row_context[row], z, passage.position[row], d_sae * len(contexts)
        )
        both = torch.cat([value, peak.view(d_sae, -1)], dim=1)
        places = torch.stack([contexts.expand(d_sae, -1), position.view(d_sae, -1)])
        # A stable order, so that what came first stays where codes are equal.
        best = both.sort(dim=1, descending=True, stable=True).indices[:, :n]
        value = both.gather(1, best)
        place = torch.cat([place, places], dim=2).gather(2, best.expand(2, -1, -1))
    place = torch.where(value > 0, place, NOWHERE)
    return Examples(fired / max(n_rows, 1), value, place[0], place[1], n_rows)


@torch.no_grad()
def codes_at(
    sae: SAE, passages: Iterable[Passage], wanted: Iterable[tuple[int, int]], length: int
) -> dict[tuple[int, int], Float[Tensor, " length"]]:
    """What some latents say at every position of some contexts, by (context, latent); 0 where there is no row."""
    by_context: dict[int, list[int]] = {}
    for context, latent in wanted:
        by_context.setdefault(context, []).append(latent)
    found: dict[tuple[int, int], Tensor] = {}
    for passage in passages:
        here = [context for context in passage.context.unique().tolist() if context in by_context]
        own = torch.isin(passage.context, torch.tensor(here, dtype=passage.context.dtype))
        if not here:
            continue
        codes, place = encode(sae, passage.x[own]), passage.position[own]
        for context in here:
            rows = (passage.context[own] == context).nonzero().squeeze(1)
            latents = torch.tensor(by_context[context])
            line = torch.zeros(length, len(latents))
            line[place[rows]] = codes[rows].dense()[:, latents]
            found |= {(context, latent): line[:, number] for number, latent in enumerate(latents.tolist())}
    return found


def encode(sae: SAE, x: Float[Tensor, "rows d_in"]) -> SparseCodes:
    """In parts whose pre-latents fit; codes count in units of unit decoder rows."""
    norms = sae.W_dec.norm(dim=1)
    return SparseCodes.cat([sae.encode(part).scaled(norms) for part in x.split(chunk_rows(sae.d_sae))])


def _entries(codes: SparseCodes) -> tuple[Tensor, Tensor, Tensor]:
    """Row, latent and value of each code that fires."""
    row, slot = (codes.values > 0).nonzero(as_tuple=True)
    return row, slot if codes.indices is None else codes.indices[row, slot], codes.values[row, slot]


def _peaks(cell: Tensor, z: Tensor, position: Tensor, n_cells: int) -> tuple[Tensor, Tensor]:
    """The largest z of each cell, 0 where there is none, and the first position that has it."""
    peak = torch.zeros(n_cells).scatter_reduce(0, cell, z, "amax")
    at_peak = z == peak[cell]
    first = torch.full((n_cells,), torch.iinfo(torch.int64).max)
    return peak, first.scatter_reduce(0, cell[at_peak], position[at_peak], "amin")
