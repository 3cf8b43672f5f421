"""Reading what others wrote: every fault is told with the file, and nothing is guessed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae.errors import UsageError


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file."""
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); copy it again") from error
    if not isinstance(mapping, dict):
        raise UsageError(f"{path} must hold a mapping, got {type(mapping).__name__}; copy it again")
    return mapping


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read ({error}); copy it again") from error


def read_pickled(path: Path) -> dict[str, Any]:
    """The mapping in a file of torch.save, of tensors and plain values alone: nothing in it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of protocols that it may not know: it then fails
            mapping = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} cannot be read as tensors alone ({reason}); save its state_dict again") from error
    if not isinstance(mapping, dict):
        raise UsageError(f"{path} must hold a state_dict, got {type(mapping).__name__}; save its state_dict again")
    return mapping


def field(mapping: Mapping[str, Any], name: str, path: Path) -> Any:
    """What the file must say."""
    if name not in mapping:
        raise UsageError(f"{path} does not say {name!r}, without which it could be read in several ways; add it")
    return mapping[name]


def exactly(
    tensors: Mapping[str, Any], names: Sequence[str], path: Path, of: str, ignored: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Those tensors, as float32; `ignored` ones may be there.

    Raises:
        UsageError: some are missing, others are there too, or a number is not finite.
    """
    missing = [name for name in names if name not in tensors]
    strange = [name for name in tensors if name not in (*names, *ignored)]
    if missing or strange:
        faults = [f"{', '.join(missing)} missing"] if missing else []
        faults += [f"{', '.join(strange)} unknown"] if strange else []
        raise UsageError(f"{path} is no {of}, which has {', '.join(names)}: {'; '.join(faults)}")
    found = {name: tensors[name].float() for name in names}
    for name, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise UsageError(f"{path}: {name} holds NaN or infinity; copy it again")
    return found


def of_shapes(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses tensors of other shapes."""
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise UsageError(f"{path}: {name} must be {list(shape)}, got {list(tensors[name].shape)}; copy it again")
