"""Sparse against dense sampling of features, and a stack of toy models against one after another."""

import pytest

from toymodels import Features, ToyModel, generator, train


@pytest.mark.parametrize(("n_features", "feature_prob"), [(256, 0.01), (4096, 0.001)])
def test_sampling(against, say, n_features, feature_prob):
    features, stream = Features(n_features, feature_prob), generator(0, "bench")
    sparse, dense = against(
        lambda: features.sample(2048, stream), lambda: features.sample_dense(2048, stream), rounds=50
    )
    say(
        f"2048 x {n_features} features at p = {feature_prob}: sparse {1e3 * sparse:.2f} ms, "
        f"dense {1e3 * dense:.2f} ms, ratio {dense / sparse:.1f}"
    )


@pytest.mark.parametrize("feature_prob", [0.01, 0.1, 0.5])
def test_stack_of_models(against, say, feature_prob):
    """The denser the features, the more of a step is drawing them, which a stack cannot share."""
    features = Features(20, feature_prob)

    def trained(n_instances: int) -> None:
        stream = generator(0, "bench")
        train(ToyModel(20, 5, n_instances=n_instances, generator=stream), features, 50, 1024, generator=stream)

    stacked, one_by_one = against(lambda: trained(64), lambda: [trained(1) for _ in range(64)], rounds=3)
    say(
        f"64 toy models (n 20, m 5, batch 1024, p {feature_prob}), 50 steps: stacked {stacked:.2f} s, "
        f"one after another {one_by_one:.2f} s, ratio {one_by_one / stacked:.2f}"
    )
