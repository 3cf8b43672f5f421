"""The engine's steps against a judge written from the definition: dense, by autograd, in float64."""

import copy
import logging
import math
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sae import SAE, SAEConfig, SparseCodes, Sparsifier, TrainConfig, checkpoint
from sae.engine import Engine, Terms
from sae.errors import UsageError
from sae.kernels import blocks, sparse_share
from sae.kernels.base import WEIGHTS
from sae.kernels.build import CannotBuild
from sae.optim import BETA1, BETA2, Now
from sae.trainer import Trainer

BATCH, D_IN, D_SAE = 37, 13, 70
UNIT, ALPHA, RATE = 1.7, 0.5, 0.003
CASES = {
    "topk": {"kind": "topk", "k": 5},
    "batchtopk": {"kind": "batchtopk", "k": 2.3},
    "relu dense": {"kind": "relu", "l1_coefficient": 0.3},
    "relu sparse": {"kind": "relu", "l1_coefficient": 0.3},
}
KERNELS = [("native", "fp32"), ("native", "exact"), ("torch", "fp32"), ("reference", "fp32")]
NO_ONE = torch.zeros(0, dtype=torch.int64)
every_case = pytest.mark.parametrize("case", CASES)
every_kernel = pytest.mark.parametrize(("kernels", "precision"), KERNELS, ids=["-".join(pair) for pair in KERNELS])
both_decoders = pytest.mark.parametrize("unit_norm", [True, False])


def make_sae(case: str, unit_norm: bool = True, dtype: torch.dtype = torch.float64, **options) -> SAE:
    """Weights of which the last ten latents seldom win: they die, and AuxK has something to give them."""
    shared = {"d_sae": D_SAE, "unit_norm_decoder": unit_norm, "aux_coefficient": ALPHA, "aux_k": 3}
    sae = SAE(D_IN, SAEConfig.of_kind(shared | CASES[case] | options)).to(dtype)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (sae.encoder, sae.W_dec, sae.b_enc, sae.b_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=stream))
        sae.encoder[-10:] *= 0.03
        sae.b_enc[-10:] = -0.4 if case == "relu sparse" else 0.01
        sae.b_enc[:-10] -= {"relu dense": 1, "relu sparse": 11}.get(case, 8)  # TopK: some rows have few positives
        if unit_norm:
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        if sae.centre is not None:
            sae.centre.copy_(0.5 * sae.b_dec)
    return sae


def make_engine(case: str, sae: SAE, kernels: str = "native", precision: str = "fp32") -> Engine:
    engine = Engine(sae, kernels, precision)
    engine.dense = case == "relu dense"
    return engine


