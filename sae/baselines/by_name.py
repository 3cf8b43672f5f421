"""Baselines by name, fitted on any source and measured as SAEs are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.baselines import scikit_learn
from sae.baselines.base import Baseline
from sae.baselines.coding import SparseCoding, offset, oracle, pursuit, sparse_coding
from sae.baselines.fixed import data_points, random_dictionary
from sae.baselines.ksvd import ksvd
from sae.baselines.linear import pca
from sae.baselines.semi_nmf import semi_nmf
from sae.errors import UsageError
from sae.evaluation import evaluate
from sae.held_out import HeldOut
from sae.model import SAE
from sae.sources import Source, as_source
from toymodels.errors import nearest

N_FIT, N_VALIDATION, N_EVALUATION = 20_000, 2000, 20_000
# Most rows for those whose time grows with rows times latents, or their square.
N_DICTIONARY_LEARNING, N_SEMI_NMF = 16_000, 8000


@dataclass(frozen=True)
class Given:
    """What baselines are fitted on, and at which size."""

    x: Float[Tensor, "batch d_in"]
    validation: HeldOut
    truth: Float[Tensor, "n_features d_in"] | None
    d_sae: int
    k: int
    seed: int = 0
    sae: SAE | None = None
    """The SAE whose dictionary the baselines `sae_*` code."""

    @property
    def known(self) -> Float[Tensor, "n_features d_in"]:
        """The true features."""
        if self.truth is None:
            raise UsageError("the oracle needs the true features, which this source does not know; leave it out")
        return self.truth

    @property
    def learnt(self) -> SAE:
        """The SAE."""
        if self.sae is None:
            raise UsageError("sae_oracle and sae_pursuit code the dictionary of a trained SAE; pass sae=")
        return self.sae


BASELINES: dict[str, Callable[[Given], Baseline]] = {
    "random": lambda g: random_dictionary(g.d_sae, g.x.mean(dim=0), g.k, g.seed),
    "data_points": lambda g: data_points(g.x, g.d_sae, g.k, g.seed),
    "pca": lambda g: pca(g.x),
    "ica": lambda g: scikit_learn.ica(g.x, g.seed),
    "semi_nmf": lambda g: semi_nmf(g.x[: max(N_SEMI_NMF, 2 * g.d_sae)], g.d_sae, g.k, g.seed),
    "dictionary_learning": lambda g: scikit_learn.dictionary_learning(
        g.x[:N_DICTIONARY_LEARNING], g.d_sae, g.truth, g.validation, g.k, g.seed
    ),
    "ksvd": lambda g: ksvd(g.x, g.d_sae, g.k, g.seed),
    "sae_pursuit": lambda g: pursuit(g.learnt.W_dec.detach(), g.k, g.learnt.b_dec.detach()),
    "sae_oracle": lambda g: sparse_coding(g.learnt.W_dec.detach(), g.truth, g.validation, g.k, g.learnt.b_dec.detach()),
    "oracle_pursuit": lambda g: pursuit(g.known, g.k, offset(g.known, g.validation)),
    "oracle_k": lambda g: oracle(g.known, g.validation, g.k),
    "oracle": lambda g: oracle(g.known, g.validation),
}


def applicable(source: Source, sae: SAE | None = None) -> list[str]:
    """The names of the baselines that a source supports."""
    knows_acts = source.truth is not None and source.held_out("calibration", 1).acts is not None
    return [
        name
        for name in BASELINES
        if (knows_acts or not name.startswith("oracle")) and (sae is not None or not name.startswith("sae_"))
    ]


def run(
    names: Sequence[str],
    source: object,
    *,
    d_sae: int,
    k: int,
    seed: int = 0,
    sae: SAE | None = None,
    n_fit: int = N_FIT,
    n_evaluation: int = N_EVALUATION,
) -> list[dict[str, Any]]:
    """A row for each baseline: its name, the seed, every metric that an SAE gets, and the seconds to fit it.

    `source` is what `sae.train` takes. Baselines are fitted on `n_fit` training rows, with `d_sae` latents of which k
    fire; penalties and thresholds are chosen on calibration rows; everything is measured on evaluation rows.

    Raises:
        UsageError: a name is unknown, or the source lacks what a baseline needs.
    """
    rows = as_source(source)
    given = prepare(names, rows, d_sae=d_sae, k=k, seed=seed, sae=sae, n_fit=n_fit)
    return [measured(name, given, rows, n_evaluation) for name in names]


def prepare(
    names: Sequence[str],
    source: Source,
    *,
    d_sae: int,
    k: int,
    seed: int = 0,
    sae: SAE | None = None,
    n_fit: int = N_FIT,
) -> Given:
    """What baselines of these names are fitted on.

    Raises:
        UsageError: they cannot be fitted.
    """
    for name in names:
        if name not in BASELINES:
            raise UsageError(f"unknown baseline {name!r}{nearest(name, BASELINES)}")
    if not 1 <= k <= min(d_sae, source.d_in):
        raise UsageError(f"k must lie in 1..min(d_sae={d_sae}, d_in={source.d_in}), got {k}; lower k")
    if source.d_out is not None:
        raise UsageError("baselines reconstruct what they read, but the source has a target; give a source without one")
    batch = next(source.batches(n_fit, seed), None)
    if batch is None:
        raise UsageError(f"the source ended before the {n_fit} activations that baselines are fitted on; lower n_fit")
    assert isinstance(batch, Tensor)
    return Given(batch, source.held_out("calibration", N_VALIDATION), source.truth, d_sae, k, seed, sae)


@torch.no_grad()
def measured(name: str, given: Given, source: Source, n_evaluation: int = N_EVALUATION) -> dict[str, Any]:
    """A row of `run`."""
    began = time.perf_counter()
    coder = BASELINES[name](given)
    seconds = time.perf_counter() - began
    values = evaluate(coder, source.held_out_stream("evaluation", n_evaluation), source.truth).metrics
    if isinstance(coder.code, SparseCoding):
        values = {**values, "codes/penalty": coder.code.penalty, "codes/firing_threshold": coder.code.threshold}
    return {"method": name, "seed": given.seed, **values, "seconds": seconds}
