"""Matching pursuit: the codes against the definition, the step against autograd through the unrolled pursuit."""

import copy

import pytest
import torch
from torch import Tensor

import sae
from sae import SAE, SAEConfig, UsageError
from sae.config import parse_config
from sae.engine import Engine, Terms
from sae.kernels import Change, State, pursuit
from sae.kernels.native import Native
from sae.kernels.plain import Plain
from sae.kernels.reference import Reference
from sae.model import load
from sae.optim import BETA1, Now
from sae.sparsifiers import MatchingPursuit

BATCH, D_IN, D_SAE, K = 37, 13, 70, 6
UNIT, ALPHA, RATE = 1.7, 0.5, 0.003
KERNELS = [("native", "fp32"), ("native", "exact"), ("torch", "fp32"), ("reference", "fp32")]
every_kernel = pytest.mark.parametrize(("kernels", "precision"), KERNELS, ids=["-".join(pair) for pair in KERNELS])


def make_sae(k: int = K, dtype: torch.dtype = torch.float64, d_sae: int = D_SAE, **options) -> SAE:
    config = {"kind": "matching_pursuit", "k": k, "d_sae": d_sae, "aux_coefficient": ALPHA, "aux_k": 3}
    made = SAE(D_IN, SAEConfig.of_kind(config | options)).to(dtype)
    made.initialise_(torch.linspace(-0.3, 0.4, D_IN), torch.Generator().manual_seed(0))
    if made.centre is not None:
        made.centre.mul_(0.5)
    return made