def batches(n: int, scale: float = UNIT, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    stream = torch.Generator().manual_seed(2)
    return [(scale * torch.randn(BATCH, D_IN, generator=stream)).to(dtype) for _ in range(n)]


def close(ours: Tensor, theirs: Tensor, tolerance: float, name: str = "") -> None:
    atol = tolerance * float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


class Judge:
    """x_hat = z W_dec + b_dec, a loss, autograd, torch's Adam; rows kept at norm 1 by projection and division."""

    def __init__(self, sae: SAE) -> None:
        self.config = sae.config
        self.sparsifier = copy.deepcopy(sae.sparsifier)
        self.weights = {name: dict(sae.named_parameters())[name].detach().clone().requires_grad_() for name in WEIGHTS}
        self.optimizer = torch.optim.Adam([*self.weights.values(), *self.sparsifier.parameters()], lr=0.0)
        self.centre = None if sae.centre is None else sae.centre.clone()
        self.silent = torch.zeros(sae.d_sae, dtype=torch.int64)
        self.window = torch.zeros_like(self.silent)
        self.gradients: dict[str, Tensor] = {}
        self.order = torch.arange(sae.d_sae)  # in which latents fill the prefixes

    def select(self, pre: Tensor) -> Tensor:
        kind = self.config.kind
        if not type(self.sparsifier).__module__.startswith("sae.sparsifiers"):
            return self.sparsifier(pre).dense()
        if kind == "topk":
            chosen = torch.zeros_like(pre).scatter(1, pre.topk(self.config.k, dim=1).indices, 1.0)
            return (pre * chosen).relu()
        if kind in ("batchtopk", "matryoshka"):
            n = round(self.config.k * len(pre))
            return (pre * (pre >= pre.detach().flatten().sort(descending=True).values[n - 1])).relu()
        return pre.relu()

    def penalty(self, z: Tensor, W_dec: Tensor) -> Tensor:
        own = self.sparsifier.penalty(SparseCodes(z, None, z.shape[1]), W_dec)
        if not type(self.sparsifier).__module__.startswith("sae.sparsifiers"):
            return z.new_zeros(()) if own is None else own
        weight = self.config.l1_coefficient if self.config.kind == "relu" else 0.0
        return weight * (z * W_dec.norm(dim=1)).sum(dim=1).mean()

    def step(self, activations: Tensor, now: Now, dead: Tensor) -> Terms:
        encoder, W_dec, b_enc, b_dec = (self.weights[name] for name in WEIGHTS)
        x = activations / UNIT

        def pre_latents(read: Tensor) -> Tensor:
            return (read - (b_dec if self.centre is None else self.centre)) @ encoder.T + b_enc

        pre = for_aux = pre_latents(x)
        z = self.select(pre)
        if getattr(self.config, "refine", 0):
            read = x + self.config.refine * (x - z @ W_dec - b_dec)
            z, for_aux = self.select(pre_latents(read)), pre_latents(read.detach())
        x_hat = z @ W_dec + b_dec
        mse = (x - x_hat).square().sum(dim=1).mean()
        ends = self.config.widths
        parts = [self.order[start:end] for start, end in zip((0, *ends), ends, strict=False)]
        left, readings = x - b_dec, []
        for part in parts:
            left = (left.detach() if self.config.detach_prefixes and readings else left) - z[:, part] @ W_dec[part]
            readings.append(left.square().sum(dim=1).mean())
        readings[-1] = mse
        shares = x.new_tensor(self.config.prefix_weights or [1.0] * len(ends))
        error = (torch.stack(readings) * shares).sum() / shares.sum()
        penalty = now.sparsity * self.penalty(z, W_dec)
        auxiliary = x.new_zeros(())
        if len(dead):
            largest = for_aux[:, dead].topk(min(self.config.aux_k, len(dead)), dim=1)
            sketch = torch.zeros_like(for_aux[:, dead]).scatter(1, largest.indices, largest.values.relu()) @ W_dec[dead]
            auxiliary = ((x - x_hat).detach() - sketch).square().sum(dim=1).mean()
        self.optimizer.zero_grad()
        (error + penalty + self.config.aux_coefficient * auxiliary).backward()
        with torch.no_grad():
            if self.config.unit_norm_decoder:
                W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
            self.gradients = {name: weight.grad.clone() for name, weight in self.weights.items()}
            self.optimizer.param_groups[0]["lr"] = float(now.rate)
            self.optimizer.step()
            if self.config.unit_norm_decoder:
                W_dec /= W_dec.norm(dim=1, keepdim=True)
            fires = (z > 0).sum(dim=0)
            self.silent = torch.where(fires > 0, 0, self.silent + len(x))
            self.window += fires
        self.z = z.detach()
        return Terms(*(t.detach() for t in (error, mse, auxiliary, penalty, (z > 0).sum() / len(x))))


def same_terms(ours: Terms, theirs: Terms) -> None:
    for name, mine, other in zip(Terms._fields, ours, theirs, strict=True):
        rtol = 1e-6 if name == "l0" else 1e-10  # a count is divided in float32 or in float64
        torch.testing.assert_close(mine.to(other), other, rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def same_weights(engine: Engine, judge: Judge, tolerance: float) -> None:
    for name, weight in engine.state.weights():
        close(weight, judge.weights[name].detach(), tolerance, name)
    assert torch.equal(engine.state.silent_samples, judge.silent)
    assert torch.equal(engine.state.window_firing, judge.window)


def same_gradients(engine: Engine, judge: Judge) -> None:
    """After one step the moments are (1 - beta) times the gradient, and its square: Adam hides no scale there."""
    for name in WEIGHTS:
        g = judge.gradients[name]
        close(engine.state.first[name] / (1 - BETA1), g, 1e-10, name)
        close(engine.state.second[name] / (1 - BETA2), g.square(), 1e-10, name)


# The step


@every_kernel
@both_decoders
@every_case
@pytest.mark.parametrize("dead", [[], [2, 3, 11, 60, 64, 65, 66, 69]], ids=["alive", "aux"])
def test_one_step(case, unit_norm, kernels, precision, dead):
    sae = make_sae(case, unit_norm)
    engine, judge = make_engine(case, sae, kernels, precision), Judge(sae)
    x, dead = batches(1)[0], torch.tensor(dead, dtype=torch.int64)
    terms, expected = (by(x, Now.at(1, RATE, 0.7), dead) for by in (with_unit(engine), judge.step))
    if case == "topk":
        assert (judge.z > 0).sum(dim=1).min() < sae.config.k, "some rows must have fewer than k positives"
    if case == "relu sparse":
        share = (judge.z > 0).double().mean()
        assert 0 < share < sparse_share(sae.W_dec, "exact"), "this must be a sparse step"
    assert (expected.auxiliary > 0) == bool(len(dead))
    same_terms(terms, expected)
    same_gradients(engine, judge)
    same_weights(engine, judge, 1e-10)


@every_kernel
@both_decoders
@every_case
@pytest.mark.parametrize(
    "options",
    [{"prefixes": (3, 20, D_SAE)}, {"tied_bias": False}, {"prefixes": (50, D_SAE), "tied_bias": False}],
    ids=["prefixes", "own centre", "both"],
)
def test_readings_and_a_centre_of_its_own(case, unit_norm, kernels, precision, options):
    sae = make_sae(case, unit_norm, **options)
    engine, judge, dead = make_engine(case, sae, kernels, precision), Judge(sae), torch.tensor([2, 60, 64, 69])
    for number, x in enumerate(batches(5), 1):
        terms, expected = (by(x, Now.at(number, RATE, 0.7), dead) for by in (with_unit(engine), judge.step))
        same_terms(terms, expected)
        if number == 1:
            assert ("prefixes" in options) == bool((expected.error - expected.mse).abs() > 0.01)
            same_gradients(engine, judge)
    same_weights(engine, judge, 1e-9)


def with_unit(engine: Engine):
    return lambda x, now, dead: engine.step(x, UNIT, now, dead)


def hundred_steps(step, silent):
    """Runs them; returns the last terms, and whether AuxK ever had a latent to revive."""
    dead, revived = NO_ONE, False
    for number, x in enumerate(batches(100)):
        if number % 10 == 0:
            dead = (silent() >= 3 * BATCH).nonzero().squeeze(1)
        terms = step(x, Now.at(number + 1, RATE * (1 - number / 200), number / 100), dead)
        revived |= bool(terms.auxiliary > 0)
    return terms, revived


@cache
def judged(case: str, unit_norm: bool) -> tuple[Judge, Terms]:
    judge = Judge(make_sae(case, unit_norm))
    terms, revived = hundred_steps(judge.step, lambda: judge.silent)
    assert revived, "the case must hold dead latents"
    return judge, terms


@every_kernel
@both_decoders
@every_case
def test_a_hundred_steps(case, unit_norm, kernels, precision):
    judge, expected = judged(case, unit_norm)
    engine = make_engine(case, make_sae(case, unit_norm), kernels, precision)
    terms, _ = hundred_steps(with_unit(engine), lambda: engine.state.silent_samples)
    torch.testing.assert_close(terms.mse, expected.mse, rtol=1e-8, atol=0)
    same_weights(engine, judge, 1e-8)


@pytest.mark.parametrize("precision", ["fp32", "exact"])
@both_decoders
@every_case
def test_blocks_of_rows_give_the_same_step(case, unit_norm, precision, monkeypatch):
    for name in ("BLOCK_ENTRIES", "DENSE_BLOCK_ENTRIES"):
        monkeypatch.setattr(f"sae.kernels.base.{name}", 4 * D_SAE)
    monkeypatch.setattr("sae.kernels.small.ENTRIES", 0)
    assert [block.stop - block.start for block in blocks(BATCH, D_SAE, 4 * D_SAE)] == [4] * 9 + [1]
    sae = make_sae(case, unit_norm)
    engine, judge = make_engine(case, sae, "native", precision), Judge(sae)
    for step, x in enumerate(batches(2), 1):
        same_terms(
            *(by(x, Now.at(step, RATE, 0.7), torch.tensor([2, 60, 69])) for by in (with_unit(engine), judge.step))
        )
    same_weights(engine, judge, 1e-10)


def test_the_last_batch_may_be_smaller():
    sae = make_sae("topk")
    engine, judge = make_engine("topk", sae), Judge(sae)
    for number, (x, rows) in enumerate(zip(batches(3), (BATCH, 1, 5), strict=True)):
        engine.step(x[:rows], UNIT, Now.at(number + 1, RATE, 1.0), NO_ONE)
        judge.step(x[:rows], Now.at(number + 1, RATE, 1.0), NO_ONE)
    same_weights(engine, judge, 1e-10)


def test_counters():
    sae = make_sae("topk")
    with torch.no_grad():
        sae.b_enc[7] = -1e6
    engine = make_engine("topk", sae)
    fired = torch.zeros(D_SAE, dtype=torch.int64)
    for number, x in enumerate(batches(3)):
        pre = (x / UNIT - sae.b_dec) @ sae.W_enc + sae.b_enc
        fired += (sae.sparsifier(pre).dense() > 0).sum(dim=0)
        terms = engine.step(x, UNIT, Now.at(number + 1, RATE, 1.0), NO_ONE)
    assert engine.state.silent_samples[7] == 3 * BATCH
    assert torch.equal(engine.state.window_firing, fired)
    assert (engine.state.silent_samples[fired == 0] == 3 * BATCH).all()
    assert (engine.state.silent_samples == 0).any()
    assert engine.l0 == terms.l0


# Sparsifiers of one's own


class Squared(Sparsifier):
    """z = gain * max(0, pre)^2, with a penalty of its own: nothing that the kernels know."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, D_SAE))

    def forward(self, pre_latents: Tensor) -> SparseCodes:
        return SparseCodes(self.gain * pre_latents.relu().square(), None, pre_latents.shape[1])

    def penalty(self, codes: SparseCodes, W_dec: Tensor) -> Tensor:
        return 0.1 * codes.values.square().sum(dim=1).mean() + 0.01 * W_dec.pow(4).sum()


class PositiveTop(Sparsifier):
    """TopK, which pays an L1 penalty as well."""

    passes_pre_latents = True
    l1_coefficient = 0.2

    def forward(self, pre_latents: Tensor) -> SparseCodes:
        values, indices = pre_latents.topk(4, dim=1)
        return SparseCodes(values.relu(), indices, pre_latents.shape[1])


@every_kernel
@both_decoders
@pytest.mark.parametrize("make", [Squared, PositiveTop])
def test_a_sparsifier_of_ones_own(make, unit_norm, kernels, precision):
    sae = make_sae("topk", unit_norm)
    sae.sparsifier = make().double()
    engine, judge = Engine(sae, kernels, precision), Judge(sae)
    dead = torch.tensor([3, 60, 66])
    for number, x in enumerate(batches(10)):
        now = Now.at(number + 1, RATE, 0.7)
        same_terms(engine.step(x, UNIT, now, dead), judge.step(x, now, dead))
        if number == 0:
            same_gradients(engine, judge)
    same_weights(engine, judge, 1e-9)
    for ours, theirs in zip(sae.sparsifier.parameters(), judge.sparsifier.parameters(), strict=True):
        close(ours.detach(), theirs.detach(), 1e-9)
        assert (ours.detach() - torch.linspace(0.5, 1.5, D_SAE)).abs().max() > RATE


def test_parameters_of_a_sparsifier_are_saved_and_restored():
    runs = []
    for interrupted in (False, True):
        sae = make_sae("topk")
        sae.sparsifier = Squared().double()
        engine = Engine(sae, "native", "fp32")
        for number, x in enumerate(batches(6)):
            if interrupted and number == 3:
                tensors, values = engine.saved()
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
                sae = make_sae("topk")
                sae.sparsifier = Squared().double()
                engine = Engine(sae, "native", "fp32")
                engine.restore(tensors, values)
            engine.step(x, UNIT, Now.at(number + 1, RATE, 1.0), NO_ONE)
        runs.append(engine.saved()[0])
    assert "adam.sparsifier.gain.exp_avg" in runs[0]
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@every_kernel
def test_the_example_sparsifier_goes_sparse(kernels, precision, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "docs" / "examples")
    monkeypatch.delitem(sys.modules, "my_sparsifier", raising=False)
    monkeypatch.setattr(SAEConfig, "kinds", dict(SAEConfig.kinds))
    sparsifier = __import__("my_sparsifier").GroupMax(10)
    engines = []
    for by_autograd in (False, True):
        sae = make_sae("topk")
        sae.sparsifier = sparsifier
        engine = Engine(sae, kernels, precision)
        assert not engine.by_autograd
        if by_autograd:
            engine.by_autograd = True
        else:
            engine._by_autograd = None  # to call it would fail
        engines.append(engine)
    for number, x in enumerate(batches(10)):
        ours, theirs = (e.step(x, UNIT, Now.at(number + 1, RATE, 1.0), torch.tensor([60, 66])) for e in engines)
        same_terms(ours, theirs)
    for (name, weight), (_, expected) in zip(*(e.state.weights() for e in engines), strict=True):
        close(weight, expected, 1e-9, name)


# Too many codes for their slots


@every_kernel
@both_decoders
def test_a_relu_with_too_many_codes_takes_a_dense_step(unit_norm, kernels, precision):
    engines = [make_engine("relu dense", make_sae("relu dense", unit_norm), kernels, precision) for _ in range(2)]
    engines[0].dense = False
    for number, x in enumerate(batches(3)):
        ours, theirs = (e.step(x, UNIT, Now.at(number + 1, RATE, 1.0), NO_ONE) for e in engines)
        assert ours.l0 > 2 * sparse_share(engines[0].state.encoder, "fp32") * D_SAE
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for (_, weight), (_, expected) in zip(*(e.state.weights() for e in engines), strict=True):
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("precision", ["fp32", "exact"])
def test_a_tie_too_wide_for_its_slots_takes_an_autograd_step(precision):
    sae = make_sae("batchtopk", k=0.5)
    with torch.no_grad():  # integers: every pre-latent of a row is the same number, exactly
        sae.encoder.copy_(sae.encoder[:1].round().expand(D_SAE, D_IN))
        sae.b_enc.fill_(20)
        sae.b_dec.zero_()
    engine, judge = Engine(sae, "native", precision), Judge(sae)
    x = UNIT * batches(1)[0][:1].round().expand(BATCH, D_IN).contiguous()
    called = []
    original = engine._by_autograd
    engine._by_autograd = lambda *arguments: called.append(1) or original(*arguments)
    same_terms(with_unit(engine)(x, Now.at(1, RATE, 1.0), NO_ONE), judge.step(x, Now.at(1, RATE, 1.0), NO_ONE))
    assert called
    assert (judge.z > 0).all(), "all tie, all fire"
    same_gradients(engine, judge)


# What a run depends on


def make_trainer(kind: str, kernels: str) -> Trainer:
    options = {"relu": {"l1_coefficient": 0.1}, "batchtopk": {"k": 2.5}, "topk": {"k": 3}}[kind]
    config = TrainConfig.model_validate(
        {
            "sae": {"kind": kind, "d_sae": 200, **options},
            "train": {"n_samples": 50 * 64, "batch_size": 64, "dead_after_samples": 1000, "kernels": kernels},
        }
    )
    sae = SAE(8, config.sae)
    sae.initialise_(torch.zeros(8), torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc.sub_(2.2 if kind == "relu" else 0.0)
    return Trainer(sae, config, 1.0)


def train(trainer: Trainer, until: int) -> Trainer:
    """50 batches in all; from the 35th on of another scale, so that a ReLU turns dense."""
    stream = torch.Generator().manual_seed(3)
    for number in range(until):
        x = torch.randn(64, 8, generator=stream) * (300.0 if number >= 35 else 1.0)
        if number == trainer.n_steps_done:
            trainer.step(x)
    return trainer


def same_state(ours: Trainer, theirs: Trainer) -> None:
    (tensors, values), (expected, expected_values) = ours.state(), theirs.state()
    assert values == expected_values
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]) or bool(tensor.isnan().all() & expected[name].isnan().all()), name


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_a_relu_turns_sparse_and_dense_by_its_l0_alone(kernels, caplog):
    with caplog.at_level(logging.INFO, "sae"):
        trainer, dense, l0 = make_trainer("relu", kernels), [], []
        for number in range(50):
            train(trainer, number + 1)
            dense.append(trainer.state()[1]["dense"])
            l0.append(float(trainer.engine.l0))
    switches = [record.message for record in caplog.records if "steps go" in record.message]
    assert [text.split(":")[0] for text in switches] == ["step 10", "step 40"]
    assert [text.split()[-1] for text in switches] == ["sparse", "dense"]
    assert f"{l0[9] / 2:.1f} % of latents fire" in switches[0]
    for number in range(10, 50):
        assert dense[number] == (l0[number // 10 * 10 - 1] >= 200 * sparse_share(trainer.engine.state.encoder, "fp32"))
    assert dense == [True] * 10 + [False] * 30 + [True] * 10


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("kind", ["relu", "batchtopk", "topk"])
def test_resuming_is_bitwise_whatever_the_steps_are(kind, kernels, tmp_path):
    """Dense, sparse, sparse with a batch that overflows, dense again; and where the scale of the data changes."""
    first, whole = make_trainer(kind, kernels), train(make_trainer(kind, kernels), 50)
    for stop in (7, 23, 35, 37):
        tensors, values = train(first, stop).state()
        checkpoint.save(tmp_path, stop, tensors, values, keep=1)
        resumed = make_trainer(kind, kernels)
        resumed.load_state(*checkpoint.load(checkpoint.latest(tmp_path)))
        same_state(train(resumed, 50), whole)


def test_a_batch_of_another_scale_stays_sparse():
    trainer = make_trainer("batchtopk", "native")
    trainer.engine._by_autograd = None  # to call it would fail
    train(trainer, 50)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("kind", ["relu", "batchtopk", "topk"])
def test_a_run_repeats_itself_bit_for_bit(kind, kernels):
    same_state(train(make_trainer(kind, kernels), 50), train(make_trainer(kind, kernels), 50))


@pytest.mark.parametrize("case", ["topk", "batchtopk", "relu sparse"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "exact"])
def test_two_threads_change_no_bit(case, precision):
    """Given the same scores: the BLAS's own sums may depend on how many threads share them."""
    engines = []
    for threads in (1, 2):
        engine = make_engine(case, make_sae(case, False, torch.float32), "native", precision)
        engine.kernels.scores = alone(engine.kernels.scores, threads)
        try:
            torch.set_num_threads(threads)
            for number, x in enumerate(batches(10, dtype=torch.float32)):
                engine.step(x, UNIT, Now.at(number + 1, RATE, 1.0), NO_ONE)
        finally:
            torch.set_num_threads(1)
        engines.append(engine)
    one, two = (engine.saved()[0] for engine in engines)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]) or tensor.isnan().all(), name


