"""What `sae harvest` reads from a file: the section `source`, which may be a training run's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, field_validator

from sae.config import SourceConfig, TrainConfig, override
from sae.config_base import Section
from sae.config_text import explain, flags, read_yaml
from sae.errors import UsageError
from sae.networks.source import ModelSourceConfig
from toymodels.errors import nearest


class _Plan(Section):
    source: ModelSourceConfig

    @field_validator("source", mode="before")
    @classmethod
    def _of_a_network(cls, value: Any) -> Any:
        kind = value.get("kind") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "model" and kind in SourceConfig.kinds:
            raise ValueError(f"kind {kind!r} has no network to harvest; set kind to model")
        return SourceConfig.of_kind(value)


def load_plan(path: Path, words: Sequence[str]) -> ModelSourceConfig:
    """The network, the place in it and the texts; `words` are flags such as `--source.n_tokens 1_000_000`.

    Raises:
        UsageError: the file cannot be read, or a key or value breaks a rule.
    """
    mapping = override(read_yaml(path), flags(words))
    for name in mapping:
        if name not in TrainConfig.model_fields and name != "sweep":
            raise UsageError(f"{path}: unknown key {name!r}{nearest(name, TrainConfig.model_fields)}")
    try:
        return _Plan.model_validate({"source": mapping["source"]} if "source" in mapping else {}).source
    except ValidationError as error:
        raise UsageError(f"{path}: {explain(error, _Plan)}") from error
