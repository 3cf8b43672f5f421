"""Synthetic worlds: known directions, known firing, thousands of features, drawn at the cost of those that are active.

    h = Σ_i x_i d_i + b + noise · ε,    ε ~ N(0, I)

Docs: worlds.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float, Int

from toymodels.correlations import Correlation, Factors, Groups, LowRank, rotated
from toymodels.dictionaries import Dictionary, Directions, RandomDictionary
from toymodels.draws import GroupDraws, Independent, LowRankDraws, numpy_generator
from toymodels.errors import UsageError
from toymodels.features import FeatureBatch
from toymodels.firing import ConstantFiring, Firing, Magnitudes, Profile, Strengths, over_features
from toymodels.hierarchies import Forest, Hierarchy, compensated, expand
from toymodels.mappings import read_mapping
from toymodels.plain_yaml import parse_yaml
from toymodels.streams import generator
from toymodels.worlds import Sample, World


@dataclass(frozen=True)
class WorldDescription:
    """What a synthetic world is like; `build(seed)` draws one such world.

    Raises:
        UsageError: the parts do not fit together.
    """

    n_features: int
    d_hidden: int
    dictionary: Dictionary = field(default_factory=RandomDictionary)
    firing: Firing = field(default_factory=ConstantFiring)
    magnitudes: Magnitudes = field(default_factory=Magnitudes)
    hierarchy: Hierarchy | None = None
    correlation: Correlation | None = None
    bias: float = 0.0
    """Norm of b, whose direction is random."""
    noise: float = 0.0
    """Standard deviation of what is added to each dimension of h."""

    def __post_init__(self) -> None:
        for name in ("n_features", "d_hidden"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("bias", "noise"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}; 0 leaves it out")
        n_parentless = self.n_features
        if self.hierarchy is not None:
            roots = self.hierarchy.n_roots
            if roots > self.n_features:
                raise UsageError(
                    f"hierarchy.n_roots must not exceed n_features={self.n_features}, got {roots}; lower it"
                )
            n_parentless = self.hierarchy.n_parentless(self.n_features)
        if isinstance(self.correlation, Groups) and self.correlation.size > n_parentless:
            raise UsageError(
                f"correlation.size must not exceed the {n_parentless} features without a parent, got "
                f"{self.correlation.size}; lower it"
            )

    def build(self, seed: int) -> SyntheticWorld:
        """Draws the dictionary, and whatever else is random about the world rather than about its samples."""
        n, stream = self.n_features, lambda name: generator(seed, "world", name)
        D = self.dictionary.directions(n, self.d_hidden, stream("dictionary"))
        strengths = Strengths(
            self.magnitudes.kind,
            over_features(self.magnitudes.mean, n, stream("mean")),
            over_features(self.magnitudes.std, n, stream("std")),
        )
        forest, probs = Forest.flat(n), self.firing.probs(n)
        if self.hierarchy is not None:
            forest = self.hierarchy.forest(n, stream("hierarchy"))
            probs = compensated(forest, probs, strengths.positive, self.hierarchy.compensation)
        correlation: Factors | Groups | None = None
        if isinstance(self.correlation, LowRank):
            correlation = self.correlation.factors(n, stream("correlation"))
        elif self.correlation is not None:
            correlation = self.correlation
        bias = self.bias * F.normalize(torch.randn(self.d_hidden, generator=stream("bias")), dim=0)
        return SyntheticWorld(D, probs, strengths, forest, correlation, bias, self.noise)

    KIND: ClassVar = None

    @classmethod
    def read(cls, path: Path) -> WorldDescription:
        """The description in a YAML file.

        Raises:
            UsageError: it cannot be read, or a key or value breaks a rule.
        """
        try:
            mapping = parse_yaml(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"cannot read {path}: {error.strerror}; give a YAML file that describes a world"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        try:
            return read_mapping(cls, mapping)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error


class SyntheticWorld(World):
    """One synthetic world: h = Σ_i x_i d_i + b + noise, with x drawn top-down along the forest.

    `probs` are those with which features draw by themselves; the others decide whether they then fire.

    Raises:
        UsageError: a child is scaled by a parent whose mean magnitude is 0.
    """

    truth: Directions

    def __init__(
        self,
        D: Directions,
        probs: Profile,
        strengths: Strengths,
        forest: Forest,
        correlation: Factors | Groups | None = None,
        bias: Float[torch.Tensor, " d_hidden"] | None = None,
        noise: float = 0.0,
        parentless: Int[np.ndarray, " n_parentless"] | None = None,
    ) -> None:
        self.truth, self.d_hidden = D, D.shape[1]
        self.probs, self.strengths, self.forest, self.correlation = probs, strengths, forest, correlation
        self.bias = torch.zeros(self.d_hidden) if bias is None else bias
        self.noise = noise
        self.first_child, self.n_children, self.children = forest.children()
        weak = strengths.mean[forest.parent[forest.scaled]] <= 0
        if weak.any():
            i = int(forest.parent[forest.scaled][weak][0])
            raise UsageError(f"feature {i} scales its children by x / mean, and its mean magnitude is 0; raise it")
        order = forest.parentless if parentless is None else parentless
        if isinstance(correlation, Groups):
            self.draws: Independent | LowRankDraws = GroupDraws(probs, order, correlation)
        elif correlation is not None:
            self.draws = LowRankDraws(probs, order, correlation)
        else:
            self.draws = Independent(probs, order)

    @property
    def n_features(self) -> int:
        return len(self.truth)

    def sample(self, n: int, stream: torch.Generator) -> Sample:
        if n < 1:
            raise UsageError(f"a sample must have at least 1 row, got {n}")
        rng = numpy_generator(stream)
        acts = self._features(n, rng)
        hidden = acts.embed(self.truth).add_(self.bias)
        if self.noise:
            noise = torch.from_numpy(rng.standard_normal(hidden.shape, dtype=np.float32))
            hidden.add_(noise, alpha=self.noise)
        return Sample(hidden, acts)

    def shifted(self, seed: int) -> SyntheticWorld:
        """The same features with other co-occurrences: dictionary, trees, magnitudes and every marginal stay.

        Shared factors are drawn anew for each tree as a whole (`rotated`); groups get other members.

        Raises:
            UsageError: features are independent but for their trees.
        """
        stream, correlation, order = generator(seed, "world", "shift"), self.correlation, None
        if correlation is None:
            raise UsageError(
                "a world without correlation has no co-occurrences to shift; describe one with correlation"
            )
        if isinstance(correlation, Groups):
            parentless = self.forest.parentless
            order = parentless[torch.randperm(len(parentless), generator=stream).numpy()]
        else:
            correlation = rotated(correlation, self.forest.trees(), stream)
        return SyntheticWorld(
            self.truth, self.probs, self.strengths, self.forest, correlation, self.bias, self.noise, order
        )

    def _features(self, n: int, rng: np.random.Generator) -> FeatureBatch:
        """Who draws without a parent, then, among the children of those that fire, who draws, ..."""
        shared = self.draws.shared(n, rng)
        row, feature = self.draws.first(n, shared, rng)
        if (self.forest.family[feature] >= 0).any():  # rivals must stand side by side
            order = np.lexsort((self.forest.family[feature], row))
            row, feature = row[order], feature[order]
        row, feature, value = self._fire(row, feature, None, rng)
        found = [(row, feature, value)]
        while len(row):
            which, at = expand(self.first_child.take(feature), self.n_children.take(feature))
            child, child_row = self.children.take(at), row.take(which)
            draws = np.flatnonzero(self.draws.children(child_row, child, shared, rng))
            above = value.take(which.take(draws))
            row, feature, value = self._fire(child_row.take(draws), child.take(draws), above, rng)
            found.append((row, feature, value))
        rows, features, values = (np.concatenate(part) for part in zip(*found, strict=True))
        return _in_order(rows, features, values, (n, self.n_features))

    def _fire(
        self,
        row: Int[np.ndarray, " nnz"],
        feature: Int[np.ndarray, " nnz"],
        above: Float[np.ndarray, " nnz"] | None,
        rng: np.random.Generator,
    ) -> tuple[Int[np.ndarray, " firing"], Int[np.ndarray, " firing"], Float[np.ndarray, " firing"]]:
        """Those with a magnitude above 0 that win their family, and x; `above` is x_parent."""
        value = self.strengths.draw(feature, rng)
        kept = np.flatnonzero(value > 0)
        family = self.forest.family.take(feature.take(kept))
        if (family >= 0).any():
            kept = kept.take(_winners(row.take(kept), family, rng))
        row, feature, value = row.take(kept), feature.take(kept), value.take(kept)
        if above is not None:
            scaled = np.flatnonzero(self.forest.scaled.take(feature))
            mean = self.strengths.mean.take(self.forest.parent.take(feature.take(scaled)))
            value[scaled] *= above.take(kept.take(scaled)) / mean
        return row, feature, value


def _winners(
    row: Int[np.ndarray, " nnz"], family: Int[np.ndarray, " nnz"], rng: np.random.Generator
) -> Int[np.ndarray, " winners"]:
    """One entry of each family and row, each as likely, and all that have no family; rivals stand side by side."""
    begins = np.ones(len(row), dtype=bool)
    begins[1:] = (row[1:] != row[:-1]) | (family[1:] != family[:-1]) | (family[1:] < 0)
    start = np.flatnonzero(begins)
    count = np.diff(start, append=len(row))
    return start + (rng.random(len(start)) * count).astype(np.int64)


def _in_order(
    row: Int[np.ndarray, " nnz"],
    feature: Int[np.ndarray, " nnz"],
    value: Float[np.ndarray, " nnz"],
    shape: tuple[int, int],
) -> FeatureBatch:
    """The batch, its entries sorted by row and feature.

    Entry numbers ride in the low bits: numpy sorts whole numbers several times faster than it finds their order.
    """
    bits = len(row).bit_length()
    if (shape[0] * shape[1]).bit_length() + bits > 63:
        raise UsageError(f"a batch of {shape[0]} rows and {shape[1]} features is too large; draw fewer rows at a time")
    packed = np.sort((row * shape[1] + feature) << bits | np.arange(len(row)))
    entry = packed & ((1 << bits) - 1)
    offsets = np.concatenate([[0], np.bincount(row, minlength=shape[0]).cumsum()])
    indices = (packed >> bits) - np.repeat(np.arange(shape[0]) * shape[1], np.diff(offsets))
    return FeatureBatch(
        torch.from_numpy(indices), torch.from_numpy(value[entry]), torch.from_numpy(offsets.astype(np.int64)), shape
    )
