"""How dictionaries fail: latents that absorb a parent's firing, latents that hedge between features that go together.

Which features go together is read off the evaluation set, so any source with true activations has both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.codes import flat_nonzero
from sae.metrics.chance import N_SHUFFLES, beside_chance
from sae.metrics.co_statistics import CoStatistics, mean, ratio
from sae.metrics.dictionary_recovery import Matching
from sae.metrics.inputs import Matrix, directions
from sae.metrics.native import look_up
from sae.metrics.samples import Samples
from toymodels.features import FeatureBatch
from toymodels.streams import generator

# A child is on at least this often, and in so many of these samples its parent is on too, which is on rarely elsewhere.
MIN_FIRINGS, ALWAYS, PARENT_AT_MOST = 20, 0.99, 0.5
# Features are correlated when |phi| exceeds this, and so many standard deviations of independent ones.
CORRELATED, DEVIATIONS = 0.1, 5.0
# By how much an absorbing latent's cosines exceed that of parent and child.
ABOVE = 0.2


class Related(NamedTuple):
    """Pairs of true features that fire together, by more than chance."""

    child: Int[Tensor, " families"]
    parent: Int[Tensor, " families"]
    n_both: Float[Tensor, " families"]
    n_parent: Float[Tensor, " families"]
    first: Int[Tensor, " correlated"]
    second: Int[Tensor, " correlated"]
    sign: Float[Tensor, " correlated"]
    """Of the correlation of first and second; each pair occurs in both orders."""

    @classmethod
    def join(cls, parts: list[Related]) -> Related:
        """All pairs."""
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def related(sums: CoStatistics) -> Related:
    """The pairs of features in the rows of these sums with all features, which stand as units in them.

    child c => parent p    c on in >= 20 samples, p in >= 99 % of them, in at most half of all, more often than c
    correlated i, j        both on in >= 20 samples, |phi_ij| > .1 and > 5 / √N, phi the correlation of being on
    """
    N, on, fires = max(sums.n_samples, 1), sums.feature_count, sums.unit_count
    often, limit = fires >= MIN_FIRINGS, max(CORRELATED, DEVIATIONS / N**0.5)
    parts = []
    for rows in sums.blocks():
        both, own_on = sums.both_count[rows], on[rows, None]
        counted = own_on >= MIN_FIRINGS
        lives = counted & (both >= ALWAYS * own_on) & (fires <= PARENT_AT_MOST * N) & (fires > own_on)
        child, parent = lives.nonzero().unbind(dim=1)
        phi = sums.phi(rows)
        own = torch.arange(len(phi))
        start = sums.first + rows.start
        phi[own, start + own] = 0.0
        first, second = ((phi.abs() > limit) & counted & often).nonzero().unbind(dim=1)
        n_both, sign = both[child, parent].double(), phi[first, second].sign()
        parts.append(Related(start + child, parent, n_both, fires[parent], start + first, second, sign))
    return Related.join(parts)


def failures_beside_chance(
    samples: Samples, pairs: Related, matching: Matching, W_dec: Matrix, truth: Matrix, seed: int = 0
) -> dict[str, float]:
    """absorption and hedging with chance and truth, and how many pairs of features they are means over.

        absorption   mean over families c => p of  P(σ(p) silent and an absorber fires | p on, c on)
                     - the same given p on, c off, where latent j absorbs if C_pj and C_cj > d_p . d_c + .2
                     (after Chanin et al. 2024, "A is for Absorption")
        hedging      mean over correlated i, j of  sign(phi_ij) (C_jσ(i) - (d_i . d_j) C_iσ(i))
                     (after Chanin et al. 2025, "Feature Hedging")

    Families whose parent has no latent are left out, as are correlated pairs whose first has none: nothing absorbs or
    hedges there. Chance is that of shuffled samples, and of random directions in place of the matched latents. The
    truth scores 0. Without any pair, both are left out and their counts are 0.
    """
    counts = {"absorption_pairs": 0.0, "hedging_pairs": 0.0}
    learned, features = directions(W_dec)[0].cpu(), directions(truth)[0].cpu()
    latent = matching.latent.cpu()
    result: dict[str, float] = {}
    whole = latent[pairs.parent] >= 0
    if bool(whole.any()):
        counts["absorption_pairs"] = float(whole.sum())
        absorbers = _absorbers(pairs, whole, matching, features)
        draws = [
            absorption(samples, pairs, whole, latent, absorbers, draw, seed) for draw in (None, *range(N_SHUFFLES))
        ]
        value, *by_luck = ({"absorption": draw} for draw in draws)
        result |= beside_chance(value, by_luck, {"absorption": 0.0})
    kept = latent[pairs.first] >= 0
    if bool(kept.any()):
        counts["hedging_pairs"] = float(kept.sum())
        first, second, sign = pairs.first[kept], pairs.second[kept], pairs.sign[kept]
        value = {"hedging": _hedging(features, first, second, sign, learned[latent.clamp(min=0)])}
        by_luck = []
        for draw in range(N_SHUFFLES):
            stream = generator(seed, "metrics", "random latents", draw)
            random = torch.randn(features.shape, generator=stream, dtype=torch.float64)
            random /= random.norm(dim=1, keepdim=True)
            by_luck.append({"hedging": _hedging(features, first, second, sign, random)})
        result |= beside_chance(value, by_luck, {"hedging": 0.0})
    return result | counts


def absorption(
    samples: Samples,
    pairs: Related,
    whole: Bool[Tensor, " families"],
    latent: Int[Tensor, " n_features"],
    absorbers: FeatureBatch,
    draw: int | None,
    seed: int,
) -> float:
    """The mean over families of P(absorbed | c on) - P(absorbed | c off), both given p on."""
    from scipy.sparse import csr_array  # noqa: PLC0415 - slow to import

    child, parent = pairs.child[whole], pairs.parent[whole]
    shape = (len(child), samples.n_latents)
    ones = np.ones(len(absorbers.indices), dtype=np.float32)
    of_pair = csr_array((ones, absorbers.indices.numpy(), absorbers.offsets.numpy()), shape=shape)
    with_child, without = torch.zeros(2, len(child), dtype=torch.float64)
    for window in samples.windows(draw, seed):
        codes = window.codes
        fires = (codes.values > 0).float().numpy()
        z = csr_array((fires, codes.indices.numpy(), codes.offsets.numpy()), shape=(len(codes), shape[1]))
        near = (z @ of_pair.T).tocsr()
        found = FeatureBatch(
            torch.from_numpy(near.indices).long(),
            torch.from_numpy(near.data),
            torch.from_numpy(near.indptr).long(),
            (len(codes), len(child)),
        )
        parent_on, child_on = look_up(found, window.acts, torch.stack([parent, child]), window.order) > 0
        silent = look_up(found, codes, latent[parent][None])[0] <= 0
        absorbed = parent_on & silent & (found.values > 0)
        with_child += found.indices.bincount((absorbed & child_on).double(), minlength=len(child))
        without += found.indices.bincount((absorbed & ~child_on).double(), minlength=len(child))
    n_both, n_parent = pairs.n_both[whole], pairs.n_parent[whole]
    return mean(ratio(with_child, n_both) - ratio(without, n_parent - n_both))


def _absorbers(
    pairs: Related, whole: Bool[Tensor, " families"], matching: Matching, features: Float[Tensor, "n_features d"]
) -> FeatureBatch:
    """The alive latents near both features of each family."""
    alive, C = matching.alive.cpu().nonzero().squeeze(1), matching.usable_C.cpu()
    parts = []
    for child, parent in zip(pairs.child[whole].split(1024), pairs.parent[whole].split(1024), strict=True):
        limit = ((features[child] * features[parent]).sum(dim=1, keepdim=True) + ABOVE).to(C.dtype)
        family, near = flat_nonzero(torch.minimum(C[child], C[parent]) > limit), len(alive)
        offsets = F.pad((family // near).bincount(minlength=len(child)).cumsum(0), (1, 0))
        latents = alive[family % near]
        parts.append(FeatureBatch(latents, torch.ones(len(latents)), offsets, (len(child), len(matching.alive))))
    return FeatureBatch.cat(parts)


def _hedging(
    features: Float[Tensor, "n_features d"],
    first: Int[Tensor, " correlated"],
    second: Int[Tensor, " correlated"],
    sign: Float[Tensor, " correlated"],
    own: Float[Tensor, "n_features d"],
) -> float:
    """The mean lean of the latent of `first` towards `second`, beyond what the two directions share."""
    total = 0.0
    for i, j, s in zip(first.split(8192), second.split(8192), sign.split(8192), strict=True):
        towards = (features[j] * own[i]).sum(dim=1)
        shared = (features[i] * features[j]).sum(dim=1) * (features[i] * own[i]).sum(dim=1)
        total += float((s * (towards - shared)).sum())
    return total / len(first)
