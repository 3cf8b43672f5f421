"""dictionary_learning: a folder with `ae.pt` and `config.json`, whose `trainer.dict_class` says what is in it.

Linear layers keep their weights transposed: `encoder.weight` [d_sae, d_in], `decoder.weight` [d_in, d_sae].
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.errors import UsageError
from sae.formats.files import exactly, field, of_shapes, read_json, read_pickled, to_json
from sae.formats.portable import Above, Gate, Largest, Portable, Positive
from toymodels.files import replaced, write_text

logger = logging.getLogger("sae")

CONFIG, WEIGHTS = "config.json", "ae.pt"
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")
TENSORS = {
    "AutoEncoder": (*LINEAR, "bias"),
    "AutoEncoderNew": (*LINEAR, "decoder.bias"),
    "GatedAutoEncoder": ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    "AutoEncoderTopK": (*LINEAR, "b_dec"),
    "BatchTopKSAE": (*LINEAR, "b_dec", "threshold"),
    "JumpReluAutoEncoder": (*MATRICES, "threshold"),
    "MatryoshkaBatchTopKSAE": (*MATRICES, "threshold"),
}
MATRIX = ("encoder.weight", "decoder.weight", "W_enc", "W_dec")
BUDGETS = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")
# Buffers that repeat what the configuration says, or that inference does not read.
BUFFERS = {
    "AutoEncoderTopK": ("k", "threshold"),
    "BatchTopKSAE": ("k",),
    "MatryoshkaBatchTopKSAE": ("k", "group_sizes"),
}


def is_here(path: Path) -> bool:
    """Whether the path looks like one."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Portable:
    """The dictionary in a folder. Only tensors are read from files."""
    trainer = field(read_json(path / CONFIG), "trainer", dict, path / CONFIG)
    name = field(trainer, "dict_class", str, path / CONFIG)
    if name not in TENSORS:
        raise UsageError(f"{path / CONFIG}: dict_class {name!r} has no counterpart here; known: {', '.join(TENSORS)}")
    given = read_pickled(path / WEIGHTS)
    axes = {key: 2 if key in MATRIX else 0 if key == "threshold" and name in BUDGETS else 1 for key in TENSORS[name]}
    t = exactly(given, axes, path / WEIGHTS, f"{name} of dictionary_learning", BUFFERS.get(name, ()))
    W_enc = t["W_enc"] if "W_enc" in t else t["encoder.weight"].T
    W_dec = t["W_dec"] if "W_dec" in t else t["decoder.weight"].T
    d_in, d_sae = W_enc.shape
    b_dec = next(t[key] for key in ("b_dec", "bias", "decoder.bias", "decoder_bias") if key in t)
    b_enc = next(t[key] for key in ("b_enc", "encoder.bias", "gate_bias") if key in t)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    of_shapes(path / WEIGHTS, dict(zip(MATRICES, (W_enc, b_enc, W_dec, b_dec), strict=True)), shapes)
    own = {key: (d_sae,) for key, n in axes.items() if n == 1 and key in ("threshold", "r_mag", "mag_bias")}
    of_shapes(path / WEIGHTS, t, own)
    k = field(trainer, "k", int, path / CONFIG) if name in ("AutoEncoderTopK", *BUDGETS) else None
    if k is not None and "k" in given and int(given["k"]) != k:
        raise UsageError(f"{path}: k is {k} in {CONFIG} but {int(given['k'])} in {WEIGHTS}; copy both again")
    tied = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    rule: Any = Positive()
    if name == "GatedAutoEncoder":
        rule = Gate(t["r_mag"], t["mag_bias"] - t["r_mag"].exp() * t["gate_bias"])
    elif name == "AutoEncoderTopK":
        assert k is not None
        rule = Largest(k)
    elif "threshold" in t:
        if name in BUDGETS and float(t["threshold"].max()) < 0:
            logger.warning(
                "%s has a threshold of %g, which was never fitted: as there, every positive latent fires, however many "
                "k=%s asked for",
                path / WEIGHTS,
                float(t["threshold"].max()),
                k,
            )
        rule = Above(t["threshold"].clamp_min(0).expand(d_sae).clone(), None if k is None else float(k))
    return Portable(W_enc, b_enc, W_dec, b_dec, rule, tied)


def write(given: Portable, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Writes the folder; `metadata` (lm_name, layer, submodule_name) is added to `trainer`."""
    if given.transcodes:
        raise UsageError("dictionary_learning has no transcoders; write it for saelens or sparsify")
    name, tensors, extra = _as_dictionary(given)
    trainer = {**metadata, "dict_class": name, "activation_dim": given.d_in, "dict_size": given.d_sae, **extra}
    text = to_json({"trainer": trainer, "buffer": {}})
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / WEIGHTS) as partial:
        torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
    write_text(folder / CONFIG, text)


def _as_dictionary(given: Portable) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Class, tensors, and what `trainer` must say besides the common part."""
    bias = given.bias(subtracts_b_dec=True)
    linear = {"encoder.weight": given.W_enc.T, "decoder.weight": given.W_dec.T}
    match given.rule:
        case Positive():
            return "AutoEncoder", linear | {"encoder.bias": bias, "bias": given.b_dec}, {}
        case Largest(k=k):
            kept = {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
            return "AutoEncoderTopK", linear | {"encoder.bias": bias, "b_dec": given.b_dec} | kept, {"k": k}
        case Above(threshold=threshold, k=k) if k is not None and k == int(k) and given.rule.is_one:
            kept = {"k": torch.tensor(int(k), dtype=torch.int), "threshold": threshold[0].clone()}
            return "BatchTopKSAE", linear | {"encoder.bias": bias, "b_dec": given.b_dec} | kept, {"k": int(k)}
        case Above(threshold=threshold):
            bias = given.bias(subtracts_b_dec=False)
            values = (given.W_enc, bias, given.W_dec, given.b_dec)
            return "JumpReluAutoEncoder", dict(zip(MATRICES, values, strict=True)) | {"threshold": threshold}, {}
        case Gate(r=r, c=c):
            biases = {"decoder_bias": given.b_dec, "r_mag": r, "gate_bias": bias, "mag_bias": bias * r.exp() + c}
            return "GatedAutoEncoder", linear | biases, {}
    raise UsageError("dictionary_learning has no matching pursuit; write it for saelens")
