"""Dead latents start anew: what changes and what does not, when, and that it helps."""

import logging
import statistics

import pytest
import torch
from torch import Tensor, nn

import sae
from sae import SAE, SAEConfig, TrainConfig, UsageError, checkpoint
from sae.config import parse_config
from sae.engine import Engine
from sae.optim import Now
from sae.resampling import RAISED_IN, raise_, resample_
from sae.sources import as_source
from sae.sparsifiers import Gated, JumpReLU
from sae.start import start
from sae.trainer import Trainer
from toymodels.streams import generator

BATCH, D_IN, D_SAE, UNIT = 37, 13, 40, 1.7
DEAD = torch.tensor([2, 11, 12, 39])
NO_ONE = torch.zeros(0, dtype=torch.int64)
KINDS = {
    "topk": {"kind": "topk", "k": 5},
    "batchtopk": {"kind": "batchtopk", "k": 2.5},
    "relu": {"kind": "relu"},
    "matching_pursuit": {"kind": "matching_pursuit", "k": 3},
}
KERNELS = [("native", "fp32"), ("native", "bf16"), ("native", "exact"), ("torch", "fp32"), ("reference", "fp32")]
every_kernel = pytest.mark.parametrize(("kernels", "precision"), KERNELS, ids=["-".join(pair) for pair in KERNELS])


def data(n: int) -> list[Tensor]:
    stream = torch.Generator().manual_seed(2)
    return list(UNIT * torch.randn(n, BATCH, D_IN, generator=stream))


def make_engine(kind: str, kernels: str = "native", precision: str = "fp32", **options) -> Engine:
    made = SAE(D_IN, SAEConfig.of_kind({"d_sae": D_SAE} | KINDS[kind] | options))
    made.initialise_(torch.linspace(-0.3, 0.4, D_IN), torch.Generator().manual_seed(0))
    return Engine(made, kernels, precision)


def trained(engine: Engine) -> Engine:
    engine.dense = False
    for number, x in enumerate(data(5), 1):
        engine.step(x, UNIT, Now.at(number, 0.01, 1.0), NO_ONE)
    return engine


