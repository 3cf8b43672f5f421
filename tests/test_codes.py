import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.codes import SparseCodes


def sparse_matrix(rows: int, d_sae: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(rows, d_sae, generator=generator)
    return z * (torch.rand(rows, d_sae, generator=generator) < 0.3)


@given(st.integers(1, 9), st.integers(1, 13), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_view_agrees_with_the_dense_matrix(rows, d_sae, seed):
    z = sparse_matrix(rows, d_sae, seed)
    W = torch.randn(d_sae, 5, generator=torch.Generator().manual_seed(seed))
    weights = torch.rand(d_sae)
    for codes in (SparseCodes.where(z > 0, z), SparseCodes(z, None, d_sae)):
        assert torch.equal(codes.dense(), z)
        torch.testing.assert_close(codes.decode(W), z @ W)
        assert torch.equal(codes.counts, (z > 0).sum(1))
        assert torch.equal(codes.firing(), (z > 0).sum(0))
        torch.testing.assert_close(codes.weighted_sum(weights), z @ weights)
        torch.testing.assert_close(codes.scaled(weights).dense(), z * weights)
        assert torch.equal(codes[: rows // 2 + 1].dense(), z[: rows // 2 + 1])


def test_padding_is_as_narrow_as_the_longest_row():
    z = torch.tensor([[0.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    codes = SparseCodes.where(z > 0, z)
    assert codes.values.tolist() == [[2, 3], [0, 0], [1, 0]]
    assert codes.indices[0].tolist() == [1, 3]


@pytest.mark.parametrize("full", [False, True])
def test_cat_joins_batches_of_different_widths(full):
    parts = [sparse_matrix(4, 11, seed) for seed in range(3)]
    codes = [SparseCodes.where(z > 0, z) for z in parts]
    if full:
        codes[1] = SparseCodes(parts[1], None, 11)
    assert torch.equal(SparseCodes.cat(codes).dense(), torch.cat(parts))


def test_where_passes_gradients_to_what_fires():
    pre = torch.randn(5, 7, requires_grad=True)
    SparseCodes.where(pre > 0, pre).values.square().sum().backward()
    torch.testing.assert_close(pre.grad, 2 * pre.detach().relu())
