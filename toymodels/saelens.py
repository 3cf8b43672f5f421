"""Reads the worlds that SAELens saves: a folder of safetensors and JSON, nothing of which is run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from toymodels.errors import UsageError, nearest
from toymodels.firing import ExponentialOver, FoldedNormalOver, LinearOver, Number, Profile, Strengths, over_features
from toymodels.hierarchies import Forest, forest_of_nodes
from toymodels.mappings import read_mapping
from toymodels.streams import generator
from toymodels.synthetic import SyntheticWorld, WorldDescription

logger = logging.getLogger("toymodels")

_KINDS: dict[str, Any] = {over.KIND: over for over in (LinearOver, ExponentialOver, FoldedNormalOver)}

CONFIG, WEIGHTS, HIERARCHY = "synthetic_model_config.json", "synthetic_model.safetensors", "hierarchy.json"


def load_saelens(folder: Path) -> SyntheticWorld:
    """The world in a folder that SAELens's SyntheticModel.save wrote.

    Dictionary, bias, factors and the (compensated) probabilities are in the weights. Magnitudes are not: SAELens
    draws them anew from the seed in its configuration, and so does this.

    Raises:
        UsageError: a file is missing or damaged, or the files do not fit together.
    """
    config, weights = _json(folder / CONFIG), _weights(folder / WEIGHTS)
    D, probs, bias = weights["feature_vectors"], weights["firing_probabilities"].double(), weights["bias"]
    n, d = D.shape
    if (config.get("num_features"), config.get("hidden_dim")) != (n, d):
        raise UsageError(
            f"{folder / CONFIG} says {config.get('num_features')} features in {config.get('hidden_dim')} dimensions, "
            f"{WEIGHTS} holds {n} in {d}; take files of one world"
        )
    if not ((probs >= 0) & (probs <= 1)).all():
        raise UsageError(f"{folder / WEIGHTS}: firing_probabilities must lie in [0, 1], got {_outside(probs):.4g}")
    factors = weights.get("correlation_factor")
    if factors is not None:
        _check_factors(folder / WEIGHTS, factors, weights.get("correlation_diag"))
    seed = config.get("seed")
    strengths = Strengths(
        "rectified_normal",
        _magnitudes(folder, config.get("mean_firing_magnitudes", 1.0), n, seed, 2),
        _magnitudes(folder, config.get("std_firing_magnitudes", 0.0), n, seed, 1),
    )
    forest = Forest.flat(n)
    if (folder / HIERARCHY).exists():
        roots = _json(folder / HIERARCHY).get("roots")
        try:
            if not isinstance(roots, list) or not all(isinstance(root, dict) for root in roots):
                raise UsageError(f"roots must be a list of nodes, got {roots!r}")
            forest = forest_of_nodes(roots, n)
        except (UsageError, AttributeError, TypeError) as error:
            raise UsageError(f"{folder / HIERARCHY} does not fit: {error}; take files of one world") from error
    return SyntheticWorld(D, probs, strengths, forest, factors, bias)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; a world of SAELens has {CONFIG}, {WEIGHTS}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def _weights(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise UsageError(f"cannot read {path}: it is not there; a world of SAELens has {CONFIG}, {WEIGHTS}")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be loaded: {error}; copy it again") from error
    wanted = {"feature_vectors": 2, "firing_probabilities": 1, "bias": 1}
    for name, ndim in wanted.items():
        if name not in weights or weights[name].ndim != ndim:
            held = {key: list(value.shape) for key, value in weights.items()}
            raise UsageError(f"{path} must hold {name} with {ndim} axes, got {held}; take a file that SAELens saved")
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UsageError(f"{path}: {name} holds NaN or infinity; copy it again")
    n, d = weights["feature_vectors"].shape
    shapes = {"firing_probabilities": [n], "bias": [d], "correlation_diag": [n]}
    for name, shape in shapes.items():
        if name in weights and list(weights[name].shape) != shape:
            raise UsageError(f"{path}: {name} must have shape {shape}, got {list(weights[name].shape)}")
    return {name: value.float().contiguous() for name, value in weights.items()}


def _outside(probs: Profile) -> float:
    return float(probs[(probs < 0) | (probs > 1)][0])


def _check_factors(path: Path, factors: Tensor, left: Tensor | None) -> None:
    if left is None or factors.ndim != 2 or len(factors) != len(left):
        raise UsageError(
            f"{path}: correlation_factor must be [n_features, rank] beside correlation_diag; copy it again"
        )
    variance = factors.square().sum(1) + left
    if not ((variance - 1).abs() < 1e-3).all() or not (left > 0).all() or not (factors.square().sum(1) < 1).all():
        raise UsageError(
            f"{path}: correlation_factor and correlation_diag must make variances of 1, got {variance.max()}"
        )


def _magnitudes(folder: Path, given: Any, n: int, seed: int | None, offset: int) -> Float[Tensor, " n"]:
    """The numbers that SAELens makes of a number or a `generator_name`, seeded `offset` after the world."""
    number: Number
    if isinstance(given, Mapping):
        own = {key: value for key, value in given.items() if key != "generator_name"}
        kind = given.get("generator_name")
        if kind == "constant":
            given = own.get("value", 1.0)
        elif kind in _KINDS:
            number = read_mapping(_KINDS[kind], own, f"{folder / CONFIG}: {kind}")
        else:
            raise UsageError(f"{folder / CONFIG}: magnitudes of {kind!r} cannot be read{nearest(kind, _KINDS)}")
    if isinstance(given, int | float) and not isinstance(given, bool):
        number = float(given)
    elif not isinstance(given, Mapping):
        raise UsageError(f"{folder / CONFIG}: magnitudes must be a number or a mapping, got {given!r}")
    if seed is None and isinstance(number, FoldedNormalOver):
        logger.warning(
            "%s has no seed: SAELens draws its magnitudes anew each time, here they are drawn from seed 0", folder
        )
    stream = generator(0, "world", offset) if seed is None else torch.Generator().manual_seed(seed + offset)
    drawn = over_features(number, n, stream)
    if (drawn < 0).any():
        raise UsageError(f"{folder / CONFIG}: magnitudes must not be negative, got {float(drawn.min()):.4g}")
    return drawn


def load_world(path: str | Path, seed: int = 0) -> SyntheticWorld:
    """The world that a YAML file describes, drawn with `seed`; or, from a folder, one that SAELens saved.

    Raises:
        UsageError: it cannot be read, or describes no world.
    """
    path = Path(path)
    return load_saelens(path) if path.is_dir() else WorldDescription.read(path).build(seed)
