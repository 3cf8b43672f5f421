"""JumpReLU: its straight-through estimators, its sparse steps against autograd, its thresholds before and after."""

import pytest
import torch
from torch import Tensor, nn

import sae
from sae import SAE, HeldOut, SAEConfig, TrainConfig, UsageError
from sae.config import parse_config
from sae.engine import Engine
from sae.kernels.precision import Precision
from sae.optim import Now
from sae.sources import as_source
from sae.sparsifiers import JumpReLU
from sae.sparsifiers.jumprelu import Jump, Step
from sae.start import start

BATCH, D_IN, D_SAE, UNIT = 37, 13, 70, 1.7
BANDWIDTH = 0.8
PENALTIES = {
    "price": {"l0_coefficient": 0.02},
    "target": {"l0": 1.5, "l0_coefficient": 0.3},
    "tanh": {"penalty": "tanh", "tanh_scale": 0.7, "l0_coefficient": 0.3},
}
KERNELS = [("native", "fp32"), ("native", "exact"), ("torch", "fp32"), ("reference", "fp32")]
every_penalty = pytest.mark.parametrize("penalty", PENALTIES)
every_kernel = pytest.mark.parametrize(("kernels", "precision"), KERNELS, ids=["-".join(pair) for pair in KERNELS])
both_decoders = pytest.mark.parametrize("unit_norm", [True, False])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours: Tensor, theirs: Tensor, name: str = "") -> None:
    atol = 1e-9 * float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


# The estimators


def test_the_estimators_are_those_published():
    """d z / d theta = -(theta / eps) K((pre - theta) / eps) and d 1[pre > theta] / d theta = -(1 / eps) K(...)."""
    pre, theta, eps = normal(200, 9), normal(9, seed=1).abs(), torch.tensor(0.3, dtype=torch.float64)
    for of, factor, values, through in ((Jump, theta, pre, 1.0), (Step, torch.ones(9), torch.ones(200, 9), 0.0)):
        own_pre, own_theta = pre.clone().requires_grad_(), theta.clone().requires_grad_()
        out, weight = of.apply(own_pre, own_theta, eps), normal(200, 9, seed=2)
        (out * weight).sum().backward()
        assert torch.equal(out, torch.where(pre > theta, values.double(), 0.0))
        near = ((pre - theta) / eps > -0.5) & ((pre - theta) / eps < 0.5)
        assert 20 < near.sum() < 1000
        torch.testing.assert_close(own_theta.grad, (weight * near * -factor / eps).sum(dim=0))
        expected = through * weight * (pre > theta)
        torch.testing.assert_close(torch.zeros_like(pre) if own_pre.grad is None else own_pre.grad, expected)


@every_penalty
def test_the_estimate_is_the_slope_of_the_expected_loss(penalty):
    """Differences of the loss over theta +- eps / 2, on the same samples; a wrong factor is many deviations away."""
    n, d_sae, eps = 400_000, 4, 0.05
    config = SAEConfig.of_kind({"kind": "jumprelu", "d_sae": d_sae, "bandwidth": eps} | PENALTIES[penalty])
    sparsifier = config.build().double()
    W_dec, target = normal(d_sae, 3, seed=1), normal(n, 3, seed=2)
    pre = 0.5 * normal(n, d_sae) + target @ W_dec.T
    with torch.no_grad():
        sparsifier.threshold.copy_(torch.tensor([0.2, 0.6, 1.0, 1.5]))

    def error(codes, W_dec):
        return (codes.dense() @ W_dec - target).square().sum(dim=1).mean()

    def loss() -> Tensor:
        _, of_error, of_penalty = sparsifier.objective(pre, W_dec, error)
        return of_error + of_penalty

    loss().backward()
    for j in range(d_sae):
        ends = []
        for sign in (0.5, -1.0):
            with torch.no_grad():
                sparsifier.threshold[j] += sign * eps
                ends.append(loss())
        with torch.no_grad():
            sparsifier.threshold[j] += 0.5 * eps
        slope = (ends[0] - ends[1]) / eps
        assert sparsifier.threshold.grad[j] == pytest.approx(float(slope), rel=0.1, abs=0.01)
        assert abs(slope) > 0.04


# Steps


