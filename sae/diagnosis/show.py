"""What a diagnosis says, in a few sentences on the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sae.names import DIAGNOSIS, FEATURES

MOST_REASONS = 4


def print_diagnosis(out: Path, metrics: Mapping[str, float]) -> None:
    """Where the F1 went, why features are missed, and where the rest stands."""
    f1, dictionary, encoder, unreachable = (
        metrics[f"diagnosis/{name}"] for name in ("f1", "dictionary_gap", "amortisation_gap", "unreachable")
    )
    print(
        f"\nF1 is {f1:.3f}. Of the {1 - f1:.3f} that are missing, {dictionary:.3f} are the dictionary's and "
        f"{encoder:.3f} the encoder's; {unreachable:.3f} are beyond the true dictionary, too."
    )
    reasons = json.loads((out / DIAGNOSIS).read_text(encoding="utf-8"))["reasons"]
    most = sorted((row for row in reasons if row["n"]), key=lambda row: -row["n"])[:MOST_REASONS]
    why = ", ".join(f"{row['n']} {row['means']}" for row in most)
    if rest := round(metrics["diagnosis/missed"]) - sum(row["n"] for row in most):
        why += f", {rest} for other reasons"
    print(f"{metrics['diagnosis/missed']:.0f} features are missed{f': {why}' if why else ''}.")
    print(f"\nwrote {out / FEATURES} and {out / DIAGNOSIS}; `sae report {out}` draws them")
