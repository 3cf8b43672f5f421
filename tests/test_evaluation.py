"""Evaluation in windows, and what it refuses."""

import pytest
import torch
from torch import Tensor

from sae import HeldOut, UsageError, metrics
from sae.baselines import Baseline
from sae.codes import SparseCodes
from sae.evaluation import evaluate, matched_f1
from sae.world_source import WorldSource
from toymodels.features import FeatureBatch
from toymodels.worlds import ToyRecipe


@pytest.fixture(scope="module")
def source() -> WorldSource:
    return WorldSource(ToyRecipe(n_features=16, d_hidden=6, feature_prob=0.1, n_steps=50).build(0))


def coder(rows: Tensor) -> Baseline:
    return Baseline(rows, torch.zeros(rows.shape[1]), lambda x: (x @ rows.T - 0.2).relu())


def test_a_stream_gives_the_numbers_of_the_whole_set(source: WorldSource, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(coder(source.truth), source.held_out("evaluation", 900), source.truth)
    stream = evaluate(coder(source.truth), source.held_out_stream("evaluation", 900), source.truth)
    assert stream.metrics == whole.metrics
    monkeypatch.setattr("sae.metrics.samples.MAX_WINDOW_ROWS", 250)
    monkeypatch.setattr("sae.metrics.samples.MIN_WINDOW_ROWS", 250)
    windowed = evaluate(coder(source.truth), source.held_out_stream("evaluation", 900), source.truth)
    for name, value in whole.metrics.items():
        if not name.endswith(("_chance", "_chance_sd")) or name.startswith("dimensionality"):
            assert windowed.metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert windowed.metrics["recovery/f1_chance"] != whole.metrics["recovery/f1_chance"]
    for name, column in whole.tables.items():
        torch.testing.assert_close(windowed.tables[name], column, rtol=1e-6, atol=1e-6)


def test_the_l0_of_the_truth_stands_beside_that_of_the_codes(source: WorldSource) -> None:
    held_out = source.held_out("evaluation", 900)
    found = evaluate(coder(source.truth), held_out, source.truth).metrics["metrics/l0_truth"]
    assert found == pytest.approx(float((held_out.acts.dense() > 0).sum(dim=1).double().mean()), rel=1e-3)
    assert "metrics/l0_truth" not in evaluate(coder(source.truth), HeldOut(held_out.x), source.truth).metrics


@pytest.mark.parametrize("n_latents", [11, 16, 23])
def test_the_f1_of_a_log_is_that_of_a_result(n_latents: int) -> None:
    """Rows of any norm, features without a latent, a feature that is never on, codes below the threshold."""
    stream = torch.Generator().manual_seed(n_latents)
    truth = torch.randn(16, 24, generator=stream)
    noise = torch.randn(n_latents, 24, generator=stream)
    W_dec = (truth[torch.arange(n_latents) % 16] + noise) * torch.linspace(0.2, 4, n_latents)[:, None]
    acts = torch.rand(300, 16, generator=stream) * (torch.rand(300, 16, generator=stream) < 0.2)
    acts[:, 3] = 0
    z = acts[:, torch.arange(n_latents) % 16] + torch.rand(300, n_latents, generator=stream) / 2 - 0.3
    z[:, 5] = -1.0
    codes, beside, threshold = SparseCodes.where(z > 0, z), FeatureBatch.from_dense(acts), 0.15
    alive = metrics.firing(W_dec, codes, threshold)
    slow = metrics.recovery(W_dec, truth, codes=codes, acts=beside, firing_threshold=threshold)["f1"]
    matching = metrics.match_dictionary(W_dec, truth, alive)
    assert not bool(alive[5])
    assert matched_f1(matching, codes.scaled(W_dec.norm(dim=1)), beside, threshold) == pytest.approx(slow, abs=1e-6)
    assert 0.2 < slow < 0.9
    assert abs(matched_f1(matching, codes, beside, threshold) - slow) > 1e-3, "norms count"


def test_bad_input_is_refused_in_one_line(source: WorldSource) -> None:
    held_out, truth = source.held_out("evaluation", 50), source.truth
    huge = torch.zeros_like(held_out.x)
    huge[7, 0] = 1e38
    cases = {
        "the evaluation set has no samples": (coder(truth), HeldOut(held_out.x[:0]), None),
        "the true features have 5 dimensions, but the dictionary has 6": (coder(truth), held_out, truth[:, :5]),
        "the true activations are of 16 features, but the truth has 9": (coder(truth), held_out, truth[:9]),
        "codes must be finite, but those of sample 7 are not": (
            coder(1e3 * truth),
            HeldOut(huge, held_out.acts),
            truth,
        ),
        "activations must be finite": (coder(truth), HeldOut(huge * 1e3, held_out.acts), truth),
    }
    for message, arguments in cases.items():
        with pytest.raises(UsageError, match=message) as refused:
            evaluate(*arguments)
        assert "\n" not in str(refused.value)


def test_features_of_a_world_without_known_activations(source: WorldSource) -> None:
    held_out = source.held_out("evaluation", 300)
    values = evaluate(coder(source.truth), HeldOut(held_out.x), source.truth).metrics
    assert values["recovery/mcc"] > values["recovery/mcc_chance"]
    assert "recovery/f1" not in values
    assert isinstance(held_out.acts, FeatureBatch)


def test_bad_rows_in_a_later_window_are_refused(source: WorldSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.metrics.samples.MAX_WINDOW_ROWS", 250)
    monkeypatch.setattr("sae.metrics.samples.MIN_WINDOW_ROWS", 250)
    x, acts, _ = source.held_out("evaluation", 900)
    for bad, known in ((torch.nan, acts), (torch.inf, None)):
        x = x.clone()
        x[700, 2] = bad
        with pytest.raises(UsageError, match="the evaluation set holds nan or inf; drop those rows"):
            evaluate(coder(source.truth), HeldOut(x, known), source.truth)
    x, acts, _ = source.held_out("evaluation", 900)
    acts.values[-1] = torch.nan
    with pytest.raises(UsageError, match="true activations must be finite, but the evaluation set holds nan or inf"):
        evaluate(coder(source.truth), HeldOut(x, acts), source.truth)