def make_engine(penalty: str, unit_norm: bool, kernels: str, precision: Precision, by_autograd: bool, **options):
    """Weights of which the last ten latents seldom fire, some thresholds of 0, and many slots in their bands."""
    shared = {"kind": "jumprelu", "d_sae": D_SAE, "unit_norm_decoder": unit_norm, "bandwidth": BANDWIDTH}
    options = shared | {"aux_coefficient": 0.5, "aux_k": 3} | PENALTIES[penalty] | options
    model = SAE(D_IN, SAEConfig.of_kind(options)).double()
    with torch.no_grad():
        for seed, weight in enumerate((model.encoder, model.W_dec, model.b_enc, model.b_dec)):
            weight.copy_(normal(*weight.shape, seed=seed))
        model.encoder[-10:] *= 0.03
        model.b_enc[:-10] -= 9
        model.b_enc[-10:] = 0.01
        model.sparsifier.threshold.copy_(normal(D_SAE, seed=5).abs())
        model.sparsifier.threshold[::7] = 0
        if unit_norm:
            model.W_dec /= model.W_dec.norm(dim=1, keepdim=True)
    engine = Engine(model, kernels, precision)
    if by_autograd:
        engine.by_autograd = True
    else:
        assert not engine.by_autograd
        engine._by_autograd = None  # to call it would fail
    return engine


def test_a_latent_that_is_raised_learns_what_was_missing(tmp_path, monkeypatch):
    """Half of the latents begin far below 0, where AuxK has nothing to do with them."""
    stream = torch.Generator().manual_seed(0)
    truth = nn.functional.normalize(torch.randn(24, 16, generator=stream), dim=1)
    x = (torch.rand(20_000, 24, generator=stream) * (torch.rand(20_000, 24, generator=stream) < 0.05)) @ truth
    begin = JumpReLU.start_

    def low(self, cuts, b_enc):
        begin(self, cuts, b_enc)
        b_enc[::2] -= 2

    monkeypatch.setattr(JumpReLU, "start_", low)
    dead = {}
    for how in (False, True):
        monkeypatch.setattr(JumpReLU, "raises_dead", how)
        train = {"n_samples": 600_000, "batch_size": 512, "dead_after_samples": 5120}
        made = {"sae": {"kind": "jumprelu", "d_sae": 24, "l0": 1.0}, "train": train, "out": tmp_path / f"{how}"}
        dead[how] = sae.train(sae.TrainConfig.model_validate(made), x, report=False).metrics["metrics/dead"]
    assert dead[False] > 0.4
    assert dead[True] < 0.2


