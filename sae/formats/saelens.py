"""SAELens: a folder with `cfg.json` and `sae_weights.safetensors`. SAEBench, Neuronpedia and the Hub read it.

z = f((x - b_dec) W_enc + b_enc), or without b_dec where `apply_b_dec_to_input` is false; x_hat = z W_dec + b_dec. A
gated SAE has separate biases: z = max(0, x W_enc exp(r_mag) + b_mag) where x W_enc + b_gate > 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.errors import UsageError
from sae.formats.files import exactly, field, of_shapes, read_json, read_safetensors, to_json
from sae.formats.portable import Above, Gate, Largest, Portable, Positive, Pursuit, Rule
from toymodels.files import save_tensors, write_text

logger = logging.getLogger("sae")

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# The release whose files these are. Without a version, SAELens reads a file as one of its first, and drops metadata.
VERSION = "6.54.12"
AFFINE = ("W_enc", "b_enc", "W_dec", "b_dec")
GATED = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
TENSORS = {
    "standard": AFFINE,
    "gated": GATED,
    "jumprelu": (*AFFINE, "threshold"),
    "topk": AFFINE,
    "matching_pursuit": ("W_dec", "b_dec"),
    "transcoder": AFFINE,
    "skip_transcoder": (*AFFINE, "W_skip"),
    "jumprelu_transcoder": (*AFFINE, "threshold"),
    "jumprelu_skip_transcoder": (*AFFINE, "threshold", "W_skip"),
}


def is_here(path: Path) -> bool:
    """Whether the path looks like one."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Portable:
    """The SAE in a folder."""
    config = read_json(path / CONFIG)
    architecture = field(config, "architecture", str, path / CONFIG)
    if architecture not in TENSORS:
        raise UsageError(
            f"{path / CONFIG}: architecture {architecture!r} has no counterpart here; known: {', '.join(TENSORS)} (of "
            "one that is in training, save the inference model)"
        )
    _require_plain(config, path / CONFIG)
    axes = {name: 2 if name.startswith("W_") else 1 for name in TENSORS[architecture]}
    t = exactly(read_safetensors(path / WEIGHTS), axes, path / WEIGHTS, f"{architecture!r} of SAELens")
    (d_sae, d_out), d_in = t["W_dec"].shape, field(config, "d_in", int, path / CONFIG)
    if (said := config.get("d_sae", d_sae)) != d_sae:
        raise UsageError(f"{path}: d_sae is {said} in {CONFIG} and {d_sae} in {WEIGHTS}; copy both again")
    _require_shapes(path / WEIGHTS, t, d_in, d_sae, d_out)
    transcodes = architecture.endswith("transcoder")
    if d_out != d_in and not transcodes:
        raise UsageError(f"{path / WEIGHTS}: W_dec must have d_in={d_in} columns, got {d_out}; copy it again")
    tied = bool(config.get("apply_b_dec_to_input", not transcodes))
    if transcodes and tied:
        raise UsageError(f"{path / CONFIG}: apply_b_dec_to_input must be false in a transcoder; write the file again")
    rule: Rule
    if architecture == "matching_pursuit":
        rule = _pursuit(config, path / CONFIG)
        b_dec = t["b_dec"] if tied else torch.zeros(d_in)  # there it is neither subtracted nor added
        return Portable(t["W_dec"].T, torch.zeros(d_sae), t["W_dec"], b_dec, rule)
    if architecture == "gated":
        t["b_enc"], gain = t["b_gate"], t["r_mag"].exp()
        rule = Gate(t["r_mag"], t["b_mag"] - gain * t["b_gate"])
    elif "threshold" in t:
        rule = Above(t["threshold"].clamp_min(0))
    elif architecture == "topk":
        rule = Largest(field(config, "k", int, path / CONFIG))
        if config.get("rescale_acts_by_decoder_norm"):  # as if rows had norm 1: what that comes to
            norms = t["W_dec"].norm(dim=1)
            t["W_enc"], t["b_enc"] = t["W_enc"] * norms, t["b_enc"] * norms
            t["W_dec"] = t["W_dec"] / norms.clamp_min(1e-30)[:, None]
    else:
        rule = Positive()
    return Portable(
        t["W_enc"],
        t["b_enc"],
        t["W_dec"],
        t["b_dec"],
        rule,
        tied=tied,
        transcodes=transcodes,
        W_skip=t["W_skip"].T if "W_skip" in t else None,
    )


