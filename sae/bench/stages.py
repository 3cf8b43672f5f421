"""Where the time of a training step goes: each stage on its own."""

from __future__ import annotations

from dataclasses import dataclass

from sae.bench.shapes import Shape


@dataclass(frozen=True)
class Stage:
    """One part of a step: how long it took, and the work that it cannot avoid."""

    name: str
    seconds: list[float]
    """One value a repeat."""
    flops: float
    bytes: float


def stages(shape: Shape, kind: str, threads: int) -> list[Stage]:
    """The stages of a step of this kind, in their order; none are taken apart yet."""
    return []
