"""An L0 that is asked for, and what an L1 penalty charges."""

import logging
import math

import pytest
import torch
from pydantic import ValidationError
from test_engine import (
    D_SAE,
    KERNELS,
    RATE,
    UNIT,
    Judge,
    batches,
    make_engine,
    make_sae,
    same_gradients,
    same_terms,
    same_weights,
    with_unit,
)

import sae
from sae import SAEConfig
from sae.optim import Now
from sae.sparsifiers import Control, ReLU
from sae.sparsifiers.control import INTEGRAL, LEAST, PROPORTIONAL, REACH, threshold_of

every_kernel = pytest.mark.parametrize(("kernels", "precision"), KERNELS, ids=["-".join(pair) for pair in KERNELS])
KINDS = [{"kind": "relu"}, {"kind": "gated"}, {"kind": "p_annealing"}]
each_kind = pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])


# Feedback


@pytest.mark.parametrize(("n_steps", "limit"), [(100, REACH / 100), (10**6, LEAST)])
def test_the_coefficient_follows_the_formula(n_steps, limit):
    control, log_lambda, before = Control(0.3, 4.0).double(), math.log(0.3), 1.0
    control.look_(n_steps)
    for l0, share in ((8.0, 0.0), (100.0, 0.5), (5.0, 1.0), (3.0, 1.0), (0.0, 1.0)):
        control.observe_(torch.tensor(l0, dtype=torch.float64), torch.tensor(share))
        error = min(max(math.log(l0 / 4), -1), 1) if l0 else -1.0
        log_lambda += share * (min(max(INTEGRAL * error, -limit), limit) + PROPORTIONAL * (error - before))
        before = error
        assert math.log(control.coefficient) == pytest.approx(log_lambda, abs=1e-6)


def test_feedback_leads_a_lagging_answer_to_its_aim():
    """log L0 = 1 - log(lambda) / 2, reached with a lag of 100 steps, from far above."""
    control, log_l0, seen = Control(0.1, 3.0), 5.0, []
    control.look_(300)
    for _ in range(2000):
        control.observe_(torch.tensor(log_l0).exp(), 1.0)
        log_l0 += (1 - math.log(control.coefficient) / 2 - log_l0) / 100
        seen.append(math.exp(log_l0))
    assert min(seen) > 0.85 * 3
    assert seen[-1] == pytest.approx(3, rel=0.01)


@each_kind
@pytest.mark.parametrize("start", [0.1, 2.0])
def test_a_run_meets_the_l0_asked_for(options, start, tmp_path, caplog):
    stream = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(48, 16, generator=stream), dim=1)
    x = (torch.rand(60_000, 48, generator=stream) * (torch.rand(60_000, 48, generator=stream) < 0.05)) @ truth
    config = sae.TrainConfig(
        sae=options | {"d_sae": 64, "l0": 3.0, "l1_coefficient": start},
        train={"n_samples": 154_000, "batch_size": 256, "precision": "fp32"},
        log={"every": 50},
        out=tmp_path,
    )
    lines = []
    with caplog.at_level(logging.WARNING, "sae"):
        result = sae.train(config, x, report=False, on_line=lambda step, values: lines.append(dict(values)))
    assert not [record for record in caplog.records if "training ended at L0" in record.message]
    assert lines[-1]["metrics/l0"] == pytest.approx(3, rel=0.1)
    ended = lines[-1]["details/l1_coefficient"]
    assert ended == pytest.approx(float(result.sae.sparsifier.coefficient))
    assert not 0.9 < ended / start < 1.1
    calibrated = result.sae.encode(sae.sources.as_source(x).held_out("calibration", 10_000).x)
    assert calibrated.counts.double().mean() == pytest.approx(3, rel=1e-3)


def test_training_that_ended_far_off_says_so(caplog):
    relu = ReLU(0.1, 3.0)
    pre = torch.randn(1000, 30, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, "sae"):
        relu.calibrate_([pre], len(pre))
    assert "training ended at L0 14.8" in caplog.text
    assert "instead of the requested 3;" in caplog.text
    assert relu.select(pre).counts.double().mean() == 3


@pytest.mark.parametrize("shift", [-2.5, 0.5])
def test_a_threshold_meets_the_l0_from_both_sides(shift):
    relu, stream = ReLU(0.1, 2.0), torch.Generator().manual_seed(0)
    pre = torch.randn(2000, 20, generator=stream) + shift
    relu.calibrate_(iter(pre.split(300)), len(pre))
    codes = relu.select(pre)
    assert codes.counts.double().mean() == 2
    threshold = float(relu.threshold)
    assert (threshold < 0) == (shift < 0)
    fires = pre > threshold
    torch.testing.assert_close(codes.dense(), torch.where(fires, pre - min(threshold, 0), 0))
    before = codes.dense()
    relu.rescale_(4.0)
    torch.testing.assert_close(relu.select(4 * pre).dense(), 4 * before)


def test_a_threshold_counts_no_more_than_there_are():
    scores = torch.tensor([[3.0, 1.0, -1.0, -2.0]])
    assert threshold_of([scores], 3.0, 1) == (-1.5, 2.0)
    assert threshold_of([scores], 1.0, 1) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l0": 32.0}, "l0 must lie below d_sae=32, got 32; lower l0 or raise d_sae"),
        ({"l0": 3.0, "l1_coefficient": 0.0}, "l1_coefficient must be above 0 where l0=3 is requested, got 0"),
        ({"l0": 0.0}, "greater than 0"),
        ({"l1_coefficient": -1.0}, "greater than or equal to 0"),
    ],
)
@pytest.mark.parametrize("kind", [options["kind"] for options in KINDS])
def test_bad_options(kind, options, message):
    with pytest.raises(ValidationError, match=message):
        SAEConfig.of_kind({"kind": kind, "d_sae": 32} | options)


# What an L1 penalty charges


@every_kernel
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("case", ["relu dense", "relu sparse", "relu autograd"])
def test_an_unweighted_l1(case, unit_norm, kernels, precision):
    dense = "dense" if case == "relu dense" else "sparse"
    extra = {"prefixes": (20, D_SAE)} if case == "relu autograd" else {}
    options = {"weight_by_decoder_norm": False} | extra
    made = make_sae(f"relu {dense}", unit_norm, **options)
    engine, judge = make_engine(f"relu {dense}", made, kernels, precision), Unweighted(made)
    engine.dense |= case == "relu autograd"
    called = []
    for name in ("_sparse", "_dense", "_by_autograd"):
        original = getattr(engine, name)
        setattr(engine, name, lambda *a, o=original, n=name: called.append(n) or o(*a))
    for number, x in enumerate(batches(5), 1):
        now, dead = Now.at(number, RATE, 0.7), torch.tensor([2, 60, 66])
        same_terms(with_unit(engine)(x, now, dead), judge.step(x, now, dead))
        if number == 1:
            same_gradients(engine, judge)
    same_weights(engine, judge, 1e-9)
    assert set(called) == {f"_{case.split()[1]}".replace("_autograd", "_by_autograd")}


class Unweighted(Judge):
    """lambda * sum_j z_j."""

    def penalty(self, z: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        return self.config.l1_coefficient * z.sum(dim=1).mean()


def test_weighting_matters_where_rows_are_free():
    made = [make_sae("relu sparse", False, weight_by_decoder_norm=weighted) for weighted in (True, False)]
    x, now, none = batches(1)[0], Now.at(1, RATE, 1.0), torch.zeros(0, dtype=torch.int64)
    one, other = (make_engine("relu sparse", sae).step(x, UNIT, now, none).sparsity for sae in made)
    assert abs(one / other - 1) > 0.1
