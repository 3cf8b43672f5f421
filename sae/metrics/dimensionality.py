"""How rows fill their space: `toymodels.geometry` on one matrix, or on a dictionary beside the truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import isfinite

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
    return beside_chance(_geometry(rows), [_geometry(random) for random in _random_directions(rows, seed)], {})


def dictionary_dimensionality(
    W_dec: Matrix, truth: Matrix | None = None, *, alive: Mask | None = None, seed: int = 0
) -> dict[str, float]:
    """The geometry of a learned dictionary's alive rows, as unit rows: their norms are the codes' affair.

    Names as in `dimensionality`, for W_dec; where the true features are given, `<name>_truth` is the value of these as
    unit rows and `<name>_difference` the learned minus the true one. Chance is that of as many random directions as are
    alive. All dead: empty.
    """
    learned, norms = directions(W_dec)
    usable = norms > 0
    learned = _precise(learned[usable if alive is None else torch.as_tensor(alive, device=usable.device) & usable])
    scores = _geometry(learned)
    true = {}
    if truth is not None:
        true = once(("geometry", fingerprint(truth)), lambda: _geometry(directions(truth)[0]))
    # Of unit rows, random directions know nothing but the shape.
    key = ("random geometry", learned.shape, learned.dtype, seed)
    draws = once(key, lambda: [_geometry(random) for random in _random_directions(learned, seed)])
    both = {name: scores[name] - true[name] for name in scores if name in true}
    return beside_chance(scores, draws, true) | {f"{name}_difference": value for name, value in both.items()}


def _geometry(W: Float[Tensor, "n_features d_hidden"]) -> dict[str, float]:
    """The values that are defined."""
    if not len(W):
        return {}
    shares = geometry.feature_dimensionality(W)
    values = {
        "feature_dimensionality": shares.mean(),
        "dimensions_per_feature": geometry.dimensions_per_feature(W),
        "interference": geometry.interference(W).mean(),
        "capacity": shares.sum(),
        "effective_rank": geometry.effective_rank(W),
        "participation_ratio": geometry.participation_ratio(W),
        "coherence_over_welch": geometry.coherence_over_welch(W),
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


def _random_directions(W: Float[Tensor, "n d"], seed: int) -> Iterator[Float[Tensor, "n d"]]:
    """Rows of the same norms in independent directions, uniform on the sphere; one matrix at a time."""
    norms = geometry.norms(W)[:, None]
    for draw in range(N_RANDOM_MATRICES if W.numel() <= LARGE else N_LARGE_RANDOM_MATRICES):
        stream = generator(seed, "metrics", "random directions", draw)
        random = torch.randn(W.shape, generator=stream, dtype=W.dtype).to(W.device)
        yield geometry.unit_rows(random).mul_(norms)
