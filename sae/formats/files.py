"""Reading other libraries' files: every error names the file, and nothing is guessed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae.errors import UsageError

Value = TypeVar("Value", str, int, dict)
WORDS = {str: "a text", int: "a whole number", dict: "a mapping"}


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
    """The mapping in a torch.save file that holds only tensors and plain values: nothing in it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of protocols that it may not know: it then fails
            mapping = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} does not hold only tensors ({reason}); save its state_dict again") from error
    if not isinstance(mapping, dict):
        raise UsageError(f"{path} must hold a state_dict, got {type(mapping).__name__}; save its state_dict again")
    return mapping


def field(mapping: Any, name: str, kind: type[Value], path: Path) -> Value:
    """A value that the file must give: a text, a mapping or a whole number."""
    if not isinstance(mapping, dict) or name not in mapping:
        raise UsageError(f"{path} does not give {name!r}, without which it could be read in several ways; add it")
    value = mapping[name]
    whole = isinstance(value, Tensor | float) and kind is int and float(value) == int(value)
    if isinstance(value, bool) or not (isinstance(value, kind) or whole):
        raise UsageError(f"{path}: {name} must be {WORDS[kind]}, got {value!r}; write the file again")
    return kind(value)


def exactly(
    tensors: Mapping[Any, Any], names: Mapping[str, int], path: Path, of: str, ignored: Sequence[str] = ()
) -> dict[str, Tensor]:
    """These tensors, with the given numbers of axes, as float32; `ignored` ones may be present.

    Raises:
        UsageError: some are missing or have other shapes, there are others, or a number is not finite.
    """
    missing = [name for name in names if name not in tensors]
    strange = [str(name) for name in tensors if name not in (*names, *ignored)]
    if missing or strange:
        faults = [f"{', '.join(missing)} missing"] if missing else []
        faults += [f"{', '.join(strange)} unknown"] if strange else []
        raise UsageError(
            f"{path} holds no valid {of}, which has {', '.join(names)}: {'; '.join(faults)}; save it again there"
        )
    found = {}
    for name, n_axes in names.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.ndim != n_axes or not tensor.numel():
            what = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UsageError(f"{path}: {name} must be a tensor with {n_axes} axes, got {what}; copy it again")
        found[name] = tensor.float()
        if not bool(found[name].isfinite().all()):
            raise UsageError(f"{path}: {name} holds NaN or infinity; copy it again")
    return found


def to_json(mapping: Mapping[str, Any]) -> str:
    """JSON for a file; built before anything is written.

    Raises:
        UsageError: metadata that JSON cannot express.
    """
    try:
        return json.dumps(mapping, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"metadata must be text, numbers, lists or mappings of these: {error}") from error


def of_shapes(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses tensors of other shapes."""
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise UsageError(f"{path}: {name} must be {list(shape)}, got {list(tensors[name].shape)}; copy it again")
