"""Baselines next to a run, on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae.console import print_methods, print_metrics
from sae.evaluation import Evaluation
from sae.names import BASELINES

CAPTION = (
    "fit s: seconds to fit a method; the SAE was trained before.\n"
    "sae_oracle, sae_pursuit: its dictionary, coded by sparse coding and by matching pursuit; oracle*: the true one.\n"
    "pca, ica, ksvd: each component with both signs. docs/baselines.md says what each of them is."
)


def print_beside(out: Path, evaluation: Evaluation, rows: Sequence[Mapping[str, Any]]) -> None:
    """Every metric of the run, and the table of methods."""
    print_metrics(evaluation.metrics)
    print_methods("the same activations, by other methods", rows, CAPTION)
    print(f"\nwrote {out / BASELINES}")
