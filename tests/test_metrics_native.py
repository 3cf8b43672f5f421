"""Judges of the sums in C: the same in torch, which the other tests hold against dense products."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sae.codes import SparseCodes
from sae.metrics import native, recovery
from sae.metrics.co_statistics import CoStatistics
from sae.metrics.inputs import compressed
from sae.metrics.native import add_pairs_, by_feature, look_up
from sae.metrics.polysemanticity import polysemanticity, unit_scores
from sae.metrics.samples import rows_in
from toymodels.features import FeatureBatch, Features
from toymodels.streams import generator

N, N_FEATURES, D_SAE = 400, 23, 31
ACTS = Features(N_FEATURES, 0.2).sample(N, generator(0, "acts"))
Z = torch.randn(N, D_SAE, generator=generator(0, "z")) - 0.5
ORDER = torch.randperm(N, generator=generator(0, "order"))


@pytest.fixture(params=["c", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "can_call", lambda: False)
    elif not native.can_call():
        pytest.skip("no compiler")
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("dense", [True, False])
def test_pairs_of_some_features_in_another_order(way: str, dense: bool, threshold: float, dtype: torch.dtype) -> None:
    first, last = 5, 17
    product = torch.ones(last - first, D_SAE, dtype=torch.float64)
    both = torch.ones(last - first, D_SAE, dtype=torch.int32)
    z = Z.to(dtype)
    units = z if dense else compressed(SparseCodes(z, None, D_SAE), threshold)
    add_pairs_(product, both, units, by_feature(ACTS), rows_in(ORDER), first, threshold)
    # Row r of the units is beside row ORDER[r] of the true activations.
    a, kept = ACTS.dense()[ORDER].double()[:, first:last], torch.where(Z.abs() > threshold, Z, 0.0).double()
    torch.testing.assert_close(product, 1 + a.T @ kept, rtol=1e-5, atol=1e-5)
    assert both.double().equal(1 + (a > 0).double().T @ Z.gt(threshold).double())


def test_features_of_latents_are_looked_up(way: str) -> None:
    codes = FeatureBatch.from_dense(Z.relu())
    features = torch.randint(-1, N_FEATURES, (2, D_SAE), generator=generator(0, "own"))
    a = torch.nn.functional.pad(ACTS.dense(), (0, 1))
    row, latent = Z.relu().nonzero().unbind(dim=1)
    for order, beside in ((None, row), (ORDER, ORDER[row])):
        found = look_up(codes, ACTS, features, order)
        assert found.equal(torch.stack([a[beside, own[latent]] for own in features]))


def both_ways(monkeypatch: pytest.MonkeyPatch, measure: Callable[[], Any]) -> tuple[Any, Any]:
    if not native.can_call():
        pytest.skip("no compiler")
    fast = measure()
    for room in ("native", "polysemanticity", "code_recovery"):
        monkeypatch.setattr(sys.modules[f"sae.metrics.{room}"], "can_call", lambda: False)
    return fast, measure()


@pytest.mark.parametrize("at_once", [3, 2**17])
def test_scores_of_units_are_those_in_torch(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("sae.metrics.co_statistics.PAIRS_AT_ONCE", at_once)
    mix = torch.randn(N_FEATURES, D_SAE, generator=generator(1, "mix"))
    sums = CoStatistics(N_FEATURES, D_SAE)
    sums.update(SparseCodes(ACTS.dense() @ mix * (mix.mean(dim=0) > 0), None, D_SAE), ACTS)
    fast, slow = both_ways(monkeypatch, lambda: unit_scores(sums))
    assert (slow["purity"] > 0).sum() > 5
    for name, column in slow.items():
        torch.testing.assert_close(fast[name], column, rtol=1e-12, atol=1e-12)


def test_every_score_is_that_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = torch.randn(N_FEATURES, 9, generator=generator(2, "truth"))
    W_dec = truth[torch.arange(D_SAE) % N_FEATURES] + 0.3 * torch.randn(D_SAE, 9, generator=generator(3, "noise"))
    monkeypatch.setattr("sae.metrics.samples.MAX_WINDOW_ROWS", 150)
    monkeypatch.setattr("sae.metrics.samples.MIN_WINDOW_ROWS", 150)
    monkeypatch.setattr(sys.modules["sae.metrics.polysemanticity"], "SUMS_ENTRIES", 700)

    def measure() -> dict[str, float]:
        monkeypatch.setattr("sae.metrics.once._kept", OrderedDict())
        x = ACTS.embed(truth)
        return recovery(W_dec, truth, codes=(x @ W_dec.T).relu(), acts=ACTS) | polysemanticity(x, ACTS)

    fast, slow = both_ways(monkeypatch, measure)
    assert fast == pytest.approx(slow, rel=1e-6, abs=1e-9)
