"""Batches of 1024 from a synthetic world against SAELens's generator, from the very same world; skips without it."""

import pytest

from toymodels import generator, load_world


@pytest.mark.parametrize(
    ("name", "n", "d", "probs", "n_roots", "rank", "rounds"),
    [("synth16k", 16384, 768, (0.4, 5e-4), 128, 25, 9), ("synth1k", 1024, 128, (0.43, 0.002), 32, 8, 60)],
)
def test_generation(against, say, tmp_path, name, n, d, probs, n_roots, rank, rounds):
    """The world of configs/worlds, but for the directions, which cost the same wherever they point."""
    theirs = pytest.importorskip("sae_lens.synthetic")
    model = theirs.SyntheticModel(
        theirs.SyntheticModelConfig(
            num_features=n,
            hidden_dim=d,
            firing_probability=theirs.ZipfianFiringProbabilityConfig(
                exponent=0.5, max_prob=probs[0], min_prob=probs[1]
            ),
            hierarchy=theirs.HierarchyConfig(
                total_root_nodes=n_roots,
                branching_factor=4,
                max_depth=3,
                mutually_exclusive_portion=1.0,
                compensate_probabilities=True,
                scale_children_by_parent=True,
            ),
            correlation=theirs.LowRankCorrelationConfig(rank=rank, correlation_scale=0.1),
            mean_firing_magnitudes=theirs.LinearMagnitudeConfig(start=5.0, end=4.0),
            std_firing_magnitudes=theirs.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            bias=0.5,
            seed=0,
        )
    )
    model.save(tmp_path)
    world, stream = load_world(tmp_path), generator(0, "bench")
    ours, other = against(lambda: world.sample(1024, stream), lambda: model.sample_with_features(1024), rounds=rounds)
    say(f"{name}, batches of 1024: {1e3 * ours:.2f} ms, SAELens {1e3 * other:.1f} ms, ratio {other / ours:.1f}")
