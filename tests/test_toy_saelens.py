"""Worlds that SAELens saved: read without it, and, where it is installed, compared with its own sampler."""

import json

import pytest
import torch
from dense_worlds import dense_features, moments, node, worst_z, write_saelens_world
from safetensors.torch import load_file, save_file

from toymodels import generator, load_world
from toymodels.errors import UsageError


def ours(world, n: int, rows: int = 20_000):
    return moments(world.sample(rows, generator(0, "ours", i)).acts.dense() for i in range(n // rows))


def test_files_are_read_as_they_are(tmp_path):
    weights = write_saelens_world(tmp_path)
    world = load_world(tmp_path)
    assert torch.equal(world.truth, weights["feature_vectors"])
    assert torch.equal(world.bias, weights["bias"])
    torch.testing.assert_close(world.probs.float(), weights["firing_probabilities"])
    torch.testing.assert_close(torch.from_numpy(world.strengths.mean), torch.linspace(2, 1, 40))
    # SAELens seeds the spreads with the world's seed + 1, the means with + 2.
    spread = (0.5 + 0.5 * torch.randn(40, generator=torch.Generator().manual_seed(8))).abs()
    torch.testing.assert_close(torch.from_numpy(world.strengths.std), spread)
    parent = [-1] * 40
    for child, above in {3: 0, 4: 0, 5: 0, 9: 3, 10: 3, 6: 1, 7: 1, 11: 6}.items():
        parent[child] = above
    assert world.forest.parent.tolist() == parent
    families = sorted(sorted(members.tolist()) for members in world.forest.families())
    assert families == [[2, 20], [3, 4, 5], [9, 10]]
    assert world.forest.scaled.nonzero()[0].tolist() == [3, 4, 5, 11]
    hidden, acts = world.sample(100, generator(0))
    torch.testing.assert_close(hidden, acts.dense() @ world.truth + world.bias)


def test_samples_have_the_statistics_of_the_obvious_sampler(tmp_path):
    write_saelens_world(tmp_path)
    world = load_world(tmp_path)
    judge = moments(dense_features(world, 20_000, generator(0, "judge", i)) for i in range(20))
    worst = worst_z(ours(world, 400_000), judge)
    assert max(worst.values()) < 5, worst


def their_own_world(synthetic, folder):
    """Saved by SAELens itself: compensated so far that some features draw with probability 1."""
    config = synthetic.SyntheticModelConfig(
        num_features=90,
        hidden_dim=24,
        firing_probability=synthetic.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.5, min_prob=0.02),
        hierarchy=synthetic.HierarchyConfig(
            total_root_nodes=4,
            branching_factor=4,
            max_depth=2,
            mutually_exclusive_portion=0.5,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        correlation=synthetic.LowRankCorrelationConfig(rank=4, correlation_scale=0.2),
        mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=2.0, end=1.0),
        std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        seed=3,
    )
    synthetic.SyntheticModel(config).save(folder)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["written here", "saved by SAELens"])
def test_samples_have_the_statistics_of_saelens(tmp_path, seed, kind, capsys):
    """10⁶ samples of each: how often features fire, alone and together, their means and second moments."""
    synthetic = pytest.importorskip("sae_lens.synthetic")
    if kind == "written here":
        write_saelens_world(tmp_path)
    else:
        their_own_world(synthetic, tmp_path)
    world, model = load_world(tmp_path), synthetic.SyntheticModel.load_from_disk(tmp_path)
    torch.manual_seed(seed)
    theirs = moments(model.activation_generator.sample(20_000) for _ in range(50))
    worst = worst_z(ours(world, 1_000_000), theirs)
    with capsys.disabled():
        print("\nlargest difference from SAELens, in standard errors:", {k: round(v, 2) for k, v in worst.items()})
    assert max(worst.values()) < 5, worst


def change(folder, **changes):
    """Overwrites tensors; None takes one away."""
    weights = load_file(folder / "synthetic_model.safetensors") | changes
    save_file({k: v for k, v in weights.items() if v is not None}, folder / "synthetic_model.safetensors")


def configure(folder, **changes):
    path = folder / "synthetic_model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hierarchy(folder, *roots):
    (folder / "hierarchy.json").write_text(json.dumps({"roots": list(roots)}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "synthetic_model_config.json").unlink(), "cannot read .*config.json: No such file"),
        (lambda f: (f / "synthetic_model.safetensors").unlink(), "cannot read .*safetensors: it is not there"),
        (lambda f: (f / "synthetic_model.safetensors").write_bytes(b"x" * 40), "safetensors cannot be loaded"),
        (lambda f: (f / "hierarchy.json").write_text("{"), "hierarchy.json is not valid JSON"),
        (lambda f: (f / "hierarchy.json").write_text("[]"), "must hold an object, got list"),
        (lambda f: (f / "hierarchy.json").write_text('{"roots": 3}'), "does not fit: roots must be a list"),
        (lambda f: hierarchy(f, 3), "hierarchy.json does not fit: roots must be a list of nodes"),
        (lambda f: hierarchy(f, node(1, 3)), "hierarchy.json does not fit: children must be nodes"),
        (lambda f: hierarchy(f, node(40)), r"feature_index must lie in 0..39, got 40"),
        (lambda f: hierarchy(f, node(0, node(1)), node(1)), "feature_index 1 occurs twice"),
        (lambda f: configure(f, num_features=41), "says 41 features in 16 dimensions, .* holds 40 in 16"),
        (lambda f: configure(f, mean_firing_magnitudes=-1.0), "magnitudes must not be negative, got -1"),
        (lambda f: configure(f, mean_firing_magnitudes=0.0), "scales its children by x / mean"),
        (lambda f: configure(f, std_firing_magnitudes="x"), "must be a number or a mapping, got 'x'"),
        (
            lambda f: configure(f, std_firing_magnitudes={"generator_name": "foldednormal"}),
            "'foldednormal' cannot be read; did you mean 'folded_normal'",
        ),
        (
            lambda f: configure(f, mean_firing_magnitudes={"generator_name": "linear", "strat": 1, "end": 2}),
            "unknown key .*strat'; did you mean 'start'",
        ),
        (lambda f: change(f, bias=None), r"must hold bias with 1 axes, got \{"),
        (lambda f: change(f, bias=torch.zeros(3)), r"bias must have shape \[16\], got \[3\]"),
        (lambda f: change(f, bias=torch.full((16,), torch.nan)), "bias holds NaN or infinity"),
        (lambda f: change(f, firing_probabilities=torch.full((40,), 1.5)), r"must lie in \[0, 1\], got 1.5"),
        (lambda f: change(f, correlation_diag=torch.ones(40)), "must make variances of 1"),
        (lambda f: change(f, correlation_diag=None), "beside correlation_diag"),
    ],
)
def test_files_that_do_not_fit_are_told_in_one_line(tmp_path, spoil, message):
    write_saelens_world(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UsageError, match=message) as told:
        load_world(tmp_path)
    assert "\n" not in str(told.value)
