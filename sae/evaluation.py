"""Every metric that applies to one dictionary and its codes, on activations that training has not seen.

SAEs and baselines are measured by the same function: it needs a dictionary, a way to encode and a way to decode.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae import metrics
from sae.codes import SparseCodes
from sae.errors import UsageError
from sae.held_out import HeldOut, HeldOutStream
from sae.metrics.dictionary_recovery import coverage
from sae.model import SAE
from sae.sources import Source
from toymodels.features import FeatureBatch

logger = logging.getLogger("sae")

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
def evaluate(
    coder: Coder, held_out: HeldOut | HeldOutStream, truth: Float[Tensor, "n_features d_out"] | None = None
) -> Evaluation:
    """Reconstruction and sparsity of any method; recovery, polysemanticity and geometry where the truth is known.

    All but the encoder sees the target, where that is not the input. The evaluation set is read in windows, and may
    be larger than memory.

    Raises:
        UsageError: an empty evaluation set, a truth of another width, or codes that are not finite.
    """
    W_dec = coder.W_dec.detach()
    size = metrics.window_rows(W_dec.shape[1], len(W_dec))
    threshold, knows_acts = _look_at_first(held_out, size, W_dec, truth)
    with metrics.Samples(len(W_dec), len(truth) if truth is not None and knows_acts else 0) as samples:
        density, values, neurons = _stream(coder, held_out.pieces(size), threshold, samples)
        values |= _group("dimensionality", metrics.dictionary_dimensionality(W_dec, truth, alive=density > 0))
        tables = {"latent/frequency": density}
        if truth is None:
            return Evaluation(values, tables)
        tables["truth"] = truth
        if knows_acts:
            latents, units = metrics.latents_beside_chance(samples)
            values |= _group("polysemanticity/neuron", neurons) | _group("polysemanticity/latent", latents)
            tables |= {f"latent/{name}": units[name] for name in ("purity", "features_per_unit", "selectivity")}
        matching = metrics.match_dictionary(W_dec, truth, density > 0)
        values |= _group("recovery", metrics.dictionary_beside_chance(matching, truth))
        if knows_acts:
            pairs = metrics.related_features(samples)
            values |= _group("recovery", metrics.failures_beside_chance(samples, pairs, matching, W_dec, truth))
            ranking = _rank(coder, held_out, metrics.Ranking(matching, samples.n_samples), size)
            judged = metrics.judge_codes(samples, ranking, matching, truth, threshold)
            values |= _group("recovery", metrics.codes_beside_chance(judged, samples, truth, threshold))
            features = metrics.table_of_features(judged[0], truth)
            values["metrics/l0_truth"] = float(features["frequency"].sum())  # true features that fire for a sample
            features |= {"matched_latent": features.pop("latent"), "matched_cosine": features.pop("cosine")}
            tables |= {f"feature/{name}": column for name, column in features.items()}
    return Evaluation(values, tables)


def evaluate_on(source: Source, sae: SAE, n_samples: int) -> Evaluation:
    """`evaluate` on a source's held-out rows, and what the network behind them loses, where it is available.

    Where that cannot be measured a line says why: a trained SAE is worth keeping all the same.
    """
    evaluation = evaluate(sae, source.held_out_stream("evaluation", n_samples), source.truth)
    try:
        lost = source.downstream(sae, n_samples)
    except UsageError as error:
        logger.warning("what the model loses was not measured: %s", error)
        return evaluation
    return Evaluation(evaluation.metrics | _group("metrics", lost), evaluation.tables)


def _look_at_first(
    held_out: HeldOut | HeldOutStream, size: int, W_dec: Tensor, truth: Tensor | None
) -> tuple[float, bool]:
    """Checks the first window: above what a latent fires, and whether the true activations are known."""
    first = next(iter(held_out.pieces(size)), None)
    if first is None or not len(first.x):
        raise UsageError("the evaluation set has no samples; raise evaluation.n_samples, or pass rows")
    if truth is not None:
        _check_widths(W_dec, truth, first)
    _check_finite(first)
    return metrics.scale_threshold(first.wanted), first.acts is not None


def _stream(
    coder: Coder, pieces: Iterator[HeldOut], threshold: float, samples: metrics.Samples
) -> tuple[Float[Tensor, " d_sae"], dict[str, float], dict[str, float]]:
    """One pass over all windows: how often each latent fires, and the metrics that need no truth.

    Where features are known it fills `samples`, and says what the neurons carry.
    """
    W_dec = coder.W_dec.detach()
    norms = metrics.row_norms(W_dec).to(W_dec.dtype)
    whole = metrics.Reconstruction(W_dec, threshold)
    by_prefix = {width: metrics.Reconstruction(W_dec, threshold) for width in _prefixes(coder)}
    neurons = metrics.Neurons(W_dec.shape[1], samples.n_features)
    for piece in pieces:
        _check_finite(piece)
        size, codes = chunk_rows(len(W_dec)), []
        for x, wanted in zip(piece.x.split(size), piece.wanted.split(size), strict=True):
            z = _encode(coder, x, whole.n_samples)
            whole.update(wanted, coder.decode(z, x), z)
            for width, of_prefix in by_prefix.items():
                first = z.scaled((torch.arange(len(W_dec), device=W_dec.device) < width).to(W_dec.dtype))
                of_prefix.update(wanted, coder.decode(first, x), first)
            if samples.n_features:
                codes.append(metrics.compressed(z.scaled(norms).to("cpu"), threshold))
        if samples.n_features and piece.acts is not None:
            acts = piece.acts.to("cpu")
            samples.append(FeatureBatch.cat(codes), acts)
            neurons.update(piece.wanted.cpu(), acts)
    density = whole.density()
    values = _group("metrics", whole.compute())
    if not isfinite(values["metrics/mse"]):
        raise UsageError("reconstructions must be finite, but some are not; check weights and activations")
    values |= {f"metrics/fvu_prefix_{width}": part.compute()["fvu"] for width, part in by_prefix.items()}
    values["sparsity/dead_features"] = float((density == 0).sum())
    carried = neurons.beside_chance(metrics.truth_as_units(samples)) if samples.n_features else {}
    return density, values, carried


def _prefixes(coder: Coder) -> tuple[int, ...]:
    """How many latents reconstruct alone, of an SAE that is nested."""
    return coder.config.widths[:-1] if isinstance(coder, SAE) else ()


def _encode(coder: Coder, x: Float[Tensor, "batch d_in"], start: int) -> SparseCodes:
    """Codes that are finite and fit the dictionary; x begins with sample `start`."""
    z = coder.encode(x)
    if not bool(z.values.isfinite().all()):
        row = start + int((~z.values.isfinite()).any(dim=1).nonzero()[0])
        raise UsageError(f"codes must be finite, but those of sample {row} are not; check weights and activations")
    if z.d_sae != len(coder.W_dec):
        raise UsageError(
            f"codes of {z.d_sae} latents do not fit a W_dec of {len(coder.W_dec)} rows; give one row per latent"
        )
    return z


def _rank(coder: Coder, held_out: HeldOut | HeldOutStream, ranking: metrics.Ranking, size: int) -> metrics.Ranking:
    """Fills in the pre-latents of the first samples."""
    for piece in held_out.pieces(size):
        assert piece.acts is not None
        rows = chunk_rows(coder.W_dec.shape[0])
        for start in range(0, len(piece.x), rows):
            if ranking.complete:
                return ranking
            chunk = slice(start, start + rows)
            ranking.update(coder.pre_latents(piece.x[chunk]), piece.acts[chunk].to("cpu"))
    return ranking


def _check_finite(piece: HeldOut) -> None:
    if not all(bool(rows.isfinite().all()) for rows in (piece.x, piece.wanted)):
        raise UsageError("activations must be finite, but the evaluation set holds nan or inf; drop those rows")
    if piece.acts is not None and not bool(piece.acts.values.isfinite().all()):
        raise UsageError("true activations must be finite, but the evaluation set holds nan or inf; drop those rows")


def _check_widths(W_dec: Tensor, truth: Tensor, first: HeldOut) -> None:
    if truth.shape[1] != W_dec.shape[1]:
        raise UsageError(
            f"the true features have {truth.shape[1]} dimensions, but the dictionary has {W_dec.shape[1]}; pass the "
            "truth of the activations that it was trained on"
        )
    if first.acts is not None and first.acts.n_features != len(truth):
        raise UsageError(
            f"the true activations are of {first.acts.n_features} features, but the truth has {len(truth)}; pass both "
            "from one world"
        )


def chunk_rows(d_sae: int) -> int:
    """Rows that are encoded together."""
    return min(CHUNK_ROWS, max(1, CHUNK_ENTRIES // d_sae))


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
    """`f1` of `metrics.recovery`, by itself, of codes z_j |w_j|: a second and cheaper road to the same number.

    It is dense where `CodeRecovery` streams entries, so that a batch has to be small. Given the same match, codes and
    threshold the two agree: tests/test_evaluation.py, test_the_f1_of_a_log_is_that_of_a_result. A log's differs from
    a result's in what it is given: few samples, the codes of training, and latents that fired lately.
    """
    owned = matching.has_latent
    on = acts.dense() > 0
    fires = torch.zeros_like(on)
    fires[:, owned] = codes.dense()[:, matching.latent[owned]] > threshold
    counted = on.any(dim=0)
    f1 = 2 * (on & fires).sum(dim=0) / (on.sum(dim=0) + fires.sum(dim=0)).clamp_min(1)
    return float(f1[counted].mean()) if bool(counted.any()) else 0.0


def _group(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{key}" if not name.count("/") else f"{name}_{key}": value for key, value in values.items()}
