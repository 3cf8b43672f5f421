"""Judges of polysemanticity: units whose features are known, brute force, scikit-learn, luck."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics import CoStatistics, polysemanticity, unit_scores
from sae.metrics.polysemanticity import mutual_information
from toymodels.features import FeatureBatch, Features
from toymodels.streams import generator

N, N_FEATURES = 6000, 8


def sample(n: int = N, p: float = 0.1, seed: int = 0) -> FeatureBatch:
    return Features(N_FEATURES, p).sample(n, generator(seed, "acts"))


ACTS = sample()
A = ACTS.dense().double()


def sums_of(
    units: Tensor | SparseCodes, acts: FeatureBatch, threshold: float = 0.0, batch: int = 10**6
) -> CoStatistics:
    codes = units if isinstance(units, SparseCodes) else SparseCodes(units, None, units.shape[1])
    sums = CoStatistics(acts.n_features, codes.d_sae, threshold)
    for start in range(0, len(acts), batch):
        sums.update(codes[start : start + batch], acts[start : start + batch])
    return sums


def padded(z: Tensor) -> SparseCodes:
    return SparseCodes(*z.sort(dim=1, descending=True), z.shape[1])


@pytest.mark.parametrize("layout", ["full", "padded"])
@pytest.mark.parametrize("batch", [1, 97, 10**6])
def test_sums_equal_dense_products_at_any_batch_size(layout: str, batch: int) -> None:
    acts = sample(200, p=0.3)
    a = acts.dense().double()
    z = torch.randn(200, 5, generator=generator(0, "z"), dtype=torch.float64)
    z = z.relu() if layout == "padded" else z
    sums = sums_of(padded(z) if layout == "padded" else z, acts, 0.2, batch)
    kept, on, fires = z * (z.abs() > 0.2), (a > 0).double(), (z > 0.2).double()
    expected = {
        "feature_count": on.sum(dim=0),
        "feature_sum": a.sum(dim=0),
        "feature_square": a.square().sum(dim=0),
        "unit_count": fires.sum(dim=0),
        "unit_sum": kept.sum(dim=0),
        "unit_square": kept.square().sum(dim=0),
        "both_count": on.T @ fires,
        "product": a.T @ kept,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(sums, name).double(), value, rtol=1e-12, atol=1e-12)
    correlation = np.corrcoef(torch.cat([a, kept], dim=1).T)[:N_FEATURES, N_FEATURES:]
    torch.testing.assert_close(sums.correlation(), torch.from_numpy(correlation), rtol=1e-9, atol=1e-9)


def test_constant_units_correlate_with_nothing() -> None:
    units = torch.stack([torch.full((N,), 1e6 + 0.1, dtype=torch.float64), A[:, 0]], dim=1)
    sums = sums_of(units, ACTS)
    assert sums.correlation()[:, 0].eq(0).all()
    assert unit_scores(sums)["alive"].tolist() == [False, True]


def test_units_with_known_features() -> None:
    """One feature; two equally strong ones; four, one of which with a negative sign; a dead unit."""
    units = torch.stack([A[:, 2], A[:, 0] + A[:, 1], A[:, 3] + A[:, 4] - A[:, 5] + A[:, 6], 0 * A[:, 0]], dim=1)
    scores = unit_scores(sums_of(units, ACTS))
    assert scores["purity"].tolist() == pytest.approx([1, 1 / 2, 1 / 4, 0], abs=0.03)
    assert scores["features_per_unit"].tolist() == pytest.approx([1, 2, 4, 0], abs=0.1)
    assert scores["feature"][[0, 3]].tolist() == [2, -1]
    assert float(scores["selectivity"][0]) == pytest.approx(1)
    assert scores["alive"].tolist() == [True, True, True, False]
    assert (scores["selectivity"][1:3] < 0.6).all()


def test_independent_perfect_latents_are_pure_where_co_firing_mass_is_not() -> None:
    """METRICS: by E[a z] perfect latents would score .35."""
    acts = Features(256, 0.01).sample(20_000, generator(3, "acts"))
    scores = polysemanticity(acts.dense(), acts)
    assert scores["purity"] > 0.99
    assert scores["features_per_unit"] < 1.05
    assert scores["selectivity"] == pytest.approx(1)
    assert scores == pytest.approx({**scores, "purity": scores["purity_truth"]})
    product = sums_of(acts.dense(), acts).product
    assert float((product.amax(dim=0) / product.sum(dim=0)).mean()) == pytest.approx(0.35, abs=0.02)


def slow_unit(z: np.ndarray, a: np.ndarray) -> tuple[float, float, float]:
    """Purity, perplexity and selectivity of one unit, as they are defined."""
    s = [max(0.0, np.corrcoef(a[:, i], z)[0, 1] ** 2 - 9 / len(z)) for i in range(a.shape[1])]
    share = [value / sum(s) for value in s] if sum(s) else []
    entropy = -sum(p * math.log(p) for p in share if p > 0)
    p = float((z > 0).mean())
    h = -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)
    best = max(mutual_info_score(a[:, i] > 0, z > 0) for i in range(a.shape[1]))
    return max(share, default=0.0), math.exp(entropy) if share else 0.0, best / h if h else 0.0


@pytest.mark.parametrize("signed", [True, False])
def test_unit_scores_equal_their_slow_version(signed: bool) -> None:
    acts = sample(500, p=0.3, seed=7)
    a = acts.dense().double()
    mix = torch.randn(N_FEATURES, 6, generator=generator(0, "mix"), dtype=torch.float64)
    units = a @ mix + 0.3 * torch.randn(500, 6, generator=generator(0, "noise"), dtype=torch.float64)
    units = units if signed else (units - 0.5).relu()
    scores = unit_scores(sums_of(units, acts))
    for k in range(6):
        got = [float(scores[name][k]) for name in ("purity", "features_per_unit", "selectivity")]
        assert got == pytest.approx(slow_unit(units[:, k].numpy(), a.numpy()), abs=1e-9)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 999), n=st.integers(1, 30))
def test_mutual_information_equals_sklearn(seed: int, n: int) -> None:
    stream = generator(seed, "mi")
    u, v = (torch.rand(n, k, generator=stream) < 0.5 for k in (3, 2))
    both = u.double().T @ v.double()
    counts = torch.broadcast_tensors(u.double().sum(dim=0)[:, None], v.double().sum(dim=0))
    found = mutual_information(both, *counts, n)
    expected = [[mutual_info_score(u[:, i], v[:, k]) for k in range(2)] for i in range(3)]
    assert found.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]
    assert (found >= 0).all()


def test_shuffled_units_score_the_reported_chance() -> None:
    mix = torch.randn(N_FEATURES, 40, generator=generator(1, "mix"), dtype=torch.float64)
    neurons = A @ mix
    scores = polysemanticity(neurons, ACTS)
    lucky = polysemanticity(neurons[torch.randperm(N, generator=generator(1, "luck"))], ACTS)
    for name in ("purity", "features_per_unit", "selectivity"):
        assert abs(lucky[name] - scores[f"{name}_chance"]) <= 6 * scores[f"{name}_chance_sd"], name
    assert scores["selectivity_chance"] < 0.01 < scores["selectivity"]
    assert scores["n_alive"] == 40


def test_means_run_over_alive_units_in_any_order_and_any_layout() -> None:
    latents = torch.cat([(A[:, :4] - 0.2).relu(), torch.zeros(N, 3, dtype=torch.float64)], dim=1)
    scores = polysemanticity(latents, ACTS)
    assert scores["n_alive"] == 4
    assert scores["purity"] == pytest.approx(1, abs=0.01)
    order = torch.tensor([6, 0, 5, 1, 4, 2, 3])
    for other in (padded(latents), SparseCodes(latents, None, 7), latents[:, order], latents.numpy()):
        assert polysemanticity(other, ACTS) == pytest.approx(scores, abs=1e-9)
    assert polysemanticity(0 * latents, ACTS)["purity"] == 0


def test_sparse_neurons_keep_their_sign() -> None:
    neurons = torch.cat([-A[:, :1], torch.zeros(N, 7, dtype=torch.float64)], dim=1)
    scores = polysemanticity(neurons, ACTS)
    assert scores["n_alive"] == 1
    assert scores["purity"] == pytest.approx(1, abs=0.01)


def test_faint_latents_are_dead_below_the_threshold() -> None:
    latents = torch.stack([A[:, 0], 1e-9 * A[:, 1]], dim=1)
    assert polysemanticity(latents, ACTS)["n_alive"] == 2
    assert polysemanticity(latents, ACTS, firing_threshold=1e-6)["n_alive"] == 1


def test_mean_scores_do_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    acts = ACTS[:500]
    scores = polysemanticity(A[:500], acts)
    monkeypatch.setattr("sae.metrics.inputs.SAMPLES_AT_ONCE", 41)
    assert polysemanticity(A[:500], acts) == pytest.approx(scores, abs=1e-9)


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="units of 5 samples and acts of 6000"):
        polysemanticity(A[:5], ACTS)
    with pytest.raises(ValueError, match="codes of 5 samples and 8 latents do not fit true activations of 6000"):
        CoStatistics(N_FEATURES, 8).update(SparseCodes(A[:5], None, 8), ACTS)
