"""The gated SAE against its definition, written with autograd in float64."""

import pytest
import torch
from test_engine import ALPHA, D_IN, D_SAE, KERNELS, RATE, UNIT, batches, close, same_terms
from torch import Tensor

import sae
from sae import SAE, SAEConfig
from sae.engine import Engine, Terms
from sae.kernels.base import WEIGHTS
from sae.optim import BETA1, Now
from sae.sparsifiers import Gated

LAMBDA = 0.3
every_kernel = pytest.mark.parametrize(("kernels", "precision"), KERNELS, ids=["-".join(pair) for pair in KERNELS])
both_decoders = pytest.mark.parametrize("unit_norm", [True, False])
OWN = ("sparsifier.r_mag", "sparsifier.c_mag")


def make_sae(unit_norm: bool = True, sparse: bool = True, **options) -> SAE:
    """Few gates are open, or many; some open ones have no magnitude, and the last latents seldom win: they die."""
    shared = {"kind": "gated", "d_sae": D_SAE, "unit_norm_decoder": unit_norm, "l1_coefficient": LAMBDA}
    made = SAE(D_IN, SAEConfig.of_kind(shared | {"aux_coefficient": ALPHA, "aux_k": 3} | options)).double()
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (made.encoder, made.W_dec, made.b_enc, made.b_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=stream))
        made.sparsifier.r_mag.copy_(0.3 * torch.randn(D_SAE, generator=stream))
        made.sparsifier.c_mag.copy_(torch.randn(D_SAE, generator=stream) - 0.5)
        made.encoder[-10:] *= 0.03
        made.b_enc[-10:] = -0.4 if sparse else 0.01
        made.b_enc[:-10] -= 11 if sparse else 1
        if unit_norm:
            made.W_dec /= made.W_dec.norm(dim=1, keepdim=True)
        if made.centre is not None:
            made.centre.copy_(0.5 * made.b_dec)
    return made


class Judge:
    """Rajamanoharan et al. 2024a, equations 3 to 8, with W_mag and b_mag of their own, tied as they say."""

    def __init__(self, made: SAE) -> None:
        self.config = made.config
        self.weights = {name: weight.detach().clone().requires_grad_() for name, weight in made.named_parameters()}
        self.optimizer = torch.optim.Adam(list(self.weights.values()), lr=0.0)
        self.centre = None if made.centre is None else made.centre.clone()
        self.silent_open = 0
        self.window = torch.zeros(D_SAE, dtype=torch.int64)

    def step(self, activations: Tensor, now: Now, dead: Tensor) -> Terms:
        W_gate, W_dec, b_gate, b_dec, r, c = (self.weights[name] for name in (*WEIGHTS, *OWN))
        x = activations / UNIT
        centred = x - (b_dec if self.centre is None else self.centre)
        gate = centred @ W_gate.T + b_gate
        W_mag, b_mag = r.exp()[:, None] * W_gate, c + r.exp() * b_gate
        magnitude = (centred @ W_mag.T + b_mag).relu()
        z = torch.where(gate > 0, magnitude, 0)
        self.silent_open += int(((gate > 0) & (magnitude == 0)).sum())

        def error(codes: Tensor, W: Tensor, b: Tensor) -> Tensor:
            ends = self.config.prefixes or (D_SAE,)
            return torch.stack([(x - codes[:, :end] @ W[:end] - b).square().sum(dim=1).mean() for end in ends]).mean()

        mse = (x - z @ W_dec - b_dec).square().sum(dim=1).mean()
        errors = error(z, W_dec, b_dec) + error(gate.relu(), W_dec.detach(), b_dec.detach())
        penalty = now.sparsity * LAMBDA * (gate.relu() * W_dec.norm(dim=1)).sum(dim=1).mean()
        auxiliary = x.new_zeros(())
        if len(dead):
            largest = gate[:, dead].topk(min(self.config.aux_k, len(dead)), dim=1)
            sketch = torch.zeros_like(gate[:, dead]).scatter(1, largest.indices, largest.values.relu()) @ W_dec[dead]
            auxiliary = ((x - z @ W_dec - b_dec).detach() - sketch).square().sum(dim=1).mean()
        self.optimizer.zero_grad()
        (errors + penalty + ALPHA * auxiliary).backward()
        with torch.no_grad():
            if self.config.unit_norm_decoder:
                W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
            self.gradients = {name: weight.grad.clone() for name, weight in self.weights.items()}
            self.optimizer.param_groups[0]["lr"] = float(now.rate)
            self.optimizer.step()
            if self.config.unit_norm_decoder:
                W_dec /= W_dec.norm(dim=1, keepdim=True)
            self.window += (z > 0).sum(dim=0)
        return Terms(*(t.detach() for t in (errors, mse, auxiliary, penalty, (z > 0).sum() / len(x))))


def same_state(engine: Engine, judge: Judge, tolerance: float) -> None:
    for name, weight in engine.sae.named_parameters():
        close(weight.detach(), judge.weights[name].detach(), tolerance, name)
    assert torch.equal(engine.state.window_firing, judge.window)


