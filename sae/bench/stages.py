"""Where the time of a training step goes: real steps, with a stopwatch around each call of the kernels."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sae.bench import ours
from sae.bench.shapes import LEARNING_RATE, Shape

WARM_UP_STEPS = 3
REST = "rest"


@dataclass(frozen=True)
class Stage:
    """One part of a step: how long it took, and the work that it cannot avoid."""

    name: str
    seconds: list[float]
    """One value a step."""
    flops: float
    bytes: float


class Stopwatch:
    """Kernels whose every call is timed, by the name of the stage; a stage inside another counts for itself."""

    def __init__(self, kernels: Any, synchronise: Callable[[], object]) -> None:
        self.kernels, self.synchronise = kernels, synchronise
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.kernels, name)
        return self._timed(name, found) if callable(found) else found

    def scores(self, *args: Any) -> Any:
        """The product is made when the selection asks for its rows."""
        scores = self._timed("scores", self.kernels.scores)(*args)
        return replace(scores, product=self._timed("scores", scores.product))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            self.synchronise()
            outer, self.inner = self.inner, 0.0
            began = time.perf_counter()
            result = function(*args, **options)
            self.synchronise()
            took = time.perf_counter() - began
            self.seconds[name] += took - self.inner
            self.inner = outer + took
            return result

        return timed


def stages(shape: Shape, kind: str, device: str, n_steps: int, synchronise: Callable[[], object]) -> list[Stage]:
    """The stages of `n_steps` steps of this kind, in their order, and last what lies between them.

    The rest of a sparse step is sums, the log's counters and Python; that of a dense one holds its four other products.
    """
    trainer, batch = ours.trainer(kind, shape, shape.activations().to(device), LEARNING_RATE, device)
    watch = Stopwatch(trainer.engine.kernels, synchronise)
    trainer.engine.kernels = watch
    found: dict[str, list[float]] = {}
    n_codes = 0.0
    for step in range(WARM_UP_STEPS + n_steps):
        given = batch()
        synchronise()
        watch.seconds.clear()
        began = time.perf_counter()
        trainer.step(*given)
        synchronise()
        watch.seconds[REST] = time.perf_counter() - began - sum(watch.seconds.values())
        if step >= WARM_UP_STEPS:
            n_codes = 0.0 if trainer.engine.dense else float(trainer.engine.l0) * shape.batch
            for name, seconds in watch.seconds.items():
                found.setdefault(name, []).append(seconds)
    size = 4 if trainer.engine.kernels.precision == "fp32" else 2
    return [Stage(name, seconds, *work(name, shape, n_codes, size)) for name, seconds in found.items()]


def work(name: str, shape: Shape, n_codes: float, size: int) -> tuple[float, float]:
    """Floating-point operations, and bytes read and written once, of one stage with n_codes sparse codes in the batch.

    `size` is that of a number in the encoder's product. Bytes that a cache gives count as well, so that a stage may
    exceed what memory alone can do.
    """
    x, scores, weights = (a * b for a, b in _matrices(shape))
    codes = n_codes * shape.d_in
    flops_and_bytes = {
        "centre": (2 * x, 8 * x),
        "scores": (shape.product_flops, size * (x + weights + scores)),
        "top_k": (scores, size * scores),
        "batch_top_k": (scores, size * scores),
        "positive": (scores, size * scores),
        # a decoder row for each code; x in, the gradient out
        "decode": (4 * codes, 4 * codes + 8 * x),
        # (latent, code, gradient) in, (sample, code, gradient) out
        "invert": (0, 24 * n_codes),
        # a row of x and of the gradient for each code; two matrices and their moments, in and out
        "update_": (4 * codes + 40 * weights, 8 * codes + 48 * weights),
        "relu": (shape.product_flops + scores, 4 * (x + weights + 3 * scores)),
        "relu_backward": (2 * scores, 12 * scores),
    }
    flops, bytes_ = flops_and_bytes.get(name, (0, 0))
    return float(flops), float(bytes_)


def _matrices(shape: Shape) -> list[tuple[int, int]]:
    return [(shape.batch, shape.d_in), (shape.batch, shape.d_sae), (shape.d_sae, shape.d_in)]
