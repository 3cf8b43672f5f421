"""Where the time of a training step goes: real steps, with a stopwatch around each call of the kernels."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sae.bench import ours
from sae.bench.shapes import LEARNING_RATE, Shape
from sae.kernels.precision import Precision

WARM_UP_STEPS = 3
SELECTIONS = ("top_k", "batch_top_k", "positive")
PRODUCTS, REST = "products", "rest"
# How a step may write a product that is no kernel's.
PRODUCT_FUNCTIONS = {torch.mm, torch.addmm, torch.matmul, Tensor.mm, Tensor.matmul, Tensor.__matmul__}


@dataclass(frozen=True)
class Stage:
    """One part of a step: how long it took, and the work that it cannot avoid."""

    name: str
    seconds: list[float]
    """One value a step."""
    flops: float
    bytes: float
    ceiling: str
    """What the product is called that the machine was measured with in the same numbers (`Ceiling.what`)."""


class Stopwatch:
    """Kernels whose every call is timed, by the name of the stage; a stage inside another counts for itself."""

    def __init__(self, kernels: Any, synchronise: Callable[[], object]) -> None:
        self.kernels, self.synchronise = kernels, synchronise
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner, self.depth = 0.0, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.kernels, name)
        return self.timed(name, found) if callable(found) else found

    def scores(self, *args: Any) -> Any:
        """The product is made when the selection asks for its rows; a selection that makes its own never asks."""
        scores = self.kernels.scores(*args)
        return replace(scores, product=self.timed("scores", scores.product))

    def dense_step(self, *args: Any) -> Any:
        """No stage where its parts are: where they are done one by one."""
        step = self.timed("dense_step", self.kernels.dense_step)(*args)
        if step is None:
            del self.seconds["dense_step"]
        return step

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function under the watch, for the stage of this name."""

        def timed(*args: Any, **options: Any) -> Any:
            self.synchronise()
            outer, self.inner = self.inner, 0.0
            self.depth += 1
            began = time.perf_counter()
            result = function(*args, **options)
            self.synchronise()
            self.depth -= 1
            took = time.perf_counter() - began
            self.seconds[name] += took - self.inner
            self.inner = outer + took
            return result

        return timed


class Products(TorchFunctionMode):
    """Within it, products outside of the kernels count as a stage: a dense step computes four of its five itself."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = partial(func, *args, **(kwargs or {}))
        outside = self.watch.depth == 0 and func in PRODUCT_FUNCTIONS
        return self.watch.timed(PRODUCTS, call)() if outside else call()


def stages(shape: Shape, kind: str, device: str, n_steps: int, synchronise: Callable[[], object]) -> list[Stage]:
    """The stages of `n_steps` steps of this kind, in their order, and last what lies between them: sums, the log's
    counters, Python, and in dense steps what is done to a product's result."""
    trainer, batch = ours.trainer(kind, shape, shape.activations().to(device), LEARNING_RATE, device)
    watch = Stopwatch(trainer.engine.kernels, synchronise)
    trainer.engine.kernels = watch
    trainer.recorder = None  # no stopwatch runs inside a recorded step
    found: dict[str, list[float]] = {}
    n_codes = 0.0
    for step in range(WARM_UP_STEPS + n_steps):
        given = batch()
        synchronise()
        watch.seconds.clear()
        began = time.perf_counter()
        with Products(watch) if trainer.engine.dense else nullcontext():
            trainer.step(*given)
        synchronise()
        watch.seconds[REST] = time.perf_counter() - began - sum(watch.seconds.values())
        if step >= WARM_UP_STEPS:
            n_codes = 0.0 if trainer.engine.dense else float(trainer.engine.l0) * shape.batch
            for name, seconds in watch.seconds.items():
                found.setdefault(name, []).append(seconds)
    precision = trainer.engine.kernels.precision
    size, apart = 4 if precision == "fp32" else 2, "scores" in found
    moment = trainer.engine.state.first["W_dec"].element_size()
    return [
        Stage(name, seconds, *work(name, shape, n_codes, size, moment, apart), ceiling(name, precision))
        for name, seconds in found.items()
    ]


def ceiling(name: str, precision: Precision) -> str:
    """The measured product to compare a stage with: bf16 products are no measure of what is computed in float32."""
    if name == "scores" and precision != "fp32":
        return "product bfloat16"
    if name in (*SELECTIONS, "dense_step") and precision == "bf16":
        return "product bfloat16"
    if name in ("relu", PRODUCTS) and precision == "bf16":
        return "product float32 (medium)"
    return "product float32"


def work(name: str, shape: Shape, n_codes: float, size: int, moment: int, apart: bool) -> tuple[float, float]:
    """Floating-point operations, and bytes read and written once, of one stage with n_codes sparse codes in the batch.

    `size` is that of a number in the encoder's product, which is a stage of its own where it is `apart`, and else a
    part of the selection; `moment` is that of an entry of Adam's moments. Bytes that a cache gives count as well, so
    that a stage may exceed what memory alone can do.
    """
    x, scores, weights = (a * b for a, b in _matrices(shape))
    codes = n_codes * shape.d_in
    product = (shape.product_flops, size * (x + weights + scores))
    selection = (scores, size * scores) if apart else (product[0] + scores, size * (x + weights))
    flops_and_bytes = {
        "centre": (2 * x, 8 * x),
        "scores": product,
        **dict.fromkeys(SELECTIONS, selection),
        # a decoder row for each code; x in, the gradient out
        "decode": (4 * codes, 4 * codes + 8 * x),
        # (latent, code, gradient) in, (sample, code, gradient) out
        "invert": (0, 24 * n_codes),
        # a row of x and of the gradient for each code; two matrices and their moments, in and out
        "update_": (4 * codes + 40 * weights, 8 * codes + 16 * (1 + moment / 2) * weights),
        "dense_step": (5 * shape.product_flops + 4 * scores, 8 * x + 16 * weights),
        "relu": (shape.product_flops + scores, 4 * (x + weights + 3 * scores)),
        "relu_backward": (2 * scores, 12 * scores),
        PRODUCTS: (4 * shape.product_flops, 16 * (x + weights + scores)),
    }
    flops, bytes_ = flops_and_bytes.get(name, (0, 0))
    return float(flops), float(bytes_)


def _matrices(shape: Shape) -> list[tuple[int, int]]:
    return [(shape.batch, shape.d_in), (shape.batch, shape.d_sae), (shape.d_sae, shape.d_in)]