def same_gradients(engine: Engine, judge: Judge) -> None:
    """After one step the first moment is (1 - beta) times the gradient."""
    moments = engine.state.first | {name: first for name, (_, first, _) in engine.own.items()}
    assert moments.keys() == judge.gradients.keys()
    for name, gradient in judge.gradients.items():
        assert gradient.any(), name
        close(moments[name] / (1 - BETA1), gradient, 1e-10, name)


@every_kernel
@both_decoders
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"prefixes": (3, 20, D_SAE)}, {"tied_bias": False}, {"prefixes": (50, D_SAE), "tied_bias": False}],
    ids=["plain", "prefixes", "own centre", "both"],
)
def test_steps_are_those_of_the_definition(sparse, options, unit_norm, kernels, precision):
    made = make_sae(unit_norm, sparse, **options)
    engine, judge, dead = Engine(made, kernels, precision), Judge(made), torch.tensor([2, 60, 64, 69])
    assert not engine.by_autograd
    dense_steps = []
    original = engine._by_autograd
    engine._by_autograd = lambda *arguments: dense_steps.append(1) or original(*arguments)
    for number, x in enumerate(batches(6), 1):
        now = Now.at(number, RATE, 0.7)
        same_terms(engine.step(x, UNIT, now, dead), judge.step(x, now, dead))
        if number == 1:
            same_gradients(engine, judge)
    same_state(engine, judge, 1e-9)
    assert len(dense_steps) == (0 if sparse else 6)
    assert judge.silent_open > 0, "some open gates must have no magnitude"


def test_without_a_penalty_magnitudes_and_gates_still_learn():
    made = make_sae(l1_coefficient=0.0)
    engine, before = Engine(made, "native", "fp32"), made.encoder.detach().clone()
    terms = engine.step(batches(1)[0], UNIT, Now.at(1, RATE, 1.0), torch.zeros(0, dtype=torch.int64))
    assert terms.sparsity == 0
    assert not torch.equal(made.encoder, before)


def test_codes_and_inference():
    gated = Gated(3, 0.1)
    with torch.no_grad():
        gated.r_mag.copy_(torch.tensor([0.0, 0.7, 0.0]))
        gated.c_mag.copy_(torch.tensor([0.5, 0.0, -1.0]))
    pre = torch.tensor([[1.0, 2.0, 0.5], [-0.1, -2.0, 3.0]])
    expected = torch.tensor([[1.5, 2 * torch.e**0.7, 0.0], [0.0, 0.0, 2.0]])
    torch.testing.assert_close(gated(pre).dense(), expected)
    torch.testing.assert_close(gated.select(pre).dense(), expected)
    assert gated.select(pre).counts.tolist() == [2, 1]


def test_the_gate_has_no_gradient_from_what_it_lets_through():
    gated = Gated(4, 0.1).double()
    torch.nn.init.normal_(gated.r_mag, generator=torch.Generator().manual_seed(0))
    pre = torch.tensor([[1.0, -1.0, 0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    gated(pre).dense().sum().backward()
    torch.testing.assert_close(pre.grad, gated.r_mag.detach().exp() * (pre.detach() > 0))


@pytest.mark.parametrize("l0", [None, 2.0])
def test_rescaling_changes_no_choice(l0):
    gated, stream = Gated(30, 0.1, l0), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(gated.r_mag, generator=stream)
    torch.nn.init.normal_(gated.c_mag, generator=stream)
    pre = torch.randn(500, 30, generator=stream) - 1
    gated.requires_grad_(False).calibrate_([pre], len(pre))
    before = gated.select(pre).dense()
    gated.rescale_(8.0)
    assert torch.equal(gated.select(8 * pre).dense(), 8 * before)


def test_an_asked_l0_is_met_below_and_above_what_training_left():
    gated, stream = Gated(30, 0.1, 5.0), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(gated.c_mag, generator=stream)
    gated.requires_grad_(False)
    for shift in (-1.0, 0.5):
        pre = torch.randn(4000, 30, generator=stream) + shift
        gated.calibrate_(iter(pre.split(700)), len(pre))
        codes = gated.select(pre)
        assert codes.counts.double().mean() == 5
        assert (gated.threshold > 0) == (gated(pre).counts.double().mean() > 5)
        magnitudes = (pre + gated.c_mag).relu()
        fires = codes.dense() > 0
        assert torch.equal(codes.dense()[fires], magnitudes[fires])


def test_a_run_starts_sparse_and_learns(tmp_path):
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)).abs().pow(2)
    config = sae.TrainConfig(
        sae={"kind": "gated", "d_sae": 128, "l0": 4.0},
        train={"n_samples": 64_000, "batch_size": 128, "warmup_steps": 5},
        evaluation={"n_samples": 500},
        log={"every": 1},
        out=tmp_path,
    )
    lines = []
    result = sae.train(config, x, report=False, on_line=lambda step, values: lines.append(dict(values)))
    assert lines[0]["metrics/l0"] == pytest.approx(8, rel=0.3)
    assert lines[-1]["metrics/fvu"] < 0.5 * lines[0]["metrics/fvu"]
    loaded = sae.load(tmp_path)
    assert loaded.sparsifier.c_mag.any()
    assert torch.equal(loaded(x[:50]), result.sae(x[:50]))
