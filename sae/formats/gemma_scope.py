"""Gemma Scope: `params.npz`, a JumpReLU SAE or transcoder that subtracts nothing from x. Read, not written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sae.errors import UsageError
from sae.formats.files import exactly, of_shapes
from sae.formats.portable import Above, Portable

WEIGHTS = "params.npz"
# And how many axes each has.
TENSORS = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1, "threshold": 1}


def is_here(path: Path) -> bool:
    """Whether the path looks like one."""
    return (path / WEIGHTS).is_file() or (path.is_file() and path.suffix == ".npz")


def read(path: Path) -> Portable:
    """The SAE in a file, or in a folder that holds `params.npz`."""
    file = path / WEIGHTS if path.is_dir() else path
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            found = {name: torch.from_numpy(np.array(archive[name])) for name in archive.files}
    except Exception as error:  # a damaged file fails in any way, and NumPy's advice would run what is in it
        reason = type(error).__name__ if "pickle" in str(error) else f"{type(error).__name__}: {error}"
        raise UsageError(f"{file} cannot be read ({reason}); copy it again") from error
    t = exactly(found, TENSORS, file, "SAE of Gemma Scope")
    (d_in, d_sae), d_out = t["W_enc"].shape, t["W_dec"].shape[-1]
    shapes = {"b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "threshold": (d_sae,)}
    of_shapes(file, t, shapes)
    rule = Above(t["threshold"].clamp_min(0))
    return Portable(t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], rule, tied=False, transcodes=d_out != d_in)
