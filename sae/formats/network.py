"""Which network a run's activations come from, according to its configuration, in the words of other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.config_text import read_yaml
from sae.names import CONFIG
from sae.stores.files import is_store, read_manifest


def network_metadata(run: Path, format: str) -> dict[str, Any]:
    """What the files of a format may say about the network; nothing where the run does not know.

    SAELens names a module by its `hook_name`, and reads its output.
    """
    origin = _origin(run)
    if origin is None:
        return {}
    model, module = origin["model"], origin["module"]
    if format == "dictionary_learning":
        return {"lm_name": model, "submodule_name": module}
    if format != "saelens":
        return {}
    said = {"model_name": model, "model_class_name": "AutoModelForCausalLM"}
    if origin["texts"] is not None:
        said |= {
            "context_size": origin["context_length"],
            "prepend_bos": origin["bos"],
            "dataset_path": origin["texts"],
        }
    if origin["reads"] == "output" and origin["target"] is None:
        said["hook_name"] = module
    return said


def _origin(run: Path) -> Mapping[str, Any] | None:
    """The section `source` of kind `model` that the activations come from, directly or through a store."""
    if not (run / CONFIG).is_file():
        return None
    source = read_yaml(run / CONFIG).get("source")
    if isinstance(source, dict) and source.get("kind") == "store" and is_store(Path(source["path"])):
        source = read_manifest(Path(source["path"])).origin
    return source if isinstance(source, dict) and source.get("kind") == "model" else None
