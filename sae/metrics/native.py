"""Sums over entries in C, from `sums.c`, where a compiler is available; in torch elsewhere, and as the reference."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.build import CannotBuild, library
from sae.metrics.inputs import rows_of, some_rows
from toymodels.features import FeatureBatch

logger = logging.getLogger("sae")

SOURCE = Path(__file__).with_name("sums.c")
# In torch: products that are added up together, pairs whose products are added up in float64, and the entries of a
# dense table of true activations, which stays in the cache.
ENTRIES_AT_ONCE = 2**22
PRECISE_PAIRS = 2**20
TABLE_ENTRIES = 2**21


class ByFeature(NamedTuple):
    """True activations in the order of features: feature i is on in sample[starts[i] : starts[i + 1]], ascending."""

    starts: Int[Tensor, " n_features_plus_1"]
    sample: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]


def by_feature(acts: FeatureBatch) -> ByFeature:
    """The entries of a batch in that order. numpy orders small whole numbers by their digits, which takes no time."""
    small = np.uint16 if acts.n_features <= 2**16 else np.int64
    order = torch.from_numpy(np.argsort(acts.indices.numpy().astype(small), kind="stable"))
    starts = F.pad(acts.indices.bincount(minlength=acts.n_features).cumsum(0), (1, 0))
    return ByFeature(starts, rows_of(acts).int()[order], acts.values[order])


@cache
def can_call() -> bool:
    """Whether there is C; told once where there is none."""
    try:
        library("float", SOURCE)
    except CannotBuild as error:
        logger.warning("metrics will be slower: %s cannot be built (%s); torch is used", SOURCE.name, error)
        return False
    return True


def add_pairs_(
    product: Float[Tensor, "features n_units"],
    both: Int[Tensor, "features n_units"],
    units: FeatureBatch | Float[Tensor, "rows n_units"],
    acts: ByFeature,
    row_of: Int[Tensor, " samples"],
    first: int,
    threshold: float,
) -> None:
    """product += aᵀ z and both += 1[a > 0]ᵀ 1[z > threshold], of the features from number `first` on.

    Sample s of the true activations is row `row_of[s]` of the units, sparse or dense; of dense ones |z| <= threshold
    counts as 0.
    """
    if not can_call():
        if isinstance(units, FeatureBatch):
            _add_sparse_(product, both, units, acts, row_of, first, threshold)
        else:
            _add_dense_(product, both, units, acts, row_of, first, threshold)
        return
    z = units.values if isinstance(units, FeatureBatch) else units
    real = torch.promote_types(z.dtype, acts.values.dtype)
    features = (acts.starts, acts.sample, acts.values.to(real), row_of, first, first + len(product))
    sums = (threshold, product.shape[1], product, both)
    if isinstance(units, FeatureBatch):
        _call("add_sparse_pairs", real, *features, units.offsets, units.indices, z.to(real), *sums)
    else:
        _call("add_dense_pairs", real, *features, z.to(real).contiguous(), *sums)


def look_up(
    codes: FeatureBatch,
    acts: FeatureBatch,
    features: Int[Tensor, "several d_sae"],
    order: Int[Tensor, " samples"] | None = None,
) -> Float[Tensor, "several entries"]:
    """What features of each firing latent do in its sample: a[order[row], features[·, latent]] of each entry of the
    codes.

    Feature -1 is never on. `order` None: row r of both is the same sample.
    """
    if not can_call():
        return _look_up(codes, acts if order is None else some_rows(acts, order), features)
    found = acts.values.new_empty(len(features), len(codes.indices))
    order = torch.arange(len(acts)) if order is None else order
    beside = (acts.offsets, acts.indices, acts.values, order)
    sizes = (len(codes), acts.n_features, features.contiguous(), *features.shape)
    _call("look_up", acts.values.dtype, *beside, codes.offsets, codes.indices, *sizes, found)
    return found


def add_matched_(
    sums: Float[Tensor, "8 d_sae"],
    codes: FeatureBatch,
    acts: FeatureBatch,
    order: Int[Tensor, " samples"] | None,
    start: int,
    chooses_every: int,
    threshold: float,
    own: Int[Tensor, " d_sae"],
    nearest: Int[Tensor, " d_sae"],
) -> None:
    """Adds a window to what `code_recovery.CodeRecovery` keeps of each latent; there it says what that is."""
    real = torch.promote_types(codes.values.dtype, acts.values.dtype)
    order = torch.arange(len(acts)) if order is None else order
    beside = (acts.offsets, acts.indices, acts.values.to(real), order)
    sizes = (len(codes), acts.n_features, start, chooses_every, threshold)
    entries = (codes.offsets, codes.indices, codes.values.to(real))
    _call("add_matched", real, *beside, *entries, *sizes, own, nearest, len(own), sums)


def score_units_(
    product: Float[Tensor, "features n_units"],
    both: Int[Tensor, "features n_units"],
    first: int,
    n_samples: int,
    floor: float,
    sides: tuple[Float[Tensor, "5 features"], Float[Tensor, "5 n_units"]],
    scores: tuple[Tensor, ...],
) -> None:
    """Raises what `polysemanticity.UnitScores` keeps by some features; there it says, in torch, what that is."""
    sizes = (*product.shape, first, n_samples, floor)
    _call("score_units", torch.float64, product, both, *sizes, *sides, *scores)


def _call(function: str, dtype: torch.dtype, *arguments: Tensor | float | int) -> None:
    """A tensor goes in as its address, a number as the function's head has it."""
    assert all(one.is_contiguous() for one in arguments if isinstance(one, Tensor))
    given = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
    real = "float" if dtype == torch.float32 else "double"
    getattr(library(real, SOURCE), function)(*given, torch.get_num_threads())


