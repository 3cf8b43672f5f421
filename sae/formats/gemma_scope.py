"""Gemma Scope: `params.npz`, a JumpReLU SAE or transcoder that subtracts nothing from x. Read, and not written."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from sae.errors import UsageError
from sae.formats.files import exactly, of_shapes
from sae.formats.portable import Above, Portable

WEIGHTS = "params.npz"
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def is_here(path: Path) -> bool:
    """Whether the path looks like one."""
    return (path / WEIGHTS).is_file() or (path.is_file() and path.suffix == ".npz")


def read(path: Path) -> Portable:
    """The SAE in a file, or in a folder that holds `params.npz`."""
    file = path / WEIGHTS if path.is_dir() else path
    try:
        with np.load(file, allow_pickle=False) as archive:
            found = {name: torch.from_numpy(np.array(archive[name])) for name in archive.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UsageError(f"{file} cannot be read ({error}); copy it again") from error
    t = exactly(found, TENSORS, file, "SAE of Gemma Scope")
    (d_in, d_sae), d_out = t["W_enc"].shape, t["W_dec"].shape[-1]
    shapes = {"b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "threshold": (d_sae,)}
    of_shapes(file, t, shapes)
    rule = Above(t["threshold"].clamp_min(0))
    return Portable(t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], rule, tied=False, transcodes=d_out != d_in)