def batches(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    stream = torch.Generator().manual_seed(2)
    return [(UNIT * torch.randn(BATCH, D_IN, generator=stream)).to(dtype) for _ in range(n)]


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def pursue_one(x: Tensor, W_dec: Tensor, k: int) -> Tensor:
    """The definition, for one activation: z [d_sae], differentiable."""
    z, residual = W_dec.new_zeros(len(W_dec)), x
    for _ in range(k):
        correlations = residual @ W_dec.T
        j = int(correlations.argmax())
        if correlations[j] <= 0:
            break
        z = z + correlations[j] * torch.eye(len(W_dec), dtype=z.dtype)[j]
        residual = residual - correlations[j] * W_dec[j]
    return z


# Codes


def test_two_steps_by_hand():
    W_dec = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    codes = MatchingPursuit(3).pursue(torch.tensor([[2.0, 0.5], [-3.0, -1.0], [0.0, -1.0]]), W_dec)
    # (2, .5) is 2 (1, 0) and (0, .5); that is .4 (.6, .8) and (-.24, .18); that is .24 (-1, 0) and the rest.
    expected = torch.tensor([[2.0, 0.4, 0.24], [0, 0, 3.0], [0, 0, 0]])
    torch.testing.assert_close(codes.dense(), expected)
    assert codes.counts.tolist() == [3, 1, 0]


def test_a_latent_chosen_again_adds_to_its_code():
    W_dec = torch.tensor([[1.0, 0.0], [-0.6, 0.8]])
    x = torch.tensor([[0.2, 1.0]])
    codes = MatchingPursuit(6).pursue(x, W_dec)
    assert codes.counts.tolist() == [2]
    torch.testing.assert_close(codes.dense()[0], pursue_one(x[0], W_dec, 6))
    torch.testing.assert_close(codes.decode(W_dec), codes.dense() @ W_dec)
    assert (x - codes.decode(W_dec)).norm() < 0.2 * x.norm()


@pytest.mark.parametrize("k", [1, 5, 12])
def test_codes_are_the_definition(k):
    made = make_sae(k)
    x = batches(1)[0]
    expected = torch.stack([pursue_one(row - made.b_dec, made.W_dec, k) for row in x])
    torch.testing.assert_close(made.encode(x).dense(), expected)
    torch.testing.assert_close(made(x), expected @ made.W_dec + made.b_dec)


def unfitting(batch: int, d: int, d_sae: int) -> tuple[Tensor, Tensor]:
    """Rows and activations of which some have nothing that fits, or little."""
    stream = torch.Generator().manual_seed(3)
    W_dec = torch.randn(d_sae, d, generator=stream, dtype=torch.float64)
    W_dec[:, 0] = W_dec[:, 0].abs()
    x = torch.randn(batch, d, generator=stream, dtype=torch.float64)
    x[0] = 0
    x[batch // 2] = 0
    x[batch // 2, 0] = -1.0
    return x, W_dec / W_dec.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("name", ["native", "torch", "torch by Gram"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (5, 3, 7, 4), (37, 13, 61, 9), (40, 21, 300, 17), (9, 65, 33, 33)])
@pytest.mark.parametrize("gram", [True, False])
def test_kernels_pursue_alike(name, gram, sizes, monkeypatch):
    batch, d, d_sae, k = sizes
    monkeypatch.setattr(pursuit, "gram_pays", lambda *sizes: gram)
    monkeypatch.setattr("sae.kernels.base.BLOCK_ENTRIES", 4 * d_sae)
    x, W_dec = unfitting(batch, d, d_sae)
    kernels = Native(torch.float64, "fp32") if name == "native" else Plain("fp32")
    expected, codes = Reference().pursue(x, W_dec, k), kernels.pursue(x, W_dec, k)
    assert torch.equal(codes.offsets, expected.offsets)
    close(codes.values, expected.values)
    fires = expected.values > 0
    assert torch.equal(codes.latents[fires].long(), expected.latents[fires])
    assert batch == 1 or 0 < fires.view(batch, k)[batch // 2].sum() + 1 <= k
    assert not fires.view(batch, k)[0].any()


# The step


class Judge:
    """x_hat = z W_dec + b_dec with z of the definition, autograd through all of it, torch's Adam, unit rows."""

    def __init__(self, made: SAE) -> None:
        self.config = made.config
        self.W_dec = made.W_dec.detach().clone().requires_grad_()
        self.b_dec = made.b_dec.detach().clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.W_dec, self.b_dec], lr=0.0)
        self.centre = None if made.centre is None else made.centre.clone()
        self.silent = torch.zeros(made.d_sae, dtype=torch.int64)
        self.window = torch.zeros_like(self.silent)

    def step(self, activations: Tensor, now: Now, dead: Tensor) -> Terms:
        W_dec, b_dec = self.W_dec, self.b_dec
        a = activations / UNIT
        x = a - (b_dec if self.centre is None else self.centre)
        z = torch.stack([pursue_one(row, W_dec, self.config.k) for row in x])
        ends = self.config.prefixes or (len(W_dec),)
        errors = [(a - z[:, :end] @ W_dec[:end] - b_dec).square().sum(dim=1).mean() for end in ends]
        error, mse, auxiliary = torch.stack(errors).mean(), errors[-1], a.new_zeros(())
        if len(dead):
            left = (a - z @ W_dec - b_dec).detach()
            sketches = torch.stack([auxiliary_sketch(row, W_dec[dead], self.config.aux_k) for row in left])
            auxiliary = (left - sketches).square().sum(dim=1).mean()
        self.optimizer.zero_grad()
        (error + self.config.aux_coefficient * auxiliary).backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
            self.gradients = {"W_dec": W_dec.grad.clone(), "b_dec": b_dec.grad.clone()}
            self.optimizer.param_groups[0]["lr"] = float(now.rate)
            self.optimizer.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            fires = (z > 0).sum(dim=0)
            self.silent = torch.where(fires > 0, 0, self.silent + len(x))
            self.window += fires
        zero = a.new_zeros(())
        return Terms(*(t.detach() for t in (error, mse, auxiliary, zero, (z > 0).sum() / len(x))))


def auxiliary_sketch(residual: Tensor, W_dead: Tensor, k: int) -> Tensor:
    correlations = residual @ W_dead.T
    chosen = correlations.topk(min(k, len(W_dead))).indices
    return correlations[chosen].relu() @ W_dead[chosen]


@every_kernel
@pytest.mark.parametrize("n_dead", [0, 4], ids=["alive", "aux"])
@pytest.mark.parametrize(
    "options",
    [{}, {"k": 1}, {"prefixes": (3, 20, D_SAE)}, {"tied_bias": False}, {"tied_bias": False, "prefixes": (50, D_SAE)}],
    ids=["plain", "one step", "prefixes", "own centre", "both"],
)
@pytest.mark.parametrize("d_sae", [D_SAE, 300], ids=["narrow", "wide"])
def test_steps_against_autograd(kernels, precision, n_dead, options, d_sae):
    if "prefixes" in options:
        options = options | {"prefixes": (*options["prefixes"][:-1], d_sae)}
    made = make_sae(d_sae=d_sae, **options)
    engine, judge = Engine(made, kernels, precision), Judge(made)
    for number, x in enumerate(batches(6), 1):
        # What is left over is orthogonal to a latent that just fired, and AuxK would read the sign of a rounding error.
        silent = ~made.encode(x / UNIT).dense().any(dim=0)
        now, dead = Now.at(number, RATE, 0.7), silent.nonzero().squeeze(1)[:n_dead]
        assert len(dead) == n_dead
        terms, expected = engine.step(x, UNIT, now, dead), judge.step(x, now, dead)
        for name, ours, theirs in zip(Terms._fields, terms, expected, strict=True):
            torch.testing.assert_close(
                ours.to(theirs), theirs, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert (expected.auxiliary > 0) == bool(n_dead)
        if number == 1:
            for name, gradient in judge.gradients.items():
                close(engine.state.first[name] / (1 - BETA1), gradient)
    close(made.W_dec.detach(), judge.W_dec.detach())
    close(made.b_dec.detach(), judge.b_dec.detach())
    assert torch.equal(engine.state.silent_samples, judge.silent)
    assert torch.equal(engine.state.window_firing, judge.window)
    assert torch.equal(made.W_enc, made.W_dec.T)
    assert not made.b_enc.any()


def test_a_latent_that_fires_twice_in_a_sample_counts_once():
    made = make_sae(k=12, d_sae=14)
    engine, x = Engine(made, "native", "fp32"), batches(1)[0]
    codes = engine.kernels.pursue(x / UNIT - made.b_dec.detach(), made.W_dec.detach(), 12)
    slots, counted = int((codes.values > 0).sum()), int(made.encode(x / UNIT).counts.sum())
    assert counted < slots, "the case must hold a latent that fires twice"
    terms = engine.step(x, UNIT, Now.at(1, RATE, 1.0), torch.zeros(0, dtype=torch.int64))
    assert terms.l0 * BATCH == counted == engine.state.window_firing.sum()


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("tied", [True, False])
def test_unroll_at_odd_sizes(name, tied):
    for batch, d, d_sae, k in [(1, 1, 1, 1), (5, 3, 7, 4), (40, 21, 300, 17)]:
        x, W_dec = unfitting(batch, d, d_sae)
        kernels, judge = Native(torch.float64, "fp32") if name == "native" else Plain("fp32"), Reference()
        zeros = torch.zeros(d_sae, dtype=torch.float64)
        weights = {"encoder": W_dec, "W_dec": W_dec, "b_enc": zeros, "b_dec": x[0]}
        states = [State.of(copy.deepcopy(weights), True, tied) for _ in range(2)]
        for state, by in zip(states, (kernels, judge), strict=True):
            codes = by.pursue(x, state.W_dec, k)
            gradient, codes = by.unroll(codes, by.decode(codes, state, x + 0.1, 0.0), x, state)
            plan = by.invert(codes, torch.zeros_like(codes.values), d_sae)
            by.update_(state, Now.at(1, RATE, 1.0), Change(x, gradient, plan=plan))
        for weight in ("W_dec", "b_dec"):
            close(states[0].first[weight], states[1].first[weight])


@every_kernel
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_activations_show_in_the_loss(kernels, precision, bad):
    engine = Engine(make_sae(dtype=torch.float32), kernels, precision)
    x = batches(1, torch.float32)[0]
    x[20, 5] = bad
    assert not engine.step(x, UNIT, Now.at(1, RATE, 1.0), torch.zeros(0, dtype=torch.int64)).mse.isfinite()


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_bf16_products_change_little(kernels):
    made = make_sae(dtype=torch.float32)
    x = batches(1, torch.float32)[0]
    nobody, now = torch.zeros(0, dtype=torch.int64), Now.at(1, RATE, 1.0)
    ours, theirs = (Engine(copy.deepcopy(made), kernels, p).step(x, UNIT, now, nobody) for p in ("bf16", "fp32"))
    torch.testing.assert_close(ours.mse, theirs.mse, rtol=0.02, atol=0)


# Around it


@pytest.mark.parametrize(("d_sae", "d_in"), [(1, 5), (4, 1)])
def test_a_dictionary_of_one_row_or_column_is_saved(tmp_path, d_sae, d_in):
    """Its transpose is contiguous, and still the same memory."""
    made = SAE(d_in, SAEConfig.of_kind({"kind": "matching_pursuit", "d_sae": d_sae, "k": 1}))
    made.initialise_(torch.zeros(d_in), torch.Generator().manual_seed(0))
    made.save(tmp_path)
    assert torch.equal(sae.load(tmp_path).W_dec, made.W_dec)


def test_the_saved_encoder_is_the_decoder(tmp_path):
    made = make_sae(dtype=torch.float32)
    x = batches(1, torch.float32)[0]
    made.rescale_(3.0)
    made.save(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded.W_enc, loaded.W_dec.T)
    assert loaded.encoder is loaded.W_dec
    assert torch.equal(loaded(x), made(x))


def test_pre_latents_are_refused():
    with pytest.raises(TypeError, match="matching pursuit reads activations and W_dec"):
        MatchingPursuit(2)(torch.zeros(3, 4))
    with pytest.raises(NotImplementedError, match="TopK selects among pre-latents"):
        sae.sparsifiers.TopK(2).pursue(torch.zeros(3, 4), torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 25}, "k must lie in 1..d_sae=24, got 25; lower k or raise d_sae"),
        ({"unit_norm_decoder": False}, r"needs \|w\| = 1, got unit_norm_decoder false; leave it on"),
        ({"tied_init": False}, "encodes with its decoder rows, got tied_init false; leave it on"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        parse_config({"sae": {"kind": "matching_pursuit", "d_sae": 24, "k": 3} | options})
