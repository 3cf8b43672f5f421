import pytest
import torch

from sae import losses
from sae.codes import SparseCodes


def test_l1_weighs_codes_by_their_decoder_rows():
    codes = SparseCodes(torch.tensor([[1.0, 2.0], [0.5, 0.0]]), torch.tensor([[0, 2], [1, 0]]), 3)
    W_dec = torch.diag(torch.tensor([1.0, 4.0, 3.0]))
    assert losses.l1(codes, W_dec) == pytest.approx((1 * 1 + 2 * 3 + 0.5 * 4) / 2)
    full = SparseCodes(codes.dense(), None, 3)
    torch.testing.assert_close(losses.l1(full, W_dec), losses.l1(codes, W_dec))


def test_total_variance_does_not_see_the_mean():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    expected = x.double().var(dim=0, correction=0).sum()
    torch.testing.assert_close(losses.total_variance(x + 1000), expected, rtol=1e-3, atol=0)


def test_geometric_median_ignores_outliers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1001, 3, generator=generator) + torch.tensor([5.0, -2.0, 1.0])
    x[:50] += 1e4
    median = losses.geometric_median(x)
    assert (median - torch.tensor([5.0, -2.0, 1.0])).norm() < 0.3
    # It is a minimum: every step away costs.
    cost = (x - median).norm(dim=1).double().sum()
    for step in 0.1 * torch.eye(3):
        assert (x - median - step).norm(dim=1).double().sum() > cost
