"""This library among the contenders: the step of `sae.train`'s loop, batches included, without its log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sae.bench.shapes import L1_COEFFICIENT, N_STEPS, Shape, parts
from sae.config import TrainConfig
from sae.run import N_CALIBRATION, start
from sae.sources import as_source
from sae.trainer import Trainer


def config(kind: str, shape: Shape, lr: float, device: str, n_steps: int = N_STEPS, out: str = "runs") -> TrainConfig:
    """The configuration of such a run: all defaults but the sizes and the learning rate."""
    own = {"l1_coefficient": L1_COEFFICIENT} if kind == "relu" else {"k": shape.k}
    return TrainConfig.model_validate(
        {
            "sae": {"kind": kind, "d_sae": shape.d_sae} | own,
            "train": {"n_samples": n_steps * shape.batch, "batch_size": shape.batch, "lr": lr, "device": device},
            "out": Path(out),
        }
    )


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
