"""Reads an unfinished run: its SAE as of the newest checkpoint. Nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae import checkpoint
from sae.config import SAEConfig, TrainConfig, parse_config
from sae.config_text import read_yaml
from sae.errors import UsageError
from sae.evaluation import Evaluation, evaluate_on
from sae.model import SAE
from sae.names import CHECKPOINTS, CONFIG, MANIFEST
from sae.run import calibration_rows, ready_
from sae.sources import Source, as_source


def is_unfinished(out: Path) -> bool:
    """Whether a run has started there, has a checkpoint, and has no result yet."""
    begun = (out / CONFIG).exists() and checkpoint.latest(out / CHECKPOINTS) is not None
    return begun and not (out / MANIFEST).exists()


def load_checkpoint(out: str | Path, source: object = None) -> SAE:
    """The SAE of a run's newest checkpoint, ready for inference: in the units of the data, thresholds calibrated on the
    source's held-out rows. The run may continue meanwhile.

    `source` is what `sae.train` was given, if it was given one.

    Raises:
        UsageError: there is no checkpoint, or no source.
    """
    sae, _, _, _ = _opened(Path(out), source)
    return sae


def evaluate_checkpoint(out: Path) -> tuple[Evaluation, int, int]:
    """All metrics of a run's newest checkpoint; its step, and the number of steps of the run."""
    sae, config, source, step = _opened(out, None)
    return evaluate_on(source, sae, config.evaluation.n_samples), step, config.n_steps


def _opened(out: Path, given: object) -> tuple[SAE, TrainConfig, Source, int]:
    newest = checkpoint.latest(out / CHECKPOINTS)
    if newest is None or not (out / CONFIG).exists():
        raise UsageError(f"{out} holds no run with a checkpoint; give a run directory")
    config = parse_config(read_yaml(out / CONFIG), where=str(out / CONFIG))
    if given is None and config.source is None:
        raise UsageError(f"{out} was trained on activations passed from Python; use sae.load_checkpoint(out, source)")
    source = as_source(given if given is not None else config.source.open() if config.source else None)
    try:
        tensors, values = checkpoint.load(newest)
    except (UsageError, OSError):
        if newest.exists():
            raise
        return _opened(out, source)  # the run, which goes on, has written a newer one and deleted this
    step = int(values["n_steps_done"])
    done = step / config.n_steps
    sae = SAE(source.d_in, _as_of(config.sae, done), source.d_out)
    weights = {name.removeprefix("sae."): tensor for name, tensor in tensors.items() if name.startswith("sae.")}
    if weights["W_dec"].shape != sae.W_dec.shape or weights["encoder"].shape != sae.encoder.shape:
        raise UsageError(
            f"{newest} has W_dec {list(weights['W_dec'].shape)}, but the source has d_in={source.d_in}; give the "
            "run's own"
        )
    sae.load_state_dict(weights)
    rows = calibration_rows(sae, source)
    ready_(sae, values["unit"], values["target_unit"], rows, done, tensors.get("frequency"))
    return sae, config, source, step


def _as_of(config: SAEConfig, done: float) -> SAEConfig:
    """With the run's current k, where k is annealed: what is saved must fire alike when it is loaded."""
    base = getattr(config, "base", None) or {}
    sparsifier: Any = config.build()
    if getattr(sparsifier, "k_start", None) is None:
        return config
    sparsifier.anneal_(done)
    now = {"k": sparsifier.k, "k_start": float(sparsifier.k)}
    return config.model_copy(update={"base": base | now} if base else now)
