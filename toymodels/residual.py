"""Many small networks in one residual stream, which is narrower than they are many.

T small networks share a stream of width D. Each owns a random unit direction e_i, through which it writes and
reads; z of them are active at a time. What i reads is its own input and a little of everyone else's:

    r = Σ_j x_j e_j        ⟨e_i, r⟩ = x_i + Σ_{j≠i} x_j ⟨e_i, e_j⟩        E⟨e_i, e_j⟩² = 1/D

After Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits), Hänni et al. 2024 (Mathematical
Models of Computation in Superposition) and Bushnaq & Mendel 2024 (Circuits in Superposition).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from toymodels.errors import UsageError
from toymodels.features import FeatureBatch, Features
from toymodels.geometry import cosines, unit_rows
from toymodels.streams import generator as named_stream
from toymodels.worlds import OnStep, Recipe, Sample, World

MEAN_SQUARE = 1 / 3
"""E[x²] of an active input, U[0, 1]."""


def random_directions(
    n_directions: int, width: int, n_instances: int, generator: torch.Generator
) -> Float[Tensor, "n_instances n_directions width"]:
    """Unit vectors, uniform on the sphere.

    Raises:
        UsageError: a size below 1.
    """
    shape = (n_instances, n_directions, width)
    if min(shape) < 1:
        raise UsageError(f"n_instances, n_directions and width must be at least 1, got {list(shape)}")
    return unit_rows(torch.randn(shape, generator=generator, device=generator.device))


def exactly_active(
    n_active: int,
    n_features: int,
    batch_size: int,
    n_instances: int,
    generator: torch.Generator,
    *,
    always: int | None = None,
) -> FeatureBatch:
    """Rows [n_instances, batch_size, n_features] with n_active entries each, any subset alike, at U[0, 1].

    Feature `always`, if given, is one of them in every row.

    Raises:
        UsageError: n_active outside 1..n_features.
    """
    if not 1 <= n_active <= n_features:
        raise UsageError(f"n_active must lie in 1..n_features={n_features}, got {n_active}")
    shape = (n_instances, batch_size, n_features)
    lots = torch.rand(shape, generator=generator, device=generator.device)
    if always is not None:
        lots[..., always] = 2.0
    indices = lots.topk(n_active, dim=-1).indices.sort(dim=-1).values.flatten()
    offsets = torch.arange(0, len(indices) + 1, n_active, device=generator.device)
    values = torch.rand(len(indices), generator=generator, device=generator.device)
    return FeatureBatch(indices, values, offsets, shape)


def interference_sd(n_others: int, width: int) -> float:
    """√(n E[x²] / D): what n active others add to a read-in."""
    return sqrt(n_others * MEAN_SQUARE / width)


def read_in_interference(
    a: FeatureBatch, directions: Float[Tensor, "n_instances n_units width"]
) -> Float[Tensor, "n_instances n_entries"]:
    """Σ_{j≠i} a_j ⟨e_i, e_j⟩: what each active unit hears of the others.

    Every instance needs as many active entries, as from `exactly_active`.
    """
    # ⟨e_i, r⟩ = Σ_j a_j ⟨e_i, e_j⟩: the cosines say it without the stream.
    heard = a.embed(cosines(directions)).flatten()
    return (heard[a.positions] - a.values).view(a.shape[0], -1)


def read_out_effect(
    a: FeatureBatch, directions: Float[Tensor, "n_instances n_units width"], read: Callable[[Tensor], Tensor]
) -> Float[Tensor, " n_instances"]:
    """Mean over i ≠ j of (read⟨e_i, r⟩ − read⟨e_i, r − a_j e_j⟩)², where j is the first active unit of its row.

    Every row needs as many active entries, as from `exactly_active`.
    """
    overlaps = cosines(directions)
    j, strength = (entries.view(*a.shape[:2], -1)[..., :1] for entries in (a.indices, a.values))
    heard = a.embed(overlaps)
    without = heard - strength * overlaps.gather(1, j.expand(-1, -1, a.n_features))
    change = (read(heard) - read(without)).square().scatter(2, j, 0)
    return change.sum((1, 2)) / (a.shape[1] * (a.n_features - 1))


def gate(u: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    """u where u > θ, else 0: the limit of two steep ReLUs side by side, 1/ε · [θ relu(u−θ+ε) − (θ−ε) relu(u−θ)]."""
    return torch.where(u > threshold, u, 0)


@dataclass(frozen=True, eq=False)
class SmallNetworks:
    """T networks of two layers: f_i(x) = Σ_k v_ik relu(x − t_k), with t_k = k/H.

    Their graphs are broken lines through the origin, so that a network without input answers nothing.
    """

    v: Float[Tensor, "n_instances n_networks n_units"]

    @classmethod
    def random(cls, n_networks: int, n_units: int, n_instances: int, generator: torch.Generator) -> SmallNetworks:
        """Slopes of either sign and size U[1, 2] on each of the H pieces."""
        shape = (n_instances, n_networks, n_units)
        size, sign = torch.rand(2, *shape, generator=generator, device=generator.device)
        slopes = (1 + size) * torch.where(sign < 0.5, -1, 1)
        return cls(slopes.diff(dim=-1, prepend=torch.zeros_like(slopes[..., :1])))

    def __call__(
        self, x: Float[Tensor, "n_instances batch #n_networks"]
    ) -> Float[Tensor, "n_instances batch n_networks"]:
        """y_i = f_i(x_i)."""
        n_units = self.v.shape[-1]
        y = self.v[:, None, :, 0] * x.relu()
        for k in range(1, n_units):
            y.addcmul_(self.v[:, None, :, k], (x - k / n_units).relu_())
        return y


@dataclass(frozen=True, eq=False)
class CompressedNetworks:
    """The same networks through one residual stream of width D, their inputs at e_i and their outputs at e'_i.

        r = Σ_j x_j e_j        u_i = gate(⟨e_i, r⟩, θ)        r' = r + Σ_j f_j(u_j) e'_j        y_i = ⟨e'_i, r'⟩

    Without a threshold every network that should rest hears the others, answers them, and is heard by all.
    """

    networks: SmallNetworks
    inputs: Float[Tensor, "n_instances n_networks width"]
    outputs: Float[Tensor, "n_instances n_networks width"]

    @classmethod
    def random(
        cls, n_networks: int, width: int, n_units: int, n_instances: int, generator: torch.Generator
    ) -> CompressedNetworks:
        """Random networks in random directions."""
        networks = SmallNetworks.random(n_networks, n_units, n_instances, generator)
        inputs = random_directions(n_networks, width, n_instances, generator)
        return cls(networks, inputs, random_directions(n_networks, width, n_instances, generator))

    def __call__(self, x: FeatureBatch, threshold: float = 0.0) -> Float[Tensor, "n_instances batch n_networks"]:
        """y."""
        r = x.embed(self.inputs)
        answers = self.networks(gate(r @ self.inputs.mT, threshold))
        return torch.baddbmm(r, answers, self.outputs) @ self.outputs.mT

    def compare(
        self, x: FeatureBatch, thresholds: Mapping[str, float]
    ) -> dict[str, Float[Tensor, "n_instances batch n_networks"]]:
        """f(x) of the networks alone, as "truth", and y at each threshold."""
        return {"truth": self.networks(x.dense()), **{name: self(x, theta) for name, theta in thresholds.items()}}

    def expected_error(self, n_active: int, threshold: float = 0.0) -> float:
        """E(y_i − f_i)² / E f_i² of an active network, by the variances of the four things that disturb it.

            E(f(gate(x + n_a)) − f(x))²          its own answer to what it reads
          + z E[x²]/D                            inputs, which stay in the stream
          + (z − 1) E f(gate(x + n_a))²/D        answers of the others that are active
          + (T − z) E f(gate(n_i))²/D            answers of those that should rest

        n_a and n_i are what z − 1 and z others add to a read-in: normal of variance Σx²/D, where Σx² varies.
        """
        n_networks, width = self.inputs.shape[1:]
        networks = SmallNetworks(self.networks.v.flatten(0, 1)[None, :512])  # enough for an average
        normal = torch.distributions.Normal(0, 1).icdf((torch.arange(200) + 0.5) / 200)
        x = (torch.arange(50) + 0.5)[:, None] / 50
        draws = torch.rand(4096, n_active, generator=named_stream(0, "expected error")).square().sum(1)
        sizes = (draws.sort().values.view(64, 64).mean(1, keepdim=True) / width).sqrt()  # of n_i; its tail matters

        def answers(u: Tensor) -> Tensor:
            return networks(gate(u, threshold).flatten()[None, :, None]).view(*u.shape, -1)

        truth = networks(x[None])[0, :, None]
        answer = answers(x + interference_sd(n_active - 1, width) * normal)
        own = (answer - truth).square().mean()
        others = n_active * MEAN_SQUARE + (n_active - 1) * answer.square().mean()
        resting = (n_networks - n_active) * answers(sizes * normal).square().mean()
        return float((own + (others + resting) / width) / truth.square().mean())


def relative_error(
    y: Float[Tensor, "n_instances samples"], truth: Float[Tensor, "n_instances samples"]
) -> Float[Tensor, " n_instances"]:
    """Σ(y − f)²/Σf²."""
    return (y - truth).square().sum(1) / truth.square().sum(1)


class ResidualWorld(World):
    """A residual stream Σ_j x_j e_j into which T networks write, each now and then."""

    def __init__(self, directions: Float[Tensor, "n_features d_hidden"], features: Features) -> None:
        self.truth: Float[Tensor, "n_features d_hidden"] = directions
        self.features, self.d_hidden = features, directions.shape[1]

    def sample(self, n: int, stream: torch.Generator) -> Sample:
        acts = self.features.sample(n, stream)
        return Sample(acts.embed(self.truth), acts)


@dataclass(frozen=True)
class ResidualRecipe(Recipe):
    """n_features networks in random directions of a stream, each active with feature_prob; nothing is trained."""

    n_features: int = 256
    d_hidden: int = 64
    feature_prob: float = 0.01

    def build(self, seed: int, on_step: OnStep | None = None) -> ResidualWorld:
        features = Features(self.n_features, self.feature_prob)
        stream = named_stream(seed, "residual", "directions")
        return ResidualWorld(random_directions(self.n_features, self.d_hidden, 1, stream)[0], features)
