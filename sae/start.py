"""A trainer at step 0: the scale of the data, the first weights, and what is logged about both."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from sae import losses
from sae.config import TrainConfig
from sae.errors import UsageError
from sae.heavy_tails import Ball, share_of_heaviest
from sae.initialise import cuts
from sae.model import SAE
from sae.ranks import ALONE, Ranks
from sae.sources import HeldOut, Source
from sae.trainer import Trainer
from sae.warm_start import start_from_
from toymodels.streams import generator

logger = logging.getLogger("sae")

# Rows, at most, that the centre and the scale are fitted on; sources that hold fewer rows back give fewer.
N_CALIBRATION = 65_536
# Tails are heavy where this share of the rows, or one of fewer, carries so many times its share of the variance.
HEAVIEST, HEAVY = 0.001, 100


def start(config: TrainConfig, source: Source, calibration: HeldOut, ranks: Ranks = ALONE) -> Trainer:
    """A trainer at step 0."""
    if source.d_out is not None and not config.sae.transcodes:
        raise UsageError(
            f"the source has a target, but kind {config.sae.kind!r} reconstructs its input; set sae.kind to transcoder "
            "or skip_transcoder, or leave the target out"
        )
    if source.d_out is None and config.sae.transcodes:
        logger.info("the source has no target: the %s reconstructs its input", config.sae.kind)
    ball, rows = _ball(config, calibration), calibration.x
    if ball is not None:
        rows = ball.draw_in(rows)
    unit = _scale(rows, "activations")
    target_unit = unit if calibration.target is None else _scale(calibration.target, "targets")
    try:
        sae = SAE(source.d_in, config.sae, source.d_out)
    except RuntimeError as error:
        raise UsageError(
            f"d_sae={config.sae.d_sae} at d_in={source.d_in} does not fit in memory; lower d_sae"
        ) from error
    centres = {
        "mean": lambda x: x.mean(dim=0),
        "geometric_median": losses.geometric_median,
        "zero": lambda x: torch.zeros(x.shape[1]),
    }
    centre_of = centres[config.sae.decoder_bias]
    centre = centre_of(rows / unit)
    b_dec = centre if calibration.target is None else centre_of(calibration.target / target_unit)
    sae.initialise_(b_dec, generator(config.train.seed, "sae"), centre)

    def start_sparsifier() -> None:
        if sae.sparsifier.initial_l0 is not None:
            sae.sparsifier.start_(cuts(sae, rows / unit, sae.sparsifier.initial_l0), sae.b_enc.detach())

    if config.train.start_from is None:
        start_sparsifier()
    else:
        start_from_(sae, config.train.start_from, unit, target_unit, start_sparsifier)
    if not sae.sparsifier.pursuit_steps:
        sae.sparsifier.require_codes(sae.affine(rows[:64] / unit))
    if source.n_training_rows is not None:
        times = config.n_steps * config.train.batch_size / source.n_training_rows
        often = f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
        logger.info("%d rows to train on, each %s times", source.n_training_rows, often)
    _describe("activations", calibration.x, unit, config)
    if calibration.target is not None:
        _describe("targets", calibration.target, target_unit, config)
    try:
        return Trainer(sae.to(config.train.device), config, unit, target_unit, ball, ranks)
    except torch.OutOfMemoryError as error:
        raise UsageError(_too_wide(config, sae.d_in + sae.d_out)) from error


def _ball(config: TrainConfig, calibration: HeldOut) -> Ball | None:
    """The ball into which rows are pulled, if any."""
    times = config.train.clip_rows
    if times is None:
        return None
    if calibration.target is not None:
        raise UsageError(f"train.clip_rows={times:g} pulls x in, but a target would not follow; leave it out")
    return Ball.around(calibration.x, times)


def _describe(name: str, rows: Tensor, size: float, config: TrainConfig) -> None:
    """Logs a line on their scale, and one on heavy tails that nothing limits."""
    width, offset = rows.shape[1], float(rows.mean(dim=0).norm()) / size
    logger.info("%s: width %d, sqrt(total variance) %.4g, |mean| / that %.2f", name, width, size, offset)
    share = max(HEAVIEST, 1 / len(rows))
    heavy = share_of_heaviest(rows, share)
    if heavy > HEAVY * share and config.train.clip_rows is None and config.train.clip_norm is None:
        remedy = "train.clip_norm=0.03" if config.sae.transcodes else "train.clip_rows=3"
        logger.warning(
            "%.1g %% of the rows carry %.0f %% of the variance of the %s, and dominate what is learned accordingly: %s "
            "limits them (docs/configuration.md, Heavy tails)",
            100 * share,
            100 * heavy,
            name,
            remedy,
        )


def _too_wide(config: TrainConfig, width: int) -> str:
    """What to do if not even the weights fit: 4 bytes for each, 8 for its moments, 4 for what else a step keeps."""
    free = torch.cuda.mem_get_info(config.train.device)[0] if torch.cuda.is_available() else 0
    fits = int(0.9 * free) // ((10 if config.train.moments == "int8" else 16) * width)
    rule = f"d_sae={config.sae.d_sae} does not fit on {config.train.device}"
    return f"{rule} ({free / 2**30:.1f} GiB free); lower sae.d_sae to {max(min(fits, config.sae.d_sae // 2), 1)}"


def _scale(rows: Tensor, what: str) -> float:
    """The square root of their total variance."""
    scale = math.sqrt(losses.total_variance(rows))
    if not scale > 0:
        raise UsageError(
            f"the {what} have no variance: all held-out rows are the same; give other rows, or check source.key"
        )
    return scale
