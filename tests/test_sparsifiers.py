import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.codes import kth_largest
from sae.sparsifiers import BatchTopK, ReLU, TopK
from sae.sparsifiers.topk import MultiTopK


@given(st.integers(1, 9), st.integers(2, 17), st.integers(0, 99), st.data())
@settings(max_examples=40, deadline=None)
def test_topk_keeps_the_largest_positive(rows, d_sae, seed, data):
    k = data.draw(st.integers(1, d_sae))
    pre = torch.randn(rows, d_sae, generator=torch.Generator().manual_seed(seed))
    z = TopK(k)(pre).dense()
    assert int((z > 0).sum(1).max()) <= k
    threshold = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
    torch.testing.assert_close(z, (pre * (pre >= threshold)).relu())


def test_batchtopk_spends_its_budget_where_it_is_needed():
    pre = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    z = BatchTopK(2.5)(pre).dense()
    assert int((z > 0).sum()) == 100
    assert len((z > 0).sum(1).unique()) > 1
    assert z[z > 0].min() >= pre[z == 0].max()


def test_batchtopk_never_fires_below_zero():
    pre = -torch.rand(10, 8) - 0.1
    assert BatchTopK(3.0)(pre).counts.sum() == 0


def test_batchtopk_threshold_gives_the_l0_asked_for_on_other_data():
    generator = torch.Generator().manual_seed(0)
    sparsifier = BatchTopK(3.7)
    sparsifier.calibrate_(iter(torch.randn(4000, 64, generator=generator).split(700)), 4000)
    held_out = torch.randn(4000, 64, generator=generator)
    assert sparsifier.select(held_out).counts.double().mean() == pytest.approx(3.7, rel=0.02)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_calibration_does_not_depend_on_the_batches(size):
    pre = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    sparsifier = BatchTopK(1.5)
    sparsifier.calibrate_(iter(pre.split(size)), 50)
    assert int((pre > sparsifier.threshold).sum()) == 75


def test_batchtopk_threshold_with_fewer_positives_than_k_is_their_mean_number():
    pre = torch.full((100, 10), -1.0)
    pre[:, :2] = torch.rand(100, 2) + 0.1
    sparsifier = BatchTopK(5.0)
    sparsifier.calibrate_(iter([pre]), len(pre))
    assert sparsifier.select(pre).counts.double().mean() == 2


def test_batchtopk_refuses_to_encode_before_calibration():
    with pytest.raises(ValueError, match="no inference threshold"):
        BatchTopK(2.0).select(torch.randn(3, 8))


def test_inference_does_not_depend_on_the_neighbours():
    pre = torch.randn(50, 20)
    batchtopk = BatchTopK(2.0)
    batchtopk.calibrate_(iter([pre]), len(pre))
    for sparsifier in (TopK(3), ReLU(0.1), batchtopk):
        whole = sparsifier.select(pre).dense()
        parts = torch.cat([sparsifier.select(row).dense() for row in pre.split(7)])
        assert torch.equal(whole, parts)


@given(st.integers(1, 2000), st.integers(0, 20), st.data())
@settings(max_examples=40, deadline=None)
def test_kth_largest(n, seed, data):
    k = data.draw(st.integers(1, n))
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    assert kth_largest(values, k) == values.sort(descending=True).values[k - 1]


def test_who_is_differentiated_by_autograd_is_inherited():
    """It is decided anew only where a class changes what the loss charges for, or knows its gradients."""

    class Charges(ReLU):
        def penalty(self, codes, W_dec):
            return codes.values.sum()

    class Knows(Charges):
        def differentiate(self, codes, decode, sparsity):
            return super().differentiate(codes, decode, sparsity)

    class Says(TopK):
        by_autograd = True

    def heir(kind):
        return type("Heir", (kind,), {})

    for kind, expected in (
        (TopK, False),
        (MultiTopK, False),
        (ReLU, False),
        (Charges, True),
        (Knows, False),
        (Says, True),
    ):
        assert (kind.by_autograd, heir(kind).by_autograd) == (expected, expected), kind
