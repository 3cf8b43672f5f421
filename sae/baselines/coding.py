"""Codes for a dictionary that is given: non-negative sparse coding, and matching pursuit.

With the true features this is an oracle; with a trained SAE's dictionary it shows what the SAE's own encoder loses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.baselines.base import Baseline
from sae.errors import UsageError
from sae.held_out import HeldOut
from sae.metrics import match_dictionary
from sae.sparsifiers import MatchingPursuit
from toymodels.geometry import unit_rows
from toymodels.sparse_coding import PenaltyChoice, select_penalty, sparse_code

# Tried penalties of sparse coding, as shares of the median row's largest projection.
PENALTIES = torch.logspace(-2, -0.3, 8)


@dataclass(frozen=True)
class SparseCoding:
    """Non-negative sparse coding whose penalty and firing threshold were chosen on validation data."""

    dictionary: Float[Tensor, "d_sae d_in"]
    penalty: float
    threshold: float
    k: int | None = None

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        z = sparse_code(x, self.dictionary, self.penalty, k=self.k)
        return z * (z > self.threshold)


def sparse_coding(
    dictionary: Float[Tensor, "d_sae d_in"],
    truth: Float[Tensor, "n_features d_in"] | None,
    validation: HeldOut,
    k: int | None = None,
    b_dec: Float[Tensor, " d_in"] | None = None,
) -> Baseline:
    """The best codes that a dictionary allows.

    Penalty and threshold maximise the macro F1 of the latents matched to the true features on `validation`. Where the
    true activations are not known, the penalty minimises the error there, which needs k, and every code fires.
    """
    centre = torch.zeros(dictionary.shape[1]) if b_dec is None else b_dec
    x = validation.x - centre
    # Smaller penalties than these buy no F1, and cost a dictionary that is off its truth very long supports.
    penalties = (PENALTIES * (x @ dictionary.T).amax(dim=1).median()).tolist()
    if truth is None or validation.acts is None:
        if k is None:
            raise UsageError("without the true activations a penalty can be chosen only at a given k; give k")

        def by_error(penalty: float) -> PenaltyChoice:
            error = (x - sparse_code(x, dictionary, penalty, k=k) @ dictionary).square().sum()
            return PenaltyChoice(penalty, 0.0, -float(error))

        choice = _descend(penalties, by_error)
        return Baseline(dictionary, centre, SparseCoding(dictionary, choice.penalty, 0.0, k))
    latent = match_dictionary(dictionary, truth).latent
    matched = latent >= 0
    # In the order of the features; a latent without a feature comes after them, where it may still explain.
    rest = torch.ones(len(dictionary), dtype=torch.bool)
    rest[latent[matched]] = False
    order = torch.cat([latent[matched], rest.nonzero().squeeze(1)])
    fires = validation.acts.dense()[:, matched.cpu()]
    fires = torch.nn.functional.pad(fires, (0, len(order) - fires.shape[1]))
    choice = _descend(penalties, lambda p: select_penalty(x, fires, dictionary[order], penalties=[p], k=k))
    return Baseline(dictionary, centre, SparseCoding(dictionary, choice.penalty, choice.threshold, k))


def _descend(penalties: list[float], choose: Callable[[float], PenaltyChoice]) -> PenaltyChoice:
    """The best penalty, from the largest down, until two in a row are worse: the small ones take longest."""
    best, n_worse = choose(penalties[-1]), 0
    for penalty in reversed(penalties[:-1]):
        choice = choose(penalty)
        n_worse = 0 if choice.f1 > best.f1 else n_worse + 1
        best = max(best, choice, key=lambda each: each.f1)
        if n_worse == 2:
            break
    return best


def oracle(truth: Float[Tensor, "n_features d_in"], validation: HeldOut, k: int | None = None) -> Baseline:
    """The true features, coded by `sparse_coding`: no encoder can be blamed for what it misses.

    It also knows the offset of the activations, mean(x - a truth) over `validation`.
    """
    return sparse_coding(truth, truth, validation, k, offset(truth, validation))


def offset(truth: Float[Tensor, "n_features d_in"], validation: HeldOut) -> Float[Tensor, " d_in"]:
    """What the activations contain besides the features: mean(x - a truth)."""
    if validation.acts is None:
        raise UsageError(
            "the oracle needs to know when each true feature is on, but this source knows only directions; leave out "
            "the baselines whose names begin with oracle"
        )
    return (validation.x - validation.acts.embed(truth)).mean(dim=0)


def pursuit(dictionary: Float[Tensor, "d_sae d_in"], k: int, b_dec: Float[Tensor, " d_in"]) -> Baseline:
    """A dictionary, its rows brought to norm 1, coded by k steps of matching pursuit (Mallat & Zhang 1993)."""
    rows = unit_rows(dictionary)
    return Baseline(rows, b_dec, lambda x: MatchingPursuit(k).pursue(x, rows).dense())
