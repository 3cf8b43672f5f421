"""How many features a neuron carries, and how many a latent: the same measures of both, unit by unit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sae.codes import SparseCodes
from sae.held_out import HeldOut
from sae.metrics import CoStatistics, unit_scores, window_rows
from sae.metrics.inputs import directions
from toymodels.geometry import purity_weights
from toymodels.streams import generator

N_RANDOM, UNITS_AT_ONCE = 256, 512
MEASURES = ("purity", "features_per_unit", "selectivity")


def neurons(held_out: HeldOut, d_sae: int) -> dict[str, Float[Tensor, " units"]]:
    """`unit_scores` of the dimensions of the activations, or of the target: the hidden units of a toy model. Only those
    that are not constant."""
    assert held_out.acts is not None
    width = held_out.wanted.shape[1]
    sums = CoStatistics(held_out.acts.n_features, width)
    for piece in held_out.pieces(window_rows(width, d_sae)):
        assert piece.acts is not None
        sums.update(SparseCodes(piece.wanted.cpu(), None, width), piece.acts.to("cpu"))
    scores = unit_scores(sums)
    return {name: scores[name][scores["alive"]] for name in MEASURES}


def weight_purities(
    W_dec: Float[Tensor, "d_sae d"], truth: Float[Tensor, "n_features d"], alive: Tensor
) -> dict[str, float]:
    """Mean over units of max_i |W_ik| / Σ_i |W_ik|, W_ik the weight of feature i in unit k: d_ik for neuron k, the
    cosine C_ik for latent k. True features taken as latents are `latent_truth`, which interference alone keeps below 1;
    random directions are `latent_chance`."""
    features, learned = (directions(rows)[0].float().cpu() for rows in (truth, W_dec))
    random = torch.randn(N_RANDOM, features.shape[1], generator=generator(0, "diagnosis", "random directions"))
    units = {"latent": learned[alive.cpu()], "latent_chance": directions(random)[0].float(), "latent_truth": features}
    means = {"neuron": float(purity_weights(features).mean())}
    for name, rows in units.items():
        parts = [purity_weights(features @ some.T) for some in rows.split(UNITS_AT_ONCE)]
        means[name] = float(torch.cat(parts).mean()) if len(rows) else 0.0
    return means


def distributions(
    by_neuron: Mapping[str, Tensor], tables: Mapping[str, Tensor], alive: Tensor
) -> dict[str, dict[str, list[float]]]:
    """Sorted values of each measure, for figures."""
    by_latent = {name: tables[f"latent/{name}"][alive.cpu()] for name in MEASURES}
    return {
        kind: {name: [round(value, 5) for value in column.sort().values.tolist()] for name, column in scores.items()}
        for kind, scores in (("neuron", by_neuron), ("latent", by_latent))
    }
