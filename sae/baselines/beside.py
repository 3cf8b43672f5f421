"""Baselines next to a finished run, on its own activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae.again import measure_again, open_again
from sae.baselines.by_name import applicable, measured, prepare
from sae.config import TrainConfig
from sae.evaluation import Evaluation
from sae.names import BASELINES
from toymodels.files import write_text


def beside_run(
    out: str | Path,
    *,
    diagnose: bool = False,
    downstream: bool = False,
    device: str | None = None,
    on_row: Callable[[str], None] | None = None,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Measures a run again, and every baseline that its source supports, with as many latents and as many firing.

    The rows, the SAE's first, also go into baselines.json in the run's directory, where `sae report` finds them; the
    SAE's has no `seconds`, as it was trained before. `on_row` is called with the name of the next baseline.

    Raises:
        UsageError: the run cannot be measured again, or its source has a target.
    """
    out = Path(out)
    sae, config, source = open_again(out, device)
    names = applicable(source, sae)
    evaluation = measure_again(out, sae, config, source, diagnose=diagnose, downstream=downstream, device=device)
    rows: list[dict[str, Any]] = [{"method": config.sae.kind, "seed": config.train.seed, **evaluation.metrics}]
    k = budget(config, evaluation.metrics["metrics/l0"], source.d_in)
    given = prepare(names, source, d_sae=config.sae.d_sae, k=k, seed=config.train.seed, sae=sae)
    for name in names:
        if on_row is not None:
            on_row(name)
        rows.append(measured(name, given, source, config.evaluation.n_samples))
    write_text(out / BASELINES, json.dumps(rows, indent=1) + "\n")
    return evaluation, rows


def budget(config: TrainConfig, l0: float, d_in: int) -> int:
    """The most latents that fire for a sample: the SAE's own k, or the one derived from its L0."""
    k = getattr(config.sae, "k", None) or l0
    return max(1, min(round(k), d_in, config.sae.d_sae))
