"""Does the dictionary hold the true features? The one-to-one match, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.metrics.inputs import Mask, Matrix, argmax, directions
from sae.metrics.matching import best_match
from sae.metrics.once import fingerprint, once
from toymodels.streams import generator

COVERAGE_THRESHOLDS = (0.7, 0.8, 0.9, 0.95)
# Latents closer than this to one feature share it.
SPLIT = 0.8
# Random dictionaries behind a chance value: their sd is ~.003 at 256 x 64, so that the mean is good to .001.
N_RANDOM_DICTIONARIES = 8
# Above so many pairs cosines are in float32, and fewer random dictionaries do: their sd is below .001.
PRECISE_PAIRS = 2**24
N_LARGE_RANDOM_DICTIONARIES = 3
LATENTS_AT_ONCE = 1024


@dataclass(frozen=True)
class Matching:
    """What the signed cosines C_ij = d_i . w_j say; dead latents and zero rows match nothing.

    `latent[i]` and `cosine[i]` are feature i's partner in the one-to-one match and their C (-1 and 0 without
    one), `nearest_latent[i]` and `nearest_cosine[i]` its closest latent, which features may share (-1 and 0
    if none is alive), and `best_feature[j]` = argmax_i |C_ij| for every latent, dead ones included.
    """

    latent: Int[Tensor, " n_features"]
    cosine: Float[Tensor, " n_features"]
    nearest_latent: Int[Tensor, " n_features"]
    nearest_cosine: Float[Tensor, " n_features"]
    best_feature: Int[Tensor, " d_sae"]
    alive: Bool[Tensor, " d_sae"]
    usable_C: Float[Tensor, "n_features n_alive"]
    """C of the alive latents, in float32 where there are very many pairs."""

    @cached_property
    def unsigned_mean(self) -> float:
        """Mean |C| over the match that maximises the sum of |C| (`mcc_saelens`), found when first asked for."""
        size = self.usable_C.abs()
        return float(size[best_match(size)].double().mean()) if size.numel() else 0.0

    @property
    def has_latent(self) -> Bool[Tensor, " n_features"]:
        """Which features have a partner."""
        return self.latent >= 0


def match_dictionary(W_dec: Matrix, truth: Matrix, alive: Mask | None = None) -> Matching:
    """Matches features and alive latents one to one so that the signed sum of C is as large as can be.

    All min(n, n_alive) pairs are made: a pair with C < 0 occurs where nothing better is left, and counts as
    it is. Rows may have any norm. `alive` None: every nonzero row is.

    Raises:
        ValueError: the dictionaries live in different spaces, one is empty, or `alive` has another length or type.
    """
    for name, rows in (("W_dec", W_dec), ("truth", truth)):
        if not isinstance(rows, Tensor | np.ndarray) or rows.ndim != 2:
            given = list(rows.shape) if isinstance(rows, Tensor | np.ndarray) else type(rows).__name__
            raise ValueError(f"{name} must be a matrix, one direction a row, got {given}; pass a 2-d tensor or array")
    if W_dec.shape[1] != truth.shape[1]:
        raise ValueError(
            f"W_dec and truth must share their columns, got W_dec {list(W_dec.shape)} and truth "
            f"{list(truth.shape)}; pass [d_sae, d] and [n_features, d]"
        )
    if len(truth) == 0:
        raise ValueError("truth holds no feature, so there is nothing to recover; pass [n_features, d]")
    if alive is not None:
        alive = torch.as_tensor(alive)
        if len(alive) != len(W_dec):
            raise ValueError(f"alive must have one entry for each of the {len(W_dec)} latents, got {len(alive)}")
        if alive.dtype != torch.bool:
            raise ValueError(
                f"alive must be boolean, one truth value for each latent, got {alive.dtype}; compare first"
            )
    learned, norms = directions(W_dec)
    features = directions(truth)[0].to(learned.device)
    usable = norms > 0
    alive = usable if alive is None else alive.to(norms.device) & usable

    if len(features) * len(learned) > PRECISE_PAIRS:
        features, learned = features.float(), learned.float()
    C = features @ learned.T
    latents = alive.nonzero().squeeze(1)
    latent = torch.full((len(C),), -1, device=C.device)
    cosine = norms.new_zeros(len(C))
    nearest_latent, nearest_cosine = latent.clone(), cosine.clone()
    usable_C = C if len(latents) == len(learned) else C[:, latents]
    if len(latents):
        rows, columns = best_match(usable_C)
        latent[rows], cosine[rows] = latents[columns], usable_C[rows, columns].double()
        nearest = argmax(usable_C)
        nearest_cosine, nearest_latent = usable_C.gather(1, nearest[:, None])[:, 0].double(), latents[nearest]
    best_feature = torch.cat([argmax(part.abs().T) for part in C.split(LATENTS_AT_ONCE, dim=1)])
    return Matching(latent, cosine, nearest_latent, nearest_cosine, best_feature, alive, usable_C)


def dictionary_recovery(W_dec: Matrix, truth: Matrix, alive: Mask | None = None) -> dict[str, float]:
    """How well the rows of W_dec [d_sae, d] recover those of truth [n, d], without chance: fast.

        C_ij               d_i . w_j, rows of norm 1, j alive
        mmcs               mean_i max_j C_ij                                        (Sharkey et al. 2022)
        mcc                sum of C over the match that maximises it, / n; unmatched features count 0
        coverage_t         share of features with matched C > t, t = .7, .8, .9, .95
        uniqueness         number of distinct argmax_i |C_ij| / n_alive
        splitting          mean_i max(0, number of j with C_ij > .8, less 1)
        mcc_saelens        mean |C| over the min(n, n_alive) pairs that maximise its sum
        uniqueness_saelens the same number of distinct features / d_sae
        n_alive            alive latents with a nonzero row

    Evaluation set: none, or the one behind `alive`. `alive` None: every nonzero row is. All dead: 0.
    """
    return dictionary_scores(match_dictionary(W_dec, truth, alive))


def dictionary_scores(matching: Matching) -> dict[str, float]:
    """The scores of `dictionary_recovery` from a finished match."""
    n_alive = int(matching.alive.sum())
    n_distinct = len(matching.best_feature[matching.alive].unique())
    scores = {
        "mmcs": float(matching.nearest_cosine.mean()),
        "mcc": float(matching.cosine.mean()),
        "uniqueness": n_distinct / n_alive if n_alive else 0.0,
        "splitting": splitting(matching),
        "mcc_saelens": matching.unsigned_mean,
        "uniqueness_saelens": n_distinct / len(matching.alive) if n_alive else 0.0,
        "n_alive": float(n_alive),
    }
    return scores | {f"coverage_{t}": coverage(matching, t) for t in COVERAGE_THRESHOLDS}


def splitting(matching: Matching) -> float:
    """How many latents beyond the first lie within a cosine of .8 of a feature, mean over features."""
    return float(((matching.usable_C > SPLIT).sum(dim=1) - 1).clamp(min=0).double().mean())


def coverage(matching: Matching, threshold: float) -> float:
    """Share of features whose matched cosine exceeds the threshold."""
    return float((matching.cosine > threshold).double().mean())


def dictionary_chance(truth: Matrix, n_alive: int, d_sae: int | None = None, seed: int = 0) -> list[dict[str, float]]:
    """The scores of independent random dictionaries: `n_alive` directions, uniform on the sphere.

    Chance grows with the number of latents, hence `n_alive`; `d_sae` (default n_alive) is what
    uniqueness_saelens divides by. Training changes only n_alive: a log may keep the result between its lines.
    """
    size = n_alive if d_sae is None else d_sae
    key = ("random dictionaries", fingerprint(truth), n_alive, size, seed)
    return once(key, lambda: _random_scores(truth, n_alive, size, seed))


def _random_scores(truth: Matrix, n_alive: int, d_sae: int, seed: int) -> list[dict[str, float]]:
    rows, alive = torch.zeros(d_sae, truth.shape[1], dtype=torch.float64), torch.arange(d_sae) < n_alive
    scores = []
    large = len(truth) * d_sae > PRECISE_PAIRS
    for draw in range(N_LARGE_RANDOM_DICTIONARIES if large else N_RANDOM_DICTIONARIES):
        stream = generator(seed, "metrics", "random dictionary", draw)
        rows[:n_alive] = torch.randn(n_alive, truth.shape[1], generator=stream, dtype=torch.float64)
        scores.append(dictionary_recovery(rows, truth, alive))
    return scores


def dictionary_limit(truth: Matrix, d_sae: int) -> dict[str, float]:
    """The scores of the true dictionary: 1, or those of its first d_sae features if fewer than n fit."""
    key = ("true dictionary", fingerprint(truth), d_sae)
    return once(key, lambda: dictionary_recovery(truth[:d_sae], truth))
