"""Feature batches: their layout, and that what they draw is Bernoulli(p) · U[0, 1]."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toymodels.features import FeatureBatch, Features
from toymodels.streams import generator

N = 60_000
PROBS = {
    "sparse": 0.01,
    "medium": 0.2,
    "dense": 0.6,
    "never": 0.0,
    "always": 1.0,
    "zipf": tuple(0.9 / i for i in range(1, 41)),
    "extremes": (0.0, 1.0, 0.3, 0.001) + (0.01,) * 40,
    "mixed and dense": (0.0, 0.1, 0.5, 0.9, 1.0),
}


def draw(features: Features, how: str) -> torch.Tensor:
    g = generator(0, "test", how)
    if how == "sample":
        return features.sample(N, g).dense()
    return features.sample_dense(N // 2, g, n_instances=2).reshape(-1, features.n_features)


@pytest.mark.parametrize("how", ["sample", "sample_dense"])
@pytest.mark.parametrize("name", PROBS)
def test_features_fire_with_their_probability_independently_at_uniform_values(name, how):
    p = PROBS[name]
    features = Features(7 if isinstance(p, float) else len(p), p)
    x = draw(features, how)
    fires = (x > 0).double()
    probs = features.probs
    certain = (probs == 0) | (probs == 1)
    assert torch.equal(fires[:, certain].mean(0), probs[certain])
    sd = (probs * (1 - probs)).sqrt()[~certain]
    centred = (fires - probs)[:, ~certain]
    limit = 5 / N**0.5
    assert ((centred.mean(0) / sd).abs() < limit).all()
    n = centred.shape[1]
    together = (centred.T @ centred / N / (sd[:, None] * sd))[~torch.eye(n, dtype=torch.bool)]
    assert (together.abs() < limit).all()
    # The previous row, and the previous feature's previous row, say nothing either.
    assert ((centred[1:] * centred[:-1]).mean(0).abs() / sd**2 < limit).all()
    # Values given that they fire: the deciles of U[0, 1].
    counts = fires[:, probs > 0].sum(0)
    below = torch.stack([((x > 0) & (x < t / 10))[:, probs > 0].sum(0) / counts for t in range(1, 10)])
    expected = torch.arange(1, 10)[:, None] / 10
    assert ((below - expected).abs() < 5 * (expected * (1 - expected) / counts).sqrt()).all()
    assert (x >= 0).all()
    assert (x < 1).all()


@pytest.mark.parametrize("p", [0.02, 0.2, 0.7, (0.02, 0.3, 0.0, 0.1, 0.05), (0.9, 0.3, 0.0, 0.1, 0.5)])
def test_a_batch_is_one_layout_of_the_same_entries(p):
    features = Features(5, p)
    batch = features.sample(33, generator(1), n_instances=3)
    assert batch.shape == (3, 33, 5)
    assert len(batch) == 99
    assert batch.n_features == 5
    assert batch.indices.dtype == batch.offsets.dtype == torch.int64
    assert batch.values.dtype == torch.float32
    assert batch.offsets[0] == 0
    assert batch.offsets[-1] == len(batch.indices)
    # Rows in order, features increasing inside a row, no entry twice.
    row = torch.arange(99).repeat_interleave(batch.offsets.diff())
    assert torch.equal(batch.positions, row * 5 + batch.indices)
    assert (batch.positions.diff() > 0).all()
    x = torch.zeros(99, 5)
    x[row, batch.indices] = batch.values
    assert torch.equal(batch.dense().reshape(99, 5), x)
    rebuilt = FeatureBatch(batch.indices, batch.values, batch.offsets, batch.shape)
    assert torch.equal(rebuilt.positions, batch.positions)


@pytest.mark.parametrize("p", [0.2, (0.02, 0.3, 0.0, 0.1, 0.05)])
def test_entries_fire_in_increasing_order_whatever_the_layout(p):
    positions = Features(5, p)._fire(3, 400, generator(1))
    assert len(positions) > 200
    assert (positions.diff() > 0).all()


def test_dense_samples_keep_each_feature_contiguous_and_reuse_memory():
    for p in (0.01, 0.9):
        features = Features(6, p)
        for n_instances in (None, 4):
            first = features.sample_dense(50, generator(2), n_instances)
            assert first.shape == ((50, 6) if n_instances is None else (4, 50, 6))
            assert first.mT.is_contiguous()
            kept = first.clone()
            features.sample_dense(50, generator(3), n_instances, out=first)
            assert not torch.equal(first, kept)
            again = features.sample_dense(50, generator(2), n_instances, out=first)
            assert again.data_ptr() == first.data_ptr()
            assert torch.equal(again, kept)


@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_from_dense_and_back(data):
    shape = data.draw(st.sampled_from([(1, 1), (4, 3), (2, 5, 3), (0, 3)]))
    size = torch.Size(shape).numel()
    values = st.sampled_from([0.0, 0.0, 0.5, 1.0, -2.0])
    x = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size))).view(shape)
    batch = FeatureBatch.from_dense(x)
    assert torch.equal(batch.dense(), x)
    assert (batch.values != 0).all()
    if len(shape) == 2:
        start, stop = data.draw(st.integers(-6, 6)), data.draw(st.integers(-6, 6))
        assert torch.equal(batch[start:stop].dense(), x[start:stop])
        assert torch.equal(batch[start:].dense(), x[start:])


@pytest.mark.parametrize("shared", [True, False])
def test_embedding_is_the_dense_product_and_so_is_its_gradient(shared):
    batch = Features(7, 0.2).sample(11, generator(4), n_instances=3)
    batch = FeatureBatch(batch.indices, batch.values.double(), batch.offsets, batch.shape)
    shape = (7, 5) if shared else (3, 7, 5)
    W = torch.randn(shape, generator=generator(5), dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 11, 5, generator=generator(6), dtype=torch.float64)
    torch.testing.assert_close(batch.embed(W), batch.dense() @ W)
    (sparse,) = torch.autograd.grad((batch.embed(W) * weights).sum(), W)
    (dense,) = torch.autograd.grad((batch.dense() @ W * weights).sum(), W)
    torch.testing.assert_close(sparse, dense)


def test_embedding_of_plain_rows():
    batch = Features(7, 0.2).sample(11, generator(4))
    W = torch.randn(7, 5, generator=generator(5))
    torch.testing.assert_close(batch.embed(W), batch.dense() @ W)
    torch.testing.assert_close(batch[3:6].embed(W), batch.dense()[3:6] @ W)


def test_worlds_compare_by_value():
    assert Features(2, [0.5, 0.25]) == Features(2, torch.tensor([0.5, 0.25]))
    assert Features(2, [0.5, 0.25]) != Features(2, [0.5, 0.5])
    assert hash(Features(2, [0.5, 0.25])) == hash(Features(2, (0.5, 0.25)))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="n_features must be at least 1, got 0"):
        Features(0, 0.5)
    for p in (-0.1, 1.1, float("nan"), [0.5, 2.0]):
        with pytest.raises(ValueError, match=r"feature_prob must lie in \[0, 1\]"):
            Features(2, p)
    with pytest.raises(ValueError, match="feature_prob must be one number, n_features=3 of them, or a row"):
        Features(3, [0.5, 0.5])
    with pytest.raises(ValueError, match="importance must be one number, n_features=3 of them, or a row"):
        Features(3, 0.5, torch.ones(2))
    with pytest.raises(ValueError, match="importance must not be negative"):
        Features(3, 0.5, -1.0)
    for sample in (Features(3, 0.1).sample, Features(3, 0.9).sample, Features(3, 0.1).sample_dense):
        with pytest.raises(ValueError, match="at least 1, got shape"):
            sample(0, generator(0))
        with pytest.raises(ValueError, match="at least 1, got shape"):
            sample(4, generator(0), 0)
    batch = Features(3, 0.1).sample(4, generator(0), 2)
    with pytest.raises(ValueError, match="only consecutive rows"):
        batch[0:1]
    with pytest.raises(ValueError, match="only consecutive rows"):
        Features(3, 0.1).sample(4, generator(0))[::2]
    for W in (torch.ones(4, 5), torch.ones(3, 3, 5)):
        with pytest.raises(ValueError, match="cannot embed features of shape"):
            batch.embed(W)
    with pytest.raises(ValueError, match="cannot embed features of shape"):
        Features(3, 0.1).sample(4, generator(0)).embed(torch.ones(4, 3, 5))


# Features that differ between instances, and signed ones


@pytest.mark.parametrize("probs", [[[0.02], [0.1], [0.05]], [[0.9], [0.02], [0.4]]], ids=["sparse", "dense"])
@pytest.mark.parametrize("how", ["sample", "sample_dense"])
def test_each_instance_has_its_own_probabilities(probs, how):
    table = torch.tensor(probs, dtype=torch.float64) * torch.tensor([1.0, 0.5, 0.1, 0.0])
    features = Features(4, table)
    x = getattr(features, how)(N // 2, generator(0, "test", how), 3)
    x = x if isinstance(x, torch.Tensor) else x.dense()
    sd = (table * (1 - table) / (N // 2)).sqrt()
    assert x.shape == (3, N // 2, 4)
    assert (((x > 0).double().mean(1) - table).abs() <= 5 * sd).all()
    counts = (x > 0).sum(1)
    means = x.sum(1) / counts.clamp(min=1)
    assert ((means - 0.5).abs() < 5 / (12 * counts).sqrt())[counts > 0].all()


@pytest.mark.parametrize("p", [0.05, 0.8, 1.0])
@pytest.mark.parametrize("how", ["sample", "sample_dense"])
def test_signed_features_fire_as_often_and_to_both_sides(p, how):
    features = Features(3, p, signed=True)
    x = getattr(features, how)(N, generator(0, "test", how))
    x = x if isinstance(x, torch.Tensor) else x.dense()
    assert ((x != 0).double().mean(0) - p).abs().max() <= 5 * (p * (1 - p) / N) ** 0.5 + 1e-6
    active = x[x != 0]
    for t in (-0.8, -0.3, 0.0, 0.5, 0.9):  # the distribution function of U[-1, 1]
        assert (active < t).double().mean().item() == pytest.approx((t + 1) / 2, abs=5 * 0.5 / len(active) ** 0.5)


def test_instances_that_disagree_are_named():
    with pytest.raises(ValueError, match="different numbers of instances"):
        Features(2, [[0.1], [0.2]], [[1.0], [1.0], [0.5]])
    features = Features(2, [[0.1], [0.2]])
    assert features.n_instances == 2
    assert Features(2, 0.1).n_instances is None
    for n_instances in (None, 3):
        with pytest.raises(ValueError, match="differ between n_instances=2 instances"):
            features.sample(4, generator(0), n_instances)