def same_steps(engines, n_steps: int, dead: Tensor) -> None:
    names = ("encoder", "W_dec", "b_enc", "b_dec")
    for number in range(1, n_steps + 1):
        x = UNIT * normal(BATCH, D_IN, seed=100 + number)
        ours, theirs = (engine.step(x, UNIT, Now.at(number, 0.003, 0.7), dead) for engine in engines)
        for name, mine, other in zip(ours._fields, ours, theirs, strict=True):
            torch.testing.assert_close(mine.to(other), other, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        state, expected = (engine.state for engine in engines)
        for name in names:
            close(state.first[name], expected.first[name], name)
            close(getattr(state, name), getattr(expected, name), name)
        (threshold, first, second), (other, first_other, second_other) = (
            engine.own["sparsifier.threshold"] for engine in engines
        )
        close(threshold.detach(), other.detach(), "threshold")
        close(first, first_other, "threshold, first moment")
        close(second, second_other, "threshold, second moment")
        assert torch.equal(state.silent_samples, expected.silent_samples)
        assert torch.equal(state.window_firing, expected.window_firing)
    assert (threshold >= 0).all()


@every_kernel
@both_decoders
@every_penalty
@pytest.mark.parametrize(
    "options",
    [{}, {"prefixes": (3, 20, D_SAE)}, {"prefixes": (50, D_SAE), "tied_bias": False}],
    ids=["one reading", "prefixes", "own centre"],
)
def test_sparse_steps_are_those_of_autograd(penalty, unit_norm, kernels, precision, options):
    engines = [make_engine(penalty, unit_norm, kernels, precision, by, **options) for by in (False, True)]
    chosen = {}

    def watch(codes, decode, sparsity):
        chosen["codes"] = codes
        return JumpReLU.differentiate(engines[0].sae.sparsifier, codes, decode, sparsity)

    engines[0].sae.sparsifier.differentiate = watch
    before = engines[0].sae.sparsifier.threshold.detach().clone()
    same_steps(engines, 1, torch.tensor([2, 60, 64, 69]))
    codes = chosen["codes"]
    assert 20 < (codes.values > 0).sum() < len(codes.values) - 20, "some slots must be silent"
    assert (codes.pre_latents < 0).any(), "some below a threshold of 0"
    same_steps(engines, 5, torch.tensor([2, 60, 64, 69]))
    moved = (engines[0].sae.sparsifier.threshold.detach() - before).abs()
    assert (moved > 0.001).sum() > 15
    assert (engines[0].sae.sparsifier.threshold == 0).any(), "some thresholds must be held at 0"


@every_kernel
def test_too_many_codes_for_their_slots_take_an_autograd_step(kernels, precision):
    engines = [make_engine("target", True, kernels, precision, True) for _ in range(2)]
    engines[0].by_autograd = False
    for engine in engines:
        engine.state.b_enc += 20
    same_steps(engines, 2, torch.zeros(0, dtype=torch.int64))
    assert engines[0].l0 > 0.5 * D_SAE


# Where thresholds start


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"l0": 2.0}, 4.0),
        ({"l0": 0.5}, 2.0),
        ({"l0": 6.0}, 6.0),
        ({"l0_coefficient": 0.1}, 4.0),
        ({"l0": 2.0, "initial_l0": 7.0}, 7.0),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_first_step_is_sparse(options, expected, scale):
    x = scale * normal(4000, 12).float()
    config = TrainConfig(sae={"kind": "jumprelu", "d_sae": 200} | options, train={"precision": "fp32"})
    trainer = start(config, as_source(x), HeldOut(x))
    trainer.engine._by_autograd = None  # to call it would fail
    trainer.step(x)
    assert trainer.engine.l0 == pytest.approx(expected, rel=0.01)


def test_biases_start_so_low_that_thresholds_can_start_small():
    """The default bandwidth is a fifth of the mean cut; pre-latents that fire too seldom already are left alone."""
    for bandwidth, expected in ((None, 0.2), (0.3, 0.3)):
        sparsifier, b_enc = JumpReLU(3, bandwidth, 1.0), torch.ones(3)
        sparsifier.start_(torch.tensor([-1.0, 1.0, 2.0]), b_enc)
        torch.testing.assert_close(b_enc, torch.tensor([1.0, 0.1, -0.8]))
        torch.testing.assert_close(sparsifier.threshold.detach(), torch.tensor([0.0, 0.1, 0.2]))
        assert float(sparsifier.bandwidth) == pytest.approx(expected)


def test_a_bandwidth_is_given_or_comes_from_the_start():
    with pytest.raises(AssertionError, match="start_ comes first"):
        JumpReLU(3, None, 1.0).look_(0, 10, 100)


def test_a_file_without_a_bandwidth_loads():
    saved = {"threshold": torch.tensor([0.1, 0.2, 0.3])}
    for bandwidth in (None, 0.5):
        sparsifier = JumpReLU(3, bandwidth, 1.0)
        sparsifier.load_state_dict(saved)
        assert torch.equal(sparsifier.threshold.detach(), saved["threshold"])
        assert float(sparsifier.bandwidth) == pytest.approx(bandwidth or float("nan"), nan_ok=True)


def test_a_target_is_approached_over_the_whole_run():
    for options, expected in (({"l0": 2.0}, 1.0), ({"l0_coefficient": 0.1}, 0.05)):
        config = TrainConfig(sae={"kind": "jumprelu", "d_sae": 24} | options)
        assert config.sparsity_warmup_fraction == expected
        given = config.train.model_copy(update={"sparsity_warmup_fraction": 0.0})
        assert config.model_copy(update={"train": given}).sparsity_warmup_fraction == 0.0


def test_the_price_of_a_target_rises_ever_faster():
    jumprelu = {"kind": "jumprelu", "l0": 2.0}
    for options in (jumprelu, {"kind": "transcoder", "base": jumprelu}):
        share = SAEConfig.of_kind({"d_sae": 24} | options).sparsity_share
        assert [share(warmed) for warmed in (0.0, 0.5, 1.0)] == pytest.approx([0, 0.2, 1])
    for options in ({"kind": "jumprelu", "l0_coefficient": 0.1}, {"kind": "relu"}):
        assert SAEConfig.of_kind({"d_sae": 24} | options).sparsity_share(0.5) == 0.5


