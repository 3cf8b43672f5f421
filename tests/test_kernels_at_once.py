"""Products that are selected from as they are made: in float32, or on AMX units, where the numbers are rounded.

Where a CPU has no such units, `amx_units.h` takes their place.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels import Change, Codes, DenseStep, Rows, State, build, selection, small
from sae.kernels.native import Native
from sae.kernels.reference import dense
from sae.optim import Now

SHAPES = [(1, 1, 1), (5, 7, 3), (33, 31, 16), (37, 64, 257), (50, 65, 128), (300, 33, 48), (65, 200, 2048)]
DATA = ["spread", "ascending", "equal", "few", "negative", "zero"]
many = settings(max_examples=60, deadline=None)
sizes = {"shape": st.sampled_from(SHAPES), "data": st.sampled_from(DATA), "seed": st.integers(0, 99)}

UNITS, CPU = Path(__file__).with_name("amx_units.h"), Path("/proc/cpuinfo")


@pytest.fixture(autouse=True, scope="module")
def _large_weights():
    """Small ones have products of their own in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "ENTRIES", -1)
        patch.setattr(selection, "FEWEST_SCREENED", float("inf"))  # test_kernels_screen.py has those that are screened
        yield


@pytest.fixture(params=["bf16", "fp32"], scope="module")
def precision(request):
    if not Native(torch.float32, request.param)._at_once:
        pytest.skip("this CPU has no AVX-512")
    return request.param


@pytest.fixture(autouse=True, scope="module")
def units(tmp_path_factory):
    if Native(torch.float32, "bf16")._tiles:
        yield
        return
    if not CPU.exists() or "avx512_bf16" not in CPU.read_text(encoding="utf-8"):
        pytest.skip("this CPU cannot even take the place of AMX units: it has no bf16 numbers in AVX-512")
    compiler, folder = [*build._compiler(), "-include", str(UNITS)], tmp_path_factory.mktemp("amx")

    @cache
    def library(real: str):
        return build._kept(compiler, build.SOURCE, real, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "library", library)
        if not Native(torch.float32, "bf16")._tiles:
            pytest.skip("the compiler makes no use of AVX-512 here")
        yield


def case(data: str, batch: int, d_in: int, d_sae: int, seed: int) -> tuple[Tensor, State]:
    stream = torch.Generator().manual_seed(seed)
    x, encoder = (torch.randn(n, d_in, generator=stream) for n in (batch, d_sae))
    bias = 0.1 * torch.randn(d_sae, generator=stream)
    if data == "ascending":  # each latent is larger than all before it
        x, encoder = x.abs() + 0.5, torch.linspace(0.1, 2, d_sae)[:, None].expand(d_sae, d_in).contiguous()
        bias = torch.zeros(d_sae)
    elif data == "equal":  # integers: sums are exact, and ties are
        x, encoder, bias = x.round(), encoder[:1].round().expand(d_sae, d_in).contiguous(), torch.zeros(d_sae)
    elif data == "few":
        bias -= 2.5 * d_in**0.5
    elif data == "negative":
        bias -= 100 * d_in**0.5
    elif data == "zero":
        x[::2] = 0
        encoder[::2] = 0
    weights = {"encoder": encoder, "W_dec": encoder.clone(), "b_enc": bias, "b_dec": torch.zeros(d_in)}
    return x, State.of(weights, False)