@every_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit_norm", [True, False])
def test_what_changes_and_what_stays(kind, kernels, precision, unit_norm):
    if kind == "matching_pursuit" and not unit_norm:
        return
    engine = trained(make_engine(kind, kernels, precision, unit_norm_decoder=unit_norm))
    before, state, a = {name: t.clone() for name, t in engine.saved()[0].items()}, engine.state, data(6)[-1]
    assert resample_(engine, a, UNIT, DEAD, generator(0, "test")) == len(DEAD)
    rows = state.W_dec[DEAD]
    assert (rows - before["sae.W_dec"][DEAD]).norm(dim=1).min() > 0.1
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(DEAD)))
    x = a / UNIT - state.b_dec
    cosines = rows @ (x / x.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(cosines.max(dim=1).values, torch.ones(len(DEAD)))
    assert len(cosines.argmax(dim=1).unique()) == len(DEAD), "no two latents become the same"

    alive = torch.ones(D_SAE, dtype=torch.bool).index_fill_(0, DEAD, False)
    if kind != "matching_pursuit":
        length = before["sae.encoder"][alive].norm(dim=1).mean()
        torch.testing.assert_close(state.encoder[DEAD], (0.2 if kind == "relu" else 1.0) * length * rows)
    assert not state.b_enc[DEAD].any()
    assert not state.silent_samples[DEAD].any()
    assert torch.equal(state.norms, before["norms"]) if unit_norm else (state.norms[DEAD] - 1).abs().max() < 1e-6
    after = engine.saved()[0]
    for name in ("encoder", "W_dec", "b_enc"):
        assert torch.equal(after[f"sae.{name}"][alive], before[f"sae.{name}"][alive])
        for moment in (f"adam.{name}.exp_avg", f"adam.{name}.exp_avg_sq"):
            if moment in after:
                assert not after[moment][DEAD].any()
                assert torch.equal(after[moment][alive], before[moment][alive])
                assert before[moment].any() or (kind, name) == ("matching_pursuit", "b_enc")
    assert torch.equal(after["sae.b_dec"], before["sae.b_dec"])
    assert torch.equal(after["adam.b_dec.exp_avg"], before["adam.b_dec.exp_avg"])
    assert torch.equal(after["silent_samples"][alive], before["silent_samples"][alive])


@every_kernel
def test_kernels_forget_the_rows_that_were(kernels, precision):
    """What they keep of the weights (rounded rows, norms) must not outlive them: the next step is a fresh engine's."""
    engine = trained(make_engine("topk", kernels, precision, unit_norm_decoder=False))
    resample_(engine, data(6)[-1], UNIT, DEAD, generator(0, "test"))
    tensors, values = engine.saved()
    fresh = make_engine("topk", kernels, precision, unit_norm_decoder=False)
    fresh.restore({name: tensor.clone() for name, tensor in tensors.items()}, values)
    for x in data(8)[-2:]:
        for own in (engine, fresh):
            own.step(x, UNIT, Now.at(6, 0.01, 1.0), NO_ONE)
    for name, tensor in engine.saved()[0].items():
        assert torch.equal(tensor, fresh.saved()[0][name]), name


def test_moments_of_own_parameters_start_anew():
    engine = make_engine("topk")
    gain = nn.Parameter(torch.ones(D_SAE))
    engine.own = {"gain": (gain, torch.ones(D_SAE), torch.ones(D_SAE)), "one": (gain[:1], torch.ones(1), torch.ones(1))}
    resample_(engine, data(1)[0], UNIT, DEAD, generator(0, "test"))
    expected = torch.ones(D_SAE).index_fill_(0, DEAD, 0.0)
    assert torch.equal(engine.own["gain"][1], expected)
    assert torch.equal(engine.own["gain"][2], expected)
    assert torch.equal(engine.own["one"][1], torch.ones(1))


@pytest.mark.parametrize(("sparsifier", "name", "value"), [(JumpReLU, "threshold", 5.0), (Gated, "c_mag", -5.0)])
def test_own_parameters_let_a_latent_fire_again(sparsifier, name, value):
    engine = make_engine("topk")
    own = engine.sae.sparsifier = sparsifier(D_SAE, 0.1, 0.1) if sparsifier is JumpReLU else sparsifier(D_SAE, 0.1)
    getattr(own, name).data.fill_(value)
    resample_(engine, data(1)[0], UNIT, DEAD, generator(0, "test"))
    expected = torch.full((D_SAE,), value).index_fill_(0, DEAD, 0.0)
    assert torch.equal(getattr(own, name).detach(), expected)


def test_rows_are_drawn_by_their_squared_loss():
    engine = make_engine("relu")
    engine.state.b_dec.zero_()
    a, drawn = torch.zeros(5, D_IN), []
    a[1, 0], a[3, 1] = UNIT, UNIT * 2**0.5  # losses 1 and 2, drawn 1 : 4
    for seed in range(1000):
        engine.state.b_enc.fill_(-100)  # nothing fires: the loss of a row is |x|^2
        resample_(engine, a, UNIT, DEAD[:1], generator(seed, "test"))
        drawn.append(int(engine.state.W_dec[DEAD[0]].argmax()))
    assert drawn.count(1) / 1000 == pytest.approx(0.8, abs=0.04)


def test_where_no_row_is_left_latents_stay_as_they_are():
    engine = make_engine("topk")
    before, a = engine.state.W_dec.clone(), engine.state.b_dec.expand(5, D_IN).clone()
    assert resample_(engine, a, 1.0, DEAD, generator(0, "test")) == 0
    a[1:3] += torch.randn(2, D_IN)
    assert resample_(engine, a, 1.0, DEAD, generator(0, "test")) == 2
    changed = (engine.state.W_dec != before).any(dim=1)
    assert changed.nonzero().squeeze(1).tolist() == DEAD[:2].tolist()
    assert resample_(engine, torch.full((5, D_IN), torch.nan), 1.0, DEAD, generator(0, "test")) == 0


# In a run


def make_trainer(every: int | None, n_steps: int = 100, **train) -> Trainer:
    config = TrainConfig.model_validate(
        {
            "sae": KINDS["topk"] | {"d_sae": D_SAE, "aux_coefficient": 0.0, "resample_every": every},
            "train": {"n_samples": n_steps * BATCH, "batch_size": BATCH, "dead_after_samples": 3 * BATCH} | train,
        }
    )
    made = SAE(D_IN, config.sae)
    made.initialise_(torch.zeros(D_IN), torch.Generator().manual_seed(0))
    made.encoder.data[-11:] *= 0.01  # these never win
    return Trainer(made, config, UNIT)


@pytest.mark.parametrize(
    ("every", "train", "expected"),
    [(25, {}, [30, 50]), (35, {"decay_fraction": 0.0}, [40, 70]), (3, {"decay_fraction": 0.6}, [10, 20, 30])],
)
def test_when(every, train, expected, monkeypatch):
    trainer, steps = make_trainer(every * BATCH, **train), []
    monkeypatch.setattr("sae.trainer.resample_", lambda *given: steps.append(trainer.n_steps_done) or 1)
    for x in data(100):
        trainer.step(x)
    assert steps == expected
    assert trainer.take_window()[0]["sparsity/resampled"] == len(expected)


def test_without_the_option_nothing_happens(monkeypatch):
    trainer = make_trainer(None)
    monkeypatch.setattr("sae.trainer.resample_", None)  # to call it would fail
    for x in data(40):
        trainer.step(x)
    assert len(trainer.dead) >= 11
    assert "sparsity/resampled" not in trainer.take_window()[0]


def test_it_is_told(caplog):
    trainer = make_trainer(10 * BATCH)
    with caplog.at_level(logging.INFO, "sae"):
        for x in data(11):
            trainer.step(x)
    n = trainer.n_resampled
    assert f"step 10: {n} of {n} dead latents restarted" in caplog.text
    assert n >= 11
    assert len(trainer.dead) == 0


def test_resuming_is_bitwise(tmp_path):
    whole, first = make_trainer(20 * BATCH), make_trainer(20 * BATCH)
    for x in data(70):
        whole.step(x)
    for x in data(70)[:33]:
        first.step(x)
    checkpoint.save(tmp_path, 33, *first.state(), keep=1)
    resumed = make_trainer(20 * BATCH)
    resumed.load_state(*checkpoint.load(checkpoint.latest(tmp_path)))
    for x in data(70)[33:]:
        resumed.step(x)
    assert whole.n_resampled == resumed.n_resampled >= first.n_resampled > 0
    for name, tensor in whole.state()[0].items():
        assert torch.equal(tensor, resumed.state()[0][name]), name


@pytest.mark.parametrize(("kind", "share"), [("topk", 0.5), ("batchtopk", 0.95)])
def test_it_revives(kind, share, tmp_path):
    """From an untied start and with rows of norm 1 many latents never win, and nothing brings them back. A budget of
    the whole batch leaves fewer behind, and fewer to win back: means over four seeds."""
    stream = torch.Generator().manual_seed(0)
    truth = nn.functional.normalize(torch.randn(48, 16, generator=stream), dim=1)
    x = (torch.rand(40_000, 48, generator=stream) * (torch.rand(40_000, 48, generator=stream) < 0.04)) @ truth

    def means(every: int | None) -> tuple[float, float]:
        found = []
        for seed in range(4):
            config = TrainConfig.model_validate(
                {
                    "sae": {"kind": kind, "d_sae": 48, "k": 2, "aux_coefficient": 0.0, "tied_init": False}
                    | {"resample_every": every, "unit_norm_decoder": True},
                    "train": {"n_samples": 153_600, "batch_size": 256, "dead_after_samples": 2560, "seed": seed},
                    "out": tmp_path / f"{every}-{seed}",
                }
            )
            found.append(sae.train(config, x, report=False).metrics)
        return tuple(statistics.fmean(one[name] for one in found) for name in ("metrics/dead", "metrics/fvu"))

    (dead, fvu), (still_dead, better) = means(None), means(10_000)
    assert dead > 0.08
    assert still_dead < share * dead
    assert better < 0.98 * fvu


def test_an_interval_that_never_comes_is_refused():
    run = {"sae": {"kind": "topk", "d_sae": 24, "k": 3}, "train": {"n_samples": 10_000, "batch_size": 100}}
    assert parse_config(run, ["--sae.resample_every", "6999"]).sae.resample_every == 6999
    with pytest.raises(UsageError, match=r"must lie below 7000 samples, where resampling ends .*got 7000; lower it"):
        parse_config(run, ["--sae.resample_every", "7000"])


def test_negative_biases_of_dead_latents_shrink_and_nothing_else():
    model = SAE(D_IN, SAEConfig.of_kind({"kind": "topk", "d_sae": D_SAE, "k": 2}))
    model.initialise_(torch.zeros(D_IN), torch.Generator().manual_seed(0))
    engine = Engine(model)
    engine.state.b_enc.copy_(torch.linspace(-1, 1, D_SAE))
    before = {name: tensor.clone() for name, tensor in engine.saved()[0].items()}
    dead = torch.tensor([0, 1, D_SAE - 1])
    raise_(engine, dead, 10)
    after = engine.saved()[0]
    expected = before.pop("sae.b_enc")
    expected[:2] *= 1 - 10 / RAISED_IN
    torch.testing.assert_close(after["sae.b_enc"], expected)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("kind", "aux", "raised"), [("batchtopk", 1.0, True), ("batchtopk", 0.0, False), ("topk", 1.0, False)]
)
def test_the_trainer_raises_dead_latents_where_auxk_may_not_reach_them(kind, aux, raised, tmp_path):
    options = {"kind": kind, "d_sae": 24, "k": 2, "aux_coefficient": aux}
    train = {"n_samples": 10_000, "batch_size": 100, "dead_after_samples": 100}
    config = TrainConfig.model_validate({"sae": options, "train": train, "out": tmp_path / "run"})
    x = torch.randn(4000, D_IN, generator=torch.Generator().manual_seed(0))
    source = as_source(x)
    trainer = start(config, source, source.held_out("calibration", 100))
    trainer.engine.state.silent_samples[3] = 1000
    trainer.engine.state.b_enc[3:5] = -1.0
    trainer.look()
    assert trainer.engine.state.b_enc[4] == -1
    assert (trainer.engine.state.b_enc[3] > -1) == raised