# Where they end


def held_out(sparsifier: JumpReLU, l0: float, bias: float = 0.0) -> float:
    """The mean L0 on other data, after calibration; thresholds and scales differ between latents."""
    scales = torch.linspace(0.2, 2.0, 64)
    with torch.no_grad():
        sparsifier.threshold.copy_(scales)
    pre = scales * (normal(20_000, 64).float() + bias)
    sparsifier.calibrate_(iter(pre[:10_000].split(700)), 10_000)
    return float(sparsifier.select(pre[10_000:]).counts.double().mean())


@pytest.mark.parametrize("l0", [1.7, 4.0, 16.0, 28.3])
def test_calibration_gives_the_l0_asked_for_on_other_data(l0):
    sparsifier = JumpReLU(64, 0.1, 1.0, l0)
    assert held_out(sparsifier, l0) == pytest.approx(l0, rel=0.02)
    assert (sparsifier.threshold >= 0).all()
    shift = (sparsifier.threshold - torch.linspace(0.2, 2.0, 64))[sparsifier.threshold > 0]
    assert shift.max() - shift.min() < 1e-5, "all move by one number"


@pytest.mark.parametrize(("l0", "told"), [(4.0, True), (10.0, False)])
def test_training_that_ended_far_off_says_so(l0, told, caplog):
    held_out(JumpReLU(64, 0.1, 1.0, l0), l0)  # before, a latent fires with probability .16: 10.2 of them do
    lines = [record.getMessage() for record in caplog.records if "training ended at L0 10." in record.getMessage()]
    assert len(lines) == told
    assert all(f"instead of the requested {l0:g};" in line and "raise l0_coefficient=1" in line for line in lines)


def test_where_fewer_are_positive_all_of_them_fire():
    sparsifier = JumpReLU(64, 0.1, 1.0, 40.0)
    assert held_out(sparsifier, 40.0) == pytest.approx(32, rel=0.02)
    assert not sparsifier.threshold.any()


def test_without_a_target_thresholds_stay_as_learnt():
    sparsifier = JumpReLU(64, 0.1, 1.0)
    held_out(sparsifier, 0.0)
    assert torch.equal(sparsifier.threshold, torch.linspace(0.2, 2.0, 64))


def test_rescaled_pre_latents_fire_alike():
    sparsifier, pre = JumpReLU(64, 0.1, 1.0), normal(50, 64).float()
    with torch.no_grad():
        sparsifier.threshold.copy_(torch.linspace(0.1, 1.0, 64))
    before = sparsifier.select(pre).dense()
    sparsifier.rescale_(8.0)
    assert torch.equal(sparsifier.select(8 * pre).dense(), 8 * before)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_run_ends_at_the_l0_asked_for(tmp_path, scale):
    x = scale * normal(20_000, 12).float().abs().pow(2)
    train = {"n_samples": 40_000, "batch_size": 256}
    made = TrainConfig(sae={"kind": "jumprelu", "d_sae": 48, "l0": 3.3}, train=train, out=tmp_path / "run")
    result = sae.train(made, x[:16_000], report=False)
    counts = result.sae.encode(x[16_000:]).counts.double()
    assert counts.mean() == pytest.approx(3.3, rel=0.05)  # calibrated on 400 rows
    assert torch.equal(sae.load(tmp_path / "run").encode(x).values, result.sae.encode(x).values)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a price of sparsity; give l0, the L0 to reach, or l0_coefficient"),
        ({"l0": 24.0}, "l0 must lie below d_sae=24, got 24; lower l0 or raise d_sae"),
        (
            {"l0": 2.0, "initial_l0": 30.0},
            "initial_l0 must lie below d_sae=24, got 30; lower initial_l0 or raise d_sae",
        ),
        ({"l0": 2.0, "penalty": "tanh"}, "penalty tanh has no target, got l0=2; give l0_coefficient instead of l0"),
        ({"l0": 2.0, "bandwidth": 0.0}, "sae.bandwidth: Input should be greater than 0, got 0.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        parse_config({"sae": {"kind": "jumprelu", "d_sae": 24} | options})
