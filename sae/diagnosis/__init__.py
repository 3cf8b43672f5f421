"""What is wrong with a dictionary whose truth is known: where its F1 was lost, which features it missed, and why.

    gaps.py        what the encoder loses, what the dictionary loses, what even the true dictionary loses
    structure.py   trees, exclusive groups, correlations of the true features
    holdings.py    which features a latent is made of
    reasons.py     why a feature is missed, and what predicts it
    units.py       features per neuron and per latent
    files.py       features.csv and diagnosis.json

`sae eval RUN_DIR --diagnose`. Definitions and an example: docs/diagnosis.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.diagnosis.gaps import f1_gaps, n_rows
from sae.diagnosis.holdings import Holdings, parts_of
from sae.diagnosis.reasons import RAREST, REASONS, Verdict, attributes, rate, telling, verdict
from sae.diagnosis.structure import CoFiring, Structure, declared_structure, observed_structure, partners
from sae.diagnosis.units import distributions, neurons, weight_purities
from sae.errors import UsageError
from sae.evaluation import Coder, Evaluation, evaluate
from sae.held_out import HeldOut
from sae.metrics import match_dictionary
from sae.metrics.inputs import directions
from sae.sources import Source
from sae.world_source import WorldSource
from toymodels.geometry import feature_dimensionality

__all__ = ["Diagnosis", "diagnose", "diagnose_source", "require_truth"]

# A found feature is misread when its latent agrees with it on when it is on by less than this.
MISREAD = 0.5
# Evaluation rows that are looked at, at most: what fires together shows on these.
MAX_ROWS = 2**17


@dataclass(frozen=True)
class Diagnosis:
    """`metrics` under the names of result.json, `features` the columns of features.csv, `summary` diagnosis.json."""

    metrics: dict[str, float]
    features: dict[str, list[Any]]
    summary: dict[str, Any]


def diagnose_source(coder: Coder, source: Source, evaluation: Evaluation, n_samples: int) -> Diagnosis:
    """The diagnosis of what was trained on a source, on its held-out rows.

    Raises:
        UsageError: it is not known what the true features do.
    """
    world = require_truth(source)
    validation = source.held_out("calibration", n_rows(len(world.truth), len(coder.W_dec)) // 4)  # type: ignore[arg-type]
    held_out = source.held_out("evaluation", min(n_samples, MAX_ROWS))
    return diagnose(
        coder, world.truth, validation, held_out, evaluation=evaluation, structure=declared_structure(world.world)
    )


def require_truth(source: Source) -> WorldSource:
    """The source, if it knows what the true features do.

    Raises:
        UsageError: it does not.
    """
    if not isinstance(source, WorldSource) or source.truth is None:
        raise UsageError(
            "a diagnosis needs the true features and when they are on, which this source does not know; use a source "
            "of kind toy or world, or evaluate without --diagnose"
        )
    return source


@torch.no_grad()
def diagnose(
    coder: Coder,
    truth: Float[Tensor, "n_features d"] | None,
    validation: HeldOut,
    held_out: HeldOut,
    *,
    evaluation: Evaluation | None = None,
    structure: Structure | None = None,
) -> Diagnosis:
    """Where the F1 was lost, which features were missed and why, what units carry, how the dictionary fills its space.

    Penalties and thresholds are chosen on `validation`; everything else is of `held_out`, whose first `gaps.n_rows`
    rows are sparsely coded. Both come with the true activations. `evaluation` is of the same rows (default: it is
    made), `structure` what is known of trees and exclusive groups (default: it is read off the rows).

    Raises:
        UsageError: no truth, no true activations, or no feature that is on in the validation rows.
    """
    for rows in (validation, held_out):
        if truth is None or rows.acts is None:
            raise UsageError(
                "a diagnosis needs the true features and when they are on; pass truth, and rows with their true "
                "activations"
            )
        if not bool((rows.acts.values > 0).any()):
            raise UsageError("no true feature is on in the rows of a diagnosis; pass more rows")
    assert truth is not None
    assert held_out.acts is not None
    evaluation = evaluate(coder, held_out, truth) if evaluation is None else evaluation
    tables = {name.removeprefix("feature/"): column for name, column in evaluation.tables.items()}
    alive = tables["latent/frequency"] > 0
    matching = match_dictionary(coder.W_dec.detach(), truth, alive)
    learned, features = (directions(rows)[0].float().cpu() for rows in (coder.W_dec.detach(), truth))

    rows = next(held_out.pieces(n_rows(len(truth), len(learned))))
    strength = tables["frequency"] * tables["magnitude"].square()
    values, by_feature = f1_gaps(coder, truth, matching, validation, rows, strength)

    seen = CoFiring(held_out.acts.to("cpu"))
    structure = observed_structure(seen) if structure is None else structure
    partner, phi = partners(seen)
    number = alive.nonzero().squeeze(1)
    held = parts_of(learned[number], features)
    held = telling(held._replace(latent=number[held.latent]), structure, seen)
    missed = ~tables["found"]
    judged = verdict(tables, held, structure, seen, missed)
    misread = ~missed & (tables["frequency"] > 0) & (tables["f1"] < MISREAD)
    values |= {"missed": float(missed.sum()), "misread": float(misread.sum())}
    values |= {f"missed_{name}": float((judged.reason == place).sum()) for place, name in enumerate(REASONS)}

    by_neuron = neurons(held_out, len(learned))
    purities = weight_purities(coder.W_dec.detach(), truth, alive)
    values |= {f"purity_weights_{kind}": value for kind, value in purities.items()}
    crowding = torch.zeros(len(learned), dtype=features.dtype)
    crowding[number] = feature_dimensionality(learned[number])
    latent = tables["matched_latent"]
    columns: dict[str, Any] = {
        **{name: tables[name] for name in ("feature", "frequency", "magnitude")},
        "dimensionality": feature_dimensionality(features),
        "parent": structure.parent,
        "n_children": structure.n_children,
        "exclusive_children": structure.exclusive_parent.long(),
        "exclusive_group": structure.group,
        "partner": partner,
        "partner_phi": phi,
        "partner_is": [structure.relation(i, k) if k >= 0 else "" for i, k in enumerate(partner.tolist())],
        **{name: tables[name] for name in ("nearest_feature", "nearest_feature_cosine")},
        **{name: tables[name] for name in ("matched_latent", "matched_cosine", "nearest_latent")},
        "nearest_latent_cosine": tables["nearest_latent_cosine"],
        "latent_dimensionality": torch.where(latent >= 0, crowding[latent.clamp(min=0)], 0.0),
        "carrier": judged.carrier,
        "carrier_holds": _parts(held, judged.carrier),
        "n_carriers": judged.n_carriers,
        **{name: tables[name] for name in ("precision", "recall", "f1", "auroc", "r2")},
        **by_feature,
        "status": [("missed" if m else "misread" if r else "found") for m, r in zip(missed, misread, strict=True)],
        "reason": ["" if place < 0 else list(REASONS)[place] for place in judged.reason.tolist()],
    }
    listed = {name: column.tolist() if isinstance(column, Tensor) else column for name, column in columns.items()}
    summary = {
        "structure": "declared by the world" if structure.declared else "read off the evaluation rows",
        "n_rows": len(held_out.x),
        "n_coded": len(rows.x),
        "n_validation": len(validation.x),
        "least_part": held.least,
        "reasons": _reasons(judged, missed),
        "predictors": [
            {"name": name, **rate(holds, missed, None if name == RAREST else tables["frequency"])._asdict()}
            for name, holds in attributes(tables, structure, phi).items()
            if bool(holds.any()) and not bool(holds.all())
        ],
        "units": distributions(by_neuron, evaluation.tables, alive),
    }
    return Diagnosis({f"diagnosis/{name}": value for name, value in values.items()}, listed, summary)


def _parts(held: Holdings, carrier: Tensor) -> list[str]:
    """What the carrier of each feature is made of: `feature:share`, from the largest part down."""
    words: dict[int, list[str]] = {}
    for latent, feature, share in zip(held.latent.tolist(), held.feature.tolist(), held.share.tolist(), strict=True):
        words.setdefault(latent, []).append(f"{feature}:{share:.2f}")
    return [" ".join(words.get(latent, [])) for latent in carrier.tolist()]


def _reasons(judged: Verdict, missed: Tensor) -> list[dict[str, Any]]:
    """Of each reason: how many features it explains, and of how many missed and found ones its condition holds."""
    n_missed, n_found = int(missed.sum()), int((~missed).sum())
    return [
        {
            "name": name,
            "means": words,
            "n": int((judged.reason == place).sum()),
            "holds_of_missed": int((judged.holds[name] & missed).sum()) / max(n_missed, 1),
            "holds_of_found": int((judged.holds[name] & ~missed).sum()) / max(n_found, 1),
        }
        for place, (name, words) in enumerate(REASONS.items())
    ]