def write(given: Portable, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Writes the folder, with `metadata` that SAELens should know, such as model_name and hook_name."""
    architecture, tensors, extra = _as_saelens(given)
    config = {
        "architecture": architecture,
        "d_in": given.d_in,
        "d_sae": given.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": given.tied,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **extra,
        "metadata": {**metadata, "sae_lens_version": VERSION},
    }
    text = to_json(config)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, tensors)
    write_text(folder / CONFIG, text)


def _as_saelens(given: Portable) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Architecture, tensors, and what the configuration must say besides the common part."""
    bias = given.bias(subtracts_b_dec=given.tied)
    tensors = {"W_enc": given.W_enc, "b_enc": bias, "W_dec": given.W_dec, "b_dec": given.b_dec}
    if given.transcodes:
        return _as_transcoder(given, tensors)
    match given.rule:
        case Positive():
            return "standard", tensors, {}
        case Largest(k=k):
            return "topk", tensors, {"k": k, "rescale_acts_by_decoder_norm": False}
        case Above(threshold=threshold):
            return "jumprelu", tensors | {"threshold": threshold}, {}
        case Gate(r=r, c=c):
            del tensors["b_enc"]
            return "gated", tensors | {"b_gate": bias, "b_mag": bias * r.exp() + c, "r_mag": r}, {}
        case Pursuit(k=k):
            if not given.tied:
                raise UsageError("SAELens has no matching pursuit with a separate centre; train it with tied_bias")
            stops = {"residual_threshold": 0.0, "max_iterations": k, "stop_on_duplicate_support": False}
            return "matching_pursuit", {"W_dec": given.W_dec, "b_dec": given.b_dec}, stops


def _as_transcoder(given: Portable, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    name = "transcoder"
    if given.W_skip is not None:
        name, tensors = f"skip_{name}", tensors | {"W_skip": given.W_skip.T}
    if isinstance(given.rule, Above):
        name, tensors = f"jumprelu_{name}", tensors | {"threshold": given.rule.threshold}
    elif not isinstance(given.rule, Positive):
        rule = given.rule.name
        raise UsageError(f"SAELens has no transcoder whose latents fire by {rule}; train one with base batchtopk")
    return name, tensors, {"d_out": given.d_out}


def _pursuit(config: Mapping[str, Any], path: Path) -> Pursuit:
    """A pursuit with the same number of steps for every row: theirs may stop earlier."""
    steps = field(config, "max_iterations", int, path) if config.get("max_iterations") is not None else None
    stops = {
        name: config.get(name, early)
        for name, early in (("residual_threshold", 1e-2), ("stop_on_duplicate_support", True))
    }
    if steps is None or any(stops.values()):
        raise UsageError(
            f"{path}: its pursuit may stop early (max_iterations={steps}, {stops}), ours takes k steps; set "
            "max_iterations to k, residual_threshold to 0 and stop_on_duplicate_support to false if that will do"
        )
    return Pursuit(steps)


def _require_plain(config: Mapping[str, Any], path: Path) -> None:
    """Refuses anything done to activations outside the weights."""
    normalised = config.get("normalize_activations", "none")
    if normalised not in ("none", None, False):
        raise UsageError(
            f"{path}: normalize_activations is {normalised!r}, which is not in the weights; fold it into them in "
            'SAELens, or normalise the activations yourself and set it to "none"'
        )
    legacy = [name for name in ("activation_fn_str", "activation_fn", "finetuning_scaling_factor") if config.get(name)]
    if {str(config[name]) for name in legacy} - {"relu"}:
        given = ", ".join(f"{name}={config[name]!r}" for name in legacy)
        raise UsageError(f"{path} is from an early SAELens ({given}); load it in SAELens 6 and save it again")
    if config.get("reshape_activations", "none") != "none":
        logger.info("%s: reads the heads of attention as one vector (hook_z); flatten them first", path)


def _require_shapes(path: Path, t: Mapping[str, Tensor], d_in: int, d_sae: int, d_out: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    shapes |= dict.fromkeys(("b_enc", "threshold", "b_gate", "b_mag", "r_mag"), (d_sae,))
    of_shapes(path, t, {name: shape for name, shape in shapes.items() if name in t})
