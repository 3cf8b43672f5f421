"""What the neurons of row 10 do: which features each serves, how well each feature is computed, and the motif that
lets one neuron serve two."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toymodels import geometry
from toymodels.features import Features
from toymodels.models import ToyModel

LIVE = 0.05
"""A neuron of less weight than this part of its network's largest is dead, and left out."""
PURE = 0.75
"""A neuron is pure when a single feature has more of its weight than this."""
SERVED = 0.056
"""A neuron serves the features that have at least this share of its weight."""
RATIO = 1.5
"""How much larger one weight of an asymmetric pair is than the other."""

Reads = Float[Tensor, "n_instances n_features d_hidden"]
Writes = Float[Tensor, "n_instances d_hidden n_features"]


def service(W: Reads, W_out: Writes) -> Reads:
    """|W ∘ W_outᵀ|: how much neuron k carries of feature i, from its input to its own output."""
    return (W * W_out.mT).abs()


def shares(W: Reads, W_out: Writes) -> Reads:
    """The part of a neuron's weight that each feature has; none of a dead neuron's."""
    weight = service(W, W_out)
    total = reduce(weight, "r n k -> r 1 k", "sum")
    return torch.where(total > LIVE * total.amax(2, keepdim=True), weight / total, 0)


def pure_neurons(W: Reads, W_out: Writes) -> Float[Tensor, " n_instances"]:
    """The fraction of live neurons that one feature has to itself."""
    share = shares(W, W_out)
    live = share.sum(1) > 0
    return ((geometry.purity_weights(share) > PURE) & live).sum(1) / live.sum(1)


def features_per_neuron(W: Reads, W_out: Writes) -> Float[Tensor, " n_instances"]:
    """How many features a live neuron serves, in the mean over neurons."""
    share = shares(W, W_out)
    return (share > SERVED).sum((1, 2)) / (share.sum(1) > 0).sum(1)


@torch.no_grad()
def unexplained(
    model: ToyModel, features: Features, n_samples: int, generator: torch.Generator
) -> Float[Tensor, "n_instances n_features"]:
    """Σ (|x_i| − y_i)² / Σ (|x_i| − mean |x_i|)²: the fraction of variance unexplained, of each feature.

    What y_i says while x_i is silent counts, too. Half of |x| alone, relu(x), scores ½ and a little.
    """
    error, total, squares = torch.zeros(3, *model.b.shape, dtype=torch.float64)
    chunk = 1 << 13
    n_chunks = -(-n_samples // chunk)
    for _ in range(n_chunks):
        x = features.sample_dense(chunk, generator, model.n_instances)
        wanted = x.abs()
        error += (model(x) - wanted).square().sum(1)
        total += wanted.sum(1)
        squares += wanted.square().sum(1)
    return (error / (squares - total.square() / (n_chunks * chunk))).float()


class Motifs(NamedTuple):
    """Pairs of features that share a neuron asymmetrically; one entry of each tensor for each motif."""

    instance: Int[Tensor, " motifs"]
    loud: Int[Tensor, " motifs"]
    """The feature with the larger input weight and the smaller output weight."""
    faint: Int[Tensor, " motifs"]
    """The feature with the smaller input weight and the larger output weight: it hears the loud one through k."""
    neuron: Int[Tensor, " motifs"]

    def per_instance(self, n_instances: int) -> Float[Tensor, " n_instances"]:
        """How many each instance has."""
        return torch.bincount(self.instance, minlength=n_instances).float()


def motifs(W: Reads, W_out: Writes) -> Motifs:
    """Every pair i, j and neuron k that serves both, with |W_ik| > 1.5 |W_jk| and W_out,ki < W_out,kj / 1.5
    (Elhage et al. 2022, "The Asymmetric Superposition Motif"). Both outputs are positive: k computes both."""
    share = shares(W, W_out)
    served: Bool[Tensor, "n_instances n_features d_hidden"] = (share > SERVED) & (W_out.mT > 0)
    # Only so many features can share a neuron: pairs are compared among a neuron's largest alone.
    most = share.where(served, 0).topk(int(served.sum(1).max()), dim=1).indices
    served, read, write = (table.gather(1, most) for table in (served, W.abs(), W_out.mT))
    one, other = (lambda t: rearrange(t, "r i k -> r i 1 k")), (lambda t: rearrange(t, "r j k -> r 1 j k"))
    found = one(served) & other(served)
    found &= (one(read) > RATIO * other(read)) & (RATIO * one(write) < other(write))
    instance, i, j, neuron = found.nonzero(as_tuple=True)
    return Motifs(instance, most[instance, i, neuron], most[instance, j, neuron], neuron)


def inhibited(W: Reads, W_out: Writes, found: Motifs) -> Float[Tensor, " motifs"]:
    """min(1, inhibition / excitation) of the faint feature's output while only the loud one fires, with the sign to
    which the motif's neuron answers: 1 when other neurons take back all that reaches it."""
    read_up, read_down, write_up, write_down = W.relu(), (-W).relu(), W_out.relu(), (-W_out).relu()
    excitation = torch.stack([read_down @ write_up, read_up @ write_up])
    inhibition = torch.stack([read_down @ write_down, read_up @ write_down])
    sign = (W[found.instance, found.loud, found.neuron] > 0).long()
    where = (sign, found.instance, found.loud, found.faint)
    return (inhibition[where] / excitation[where]).clamp(max=1)


def dealt_anew(W_out: Writes, generator: torch.Generator) -> Writes:
    """Each feature's output weights, dealt to the neurons in another order: its own sizes and signs stay."""
    return W_out.gather(1, torch.rand(W_out.shape, generator=generator).argsort(1))