# ------------------------------------------------------------------------------------------------------------ in torch


def _features(acts: ByFeature, first: int, last: int) -> tuple[Int[Tensor, " bounds"], slice]:
    """Where the entries of each feature begin, among those of some features; and where those lie among all."""
    starts = acts.starts[first : last + 1]
    return starts - starts[0], slice(int(starts[0]), int(starts[-1]))


def _add_dense_(
    product: Tensor,
    both: Tensor,
    units: Float[Tensor, "rows n_units"],
    acts: ByFeature,
    row_of: Tensor,
    first: int,
    threshold: float,
) -> None:
    z = torch.where(units.abs() > threshold, units, 0.0) if threshold else units
    # Of very many pairs, the products are added up in float32, in a third of the time; counts always.
    dtype = torch.float64 if product.numel() <= PRECISE_PAIRS else torch.float32
    bags, own = _features(acts, first, first + len(product))
    samples, a = row_of[acts.sample[own].long()].long(), acts.values[own]
    for pairs, weights, values in ((both, (a > 0).float(), z > threshold), (product, a.to(dtype), z)):
        rows = values.to(weights.dtype)
        sums = F.embedding_bag(samples, rows, bags, mode="sum", per_sample_weights=weights, include_last_offset=True)
        pairs.add_(sums.to(pairs.dtype))


def _add_sparse_(
    product: Tensor,
    both: Tensor,
    units: FeatureBatch,
    acts: ByFeature,
    row_of: Tensor,
    first: int,
    threshold: float,
) -> None:
    from scipy.sparse import csr_array  # noqa: PLC0415 - slow to import

    n_features, n_units = product.shape
    bags, own = _features(acts, first, first + n_features)
    samples, a, z = row_of[acts.sample[own].long()], acts.values[own].double(), units.values.double()
    for pairs, weights, values in ((both, (a > 0).double(), (z > threshold).double()), (product, a, z)):
        left = csr_array((weights.numpy(), samples.numpy(), bags.numpy()), shape=(n_features, len(units)))
        right = csr_array((values.numpy(), units.indices.numpy(), units.offsets.numpy()), shape=(len(units), n_units))
        found, whole = (left @ right).tocsr(), pairs.numpy()
        at_once = max(1, ENTRIES_AT_ONCE // max(n_units, 1))
        for start in range(0, n_features, at_once):
            pointers = found.indptr[start : start + at_once + 1]
            row = np.repeat(np.arange(start, start + len(pointers) - 1), np.diff(pointers))
            entries = slice(pointers[0], pointers[-1])
            # A pair occurs once in a product, so that no addition is lost.
            whole[row, found.indices[entries]] += found.data[entries].astype(whole.dtype)


def _look_up(
    codes: FeatureBatch, acts: FeatureBatch, features: Int[Tensor, "several d_sae"]
) -> Float[Tensor, "several entries"]:
    """A few samples at a time, the true activations are laid out in a dense table."""
    width = acts.n_features + 1  # the last column stays empty: that of feature -1
    at_once = max(1, TABLE_ENTRIES // width)
    place = rows_of(acts) * width + acts.indices
    base = rows_of(codes) * width
    wanted = torch.where(features < 0, width - 1, features)
    found = acts.values.new_empty(len(features), len(base))
    table = acts.values.new_zeros(at_once * width)
    first = torch.arange(0, len(acts), at_once)
    last = (first + at_once).clamp(max=len(acts))
    bounds = torch.stack([acts.offsets[first], acts.offsets[last], codes.offsets[first], codes.offsets[last]], dim=1)
    for number, (a_start, a_stop, z_start, z_stop) in enumerate(bounds.tolist()):
        here = place[a_start:a_stop] - number * at_once * width
        table[here] = acts.values[a_start:a_stop]
        latent, at = codes.indices[z_start:z_stop], base[z_start:z_stop] - number * at_once * width
        for feature, values in zip(wanted, found, strict=True):
            torch.index_select(table, 0, at + feature[latent], out=values[z_start:z_stop])
        table[here] = 0.0
    return found
