"""What the metrics accept, brought to one form: float64 rows, sparse codes, sparse true activations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from sae.codes import SparseCodes
from toymodels import geometry
from toymodels.features import FeatureBatch

Matrix = Real[Tensor, "_rows _columns"] | Real[np.ndarray, "_rows _columns"]
Mask = Bool[Tensor, " _rows"] | Bool[np.ndarray, " _rows"]

# Samples that a metric reads at once; its value does not depend on this.
SAMPLES_AT_ONCE = 4096
# A latent fires when z exceeds this share of the input's scale.
FIRING_SHARE = 1e-6


def as_tensor(x: Matrix) -> Float[Tensor, "_rows _columns"]:
    """x without its gradient, in float32 at least; integers in float64, and a numpy array is copied."""
    x = x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.array(x))
    if not x.is_floating_point():
        return x.double()
    return x.float() if x.itemsize < 4 else x


def row_norms(W: Matrix) -> Float[Tensor, " _rows"]:
    """|W_i| in float64, without a copy of W in it.

    Raises:
        ValueError: a row holds nan or inf.
    """
    norms = torch.linalg.vector_norm(as_tensor(W), dim=1, dtype=torch.float64)
    if len(bad := (~norms.isfinite()).nonzero()):
        raise ValueError(f"rows must be finite directions, row {int(bad[0])} holds nan or inf; drop that row")
    return norms


def directions(W: Matrix) -> tuple[Float[Tensor, "_rows _columns"], Float[Tensor, " _rows"]]:
    """Rows of norm 1 in float64, and the norms they had; a zero row stays zero.

    Raises:
        ValueError: a row holds nan or inf.
    """
    rows = as_tensor(W).double()
    if len(bad := (~rows.isfinite().all(dim=1)).nonzero()):
        raise ValueError(f"rows must be finite directions, row {int(bad[0])} holds nan or inf; drop that row")
    return geometry.unit_rows(rows), geometry.norms(rows)


def argmax(x: Float[Tensor, "_rows _columns"]) -> Int[Tensor, " _rows"]:
    """The column of the largest entry of each row; of equal ones the first. numpy finds it ten times as fast."""
    if x.device.type != "cpu":
        return x.argmax(dim=1)
    return torch.from_numpy(np.ascontiguousarray(x.numpy()).argmax(axis=1))


def all_finite(values: Tensor) -> bool:
    """Whether no value is nan or inf: their sum would be neither, unless it overflows."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def scale_threshold(x: Matrix) -> float:
    """Above what a latent fires: 1e-6 of the input's scale sqrt(E|x - mean(x)|^2)."""
    return FIRING_SHARE * float(as_tensor(x).double().var(dim=0, correction=0).sum().sqrt())


def slices(n_samples: int) -> Iterator[slice]:
    """Consecutive slices that cover the samples."""
    for start in range(0, n_samples, SAMPLES_AT_ONCE):
        yield slice(start, min(start + SAMPLES_AT_ONCE, n_samples))


# True activations


def as_acts(acts: FeatureBatch | Matrix) -> FeatureBatch:
    """Dense true activations become their non-zero entries.

    Raises:
        ValueError: a batch with more leading axes than one, or with values that are not finite.
    """
    if isinstance(acts, FeatureBatch) and len(acts.shape) != 2:
        raise ValueError(f"true activations must be [samples, n_features], got {list(acts.shape)}; pass one instance")
    acts = acts.to("cpu") if isinstance(acts, FeatureBatch) else FeatureBatch.from_dense(as_tensor(acts).cpu())
    if not acts.values.is_floating_point():
        acts = FeatureBatch(acts.indices, acts.values.double(), acts.offsets, acts.shape)
    if not all_finite(acts.values):
        sample = int(rows_of(acts)[~acts.values.isfinite()][0])
        raise ValueError(f"true activations must be finite, sample {sample} holds nan or inf; drop that sample")
    return acts


def rows_of(acts: FeatureBatch) -> Int[Tensor, " nnz"]:
    """The sample that each entry belongs to."""
    samples = torch.arange(len(acts), device=acts.indices.device)
    return samples.repeat_interleave(acts.offsets.diff(), output_size=len(acts.indices))


def some_rows(batch: FeatureBatch, chosen: Int[Tensor, " rows"]) -> FeatureBatch:
    """Some rows of a batch, in any order."""
    chosen = chosen.to(batch.indices.device)
    counts = batch.offsets.diff()[chosen]
    offsets = F.pad(counts.cumsum(0), (1, 0))
    moved = (batch.offsets[chosen] - offsets[:-1]).repeat_interleave(counts)
    source = moved + torch.arange(len(moved), device=chosen.device)
    return FeatureBatch(batch.indices[source], batch.values[source], offsets, (len(chosen), batch.n_features))


# Codes


def as_codes(z: SparseCodes | Matrix) -> SparseCodes:
    """Dense units become codes in the full layout, signs kept.

    Raises:
        ValueError: a code is not finite.
    """
    values = as_tensor(z.values if isinstance(z, SparseCodes) else z)
    if not all_finite(values):
        sample = int((~values.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"codes must be finite, those of sample {sample} hold nan or inf; drop that sample")
    if isinstance(z, SparseCodes):
        return SparseCodes(values, z.indices, z.d_sae)
    return SparseCodes(values, None, values.shape[1])


def compressed(z: SparseCodes, threshold: float) -> FeatureBatch:
    """The entries |z| > threshold of codes on the host, in compressed rows."""
    fires = z.values.abs() > threshold
    offsets = F.pad(fires.sum(dim=1).cumsum(0), (1, 0))
    place = torch.from_numpy(np.flatnonzero(fires.numpy()))
    indices = place % z.d_sae if z.indices is None else z.indices.flatten()[place]
    return FeatureBatch(indices, z.values.flatten()[place], offsets, (len(z), z.d_sae))


def column_sums(z: SparseCodes) -> Float[Tensor, " d_sae"]:
    """Σ z over the samples, in float64."""
    if z.indices is None:
        return z.values.sum(dim=0, dtype=torch.float64)
    total = torch.zeros(z.d_sae, dtype=torch.float64, device=z.values.device)
    return total.index_add_(0, rearrange(z.indices, "b k -> (b k)"), rearrange(z.values.double(), "b k -> (b k)"))


def firing_counts(z: SparseCodes, threshold: float) -> Float[Tensor, " d_sae"]:
    """In how many samples each latent fires, z > threshold."""
    return column_sums(SparseCodes((z.values > threshold).float(), z.indices, z.d_sae))