def alone(scores, threads: int):
    def by_one_thread(*arguments):
        torch.set_num_threads(1)
        try:
            return scores(*arguments)
        finally:
            torch.set_num_threads(threads)

    return by_one_thread


@pytest.mark.parametrize("began", ["native in bf16", "torch", "native exact"])
def test_a_run_goes_on_as_it_began(began, monkeypatch):
    """Whatever `auto` would choose on the machine that resumes it."""
    case = "topk"
    monkeypatch.setattr("sae.kernels.has_bf16_units", lambda device: began == "native in bf16")
    asked = {"native in bf16": ("auto", "auto"), "torch": ("torch", "auto"), "native exact": ("native", "exact")}
    first = make_engine(case, make_sae(case, True, torch.float32), *asked[began])
    x = batches(6, dtype=torch.float32)
    for number in range(3):
        first.step(x[number], UNIT, Now.at(number + 1, RATE, 1.0), NO_ONE)
    tensors, values = first.saved()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    monkeypatch.setattr("sae.kernels.has_bf16_units", lambda device: began != "native in bf16")
    second = make_engine(case, make_sae(case, True, torch.float32), "auto", "auto")
    assert (second.kernels.name, second.kernels.precision) != (first.kernels.name, first.kernels.precision)
    second.restore(tensors, values)
    assert (second.kernels.name, second.kernels.precision) == (first.kernels.name, first.kernels.precision)
    for number in range(3, 6):
        for engine in (first, second):
            engine.step(x[number], UNIT, Now.at(number + 1, RATE, 1.0), NO_ONE)
    for name, tensor in first.saved()[0].items():
        assert torch.equal(tensor, second.saved()[0][name]), name


