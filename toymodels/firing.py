"""How often each feature fires, and how strongly: numbers that vary over features, and laws of the strength."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from toymodels.errors import UsageError, nearest

Profile = Float[Tensor, " n_features"]


def _check_probs(**probs: float) -> None:
    for name, prob in probs.items():
        if not 0 <= prob <= 1:
            raise UsageError(f"{name} must lie in [0, 1], got {prob}; it is the probability that a feature fires")


def _check_order(max_prob: float, min_prob: float) -> None:
    _check_probs(max_prob=max_prob, min_prob=min_prob)
    if max_prob < min_prob:
        raise UsageError(f"max_prob must not lie below min_prob={min_prob}, got {max_prob}; exchange them")


# Probabilities


@dataclass(frozen=True)
class ConstantFiring:
    """p_i = p."""

    KIND: ClassVar = "constant"
    prob: float = 0.01

    def __post_init__(self) -> None:
        _check_probs(prob=self.prob)

    def probs(self, n: int) -> Profile:
        """p, in float64."""
        return torch.full((n,), self.prob, dtype=torch.float64)


@dataclass(frozen=True)
class LinearFiring:
    """p_i falls in equal steps from max_prob to min_prob."""

    KIND: ClassVar = "linear"
    max_prob: float = 0.3
    min_prob: float = 0.01

    def __post_init__(self) -> None:
        _check_order(self.max_prob, self.min_prob)

    def probs(self, n: int) -> Profile:
        """p, in float64."""
        return torch.linspace(self.max_prob, self.min_prob, n, dtype=torch.float64)


@dataclass(frozen=True)
class ZipfFiring:
    """p_i = a r_i^(−exponent) + b with rank r_i = i + 1; a and b make the first max_prob and the last min_prob."""

    KIND: ClassVar = "zipf"
    exponent: float = 1.0
    max_prob: float = 0.3
    min_prob: float = 0.01

    def __post_init__(self) -> None:
        _check_order(self.max_prob, self.min_prob)
        if not self.exponent > 0:
            raise UsageError(f"exponent must be positive, got {self.exponent}; constant is a kind of its own")

    def probs(self, n: int) -> Profile:
        """p, in float64."""
        power = torch.arange(1, n + 1, dtype=torch.float64) ** -self.exponent
        share = (power - power[-1]) / (power[0] - power[-1]) if n > 1 else power
        return self.min_prob + (self.max_prob - self.min_prob) * share


Firing = ConstantFiring | LinearFiring | ZipfFiring


# Numbers that vary over features


@dataclass(frozen=True)
class LinearOver:
    """From start at the first feature to end at the last, in equal steps."""

    KIND: ClassVar = "linear"
    start: float
    end: float

    def over(self, n: int, stream: torch.Generator) -> Profile:
        """One number for each feature, in float32."""
        return torch.linspace(self.start, self.end, n)


@dataclass(frozen=True)
class ExponentialOver:
    """From start at the first feature to end at the last, by equal factors."""

    KIND: ClassVar = "exponential"
    start: float
    end: float

    def __post_init__(self) -> None:
        if min(self.start, self.end) <= 0:
            raise UsageError(f"start and end must be positive, got {self.start} and {self.end}; linear takes others")

    def over(self, n: int, stream: torch.Generator) -> Profile:
        """One number for each feature, in float32."""
        return self.start * (self.end / self.start) ** torch.linspace(0, 1, n)


@dataclass(frozen=True)
class FoldedNormalOver:
    """|N(mean, std²)|, drawn once for each feature, within [min_value, max_value] where these are given."""

    KIND: ClassVar = "folded_normal"
    mean: float = 0.0
    std: float = 0.1
    min_value: float | None = None
    max_value: float | None = None

    def __post_init__(self) -> None:
        _check_std(self.std)
        if None not in (self.min_value, self.max_value) and self.min_value > self.max_value:  # type: ignore[operator]
            raise UsageError(
                f"min_value must not exceed max_value={self.max_value}, got {self.min_value}; exchange them"
            )

    def over(self, n: int, stream: torch.Generator) -> Profile:
        """One number for each feature, in float32."""
        drawn = (self.mean + torch.randn(n, generator=stream) * self.std).abs()
        return drawn if self.min_value is self.max_value is None else drawn.clamp(self.min_value, self.max_value)


Over = LinearOver | ExponentialOver | FoldedNormalOver
Number = float | LinearOver | ExponentialOver | FoldedNormalOver


def _check_std(std: float) -> None:
    if std < 0:
        raise UsageError(f"std must not be negative, got {std}; 0 is no spread")


def over_features(number: Number, n: int, stream: torch.Generator) -> Profile:
    """The number of each feature, in float32."""
    return torch.full((n,), float(number)) if isinstance(number, float | int) else number.over(n, stream)


# Laws of the strength of a feature that fires


@dataclass(frozen=True)
class Magnitudes:
    """x_i where feature i fires, by `kind`: with mean μ_i, spread σ_i and a draw ε,

        constant           μ_i
        uniform            μ_i + √3 σ_i ε,     ε ~ U[−1, 1]: mean μ_i and standard deviation σ_i
        exponential        μ_i ε,              ε ~ Exp(1)
        folded_normal      |μ_i + σ_i ε|,      ε ~ N(0, 1)
        rectified_normal   max(0, μ_i + σ_i ε), ε ~ N(0, 1); at 0 it does not fire

    Raises:
        UsageError: a negative scale, a spread that the kind does not have, or a uniform law that reaches below 0.
    """

    KIND: ClassVar = None
    kind: str = "constant"
    mean: Number = 1.0
    std: Number = 0.0

    KINDS: ClassVar = ("constant", "uniform", "exponential", "folded_normal", "rectified_normal")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise UsageError(f"kind {self.kind!r} is unknown{nearest(self.kind, self.KINDS)}")
        if self.kind in ("constant", "exponential") and self.std != 0.0:
            raise UsageError(f"{self.kind} magnitudes have no std, got {self.std}; leave it out")
        for name, number in (("mean", self.mean), ("std", self.std)):
            ends = (number.start, number.end) if isinstance(number, LinearOver) else (number,)
            if any(isinstance(end, float | int) and end < 0 for end in ends):
                raise UsageError(f"{name} must not be negative, got {number}; features fire above zero")
        if self.kind in ("constant", "exponential") and self.mean == 0.0:
            raise UsageError(f"mean of {self.kind} magnitudes must be positive, got 0; features fire above zero")


class Strengths:
    """Draws magnitudes of features by number."""

    def __init__(self, kind: str, mean: Profile, std: Profile) -> None:
        self.kind, self.mean, self.std = kind, mean.numpy(), std.numpy()
        lowest = self.mean - math.sqrt(3) * self.std
        if kind == "uniform" and (lowest < 0).any():
            i = int(lowest.argmin())
            raise UsageError(
                f"uniform magnitudes must not reach below 0: feature {i} has mean {self.mean[i]:.4g} and std "
                f"{self.std[i]:.4g}; keep std below mean / √3"
            )

    def draw(self, features: Int[np.ndarray, " nnz"], rng: np.random.Generator) -> Float[np.ndarray, " nnz"]:
        """x of each of these features, drawn afresh each time."""
        mean, n = self.mean.take(features), len(features)
        match self.kind:
            case "constant":
                return mean
            case "exponential":
                return mean * rng.standard_exponential(n, dtype=np.float32)
            case "uniform":
                spread = np.float32(math.sqrt(3)) * (2 * rng.random(n, dtype=np.float32) - 1)
                return mean + spread * self.std.take(features)
        values = mean + rng.standard_normal(n, dtype=np.float32) * self.std.take(features)
        return np.abs(values) if self.kind == "folded_normal" else np.maximum(values, 0)

    @property
    def positive(self) -> Profile:
        """P(x_i > 0 where it fires), in float64: below 1 only for rectified normals."""
        if self.kind != "rectified_normal":
            return torch.ones(len(self.mean), dtype=torch.float64)
        mean, std = torch.from_numpy(self.mean).double(), torch.from_numpy(self.std).double()
        return torch.where(std > 0, torch.special.ndtr(mean / std.clamp(min=1e-300)), (mean > 0).double())
