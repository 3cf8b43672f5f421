"""How rows fill their space: `toymodels.geometry` on one matrix, or on a dictionary and the truth."""

from __future__ import annotations

from collections import Counter
from math import isfinite, log

import torch
from jaxtyping import Float
from torch import Tensor

from sae.metrics.chance import beside_chance
from sae.metrics.inputs import Mask, Matrix, as_tensor, directions, row_norms
from sae.metrics.once import fingerprint, once
from toymodels import geometry
from toymodels.streams import generator

# Random matrices behind a chance value. Of the large ones two are enough: the more rows, the more alike they are.
N_RANDOM_MATRICES, N_LARGE_RANDOM_MATRICES = 4, 2
# Entries above which a matrix is large: it stays in float32, as its Gram matrix would take minutes in float64.
LARGE = 2**20
# So many directions all touch one another in some chain: there are no polytopes to count.
POLYTOPE_ROWS = 2048


def dimensionality(W: Matrix, *, seed: int = 0) -> dict[str, float]:
    """The geometry of rows W [n, m], norms included, for instance of a toy model's features.

        feature_dimensionality   mean_i D_i, D_i = |W_i|² / Σ_j (Ŵ_i · W_j)²      (Elhage et al. 2022)
        dimensions_per_feature   D* = m / |W|_F²
        interference             mean_i Σ_{j≠i} (Ŵ_i · W_j)²
        capacity                 Σ_i D_i                                          (Scherlis et al. 2022)
        effective_rank           exp of the entropy of the normalised singular values
        participation_ratio      (Σλ)² / Σλ² of the squared singular values
        coherence_over_welch     max_{i≠j} |Ŵ_i · Ŵ_j| / √((n − m) / (m (n − 1)))
        rms_over_welch           the root mean square of the same cosines over the same bound
        polytope_<kind>          how many connected components of |Ŵ_i · Ŵ_j| > .1 have that shape, n <= 2048

    Beside each stand `<name>_chance` and `<name>_chance_sd`, of random directions with these norms.
    What is undefined (the Welch ratios for n <= m, D* of zeros) is left out. `seed` drives chance alone.

    Raises:
        ValueError: a row holds nan or inf.
    """
    row_norms(W)  # refuses what is not finite
    rows = _precise(as_tensor(W))
    return beside_chance(_geometry(rows), _random_geometries(geometry.norms(rows), rows.shape[1], seed), {})


def dictionary_dimensionality(
    W_dec: Matrix, truth: Matrix | None = None, *, alive: Mask | None = None, seed: int = 0
) -> dict[str, float]:
    """The geometry of a learned dictionary's alive rows, as unit rows: their norms are the codes' affair.

    Names as in `dimensionality`, for W_dec; where the true features are given, `<name>_truth` is the value of these as
    unit rows and `<name>_difference` the learned minus the true one. Chance is that of as many random directions as are
    alive. All dead: empty.
    """
    norms = row_norms(W_dec)
    usable = norms > 0
    if alive is not None:
        usable &= torch.as_tensor(alive, device=usable.device)
    learned = _precise(as_tensor(W_dec)[usable])
    learned /= norms[usable, None].to(learned.dtype)
    scores = _geometry(learned)
    true = {}
    if truth is not None:
        true = once(("geometry", fingerprint(truth)), lambda: _geometry(directions(truth)[0]))
    # Of unit rows, random directions know nothing but the shape.
    norms, width = geometry.norms(learned), learned.shape[1]
    del learned  # as large as what is drawn
    draws = once(
        ("random geometry", len(norms), width, norms.dtype, seed), lambda: _random_geometries(norms, width, seed)
    )
    both = {name: scores[name] - true[name] for name in scores if name in true}
    return beside_chance(scores, draws, true) | {f"{name}_difference": value for name, value in both.items()}


def _geometry(W: Float[Tensor, "n_features d_hidden"], coherence: float | None = None) -> dict[str, float]:
    """The values that are defined; the largest cosine, which takes longest, only where it is not given."""
    if not len(W):
        return {}
    shares, bound = geometry.feature_dimensionality(W), geometry.welch_bound(*W.shape)
    values = {
        "feature_dimensionality": shares.mean(),
        "dimensions_per_feature": geometry.dimensions_per_feature(W),
        "interference": geometry.interference(W).mean(),
        "capacity": shares.sum(),
        "effective_rank": geometry.effective_rank(W),
        "participation_ratio": geometry.participation_ratio(W),
        "coherence_over_welch": geometry.coherence_over_welch(W) if coherence is None else coherence / bound,
        "rms_over_welch": geometry.rms_over_welch(W),
    }
    measured = {name: float(value) for name, value in values.items() if isfinite(value)}
    if len(W) > POLYTOPE_ROWS:
        return measured
    kinds = Counter(polytope.kind for polytope in geometry.polytopes(W))
    counts = {f"polytope_{kind.replace(' ', '_')}": float(kinds[kind]) for kind in (*geometry.POLYTOPES, "other")}
    return measured | counts


def _precise(W: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """In float64, or a large one in float32."""
    return W.to(torch.float64 if W.numel() <= LARGE else torch.float32)


def _random_geometries(norms: Float[Tensor, " n"], d: int, seed: int) -> list[dict[str, float]]:
    """Of rows of these norms in independent directions, uniform on the sphere."""
    large = len(norms) * d > LARGE
    draws = []
    for draw in range(N_LARGE_RANDOM_MATRICES if large else N_RANDOM_MATRICES):
        stream = generator(seed, "metrics", "random directions", draw)
        random = torch.randn(len(norms), d, generator=stream, dtype=norms.dtype).to(norms.device)
        random *= (norms / geometry.norms(random))[:, None]
        luck = float(torch.rand((), generator=stream, dtype=torch.float64))
        draws.append(_geometry(random, _random_coherence(int((norms > 0).sum()), d, luck) if large else None))
    return draws


def _random_coherence(n: int, d: int, luck: float) -> float:
    """The largest of the |cosines| of n directions drawn uniformly in d dimensions, at this quantile of its law.

    A squared cosine is Beta(1/2, (d - 1) / 2). The n (n - 1) / 2 of them are independent by pairs, so that the number
    above a high bound t is Poisson's, and P(largest < t) = exp(-n (n - 1) / 2 P(cosine² > t²)).
    """
    from scipy.special import betaincinv  # noqa: PLC0415 - slow to import

    n_pairs = n * (n - 1) / 2
    if not n_pairs or d == 1:
        return float(n_pairs > 0)
    beyond = min(-log(max(luck, 1e-300)) / n_pairs, 1.0)
    return float(1 - betaincinv((d - 1) / 2, 0.5, beyond)) ** 0.5