@pytest.mark.parametrize(("kernels", "precision"), [*KERNELS, ("native", "bf16"), ("torch", "bf16")])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@every_case
def test_bad_activations_show_in_the_loss(case, bad, kernels, precision):
    engine = make_engine(case, make_sae(case, True, torch.float32), kernels, precision)
    x = batches(1, dtype=torch.float32)[0]
    x[20, 5] = bad
    assert not engine.step(x, UNIT, Now.at(1, RATE, 1.0), NO_ONE).mse.isfinite()


@pytest.mark.parametrize("kernels", ["native", "torch", "reference"])
@pytest.mark.parametrize("kind", ["relu", "batchtopk", "topk"])
def test_weights_that_explode_show_in_the_loss(kind, kernels):
    """In the step that makes them: of NaN pre-latents none is the largest, and later steps may look calm."""
    trainer = make_trainer(kind, kernels)
    trainer.learning_rate = lambda step: 1e30
    values, _ = train(trainer, 20).take_window()
    assert not math.isfinite(values["losses/overall_loss"])


@pytest.mark.parametrize("case", ["topk", "relu dense", "relu sparse"])
def test_free_rows_go_on_bit_for_bit(case):
    whole = make_engine(case, make_sae(case, unit_norm=False, dtype=torch.float32))
    data = batches(8, dtype=torch.float32)
    for step, x in enumerate(data[:4], 1):
        whole.step(x, UNIT, Now.at(step, RATE, 0.7), NO_ONE)
    tensors, values = whole.saved()
    parts = make_engine(case, make_sae(case, unit_norm=False, dtype=torch.float32))
    parts.restore({name: tensor.clone() for name, tensor in tensors.items()}, values)
    for step, x in enumerate(data[4:], 5):
        for engine in (whole, parts):
            engine.step(x, UNIT, Now.at(step, RATE, 0.7), NO_ONE)
    for (name, ours), (_, theirs) in zip(parts.state.weights(), whole.state.weights(), strict=True):
        assert torch.equal(ours, theirs), name


