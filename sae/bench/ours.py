"""This library among the contenders: the step of `sae.train`'s loop, batches included, without its log."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.bench.shapes import L1_COEFFICIENT, N_STEPS, Shape, options_of, parts
from sae.config import SAEConfig, TrainConfig, parse_config
from sae.sources import as_source
from sae.start import N_CALIBRATION, start
from sae.trainer import Trainer


def config(kind: str, shape: Shape, lr: float, device: str, n_steps: int = N_STEPS, out: str = "runs") -> TrainConfig:
    """The configuration of such a run: all defaults but the sizes, the learning rate, and options behind the kind.

    Raises:
        UsageError: an option is unknown or bad, or one that the kind requires is missing.
    """
    name, words = options_of(kind)
    shared: dict[str, float] = {"k": shape.k, "l1_coefficient": L1_COEFFICIENT}
    own = {key: value for key, value in shared.items() if key in SAEConfig.kinds[name].model_fields}
    if name == "jumprelu":
        own["l0"] = shape.k
    sections = {
        "sae": {"kind": name, "d_sae": shape.d_sae} | own,
        "train": {"n_samples": n_steps * shape.batch, "batch_size": shape.batch, "lr": lr, "device": device},
        "out": out,
    }
    return parse_config(sections, words, where=f"kind {kind}")


def trainer(
    kind: str, shape: Shape, x: Float[Tensor, "rows d_in"], lr: float, device: str
) -> tuple[Trainer, Callable[[], tuple[Tensor, ...]]]:
    """A run at its beginning, and what gives it its next batch of the rows of x, shuffled as in any run."""
    given = parts(kind, x)
    source = as_source(given if len(given) > 1 else x)
    run = config(kind, shape, lr, device)
    begun = start(run, source, source.held_out("calibration", N_CALIBRATION))
    batches = source.batches(shape.batch, run.train.seed)

    def batch() -> tuple[Tensor, ...]:
        rows = next(batches)
        each = rows if isinstance(rows, tuple) else (rows,)
        return tuple(part.to(torch.device(device), non_blocking=True) for part in each)

    return begun, batch


def advance(kind: str, shape: Shape, x: Float[Tensor, "rows d_in"], lr: float, device: str) -> Callable[[], None]:
    """One more step of such a run."""
    begun, batch = trainer(kind, shape, x, lr, device)

    def step() -> None:
        begun.step(*batch())

    return step