def judged(x: Tensor, state: State, precision: str) -> tuple[Tensor, Tensor]:
    """Pre-latents in float64, of the rounded numbers where they are, and how far sums in float32 may be from them."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = x.to(dtype).double(), state.encoder.to(dtype).double()
    blur = 2 * (x.shape[1] + 2) * 2**-24 * (a.abs() @ b.abs().T + state.b_enc.double().abs())
    return a @ b.T + state.b_enc.double(), blur


def selects(codes: Codes, pre: Tensor, blur: Tensor, cut: Tensor) -> None:
    """Values are right; all that is surely above the cut fires, nothing surely below."""
    z = dense(codes, pre.shape[1]).double()
    assert ((z - pre).abs() <= blur)[z > 0].all()
    assert (z > 0)[(pre - blur > cut + blur) & (pre > blur)].all()
    assert (z == 0)[pre + blur < cut - blur].all()


@many
@given(k_share=st.floats(0, 1), **sizes)
@example(k_share=0.02, shape=(65, 200, 2048), data="ascending", seed=0)
@example(k_share=0.02, shape=(65, 200, 2048), data="equal", seed=0)
def test_top_k(precision, k_share, shape, data, seed):
    x, state = case(data, *shape, seed)
    k = 1 + int(k_share * (shape[2] - 1))
    kernels = Native(torch.float32, precision)
    pre, blur = judged(x, state, precision)
    cut = pre.topk(k, dim=1).values[:, -1:].clamp_min(0)
    for _ in range(2):  # the second time with what the first has seen
        codes = kernels.top_k(kernels.scores(x, state), k)
        selects(codes, pre, blur, cut)
        assert (codes.offsets.diff() == k).all()
        z = dense(codes, shape[2])
        assert torch.equal((z > 0).sum(dim=1), (codes.values > 0).view(len(x), k).sum(dim=1))  # no latent twice
        if data == "equal":  # of equal ones the first
            firing = z.sum(dim=1) > 0
            assert (z[firing][:, :k] > 0).all()
            assert not z[:, k:].any()


@many
@given(share=st.floats(0, 1), **sizes)
def test_batch_top_k(precision, share, shape, data, seed):
    x, state = case(data, *shape, seed)
    n = 1 + int(share * (shape[0] * shape[2] - 1))
    kernels = Native(torch.float32, precision)
    pre, blur = judged(x, state, precision)
    top = pre.flatten().topk(n)
    for _ in range(2):
        codes = kernels.batch_top_k(kernels.scores(x, state), n)
        if codes is None:
            assert data in ("equal", "ascending", "zero")  # too many alike
            return
        slack = blur.flatten()[top.indices[-1]]
        selects(codes, pre, blur + slack, top.values[-1].clamp_min(0))


@many
@given(**sizes)
def test_positive(precision, shape, data, seed):
    x, state = case(data, *shape, seed)
    kernels = Native(torch.float32, precision)
    codes = kernels.positive(kernels.scores(x, state), shape[0] * shape[2])
    assert codes is not None
    assert (codes.values > 0).all()
    selects(codes, *judged(x, state, precision), torch.zeros(1))


def test_a_batch_that_needs_more_slots_says_so(precision):
    x, state = case("spread", 37, 64, 257, 0)
    kernels = Native(torch.float32, precision)
    assert kernels.positive(kernels.scores(x, state), 10) is None


def test_threads_change_nothing(precision):
    x, state = case("spread", 600, 65, 2048, 3)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        kernels = Native(torch.float32, precision)
        found.append([part.clone() for part in kernels.top_k(kernels.scores(x, state), 9)[:3]])
    torch.set_num_threads(1)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(precision, bad):
    x, state = case("spread", 37, 64, 257, 0)
    kernels = Native(torch.float32, precision)
    good = dense(kernels.top_k(kernels.scores(x, state), 5), 257).clone()
    x[3, 7] = bad
    after = dense(kernels.top_k(kernels.scores(x, state), 5), 257)
    others = torch.arange(37) != 3
    assert torch.equal(after[others], good[others])


def test_infinite_latents_are_the_largest(precision):
    x, state = case("spread", 37, 64, 257, 0)
    state.b_enc[[3, 200]] = float("inf")
    kernels = Native(torch.float32, precision)
    z = dense(kernels.top_k(kernels.scores(x, state), 12), 257)
    assert z[:, [3, 200]].isinf().all()
    pre, _ = judged(x, state, precision)
    assert torch.equal(z > 0, pre >= pre.topk(12, dim=1).values[:, -1:])


def test_a_batch_of_no_rows_has_no_codes(precision):
    x, state = case("spread", 37, 64, 257, 0)
    kernels = Native(torch.float32, precision)
    assert not len(kernels.positive(kernels.scores(x[:0], state), 10).values)


@pytest.mark.parametrize("shape", [(37, 64, 257), (5, 7, 3), (33, 31, 48)])
def test_the_tiles_follow_the_encoder(shape):
    x, state = case("spread", *shape, 0)
    kernels = Native(torch.float32, "bf16")
    codes = kernels.top_k(kernels.scores(x, state), 2)
    decoded = kernels.decode(codes, state, x, 0.0)
    plan = kernels.invert(codes, decoded.code_gradients, shape[2])
    kernels.update_(state, Now(0.1, 0.1, 0.001, 1.0, 1.0), Change(x, decoded.gradient, plan=plan))
    followed = kernels._buffer.kept["encoder_tiles"].clone()
    fresh = Native(torch.float32, "bf16")
    fresh.scores(x, state)
    assert torch.equal(followed, fresh._buffer.kept["encoder_tiles"])


def share(found: Tensor, wanted: Tensor) -> float:
    """How far the worst entry is off, of the largest."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def updated(x: Tensor, state: State, cost: float, extra: Rows | None = None) -> tuple[DenseStep, State]:
    """A dense step and its update, by SGD as it were: Adam's first moments are a tenth of the gradients."""
    kernels = Native(torch.float32, "bf16")
    kernels.refresh(state)
    step = kernels.dense_step(x, state, x, cost)
    now = Now(0.0, 0.1, 0.001, 1.0, 1.0)
    kernels.update_(state, now, Change(x, step.gradient, plan=step.plan, extra=extra, firing=step.firing, cost=cost))
    return step, state


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 45, 333), (300, 64, 512), (259, 70, 333), (128, 32, 31)])
def test_dense_step(shape, unit_norm):
    """Against the same products of rounded numbers in float64."""
    (x, state), cost, (batch, _, d_sae) = case("spread", *shape, 0), 0.3, shape
    if unit_norm:
        state.W_dec /= state.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
        state.unit_norm = True
    a, encoder, decoder = (t.bfloat16().double() for t in (x, state.encoder, state.W_dec))
    norms, W_dec = state.W_dec.double().norm(dim=1), state.W_dec.double().clone()
    some = Rows(torch.arange(0, d_sae, 3), *(torch.randn(-(-d_sae // 3), d) for d in (shape[1], shape[1])), None)
    some = some._replace(b_enc=torch.randn(-(-d_sae // 3)))
    step, state = updated(x, state, cost, some)
    charged = torch.ones_like(norms) if unit_norm else norms
    z = (a @ encoder.T + state.b_enc.double()).clamp_min(0)
    gradient = (z.bfloat16().double() @ decoder - x.double()) * 2 / batch
    rounded = gradient.bfloat16().double()
    through = (rounded @ decoder.T + cost * charged) * (z > 0)
    g_encoder, g_bias = through.bfloat16().double().T @ a, through.sum(dim=0)
    g_decoder = z.bfloat16().double().T @ rounded
    for total, part in zip((g_encoder, g_decoder, g_bias), some[1:], strict=True):
        total.index_add_(0, some.latents, part.double())
    if unit_norm:
        g_decoder -= (g_decoder * W_dec).sum(dim=1, keepdim=True) * W_dec
    else:
        g_decoder += (cost * z.sum(dim=0) / norms)[:, None] * W_dec
    # A number next to a midpoint may be rounded the other way after another order of sums: 2^-8 of one summand.
    assert share(step.gradient, gradient) < 1e-3
    assert share(10 * state.first["encoder"], g_encoder) < 1e-3
    assert share(10 * state.first["W_dec"], g_decoder) < 1e-3
    assert share(10 * state.first["b_enc"], g_bias) < 1e-3
    assert torch.equal(step.firing.long(), (z > 0).sum(dim=0))
    assert torch.equal(state.window_firing, (z > 0).sum(dim=0))
    assert int(step.plan.n_codes) == int((z > 0).sum())
    assert float(step.squares) == pytest.approx(float((gradient * batch / 2).square().sum()), rel=1e-3)
    assert float(step.code_sum) == pytest.approx(float((z * charged).sum()), rel=1e-5)


def test_gradients_of_a_dense_step_as_matrices():
    x, state = case("spread", 259, 70, 333, 0)
    kernels = Native(torch.float32, "bf16")
    step = kernels.dense_step(x, state, x, 0.3)
    rows, sums, fires = kernels.gradient_rows(state, x, step.gradient, step.plan)
    kernels.update_(state, Now(0.0, 0.1, 0.001, 1.0, 1.0), Change(x, step.gradient, plan=step.plan, firing=step.firing))
    for found, name in zip(rows, ("encoder", "W_dec", "b_enc"), strict=True):
        torch.testing.assert_close(found, 10 * state.first[name])
    assert torch.equal(fires.int(), step.firing)
    assert float((sums * state.norms).sum()) == pytest.approx(float(step.code_sum), rel=1e-5)


def test_threads_change_nothing_in_a_dense_step():
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        step, state = updated(*case("spread", 600, 65, 300, 3), 0.1)
        found.append([part.clone() for part in (*step[1:5], *state.first.values(), *state.second.values())])
    torch.set_num_threads(1)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_is_no_number_shows_in_the_loss():
    x, state = case("spread", 37, 64, 257, 0)
    x[3, 7] = float("nan")
    assert Native(torch.float32, "bf16").dense_step(x, state, x, 0.1).squares.isnan()