def test_weights_that_are_no_numbers_are_seen():
    engine = make_engine("topk", make_sae("topk"))
    assert engine.finite()
    engine.state.encoder[3, 1] = math.nan
    assert not engine.finite()


def test_a_run_that_cannot_go_on_as_it_began_says_so(monkeypatch):
    engine = make_engine("topk", make_sae("topk"))
    tensors, values = engine.saved()
    other = make_engine("topk", make_sae("topk"), "torch")
    monkeypatch.setattr("sae.kernels.selection.library", no_compiler)
    with pytest.raises(
        UsageError, match=r"began with native kernels in fp32 and must continue with them: .*no compiler"
    ):
        other.restore(tensors, values)


def no_compiler(real: str):
    raise CannotBuild("no compiler")


@pytest.mark.parametrize("unit_norm", [True, False])
def test_a_sparse_step_asks_the_device_nothing(unit_norm, monkeypatch):
    """Tensors without data cannot answer: whatever would make a host wait for a GPU raises here."""
    monkeypatch.setattr("sae.kernels.plain._stable_order", lambda latents, d_sae: latents.argsort(stable=True))
    with FakeTensorMode():
        sae = SAE(D_IN, SAEConfig.of_kind({"kind": "topk", "k": 5, "d_sae": D_SAE, "unit_norm_decoder": unit_norm}))
        engine = Engine(sae, "torch", "fp32")
        x = torch.empty(BATCH, D_IN)
        state, kernels = engine.state, engine.kernels
        x = kernels.centre(x, UNIT, state.b_dec)
        codes = sae.sparsifier.choose(kernels, kernels.scores(x, state))
        decoded = kernels.decode(codes, state, x, 0.1)
        plan = kernels.invert(codes, decoded.code_gradients, D_SAE)
        (g_encoder, _, _), _, firing = kernels.gradient_rows(state, x, decoded.gradient, plan)
        assert (g_encoder.shape, firing.shape) == ((D_SAE, D_IN), (D_SAE,))
