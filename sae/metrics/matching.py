"""The one-to-one match with the largest sum: dense where that is quick, otherwise sparse with a proof.

A match that is best among some pairs is best among all of them if there are prices u of rows and v of columns with

    u_i + v_j >= C_ij for every pair,   u_i + v_j = C_ij for the matched ones,   v >= 0, and 0 for columns left over,

because then no other match can exceed Σu + Σv (linear programming duality). The largest values of each row are
matched first; the prices that prove this match are found along its alternating paths, and held against
every pair that was left out. Pairs that beat their prices join, until none does: the answer is the dense one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

# Up to so many pairs the dense method takes a second at most, whatever the values; where many are nearly equal, the
# sparse one may take minutes.
DENSE_PAIRS = 2**22
# Pairs of each row that are matched first.
CANDIDATES = 32
# Pairs that are compared with their prices at once, and of each row that join together.
PAIRS_AT_ONCE = 2**23
JOINING = 16
# A pair beats its prices by more than rounding, or the mean of a match by less than this.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}

Pairs = tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]


def best_match(value: Float[Tensor, "rows columns"]) -> Pairs:
    """The min(rows, columns) pairs (row, column), one to one, with the largest sum of values; rows ascend."""
    C = value.cpu()
    if C.numel() <= DENSE_PAIRS:
        rows, columns = _dense(C.numpy())
    elif len(C) <= C.shape[1]:
        rows, columns = _sparse(C.contiguous().numpy())
    else:
        columns, rows = _sparse(C.T.contiguous().numpy())
        order = np.argsort(rows)
        rows, columns = rows[order], columns[order]
    return torch.from_numpy(rows).to(value.device), torch.from_numpy(columns).to(value.device)


def _dense(C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - slow to import

    rows, columns = linear_sum_assignment(C, maximize=True)
    return rows, columns


def _sparse(C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For no more rows than columns: widens the candidates until the prices prove the match."""
    pairs = _candidates(C)
    while True:
        partner = _match(C, pairs)
        u, v = prices(C, pairs, partner)
        beaten = _beaten(C, u, v)
        new = np.setdiff1d(beaten, pairs)
        if not len(new):
            return np.arange(len(C)), partner
        pairs = np.union1d(pairs, new)


def _candidates(C: np.ndarray) -> np.ndarray:
    """Positions in C.flatten() of the largest of each row, and of a diagonal, so that a match exists."""
    n, m = C.shape
    at_once = max(1, PAIRS_AT_ONCE // m)
    top = [_largest(C[start : start + at_once], min(CANDIDATES, m)) for start in range(0, n, at_once)]
    positions = np.arange(n)[:, None] * m + np.concatenate(top)
    return np.union1d(positions.ravel(), np.arange(n) * (m + 1))


def _largest(block: np.ndarray, k: int) -> np.ndarray:
    """The columns of the k largest of each row."""
    return torch.from_numpy(block).topk(k, dim=1, sorted=False).indices.numpy()


def _match(C: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The column of each row in the best match among some pairs."""
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching  # noqa: PLC0415 - slow to import

    weights = C[pairs // C.shape[1], pairs % C.shape[1]].astype(np.float64)
    # Every pair has to cost something: scipy takes a weight of 0 for no pair. All matches have as many pairs.
    _, columns = min_weight_full_bipartite_matching(_graph(C, pairs, weights.max() + 1 - weights))
    return columns.astype(np.int64)


def prices(C: np.ndarray, pairs: np.ndarray, partner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest prices v >= 0 of columns, and u of rows, that no pair of these beats.

    v_j = max(0, max_i C_ij - C_iσ(i) + v_σ(i)), found as the longest paths that alternate between the match and
    other pairs: they have no cycle that gains, or the match were not the best.
    """
    n, m = C.shape
    row, column = np.divmod(pairs, m)
    own = C[np.arange(n), partner].astype(np.float64)
    gain = C[row, column] - own[row]
    order = np.argsort(column, kind="stable")
    row, column, gain = row[order], column[order], gain[order]
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    v = np.zeros(m)
    # A path passes each row once; rounding may leave a cycle that seems to gain, which the tolerance ends.
    for _ in range(n + 1):
        reached = np.maximum.reduceat(gain + v[partner[row]], starts)
        risen = np.maximum(v[column[starts]], reached)
        rise = (risen - v[column[starts]]).max()
        v[column[starts]] = risen
        if rise <= 1e-14:
            break
    return own - v[partner], v


def _beaten(C: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Positions of pairs with C_ij > u_i + v_j, the JOINING worst of each row."""
    n, m = C.shape
    values = torch.from_numpy(C)
    row_price, column_price = (torch.from_numpy(price).to(values.dtype) for price in (u, v))
    found = [np.zeros(0, dtype=np.int64)]
    at_once = max(1, PAIRS_AT_ONCE // m)
    for start in range(0, n, at_once):
        excess = values[start : start + at_once] - column_price
        limit = row_price[start : start + at_once] + TOLERANCE[values.dtype]
        rows = (excess.amax(dim=1) > limit).nonzero().squeeze(1)
        worst = excess[rows].topk(min(JOINING, m), dim=1)
        r, c = (worst.values > limit[rows, None]).nonzero().unbind(dim=1)
        found.append(((start + rows[r]) * m + worst.indices[r, c]).numpy())
    return np.concatenate(found)


def _graph(C: np.ndarray, pairs: np.ndarray, weights: np.ndarray) -> Any:
    from scipy.sparse import csr_array  # noqa: PLC0415 - slow to import

    rows, columns = np.divmod(pairs, C.shape[1])
    pointers = np.concatenate([[0], np.bincount(rows, minlength=len(C)).cumsum()])
    return csr_array((weights, columns.astype(np.int32), pointers.astype(np.int32)), shape=C.shape)
