"""An SAE of any library, on activations that it need not have been trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, field_validator

from sae import formats
from sae.config import SourceConfig
from sae.config_base import Section
from sae.config_text import explain, read_yaml
from sae.errors import UsageError
from sae.evaluation import Evaluation, evaluate_on
from sae.model import SAE
from sae.sources import Source
from toymodels.plain_yaml import parse_yaml


class _Holder(Section):
    source: Any

    @field_validator("source", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"must be a mapping, as {{kind: store, path: acts}}, got {value!r}")
        return SourceConfig.of_kind(value)


def source_from(words: str) -> SourceConfig:
    """The source in words of YAML, or in a file that has a section `source`.

    Raises:
        UsageError: they name none.
    """
    try:
        mapping = read_yaml(words) if Path(words).is_file() else {"source": parse_yaml(words)}
        return _Holder.model_validate({"source": mapping.get("source")}).source
    except yaml.YAMLError as error:
        raise UsageError(f"--source {words}: {' '.join(str(error).split())}; give a file or {{kind: ...}}") from error
    except ValidationError as error:
        raise UsageError(f"--source {words}: {explain(error, _Holder)}") from error


def evaluate_elsewhere(path: Path, words: str, n_samples: int) -> Evaluation:
    """Every metric that applies to the SAE in a folder or file, on about n_samples held-out rows of a source; recovery
    where the source knows the truth, and what a language model loses where the rows come from one.

    Raises:
        UsageError: the SAE or the source cannot be read, or they do not fit each other.
    """
    config, sae = source_from(words), formats.load(path)
    source = config.open()
    require_fit(sae, source)
    return evaluate_on(source, sae, n_samples)


def require_fit(sae: SAE, source: Source) -> None:
    """Refuses activations of another width.

    Raises:
        UsageError: they are, or their targets are.
    """
    widths, theirs = (sae.d_in, sae.d_out), (source.d_in, source.d_out or source.d_in)
    if widths != theirs:
        raise UsageError(
            f"the SAE maps {widths[0]} dimensions to {widths[1]}, the source has {theirs[0]} and {theirs[1]}; give "
            "activations from the place that it was trained on"
        )
