"""A run that starts from the weights of a trained SAE."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sae import formats
from sae.config import TrainConfig
from sae.errors import UsageError
from sae.hub import said
from sae.model import SAE
from sae.names import MANIFEST

logger = logging.getLogger("sae")

# Rows that a file holds in half precision are of norm 1 to about this.
UNIT_NORM = 1e-2


def require_start(config: TrainConfig) -> None:
    """Refuses, before any data are opened, a `train.start_from` that is not an SAE, or that the run would discard.

    Raises:
        UsageError: it is one of these.
    """
    path = config.train.start_from
    if path is None:
        return
    if path.resolve() == config.out.resolve():
        raise UsageError(f"train.start_from {path} is the run's own directory; give another --out")
    try:
        path = formats.local(path)
        if not (path / MANIFEST).is_file():
            formats.recognise(path)
    except UsageError as error:
        raise UsageError(f"train.start_from: {error}") from error


@torch.no_grad()
def start_from_(sae: SAE, path: Path, unit: float, target_unit: float, start: Callable[[], None]) -> None:
    """Gives `sae`, in the trainer's units, the weights of the SAE in a folder or file.

    From the same kind it takes everything learned. From another kind it takes encoder, decoder and biases, and `start`
    then initialises its own sparsifier.

    Raises:
        UsageError: there is none, it is of other sizes, or its decoder rows cannot be made those that the run keeps.
    """
    try:
        given = formats.load(path)
    except UsageError as error:
        raise UsageError(f"train.start_from: {error}") from error
    sizes, theirs = ({"d_in": m.d_in, "d_out": m.d_out, "d_sae": m.d_sae} for m in (sae, given))
    if sizes != theirs:
        raise UsageError(
            f"train.start_from {said(path)} has {_listed(theirs)}, but this run {_listed(sizes)}; give an SAE of these "
            "sizes"
        )
    given.rescale_(1 / unit, 1 / target_unit)
    same = given.config.kind == sae.config.kind
    learnt: dict[str, Tensor] = dict(given.sparsifier.named_parameters()) if same else {}
    if sae.config.unit_norm_decoder:
        _normalise_(given, bool(learnt), path)
    sae.encoder.copy_(given.encoder)
    sae.W_dec.copy_(given.W_dec)
    sae.b_dec.copy_(given.b_dec)
    sae.b_enc.copy_(given.b_enc)
    if sae.centre is not None:
        sae.centre.copy_(given.input_centre)
    elif given.centre is not None:  # b_dec is subtracted now: what was subtracted beyond that is a bias
        sae.b_enc.add_(sae.encoder @ (given.b_dec - given.centre))
    if sae.W_skip is not None and given.W_skip is not None:
        sae.W_skip.copy_(given.W_skip)
    b_enc = sae.b_enc.clone()
    start()
    if same:
        sae.b_enc.copy_(b_enc)
    for name, weight in sae.sparsifier.named_parameters():
        if name in learnt:
            weight.copy_(learnt[name])
    what = "all weights" if same else "the dictionary"
    logger.info("starts from %s of %s, a %s", what, said(path), given.config.kind)


def _normalise_(given: SAE, thresholds: bool, path: Path) -> None:
    """Decoder rows of norm 1: codes grow by what rows shrink, so that what a latent adds to x_hat stays."""
    norms = given.W_dec.norm(dim=1).clamp_min(1e-12)
    if not bool(((norms - 1).abs() > UNIT_NORM).any()):
        return
    if thresholds:
        least, most = float(norms.min()), float(norms.max())
        raise UsageError(
            f"train.start_from {said(path)} has decoder rows of norms {least:.3g} to {most:.3g}, to which its "
            "thresholds belong, but this run keeps them at 1; set sae.unit_norm_decoder false"
        )
    given.W_dec.div_(norms[:, None])
    given.encoder.mul_(norms[:, None])
    given.b_enc.mul_(norms)


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
