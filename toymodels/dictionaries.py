"""Directions of the true features: random, orthogonalised, or with a chosen overlap.

Overlap of two unit directions is |d_i · d_j|. Its mean over i of the maximum over j ≠ i says how crowded a
dictionary is; its maximum over all pairs is the coherence, which is at least √((n − d) / (d (n − 1))) (Welch 1974).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toymodels.errors import UsageError

Directions = Float[Tensor, "n_features d_hidden"]
Overlap = Literal["mean_max", "coherence"]

ROWS_AT_ONCE = 2048
# Gradient steps towards an overlap before it counts as out of reach.
MOST_STEPS = 3000


def overlaps(D: Directions) -> Float[Tensor, " n_features"]:
    """max_{j ≠ i} |d_i · d_j| of each feature, in blocks of rows: the n × n matrix is never whole."""
    largest = []
    for start in range(0, len(D), ROWS_AT_ONCE):
        block = (D[start : start + ROWS_AT_ONCE] @ D.T).abs_()
        block.diagonal(start).zero_()
        largest.append(block.amax(1))
    return torch.cat(largest)


def overlap(D: Directions, statistic: Overlap) -> float:
    """The mean or the maximum of `overlaps`."""
    largest = overlaps(D)
    return float(largest.mean() if statistic == "mean_max" else largest.max())


def random_directions(n: int, d: int, stream: torch.Generator) -> Directions:
    """Uniform on the sphere."""
    return F.normalize(torch.randn(n, d, generator=stream), dim=1)


@dataclass(frozen=True)
class RandomDictionary:
    """Directions uniform on the sphere."""

    KIND: ClassVar = "random"

    def directions(self, n: int, d: int, stream: torch.Generator) -> Directions:
        """Unit rows."""
        return random_directions(n, d, stream)


@dataclass(frozen=True)
class OrthogonalisedDictionary:
    """Random directions after `n_steps` of Adam at `lr` on Σ_{i≠j} (d_i · d_j)² + n Σ_i (|d_i|² − 1)².

    The objective and the steps are those of SAELens's dictionaries. Where `mean_max_overlap` is given, the step that
    passes it is cut short; if the steps end above it, close pairs part further, as for `overlap`.
    """

    KIND: ClassVar = "orthogonalised"
    n_steps: int = 200
    lr: float = 0.01
    mean_max_overlap: float | None = None

    def __post_init__(self) -> None:
        if self.n_steps < 1 or not self.lr > 0:
            raise UsageError(f"n_steps and lr must be positive, got {self.n_steps} and {self.lr}; random takes no step")
        _check_overlap("mean_max_overlap", self.mean_max_overlap)

    def directions(self, n: int, d: int, stream: torch.Generator) -> Directions:
        """Unit rows."""
        D = random_directions(n, d, stream)
        adam, target = _Adam(D, self.lr), self.mean_max_overlap
        before = D
        if target is None:
            for _ in range(self.n_steps):
                adam.step(_repulsion(adam.x))
            return F.normalize(adam.x, dim=1)
        for _ in range(self.n_steps):
            if overlap(before, "mean_max") <= target:
                break
            adam.step(_repulsion(adam.x))
            after = F.normalize(adam.x, dim=1)
            if overlap(after, "mean_max") <= target:
                return _between(before, after, "mean_max", target)
            before = after
        return _with_overlap(before, "mean_max", target)


@dataclass(frozen=True)
class OverlapDictionary:
    """Directions whose mean maximal overlap is `mean_max`, above or below what random ones have."""

    KIND: ClassVar = "overlap"
    mean_max: float

    def __post_init__(self) -> None:
        _check_overlap("mean_max", self.mean_max)

    def directions(self, n: int, d: int, stream: torch.Generator) -> Directions:
        """Unit rows."""
        return _with_overlap(random_directions(n, d, stream), "mean_max", self.mean_max)


@dataclass(frozen=True)
class CoherentDictionary:
    """Directions in superposition whose largest overlap is `coherence`."""

    KIND: ClassVar = "coherence"
    coherence: float

    def __post_init__(self) -> None:
        _check_overlap("coherence", self.coherence)

    def directions(self, n: int, d: int, stream: torch.Generator) -> Directions:
        """Unit rows."""
        return _with_overlap(random_directions(n, d, stream), "coherence", self.coherence)


Dictionary = RandomDictionary | OrthogonalisedDictionary | OverlapDictionary | CoherentDictionary


def _check_overlap(name: str, given: float | None) -> None:
    if given is not None and not 0 <= given < 1:
        raise UsageError(f"{name} must lie in [0, 1), got {given}; 1 would be one direction for several features")


def _repulsion(D: Directions) -> Directions:
    """The gradient of Σ_{i≠j} (d_i · d_j)² + n Σ_i (|d_i|² − 1)².

    Σ_j (d_i · d_j) d_j = d_i DᵀD costs n d² rather than the n² d of all pairs.
    """
    squared = torch.linalg.vector_norm(D, dim=1, keepdim=True).square_()
    return (D @ (D.T @ D).mul_(4)).addcmul_(D, 4 * (len(D) * (squared - 1) - squared))


def _crowding(D: Directions, above: float) -> Directions:
    """The gradient of Σ_{i≠j} max(0, |d_i · d_j| − above)² / 2 at unit rows: only close pairs part."""
    gradient = torch.empty_like(D)
    for start in range(0, len(D), ROWS_AT_ONCE):
        block = D[start : start + ROWS_AT_ONCE] @ D.T
        block.diagonal(start).zero_()
        gradient[start : start + ROWS_AT_ONCE] = F.softshrink(block, above) @ D
    return 2 * gradient


class _Adam:
    """Kingma and Ba 2015, on one tensor and a gradient written by hand."""

    def __init__(self, x: Tensor, lr: float) -> None:
        self.x, self.lr, self.n_steps = x.clone(), lr, 0
        self.m, self.v = torch.zeros_like(x), torch.zeros_like(x)

    def step(self, gradient: Tensor) -> None:
        self.n_steps += 1
        self.m.lerp_(gradient, 0.1)
        self.v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (self.v / (1 - 0.999**self.n_steps)).sqrt_().add_(1e-8)
        self.x.addcdiv_(self.m, scale, value=-self.lr / (1 - 0.9**self.n_steps))


def _with_overlap(D: Directions, statistic: Overlap, target: float) -> Directions:
    """The dictionary nearest to D with this overlap: close pairs part, or partners close up."""
    n, d = D.shape
    if n == 1:
        raise UsageError("one feature overlaps with none; use kind random")
    welch = math.sqrt(max(n - d, 0) / (d * (n - 1)))
    if statistic == "coherence" and target < welch:
        raise UsageError(
            f"coherence must be at least {welch:.4g}, the Welch bound of {n} features in {d} dimensions, got {target}; "
            "raise it or d_hidden"
        )
    begun = overlap(D, statistic)
    if begun <= target:
        partners = torch.arange(n) ^ 1
        partners[-1] = partners[-1] if n % 2 == 0 else n - 2
        # Full way, a feature meets its partner: somewhere between lies the overlap.
        return _between(D, _towards(D, partners), statistic, target, partners)
    adam, before = _Adam(D, 0.3 / math.sqrt(d) / 10), D
    for _ in range(MOST_STEPS):
        # Pairs a little closer than the target part as well, so that the target is passed and not approached.
        adam.step(_crowding(before, 0.9 * target))
        after = F.normalize(adam.x, dim=1)
        adam.x.copy_(after)
        if overlap(after, statistic) <= target:
            return _between(before, after, statistic, target)
        before = after
    raise UsageError(
        f"{statistic} {target} is out of reach: {n} features in {d} dimensions start at {begun:.3f} and are at "
        f"{overlap(before, statistic):.3f} after {MOST_STEPS} steps; raise it or d_hidden"
    )


def _towards(D: Directions, partners: Tensor) -> Directions:
    """Every direction halfway to its partner's, on the partner's side of the origin: they fall together."""
    sign = torch.where((D * D[partners]).sum(1, keepdim=True) < 0, -1.0, 1.0)
    return D + sign * D[partners]


def _between(
    before: Directions, after: Directions, statistic: Overlap, target: float, partners: Tensor | None = None
) -> Directions:
    """On the way from one dictionary to the other, where the overlap is the target: by bisection."""
    rising = partners is not None
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        middle = F.normalize(torch.lerp(before, after, share), dim=1)
        passed = (overlap(middle, statistic) >= target) if rising else (overlap(middle, statistic) <= target)
        low, high = (low, share) if passed else (share, high)
    return F.normalize(torch.lerp(before, after, high), dim=1)
