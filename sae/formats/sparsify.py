"""sparsify: a folder with `cfg.json` and `sae.safetensors`. Its SAEs and transcoders are TopK."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.errors import UsageError
from sae.formats.files import exactly, field, of_shapes, read_json, read_safetensors
from sae.formats.portable import Largest, Portable, has_unit_rows
from toymodels.files import save_tensors, write_text

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
# And how many axes each has.
TENSORS = {"encoder.weight": 2, "encoder.bias": 1, "W_dec": 2, "b_dec": 1}


def is_here(path: Path) -> bool:
    """Whether the path looks like one."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Portable:
    """The SAE in a folder."""
    config = read_json(path / CONFIG)
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise UsageError(f"{path / CONFIG}: activation {activation!r} has no counterpart here; known: topk")
    skips, transcodes = bool(config.get("skip_connection")), bool(config.get("transcode"))
    axes = TENSORS | ({"W_skip": 2} if skips else {})
    t = exactly(read_safetensors(path / WEIGHTS), axes, path / WEIGHTS, "SAE of sparsify")
    d_sae, d_in = t["encoder.weight"].shape
    shapes = {"encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    of_shapes(path / WEIGHTS, t, shapes | ({"W_skip": (d_in, d_in)} if skips else {}))
    if skips and not transcodes:
        raise UsageError(
            f"{path / CONFIG}: a skip connection from x to x has no counterpart here; only transcoders have one"
        )
    return Portable(
        t["encoder.weight"].T,
        t["encoder.bias"],
        t["W_dec"],
        t["b_dec"],
        Largest(field(config, "k", int, path / CONFIG)),
        tied=not transcodes,
        transcodes=transcodes,
        W_skip=t["W_skip"].T if skips else None,
    )


def write(given: Portable, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Writes the folder; it has no metadata."""
    if not isinstance(given.rule, Largest):
        raise UsageError(f"sparsify has only TopK, but here latents fire by {given.rule.name}; write it for saelens")
    if given.d_out != given.d_in:
        raise UsageError(
            f"sparsify's targets are as wide as x, got d_in={given.d_in}, d_out={given.d_out}; write it for saelens"
        )
    if metadata:
        raise UsageError(f"sparsify's format has no metadata, got {', '.join(metadata)}; leave it out")
    tensors = {
        "encoder.weight": given.W_enc.T,
        "encoder.bias": given.bias(subtracts_b_dec=not given.transcodes),
        "W_dec": given.W_dec,
        "b_dec": given.b_dec,
    }
    tensors |= {} if given.W_skip is None else {"W_skip": given.W_skip.T}
    config = {
        "activation": "topk",
        "expansion_factor": -(-given.d_sae // given.d_in),
        "normalize_decoder": has_unit_rows(given.W_dec),
        "num_latents": given.d_sae,
        "k": given.rule.k,
        "multi_topk": False,
        "skip_connection": given.W_skip is not None,
        "transcode": given.transcodes,
        "d_in": given.d_in,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, tensors)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
