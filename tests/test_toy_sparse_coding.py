"""Sparse codes against scikit-learn and scipy, and against the conditions that make them optimal."""

from inspect import unwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toymodels.features import Features
from toymodels.sparse_coding import best_threshold, refit_largest, select_penalty, sparse_code
from toymodels.streams import generator


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed, "test", "normal"), dtype=dtype)


def objective(x, D, z, penalty):
    return (x - z @ D).square().sum(1) / 2 + penalty * z.sum(1)


@pytest.mark.parametrize("shape", [(20, 6), (6, 20), (9, 9), (1, 3), (5, 1)])
@pytest.mark.parametrize("penalty", [0.01, 0.3, 2.0])
def test_the_free_solution_is_the_positive_lasso(shape, penalty):
    from sklearn.linear_model import Lasso

    D = normal(*shape, seed=1)
    x = normal(15, shape[1], seed=2)
    z = sparse_code(x, D, penalty, tolerance=1e-9)
    lasso = Lasso(alpha=penalty / shape[1], positive=True, fit_intercept=False, tol=1e-12, max_iter=1_000_000)
    for row, codes in zip(x, z, strict=True):
        expected = torch.from_numpy(lasso.fit(D.T.numpy(), row.numpy()).coef_)
        torch.testing.assert_close(
            objective(row[None], D, codes[None], penalty),
            objective(row[None], D, expected[None], penalty),
            rtol=1e-6,
            atol=1e-8,
        )
        torch.testing.assert_close(codes, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(20, 6), (6, 20), (9, 9)])
def test_without_a_penalty_it_is_nnls(shape):
    from scipy.optimize import nnls

    D = normal(*shape, seed=1)
    x = normal(15, shape[1], seed=2)
    z = sparse_code(x, D, 0.0, tolerance=1e-9)
    for row, codes in zip(x, z, strict=True):
        _, residual = nnls(D.T.numpy(), row.numpy())
        assert (row - codes @ D).norm().item() == pytest.approx(residual, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("k", "penalty"), [(3, 0.2), (6, 4.0)])
def test_with_k_the_largest_codes_are_refitted(k, penalty):
    from scipy.optimize import nnls

    D, x = normal(30, 10, seed=1), normal(25, 10, seed=2)
    free, limited = sparse_code(x, D, penalty), sparse_code(x, D, penalty, k=k)
    assert ((limited > 0).sum(1) <= k).all()
    assert ((free > 0).sum(1) > k).any() == (k == 3)  # both sides of the limit
    for row, before, after in zip(x, free, limited, strict=True):
        kept = before.topk(k).indices[before.topk(k).values > 0]
        expected = torch.zeros(30, dtype=torch.float64)
        if len(kept):  # scipy aborts the process on no atoms at all
            expected[kept] = torch.from_numpy(nnls(D[kept].T.numpy(), row.numpy())[0])
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_each_row_may_keep_a_number_of_codes_of_its_own():
    D, x = normal(30, 10, seed=1), normal(25, 10, seed=2)
    k = torch.arange(25) % 5
    free = sparse_code(x, D, 0.2)
    limited = refit_largest(x, D, free, k)
    assert ((limited > 0).sum(1) <= k).all()
    for number in range(1, 5):
        rows = k == number
        torch.testing.assert_close(limited[rows], sparse_code(x[rows], D, 0.2, k=number))


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 30),
    d=st.integers(1, 12),
    penalty=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    twins=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_the_solution_meets_the_optimality_conditions(seed, n, d, penalty, twins):
    D = normal(n, d, seed=seed, dtype=torch.float32)
    if twins:  # copies of atoms, and atoms that are nothing
        D = torch.cat([D, D, torch.zeros(2, d)])
    x = normal(9, d, seed=seed + 1, dtype=torch.float32)
    x[0] = 0
    z = sparse_code(x, D, penalty)
    slack = 2e-4 * x.norm(dim=1, keepdim=True) * D.norm(dim=1).max()
    correlation = (x - z @ D) @ D.T
    assert (z >= 0).all()
    assert (correlation <= penalty + slack).all()
    assert (((correlation - penalty).abs() <= slack) | (z == 0)).all()
    # No row depends on the others, and scaling x and the penalty scales the codes.
    assert torch.allclose(sparse_code(x[3:5], D, penalty), z[3:5], atol=1e-3, rtol=1e-2) or twins or penalty == 0
    fit = sparse_code(3 * x, D, 3 * penalty) @ D
    torch.testing.assert_close(fit, 3 * (z @ D), atol=5e-2, rtol=1e-2)


def test_a_planted_support_is_found_and_the_penalty_that_finds_it():
    features = Features(100, 0.03)
    D = torch.nn.functional.normalize(normal(100, 40, seed=3, dtype=torch.float32), dim=1)
    held_out, validation = (features.sample(800, generator(seed, "test")) for seed in (0, 1))
    choice = select_penalty(validation.embed(D), validation.dense(), D)
    assert choice.f1 > 0.98
    fires = held_out.dense() > 0
    z = sparse_code(held_out.embed(D), D, choice.penalty)
    hits = ((z > choice.threshold) & fires).sum(0)
    f1 = 2 * hits / ((z > choice.threshold).sum(0) + fires.sum(0))
    assert f1[fires.any(0)].mean() > 0.98
    # A mis-sized penalty does worse, and a small k caps what any penalty can reach.
    assert select_penalty(validation.embed(D), validation.dense(), D, penalties=[0.4]).f1 < choice.f1 - 0.1
    limited = select_penalty(validation.embed(D), validation.dense(), D, k=2)
    assert limited.f1 < choice.f1 - 0.02


def test_best_threshold_is_the_best_of_all():
    z = torch.tensor([[0.9, 0.2, 0.0], [0.3, 0.8, 0.1], [0.0, 0.4, 0.0], [0.7, 0.5, 0.0]])
    fires = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 1, 0]], dtype=torch.bool)
    threshold, f1 = best_threshold(z, fires)  # the third feature never fires and is left out
    assert f1 == pytest.approx(1)
    assert 0.3 <= threshold < 0.4

    z = normal(200, 5, seed=5).float()
    fires = z + normal(200, 5, seed=6) > 1
    threshold, f1 = best_threshold(z, fires)

    def macro(t: float) -> float:
        tp = ((z > t) & fires).sum(0)
        return (2 * tp / ((z > t).sum(0) + fires.sum(0))).mean().item()

    assert f1 == pytest.approx(macro(threshold))
    assert f1 == pytest.approx(max(macro(t) for t in [0.0, *z[z > 0].tolist()]))
    assert best_threshold(torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool)) == (0.0, 0.0)


def test_mistakes_are_named():
    x, D = normal(4, 3), normal(5, 3)
    with pytest.raises(ValueError, match="penalty must not be negative, got -1"):
        sparse_code(x, D, -1.0)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.n=5, got 0"):
        sparse_code(x, D, 0.1, k=0)
    with pytest.raises(ValueError, match="x has 3 dimensions, the dictionary 4"):
        unwrap(sparse_code)(x, normal(5, 4), 0.1)
    with pytest.raises(ValueError, match="no feature fires"):
        select_penalty(x, torch.zeros(4, 5), D)
    with pytest.raises(ValueError, match="penalties must name at least one"):
        select_penalty(x, torch.ones(4, 5), D, penalties=[])
    with pytest.warns(UserWarning, match="stopped after 1 steps with"):
        unfinished = sparse_code(x, D, 0.0, n_steps=1)
    assert (objective(x, D, unfinished, 0.0) < x.square().sum(1) / 2).all()
