"""Judges of the match: scipy's dense method, and prices that prove what they should."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae.metrics import matching
from sae.metrics.matching import best_match, prices
from toymodels.streams import generator


def cosines(n: int, d_sae: int, d: int, seed: int = 0) -> Tensor:
    truth, learned = (
        torch.nn.functional.normalize(torch.randn(rows, d, generator=generator(seed, name), dtype=torch.float64))
        for name, rows in (("truth", n), ("learned", d_sae))
    )
    return truth @ learned.T


def dense(C: Tensor) -> float:
    rows, columns = linear_sum_assignment(C.numpy(), maximize=True)
    return float(C[rows, columns].double().sum())


def crowd(n: int) -> Tensor:
    """All rows want the same few columns, and rank the others nearly alike: what a filter of the best leaves out is
    needed."""
    C = torch.rand(n, n, generator=generator(0, "crowd"), dtype=torch.float64) / 1000
    C[:, :40] += torch.linspace(1, 0.9, 40, dtype=torch.float64)
    return C


ADVERSARIAL = {
    "everyone wants the same": crowd(120),
    "all alike": torch.full((60, 70), 0.5, dtype=torch.float64),
    "all zero": torch.zeros(70, 60, dtype=torch.float64),
    "signs flipped": -torch.eye(80, dtype=torch.float64),
    "every latent three times": cosines(50, 50, 16).repeat_interleave(3, dim=1),
    "the last shall be first": torch.outer(torch.linspace(0, 1, 90).double(), torch.linspace(0, 1, 90).double()),
    "one latent": cosines(90, 1, 16),
    "one feature": cosines(1, 90, 16),
    "few dimensions": cosines(100, 130, 2),
}


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates, and small blocks, for matrices of any size."""
    monkeypatch.setattr(matching, "DENSE_PAIRS", 0)
    monkeypatch.setattr(matching, "CANDIDATES", 2)
    monkeypatch.setattr(matching, "JOINING", 2)
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 700)


@pytest.mark.parametrize("C", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_sparse_match_is_as_good_as_the_dense_one(sparse: None, C: Tensor, dtype: torch.dtype) -> None:
    C = C.to(dtype)
    rows, columns = best_match(C)
    assert len(rows) == min(C.shape) == len(set(rows.tolist())) == len(set(columns.tolist()))
    assert rows.equal(rows.sort().values)
    assert float(C[rows, columns].double().sum()) == pytest.approx(dense(C), abs=1e-9 if C.itemsize == 8 else 1e-5)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(n=st.integers(1, 40), d_sae=st.integers(1, 40), d=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_sparse_match_equals_the_dense_one_on_any_shape(n: int, d_sae: int, d: int, seed: int) -> None:
    C = cosines(n, d_sae, d, seed)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DENSE_PAIRS": 0, "CANDIDATES": 1, "JOINING": 1, "PAIRS_AT_ONCE": 50}.items():
            patch.setattr(matching, name, value)
        rows, columns = best_match(C)
    assert float(C[rows, columns].sum()) == pytest.approx(dense(C), abs=1e-9)


def test_prices_prove_the_match() -> None:
    C = cosines(60, 80, 4)
    rows, columns = linear_sum_assignment(C.numpy(), maximize=True)
    u, v = prices(C.numpy(), np.arange(C.numel()), columns)
    assert (C.numpy() <= u[:, None] + v + 1e-12).all()
    assert u.sum() + v.sum() == pytest.approx(float(C[rows, columns].sum()))
    assert (v >= 0).all()
    assert v[np.setdiff1d(np.arange(80), columns)] == pytest.approx(0)


def test_a_filter_that_is_too_narrow_is_widened(sparse: None, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    inner = matching._match

    def counted(C: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        widths.append(len(pairs))
        return inner(C, pairs)

    monkeypatch.setattr(matching, "_match", counted)
    C = crowd(120)
    best_match(C)
    assert len(widths) > 1
    assert widths == sorted(widths)
    assert widths[-1] < C.numel() / 2
