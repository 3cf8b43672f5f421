"""The twins of SAELens's scores against its own code, where it is installed; and one case by hand."""

import pytest
import torch

from sae.metrics import recovery
from sae.metrics.reconstruction import explained_variance
from toymodels.features import FeatureBatch
from toymodels.streams import generator


def test_the_twins_by_hand() -> None:
    """Latents 0 and 1 both stand for feature 0, one with the wrong sign; latent 2 for feature 2 is dead."""
    truth = torch.eye(3)
    W_dec = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    acts = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    codes = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    scores = recovery(W_dec, truth, codes=codes, acts=acts)
    # |C| of the two alive latents: 1 for feature 0, and 0 for what is left.
    assert scores["mcc_saelens"] == pytest.approx(0.5)
    # Both alive latents point at feature 0; SAELens divides by all three.
    assert scores["uniqueness_saelens"] == pytest.approx(1 / 3)
    # F1 of latent 0: 2 · 1 / (2 + 2); of latent 1: 2 · 1 / (1 + 2); the dead one counts 0.
    assert scores["f1_saelens"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize(("n", "d_sae", "d"), [(60, 60, 16), (80, 40, 16), (30, 70, 8)])
def test_the_twins_agree_with_saelens(n: int, d_sae: int, d: int) -> None:
    evals = pytest.importorskip("sae_lens.synthetic.evals", reason="sae-lens is not installed")
    stream = generator(0, "saelens")
    truth = torch.nn.functional.normalize(torch.randn(n, d, generator=stream))
    W_dec = torch.randn(d_sae, d, generator=stream)
    W_dec[: min(n, d_sae) // 2] += 3 * truth[: min(n, d_sae) // 2]
    acts = torch.rand(3000, n, generator=stream) * (torch.rand(3000, n, generator=stream) < 0.1)
    codes = ((acts @ truth) @ torch.nn.functional.normalize(W_dec).T - 0.4).relu()
    scores = recovery(W_dec, truth, codes=codes, acts=FeatureBatch.from_dense(acts), firing_threshold=0.0)
    assert scores["n_alive"] == d_sae
    assert scores["mcc_saelens"] == pytest.approx(evals.mean_correlation_coefficient(W_dec, truth), abs=1e-3)
    assert scores["uniqueness_saelens"] == pytest.approx(evals.feature_uniqueness(W_dec, truth), abs=1e-3)
    theirs = evals.compute_classification_metrics(codes, acts, W_dec, truth)
    assert scores["f1_saelens"] == pytest.approx(theirs.f1_score, abs=1e-3)
    x = acts @ truth
    x_hat = x + 0.1 * torch.randn(x.shape, generator=stream)
    plain = 1 - (x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert float(explained_variance(x, x_hat)) == pytest.approx(float(plain), abs=1e-6)
