"""The diagnosis in a run directory: one row per feature, and the counts."""

from __future__ import annotations

import csv
import json
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any

from sae.diagnosis import Diagnosis
from sae.names import DIAGNOSIS, FEATURES
from toymodels.files import write_text


def save_diagnosis(out: Path, diagnosis: Diagnosis) -> None:
    """features.csv and diagnosis.json; what is undefined is left empty, or null."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(diagnosis.features)
    columns = [[_cell(value) for value in column] for column in diagnosis.features.values()]
    writer.writerows(zip(*columns, strict=True))
    write_text(out / FEATURES, text.getvalue())
    write_text(out / DIAGNOSIS, json.dumps(_defined(diagnosis.summary), indent=1) + "\n")


def _cell(value: object) -> object:
    """Six digits are more than any of these has."""
    return f"{value:.6g}" if isinstance(value, float) else value


def _defined(value: Any) -> Any:
    """JSON knows no nan."""
    if isinstance(value, dict):
        return {key: _defined(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_defined(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
