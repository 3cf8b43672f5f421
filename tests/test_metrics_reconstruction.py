"""Judges of reconstruction: known predictors, invariances, the streamed numbers against the formulas."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics import Reconstruction, reconstruction, scale_threshold
from toymodels.streams import generator

N, D, D_SAE = 203, 7, 11


def rows(n: int, d: int, *names: str | int) -> Tensor:
    return torch.randn(n, d, generator=generator(0, "test", *names), dtype=torch.float64)


X, W_DEC = rows(N, D, "x") + 5, rows(D_SAE, D, "W")
Z = (rows(N, D_SAE, "z") - torch.linspace(-1, 3, D_SAE, dtype=torch.float64)).relu()
X_HAT = Z @ W_DEC


def test_perfect_and_mean_predictors() -> None:
    assert reconstruction.fvu(X, X) == 0
    assert float(reconstruction.fvu(X, X.mean(dim=0).expand_as(X))) == pytest.approx(1)
    assert float(reconstruction.fvu(X, 0 * X)) > 1
    assert float(reconstruction.explained_variance(X, X)) == 1
    assert reconstruction.mse(X, X) == 0
    assert float(reconstruction.cosine(X, 3 * X)) == pytest.approx(1)
    assert float(reconstruction.cosine(X, -X)) == pytest.approx(-1)
    assert reconstruction.cosine(X, 0 * X) == 0


def test_mse_sums_over_dimensions_and_averages_over_samples() -> None:
    x = torch.zeros(2, 3)
    assert reconstruction.mse(x, torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 1.0]])) == 5


@settings(deadline=None, derandomize=True, max_examples=30)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3), seed=st.integers(0, 99))
def test_fvu_ignores_shift_and_scale(scale: float, shift: float, seed: int) -> None:
    x, x_hat = rows(20, D, "x", seed), rows(20, D, "x_hat", seed)
    moved = reconstruction.fvu(scale * x + shift, scale * x_hat + shift)
    assert float(moved) == pytest.approx(float(reconstruction.fvu(x, x_hat)), rel=1e-6)


def test_relative_bias_is_the_shrinkage_of_a_shrunk_copy() -> None:
    assert float(reconstruction.relative_reconstruction_bias(X, 0.7 * X)) == pytest.approx(0.7)
    # The definition: gamma minimises |x_hat / gamma - x|^2.
    gammas = torch.linspace(0.05, 10, 50_000, dtype=torch.float64)
    inverse = 1 / gammas
    loss = inverse**2 * X_HAT.square().sum() - 2 * inverse * (X_HAT * X).sum()
    found = reconstruction.relative_reconstruction_bias(X, X_HAT)
    assert float(found) == pytest.approx(float(gammas[loss.argmin()]), abs=1e-3)
    assert reconstruction.relative_reconstruction_bias(X, 0 * X) == 0


def padded(z: Tensor) -> SparseCodes:
    return SparseCodes(*z.sort(dim=1, descending=True), z.shape[1])


@pytest.mark.parametrize("layout", ["full", "padded"])
@pytest.mark.parametrize("bounds", [[0, N], [0, 1, 2, 100, N], list(range(N + 1))])
def test_streamed_numbers_equal_the_formulas_at_any_batch_size(layout: str, bounds: list[int]) -> None:
    codes = padded(Z) if layout == "padded" else SparseCodes(Z, None, D_SAE)
    seen = Reconstruction(W_DEC, firing_threshold=0.1)
    for start, stop in pairwise(bounds):
        seen.update(X[start:stop], X_HAT[start:stop], codes[start:stop])
    scaled = Z * W_DEC.norm(dim=1)
    fires = scaled > 0.1
    density = fires.double().mean(dim=0)
    assert seen.density().tolist() == pytest.approx(density.tolist())
    assert seen.compute() == pytest.approx(
        {
            "mse": float((X - X_HAT).square().sum() / N),
            "fvu": float((X - X_HAT).square().sum() / (X - X.mean(dim=0)).square().sum()),
            "explained_variance": 1 - float((X - X_HAT).square().sum() / (X - X.mean(dim=0)).square().sum()),
            "cosine": float(torch.cosine_similarity(X, X_HAT).mean()),
            "relative_reconstruction_bias": float(X_HAT.square().sum() / (X * X_HAT).sum()),
            "l0": float(fires.double().sum(dim=1).mean()),
            "l1": float(scaled.sum(dim=1).mean()),
            "dead": float((density == 0).double().mean()),
            "dense": float((density > 0.1).double().mean()),
        },
        rel=1e-9,
    )
    assert 0 < seen.compute()["dead"] < seen.compute()["dense"] < 1


def test_plain_functions_equal_the_streamed_ones() -> None:
    codes = SparseCodes(Z, None, D_SAE)
    seen = Reconstruction(torch.nn.functional.normalize(W_DEC))
    seen.update(X, X_HAT, codes)
    streamed, density = seen.compute(), reconstruction.density(codes)
    assert streamed["l0"] == pytest.approx(reconstruction.l0(codes))
    assert streamed["l1"] == pytest.approx(reconstruction.l1(codes))
    assert streamed["dead"] == reconstruction.dead(density)
    assert streamed["dense"] == reconstruction.dense(density)
    for name in ("mse", "fvu", "explained_variance", "cosine", "relative_reconstruction_bias"):
        assert streamed[name] == pytest.approx(float(getattr(reconstruction, name)(X, X_HAT))), name


def test_a_large_mean_costs_no_digits() -> None:
    x = rows(300, D, "far")
    seen = Reconstruction(W_DEC)
    for part in (x + 1e7).split(64):
        seen.update(part, part + 0.5, Z[: len(part)])
    assert seen.compute()["fvu"] == pytest.approx(0.25 * D * 300 / float((x - x.mean(dim=0)).square().sum()), rel=1e-6)


def test_dead_reconstruction_is_all_zero_but_its_error() -> None:
    seen = Reconstruction(W_DEC)
    seen.update(X, torch.zeros_like(X), torch.zeros(N, D_SAE))
    scores = seen.compute()
    assert scores["dead"] == 1
    assert {scores[name] for name in ("l0", "l1", "dense", "cosine", "relative_reconstruction_bias")} == {0.0}


def test_identical_rows_have_no_fvu() -> None:
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match="got 4 identical rows; evaluate on more samples"):
        reconstruction.fvu(x, x)
    seen = Reconstruction(W_DEC[:, :3])
    seen.update(x, x, torch.ones(4, D_SAE))
    with pytest.raises(ValueError, match="got 4 identical rows"):
        seen.compute()


def test_firing_threshold_is_a_millionth_of_the_scale() -> None:
    expected = 1e-6 * float((X - X.mean(dim=0)).square().sum(dim=1).mean().sqrt())
    assert scale_threshold(X) == pytest.approx(expected)
    assert scale_threshold((X + 40).numpy() * 3) == pytest.approx(3 * expected)
