"""Every metric that applies to one dictionary and its codes, on activations that training has not seen.

SAEs and baselines are measured by the same function: it needs a dictionary, a way to encode and a way to decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae import metrics
from sae.codes import SparseCodes
from sae.metrics.dictionary_recovery import coverage
from sae.metrics.dimensionality import dimensionality_against_truth
from sae.model import SAE
from sae.sources import HeldOut
from toymodels.features import FeatureBatch

CHUNK_ROWS = 4096
# Pre-latents that exist together, at most: an evaluation should need less memory than the training before it.
CHUNK_ENTRIES = 2**21


@runtime_checkable
class Coder(Protocol):
    """What the metrics need of a method."""

    @property
    def W_dec(self) -> Tensor:
        """The dictionary [d_sae, d_out]."""

    def encode(self, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """The codes of x."""

    def decode(self, codes: SparseCodes, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """x_hat; the codes are those of x."""

    def pre_latents(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """The scores that the codes are selected from."""


@dataclass(frozen=True)
class Evaluation:
    """Final numbers under the names of the log, and the tables per latent and per feature behind the report."""

    metrics: dict[str, float]
    tables: dict[str, Tensor]


@torch.no_grad()
def evaluate(coder: Coder, held_out: HeldOut, truth: Float[Tensor, "n_features d_out"] | None = None) -> Evaluation:
    """Reconstruction and sparsity of any method; recovery, polysemanticity and geometry where the truth is known.

    All but the encoder sees the target, where that is not the input.
    """
    acts, target = held_out.acts, held_out.wanted
    W_dec = coder.W_dec.detach()
    threshold = metrics.scale_threshold(target)
    size = chunk_rows(len(W_dec))
    chunks = held_out.x.split(size)
    reconstruction, parts = metrics.Reconstruction(W_dec, threshold), []
    inner = coder.config.widths[:-1] if isinstance(coder, SAE) else ()
    by_prefix = {width: metrics.Reconstruction(W_dec, threshold) for width in inner}
    for chunk, wanted in zip(chunks, target.split(size), strict=True):
        z = coder.encode(chunk)
        reconstruction.update(wanted, coder.decode(z, chunk), z)
        for width, of_prefix in by_prefix.items():
            first = z.scaled((torch.arange(len(W_dec), device=W_dec.device) < width).to(W_dec.dtype))
            of_prefix.update(wanted, coder.decode(first, chunk), first)
        if truth is not None and acts is not None:
            parts.append(z)
    density = reconstruction.density()
    alive = density > 0
    values = _group("metrics", reconstruction.compute())
    values |= {f"metrics/fvu_prefix_{width}": part.compute()["fvu"] for width, part in by_prefix.items()}
    values["sparsity/dead_features"] = float((~alive).sum())
    tables = {"latent/frequency": density}
    if truth is None:
        values |= _group("dimensionality", metrics.dimensionality(W_dec[alive]))
        return Evaluation(values, tables)

    tables["truth"] = truth
    values |= _group("dimensionality", dimensionality_against_truth(W_dec, truth, alive=alive))
    if acts is None:
        values |= _group("recovery", metrics.recovery(W_dec, truth, alive=alive))
        return Evaluation(values, tables)

    codes, scores = SparseCodes.cat(parts), torch.cat([coder.pre_latents(chunk) for chunk in chunks])
    judged: dict[str, Any] = {
        "codes": codes,
        "acts": acts,
        "alive": alive,
        "pre_latents": scores,
        "firing_threshold": threshold,
    }
    values |= _group("recovery", metrics.recovery(W_dec, truth, **judged))
    scaled = codes.scaled(W_dec.norm(dim=1))
    values |= _group("polysemanticity/latent", metrics.polysemanticity(scaled, acts, firing_threshold=threshold))
    values |= _group("polysemanticity/neuron", metrics.polysemanticity(target, acts))
    features = metrics.feature_table(W_dec, truth, **judged)
    features |= {"matched_latent": features.pop("latent"), "matched_cosine": features.pop("cosine")}
    tables |= {f"feature/{name}": column for name, column in features.items()}
    tables |= {f"latent/{name}": column for name, column in unit_table(scaled, acts, threshold).items()}
    return Evaluation(values, tables)


def chunk_rows(d_sae: int) -> int:
    """Rows that are encoded together."""
    return min(CHUNK_ROWS, max(1, CHUNK_ENTRIES // d_sae))


def unit_table(units: SparseCodes, acts: FeatureBatch, threshold: float) -> dict[str, Tensor]:
    """Polysemanticity latent by latent: purity, features_per_unit, selectivity."""
    sums = metrics.CoStatistics(acts.n_features, units.d_sae, threshold)
    for start in range(0, len(units), CHUNK_ROWS):
        sums.update(units[start : start + CHUNK_ROWS], acts[start : start + CHUNK_ROWS])
    scores = metrics.unit_scores(sums)
    return {name: scores[name] for name in ("purity", "features_per_unit", "selectivity")}


@torch.no_grad()
def live_recovery(
    sae: SAE,
    fired: Bool[Tensor, " d_sae"],
    truth: Float[Tensor, "n_features d_out"] | None,
    probe: HeldOut,
    unit: float,
    target_unit: float,
) -> dict[str, float]:
    """The few recovery scores that a training log can afford: mcc, mmcs, coverage_0.9, and f1 on a small probe.

    `fired` are the latents seen to fire lately, `unit` and `target_unit` what the trainer divides activations and
    targets by.
    """
    if truth is None:
        return {}
    W_dec = sae.W_dec.detach().cpu()
    matching = metrics.match_dictionary(W_dec, truth, fired.cpu())
    scores = {"mcc": float(matching.cosine.mean()), "mmcs": float(matching.nearest_cosine.mean())}
    scores["coverage_0.9"] = coverage(matching, 0.9)
    if probe.acts is not None:
        x = probe.x.to(sae.W_dec.device) / unit
        codes = sae.training_codes(x).to("cpu")
        codes = codes.scaled(W_dec.norm(dim=1))
        scores["f1"] = matched_f1(matching, codes, probe.acts, metrics.scale_threshold(probe.wanted / target_unit))
    return _group("recovery", scores)


def matched_f1(matching: metrics.Matching, codes: SparseCodes, acts: FeatureBatch, threshold: float) -> float:
    """`f1` of `metrics.recovery` for codes z_j |w_j|, by itself and on a batch small enough to be dense."""
    owned = matching.has_latent
    on = acts.dense() > 0
    fires = torch.zeros_like(on)
    fires[:, owned] = codes.dense()[:, matching.latent[owned]] > threshold
    counted = on.any(dim=0)
    f1 = 2 * (on & fires).sum(dim=0) / (on.sum(dim=0) + fires.sum(dim=0)).clamp_min(1)
    return float(f1[counted].mean()) if bool(counted.any()) else 0.0


def _group(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{key}" if not name.count("/") else f"{name}_{key}": value for key, value in values.items()}
