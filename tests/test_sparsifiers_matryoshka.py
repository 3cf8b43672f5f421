"""Matryoshka SAEs: prefixes of any kind, their weights, what is measured of them."""

import json

import pytest
import torch
import yaml
from test_engine import (
    BATCH,
    D_SAE,
    RATE,
    Judge,
    batches,
    both_decoders,
    every_case,
    every_kernel,
    make_engine,
    make_sae,
    same_gradients,
    same_terms,
    same_weights,
    with_unit,
)

import sae
from sae import SAEConfig, UsageError
from sae.config import load_config, parse_config
from sae.evaluation import evaluate
from sae.optim import Now
from sae.sources import HeldOut

DEAD = torch.tensor([2, 60, 64, 69])


def config(**options) -> SAEConfig:
    return parse_config({"sae": {"kind": "matryoshka", "d_sae": D_SAE, "k": 2.3} | options}).sae


@every_kernel
@both_decoders
@every_case
def test_weighted_prefixes_of_every_kind(case, unit_norm, kernels, precision):
    made = make_sae(case, unit_norm, prefixes=(3, 20, D_SAE), prefix_weights=(1.0, 5.0, 2.0))
    engine, judge = make_engine(case, made, kernels, precision), Judge(made)
    for number, x in enumerate(batches(5), 1):
        terms, expected = (by(x, Now.at(number, RATE, 0.7), DEAD) for by in (with_unit(engine), judge.step))
        same_terms(terms, expected)
        if number == 1:
            same_gradients(engine, judge)
    same_weights(engine, judge, 1e-9)


@every_kernel
@both_decoders
def test_the_kind_itself(unit_norm, kernels, precision):
    """Its default prefixes, in the judge's own words."""
    made = make_sae("batchtopk", unit_norm, kind="matryoshka")
    assert made.config.widths == (4, 8, 17, 35, 70)
    engine, judge = make_engine("batchtopk", made, kernels, precision), Judge(made)
    for number, x in enumerate(batches(5), 1):
        terms, expected = (by(x, Now.at(number, RATE, 0.7), DEAD) for by in (with_unit(engine), judge.step))
        same_terms(terms, expected)
        if number == 1:
            assert (expected.error - expected.mse).abs() > 0.01
            same_gradients(engine, judge)
    same_weights(engine, judge, 1e-9)


@every_kernel
@both_decoders
def test_a_single_prefix_is_the_outer_level(unit_norm, kernels, precision):
    """Of all readings the last is the plain SAE's; with one prefix nothing else is left."""
    x, now = batches(1)[0], Now.at(1, RATE, 0.7)
    plain, one, nested = (
        make_engine("batchtopk", make_sae("batchtopk", unit_norm, **options), kernels, precision)
        for options in ({}, {"kind": "matryoshka", "prefixes": (D_SAE,)}, {"kind": "matryoshka"})
    )
    ours, theirs, outer = (with_unit(engine)(x, now, DEAD) for engine in (plain, one, nested))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for (_, weight), (_, expected) in zip(plain.state.weights(), one.state.weights(), strict=True):
        assert torch.equal(weight, expected)
    for name in ("mse", "auxiliary", "l0"):
        torch.testing.assert_close(getattr(outer, name), getattr(ours, name), rtol=1e-12, atol=0)
    assert outer.error != ours.error


def test_default_prefixes():
    assert config(d_sae=8192).widths == (512, 1024, 2048, 4096, 8192)
    assert config(d_sae=10, k=1).widths == (1, 2, 5, 10)
    assert config(d_sae=1, k=1).widths == (1,)
    assert config(prefixes=[5, D_SAE]).widths == (5, D_SAE)
    assert parse_config({"sae": {"kind": "batchtopk", "d_sae": D_SAE, "k": 2.0}}).sae.widths == (D_SAE,)
    assert config(prefixes=[5, D_SAE], prefix_weights=[3, 1]).shares == (0.75, 0.25)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, float("inf"), 1.0], []])
def test_bad_weights(weights):
    with pytest.raises(
        UsageError, match=r"one for each of the prefixes \[3, 20, 70\], got .*; (give 3|make each)|number, got inf"
    ):
        config(prefixes=[3, 20, D_SAE], prefix_weights=weights)


@pytest.mark.parametrize("prefixes", [[3, 20], [20, 3, D_SAE], [0, D_SAE], [3, 3, D_SAE], [D_SAE + 1], []])
def test_bad_prefixes(prefixes):
    remedy = "make each wider than the one before" if prefixes[-1:] == [D_SAE] else "end with d_sae"
    with pytest.raises(UsageError, match=rf"prefixes must rise to d_sae=70, got .*; {remedy}"):
        config(prefixes=prefixes)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu", "matryoshka"])
def test_prefixes_in_a_file_and_on_the_command_line(kind, tmp_path):
    options = {"kind": kind, "d_sae": 256} | ({} if kind == "relu" else {"k": 3})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"sae": options | {"prefixes": [32, 256]}}))
    assert load_config(path).sae.widths == (32, 256)
    words = ["--sae.prefixes", "[64, 256]", "--sae.prefix_weights", "[1, 3]"]
    given = load_config(path, words).sae
    assert (given.widths, given.shares) == ((64, 256), (0.25, 0.75))
    with pytest.raises(UsageError, match="prefixes must rise to d_sae=128"):
        load_config(path, ["--sae.d_sae", "128"])


def test_a_run_tells_what_each_prefix_reconstructs(tmp_path):
    given = parse_config(
        {
            "source": {"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 100},
            "sae": {"kind": "matryoshka", "d_sae": 24, "k": 2.5, "prefixes": [4, 12, 24]},
            "train": {"n_samples": 19_200, "batch_size": 64, "warmup_steps": 5},
            "evaluation": {"n_samples": 500},
            "out": str(tmp_path / "run"),
        }
    )
    result = sae.train(given, report=False)
    assert json.loads((tmp_path / "run/result.json").read_text()) == result.metrics
    found = {key: value for key, value in result.metrics.items() if "fvu" in key}
    assert found.keys() == {"metrics/fvu", "metrics/fvu_prefix_4", "metrics/fvu_prefix_12"}
    assert found["metrics/fvu"] < found["metrics/fvu_prefix_12"] < found["metrics/fvu_prefix_4"] < 1

    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    z = result.sae.encode(x).dense()
    for width in (4, 12):
        x_hat = z[:, :width] @ result.sae.W_dec[:width] + result.sae.b_dec
        fvu = (x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()
        measured = evaluate(result.sae, HeldOut(x)).metrics[f"metrics/fvu_prefix_{width}"]
        assert measured == pytest.approx(float(fvu), rel=1e-5)


def test_steps_stay_sparse():
    made = make_sae("batchtopk", kind="matryoshka")
    engine = make_engine("batchtopk", made)
    engine._by_autograd = None  # to call it would fail
    terms = with_unit(engine)(batches(1)[0], Now.at(1, RATE, 1.0), DEAD)
    assert terms.l0 == round(2.3 * BATCH) / BATCH
