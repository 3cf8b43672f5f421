"""Every stage of all kernels against the reference in float64, at odd sizes; bf16 within its bound; the build."""

import copy
import ctypes
import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae import UsageError
from sae.kernels import Change, Codes, Rows, Scores, State, build, capacity, choose, products, sparse_share
from sae.kernels.native import Native
from sae.kernels.plain import Plain
from sae.kernels.precision import slack
from sae.kernels.reference import Reference, dense
from sae.kernels.selection import SCREENED
from sae.optim import Now

CPU = torch.device("cpu")
NAMES = ["native", "exact", "torch"]
BATCHES, WIDTHS, LATENTS = [1, 5, 37], [1, 7, 13, 65, 70], [1, 3, 19, 61, 128, 257]
DATA = ["spread", "few", "none", "tied", "heavy", "tiny", "huge"]


@pytest.fixture(autouse=True, scope="module")
def _fill_new_memory():
    """NaN and extreme integers in what torch.empty gives, so that memory which nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def make(name: str, dtype: torch.dtype = torch.float64) -> Native | Plain | Reference:
    if name == "torch":
        return Plain("fp32")
    return Reference() if name == "reference" else Native(dtype, "fp32" if name == "native" else name)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    """Within `tolerance` of the largest entry."""
    assert ours.shape == theirs.shape
    size = float(theirs.abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=tolerance * size)


def state_of(d_sae: int, d_in: int, unit_norm: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64) -> State:
    """A state in mid-training: no weight, moment or counter is 0."""
    stream = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream, dtype=torch.float64).to(dtype)

    weights = {"encoder": normal(d_sae, d_in), "W_dec": normal(d_sae, d_in) + 0.1}
    weights |= {"b_enc": normal(d_sae), "b_dec": normal(d_in)}
    if unit_norm:
        weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
    state = State.of(weights, unit_norm)
    for moment in state.first.values():
        moment.copy_(0.1 * normal(*moment.shape))
    for moment in state.second.values():
        moment.copy_(0.01 + 0.01 * normal(*moment.shape).square())
    state.silent_samples.random_(1000, generator=stream)
    state.window_firing.random_(1000, generator=stream)
    return state


def case(data: str, batch: int, d_in: int, d_sae: int, seed: int = 0) -> tuple[Tensor, State]:
    """Activations and weights whose pre-latents are hard in one way."""
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=stream, dtype=torch.float64)
    state = state_of(d_sae, d_in, seed=seed + 1)
    if data == "few":
        state.b_enc.sub_(1.5 * d_in**0.5)
    elif data == "none":
        state.b_enc.copy_(-x.norm(dim=1).max() * state.encoder.norm(dim=1) - state.encoder @ state.b_dec - 99)
        state.b_dec.zero_()
        state.b_enc.sub_(99)
    elif data == "tied":
        # Small integers: sums are exact in any order and precision, and equal where rows are.
        x = torch.randint(-2, 3, (batch, d_in), generator=stream).double()
        state.encoder.copy_(torch.randint(-1, 2, (d_sae, d_in), generator=stream))
        state.encoder[d_sae // 2 :] = state.encoder[: d_sae - d_sae // 2].clone()
        state.b_enc.copy_(torch.randint(-1, 2, (d_sae,), generator=stream))
        state.b_dec.zero_()
    elif data == "heavy":
        x[-1] *= 1000
    elif data == "tiny":
        x, state.b_enc, state.b_dec = (1e-12 * t for t in (x, state.b_enc, state.b_dec))
    elif data == "huge":
        x, state.b_enc, state.b_dec = (1e12 * t for t in (x, state.b_enc, state.b_dec))
    return x, state


def scores(kernels, raw: Tensor, state: State) -> Scores:
    kernels.refresh(state)
    return kernels.scores(kernels.centre(raw, 1.0, state.b_dec), state)


def pre_latents(raw: Tensor, state: State) -> Tensor:
    return (raw - state.b_dec) @ state.encoder.T + state.b_enc


def whole(codes: Codes, batch: int, d_sae: int) -> Tensor:
    """The codes as a matrix, once it is sure that their slots are in order."""
    assert codes.offsets[0] == 0
    assert codes.offsets[-1] == len(codes.values) == len(codes.latents)
    assert len(codes.offsets) == batch + 1
    assert (codes.offsets.diff() >= 0).all()
    assert ((codes.latents >= 0) & (codes.latents < d_sae)).all()
    return dense(codes, d_sae)


def same_codes(codes: Codes, theirs: Codes, pre: Tensor) -> None:
    """Both fire at values of `pre`, the same ones in each row; where two latents tie, either may fire."""
    z, expected = (whole(c, *pre.shape) for c in (codes, theirs))
    close(z, torch.where(z != 0, pre, 0.0))
    close(z.sort(dim=1).values, expected.sort(dim=1).values)


sizes = {
    "batch": st.sampled_from(BATCHES),
    "d_in": st.sampled_from(WIDTHS),
    "d_sae": st.sampled_from(LATENTS),
    "data": st.sampled_from(DATA),
    "seed": st.integers(0, 99),
}
many = settings(max_examples=40, deadline=None)


# The encoder and the selection


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d_in", WIDTHS)
def test_centre_and_scores(name, d_in):
    x, state = case("spread", 5, d_in, 19)
    for dtype in (torch.float64, torch.float32):  # activations come in their own type
        centred = make(name).centre(x.to(dtype), 1.7, state.b_dec)
        close(centred, x.to(dtype).double() / 1.7 - state.b_dec)
    kernels = make("torch" if name == "torch" else "native")
    close(scores(kernels, x, state).pre_latents(), pre_latents(x, state))


@pytest.mark.parametrize("name", NAMES)
@many
@given(k_share=st.floats(0, 1), **sizes)
@example(k_share=1.0, batch=5, d_in=7, d_sae=257, data="spread", seed=0)
@example(k_share=0.0, batch=5, d_in=7, d_sae=1, data="none", seed=0)
@example(k_share=0.0625, batch=5, d_in=1, d_sae=19, data="spread", seed=0)  # as many groups as lie in a strip
def test_top_k(name, k_share, batch, d_in, d_sae, data, seed):
    k = 1 + int(k_share * (d_sae - 1))
    x, state = case(data, batch, d_in, d_sae, seed)
    kernels, judge = make(name), Reference()
    codes = kernels.top_k(scores(kernels, x, state), k)
    assert (codes.offsets.diff() == k).all()
    assert (codes.values >= 0).all()
    same_codes(codes, judge.top_k(scores(judge, x, state), k), pre_latents(x, state))
    if data == "none":
        assert codes.values.count_nonzero() == 0


@pytest.mark.parametrize("name", NAMES)
@many
@given(share=st.floats(0, 1.2), **sizes)
@example(share=1.2, batch=5, d_in=7, d_sae=19, data="few", seed=0)
@example(share=0.02, batch=37, d_in=13, d_sae=257, data="heavy", seed=0)
@example(share=0.5, batch=37, d_in=13, d_sae=61, data="none", seed=0)
def test_batch_top_k(name, share, batch, d_in, d_sae, data, seed):
    n = 1 + int(share * batch * d_sae)
    x, state = case(data, batch, d_in, d_sae, seed)
    kernels, judge = make(name), Reference()
    theirs = judge.batch_top_k(scores(judge, x, state), n)
    for _ in range(2):  # the second time with the first cut as its guess
        codes = kernels.batch_top_k(scores(kernels, x, state), n)
        if codes is None:
            # Ties at the cut all fire; where they are many, they need not fit.
            assert name == "exact" or (name == "native" and len(theirs.values) > SCREENED * n)
        else:
            assert (codes.values > 0).all()
            same_codes(codes, theirs, pre_latents(x, state))


@pytest.mark.parametrize("name", NAMES)
@many
@given(**sizes)
def test_positive(name, batch, d_in, d_sae, data, seed):
    x, state = case(data, batch, d_in, d_sae, seed)
    kernels, judge = make(name), Reference()
    theirs = judge.positive(scores(judge, x, state), batch * d_sae)
    n = len(theirs.values)
    # What bf16 cannot tell from positive takes a slot as well while it is screened.
    capacity = batch * d_sae if name == "exact" else max(n, 1)
    codes = kernels.positive(scores(kernels, x, state), capacity)
    assert len(codes.values) == n
    same_codes(codes, theirs, pre_latents(x, state))
    if n > 1:
        assert kernels.positive(scores(kernels, x, state), n - 1) is None
        assert judge.positive(scores(judge, x, state), n - 1) is None


@pytest.mark.parametrize("name", ["native", "exact"])
@pytest.mark.parametrize("factor", [1e-12, 1e-3, 0.3, 3, 50, 1e3, 1e12])
def test_the_last_batch_only_helps_to_guess(name, factor):
    x, state = case("spread", 37, 13, 257)
    state.b_enc.zero_()
    state.b_dec.zero_()
    kernels, fresh = make(name), make(name)
    first = kernels.batch_top_k(scores(kernels, x, state), 97)
    assert len(first.values) == 97
    codes = kernels.batch_top_k(scores(kernels, factor * x, state), 97)
    expected = fresh.batch_top_k(scores(fresh, factor * x, state), 97)
    assert codes is not None
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(codes[:3], expected[:3], strict=True))


@pytest.mark.parametrize("name", ["native", "exact"])
def test_a_batch_whose_first_rows_tell_nothing_of_the_others(name):
    # The first guess looks at every third of 200 rows: here none of them fires.
    x, state = case("spread", 200, 7, 61)
    state.encoder.abs_()
    state.b_dec.zero_()
    state.b_enc.zero_()
    x = x.abs()
    x[::3] *= -1
    kernels, judge = make(name), Reference()
    codes = kernels.batch_top_k(scores(kernels, x, state), 100)
    assert codes is not None
    same_codes(codes, judge.batch_top_k(scores(judge, x, state), 100), pre_latents(x, state))


def test_a_tie_too_wide_for_its_slots_is_refused():
    x, state = case("tied", 37, 7, 61)
    state.encoder.copy_(state.encoder[:1].expand_as(state.encoder))
    state.b_enc.fill_(20)
    x = x[:1].expand(37, 7).contiguous()
    assert make("native").batch_top_k(scores(make("native"), x, state), 5) is None
    kernels = make("exact")
    assert kernels.batch_top_k(scores(kernels, x, state), 5) is None


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", ["native", "exact"])
def test_rows_come_in_order_from_two_threads(name):
    x, state = case("spread", 37, 13, 257)
    kernels, pre = make(name), pre_latents(x, state)
    judge = Reference()
    theirs = scores(judge, x, state)
    for _ in range(5):
        ours = scores(kernels, x, state)
        same_codes(kernels.top_k(ours, 9), judge.top_k(theirs, 9), pre)
        same_codes(kernels.batch_top_k(ours, 200), judge.batch_top_k(theirs, 200), pre)
        same_codes(kernels.positive(ours, 37 * 257), judge.positive(theirs, 37 * 257), pre)


# The decoder and the gradients


def fired(data: str, batch: int, d_in: int, d_sae: int, k: int, unit_norm: bool) -> tuple[Tensor, State, Codes]:
    """Centred activations, and their codes by the reference, with empty slots among them."""
    x, state = case(data, batch, d_in, d_sae)
    free = state_of(d_sae, d_in, unit_norm)
    state.W_dec, state.norms, state.unit_norm = free.W_dec, free.norms, unit_norm
    judge = Reference()
    x = judge.centre(x, 1.0, state.b_dec)
    codes = judge.top_k(judge.scores(x, state), min(k, d_sae))
    codes.values[::7] = 0
    return x, state, codes


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("cost", [0.0, 0.3])
@pytest.mark.parametrize("data", ["spread", "few", "none"])
@pytest.mark.parametrize(
    ("batch", "d_in", "d_sae", "k"),
    [(1, 1, 1, 1), (5, 7, 3, 3), (37, 65, 61, 6), (37, 64, 61, 6), (5, 70, 257, 31)],
)
def test_decode(name, unit_norm, cost, data, batch, d_in, d_sae, k):
    x, state, codes = fired(data, batch, d_in, d_sae, k, unit_norm)
    for ours, theirs in zip(
        make(name).decode(codes, state, x, cost), Reference().decode(codes, state, x, cost), strict=True
    ):
        close(ours, theirs)


@pytest.mark.parametrize("name", ["native", "torch"])
def test_no_slot_at_all(name):
    x, state, _ = fired("spread", 5, 7, 19, 3, True)
    codes = Codes(torch.zeros(6, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0).double())
    kernels = make(name)
    decoded = kernels.decode(codes, state, x, 0.3)
    close(decoded.squares, x.square().sum(dim=1))
    close(decoded.gradient, -2 / 5 * x)
    assert len(decoded.code_gradients) == 0
    plan = kernels.invert(codes, decoded.code_gradients, 19)
    assert torch.equal(plan.offsets.long(), torch.zeros(20, dtype=torch.int64))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize(
    ("batch", "d_in", "d_sae", "k"), [(1, 1, 1, 1), (1, 7, 61, 9), (5, 7, 3, 2), (37, 13, 257, 20)]
)
def test_invert_is_a_stable_inverted_index(name, batch, d_in, d_sae, k, threads):
    x, state, codes = fired("spread", batch, d_in, d_sae, k, True)
    gradients = Reference().decode(codes, state, x, 0.1).code_gradients
    torch.set_num_threads(threads)
    plan = make(name).invert(codes, gradients, d_sae)
    torch.set_num_threads(1)
    z, by_code = dense(codes, d_sae), dense(codes._replace(values=gradients), d_sae)
    assert plan.n_codes == (codes.values > 0).sum()
    assert plan.offsets[0] == 0
    assert len(plan.offsets) == d_sae + 1
    for j in range(d_sae):
        entries = slice(int(plan.offsets[j]), int(plan.offsets[j + 1]))
        filled = plan.codes[entries] > 0
        assert name == "torch" or filled.all()  # empty slots are left out in C, and are zeros in torch
        assert (plan.gradients[entries][~filled] == 0).all()
        rows = plan.rows[entries][filled].long()
        assert torch.equal(rows, z[:, j].nonzero().squeeze(1))
        assert torch.equal(plan.codes[entries][filled], z[rows, j])
        assert torch.equal(plan.gradients[entries][filled], by_code[rows, j])
    if name == "native":
        assert plan.offsets[-1] == (codes.values > 0).sum()
    else:
        assert torch.equal(plan.firing, (z > 0).sum(dim=0))


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(1, 1, 1), (5, 7, 3), (37, 13, 61), (130, 7, 257)])
def test_relu_and_its_backward(name, unit_norm, batch, d_in, d_sae):
    x, state, _ = fired("spread", batch, d_in, d_sae, 1, unit_norm)
    kernels, judge = make(name), Reference()
    for scale in (1.0, 0.5):  # twice, as buffers are kept
        z, expected = kernels.relu(scale * x, state), judge.relu(scale * x, state)
        for ours, theirs in zip(z, expected, strict=True):
            close(ours, theirs)
        gradient = torch.randn(batch, d_sae, dtype=torch.float64)
        theirs = judge.relu_backward(gradient.clone(), expected, state, 0.3)
        for mine, other in zip(kernels.relu_backward(gradient.clone(), z, state, 0.3), theirs, strict=True):
            close(mine, other)


STEPS = [(1, 1, 1), (5, 7, 3), (37, 13, 61), (130, 7, 257), (700, 33, 40)]


def by_products(x: Tensor, state: State, cost: float) -> tuple[Tensor, ...]:
    """What a dense step computes, one product after the other."""
    judge = Reference()
    z = judge.relu(x, state)
    residual = z.values @ state.W_dec - x
    gradient = 2 / len(x) * residual
    through, g_bias = judge.relu_backward(gradient @ state.W_dec.T, z, state, cost)
    g_decoder = z.values.T @ gradient
    if not state.unit_norm:
        g_decoder += (cost * z.values.sum(dim=0) / state.norms)[:, None] * state.W_dec
    sums = (residual.square().sum(), z.code_sums.sum())
    return through.T @ x, g_decoder, g_bias, gradient, z.firing, *sums


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), STEPS)
def test_a_dense_step_in_one_call(unit_norm, batch, d_in, d_sae):
    x, state, _ = fired("spread", batch, d_in, d_sae, 1, unit_norm)
    kernels = make("native")
    for scale in (1.0, 0.5):  # twice, as buffers are kept
        given = scale * x
        step = kernels.dense_step(given, state, given, 0.3)
        ours = (*step.rows[1:], *step[1:5])
        for mine, other in zip(ours, by_products(given, state, 0.3), strict=True):
            close(mine, other)


@pytest.mark.parametrize("k", [1, 5, 1000])
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), STEPS)
def test_aux_k(k, batch, d_in, d_sae):
    x, state, _ = fired("spread", batch, d_in, d_sae, 1, True)
    gradient = torch.randn(batch, d_in, dtype=torch.float64)
    dead = torch.arange(0, d_sae, 2)
    given = (gradient, x, state.encoder[dead], state.b_enc[dead], state.W_dec[dead], k)
    value, rows = make("native").aux_k(*given)
    expected, judged = Reference().aux_k(*given)
    for mine, other in zip((value, *rows), (expected, *judged), strict=True):
        close(mine, other)


def test_no_number_of_threads_changes_a_dense_step(two_threads):
    x, state, _ = fired("spread", 700, 33, 40, 1, True)
    x, state = x.float(), state_of(40, 33, dtype=torch.float32)
    two = make("native", torch.float32).dense_step(x, state, x, 0.3)
    torch.set_num_threads(1)
    one = make("native", torch.float32).dense_step(x, state, x, 0.3)
    for ours, theirs in zip((*two.rows[1:], *two[1:5]), (*one.rows[1:], *one[1:5]), strict=True):
        assert torch.equal(ours, theirs)


def test_large_matrices_and_emulated_bf16_are_left_to_the_blas(monkeypatch):
    x, state, _ = fired("spread", 5, 7, 3, 1, True)
    monkeypatch.setattr(Native, "_call", lambda self, name, *given: 0)
    single = x.float()
    assert Native(torch.float32, "bf16").dense_step(single, state, single, 0.3) is None
    monkeypatch.undo()
    assert make("native").dense_step(x, state, x.clone(), 0.3) is None, "a target of its own"
    monkeypatch.setattr("sae.kernels.small.ENTRIES", 20)
    assert make("native").dense_step(x, state, x, 0.3) is None


# The update


def same_state(ours: State, theirs: State, tolerance: float = 1e-10) -> None:
    for name, weight in ours.weights():
        close(weight, getattr(theirs, name), tolerance)
        close(ours.first[name], theirs.first[name], tolerance)
        close(ours.second[name], theirs.second[name], tolerance)
    if not ours.unit_norm:
        close(ours.norms, theirs.norms, tolerance)
    assert torch.equal(ours.silent_samples, theirs.silent_samples)
    assert torch.equal(ours.window_firing, theirs.window_firing)


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("extra_of", [None, "some", "all"])
@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(1, 1, 1), (5, 70, 19), (37, 13, 257)])
def test_update(name, unit_norm, extra_of, planned, counted, batch, d_in, d_sae):
    ours = state_of(d_sae, d_in, unit_norm)
    theirs = copy.deepcopy(ours)
    kernels, judge = make(name), Reference()
    stream = torch.Generator().manual_seed(4)
    for number, k in ((1, 3), (2, 1), (1000, 5)):  # fewer codes than the time before: nothing of those may remain
        x, _, codes = fired("spread", batch, d_in, d_sae, k, unit_norm)
        gradient = 0.1 * torch.randn(batch, d_in, generator=stream, dtype=torch.float64)
        through = 0.1 * torch.randn(len(codes.values), generator=stream, dtype=torch.float64) * (codes.values > 0)
        n = d_sae if extra_of == "all" else max(d_sae // 3, 1)
        latents = None if extra_of == "all" else torch.randperm(d_sae, generator=stream)[:n]
        rows = [torch.randn(n, d_in, generator=stream, dtype=torch.float64) for _ in range(2)]
        extra = Rows(latents, *rows, torch.randn(n, generator=stream, dtype=torch.float64)) if extra_of else None
        firing = torch.randint(3, (d_sae,), generator=stream) if counted else None
        for state, by in ((ours, kernels), (theirs, judge)):
            plan = by.invert(codes, through, d_sae) if planned else None
            options = {"plan": plan, "extra": extra, "firing": firing, "cost": 0.2}
            by.update_(state, Now.at(number, 0.01, 1.0), Change(x, gradient, **options))
        same_state(ours, theirs)
    if unit_norm:
        close(ours.W_dec.norm(dim=1), torch.ones(d_sae).double())


@pytest.mark.parametrize("unit_norm", [True, False])
def test_the_reference_projects_corrects_and_counts(unit_norm):
    """The judge itself, on numbers small enough to follow: one latent, two dimensions, the first step."""
    weights = {"encoder": torch.tensor([[1.0, 0.0]]), "W_dec": torch.tensor([[0.6, 0.8]])}
    weights |= {"b_enc": torch.zeros(1), "b_dec": torch.zeros(2)}
    state = State.of({name: weight.double() for name, weight in weights.items()}, unit_norm)
    extra = Rows(None, *(torch.tensor(g).double() for g in ([[1.0, 0.0]], [[1.0, 0.0]], [2.0])))
    gradient, firing = torch.tensor([[0.0, 3.0]]).double(), torch.tensor([4])
    Reference().update_(state, Now.at(1, 0.1, 1.0), Change(gradient, gradient, extra=extra, firing=firing))
    # (1, 0) less its part along (0.6, 0.8); b_dec: 3 from the residual, less 2 through the encoder's (1, 0).
    tangent = [[1 - 0.36, -0.48]] if unit_norm else [[1.0, 0.0]]
    torch.testing.assert_close(state.first["W_dec"], 0.1 * torch.tensor(tangent).double())
    torch.testing.assert_close(state.first["b_dec"], 0.1 * torch.tensor([-2.0, 3.0]).double())
    torch.testing.assert_close(state.second["b_dec"], 0.001 * torch.tensor([4.0, 9.0]).double())
    # Adam's first step is the rate, whatever the gradient's size.
    torch.testing.assert_close(state.b_dec, torch.tensor([0.1, -0.1]).double(), rtol=1e-6, atol=0)
    moved = torch.tensor([[0.5, 0.9]] if unit_norm else [[0.5, 0.8]]).double()
    expected = moved / moved.norm() if unit_norm else moved
    torch.testing.assert_close(state.W_dec, expected, rtol=1e-6, atol=0)
    assert (state.silent_samples.item(), state.window_firing.item()) == (0, 4)


def test_latents_silent_for_long_go_on_as_in_double():
    """Their moments have decayed below the smallest normal number: to flush these changes no weight."""
    single, double = (state_of(61, 7, dtype=dtype) for dtype in (torch.float32, torch.float64))
    decayed = 10 ** torch.linspace(-30, -46, 61, dtype=torch.float64)[:, None].expand(61, 7)
    for state in (single, double):
        for name in ("encoder", "W_dec"):
            getattr(state, name).copy_(getattr(single, name))
            state.first[name].copy_(decayed)
            state.second[name].copy_(decayed)
    assert ((single.first["encoder"] > 0) & (single.first["encoder"] < torch.finfo(torch.float32).tiny)).any()
    kernels, judge = make("native", torch.float32), Reference()
    x = torch.zeros(3, 7)
    for number in range(50):
        kernels.update_(single, Now.at(number + 10_000, 0.001, 1.0), Change(x, x))
        judge.update_(double, Now.at(number + 10_000, 0.001, 1.0), Change(x.double(), x.double()))
    for name in ("encoder", "W_dec"):
        torch.testing.assert_close(getattr(single, name).double(), getattr(double, name), rtol=0, atol=3e-7)
        torch.testing.assert_close(single.first[name].double(), double.first[name], rtol=1e-4, atol=1e-37)


# Precision


def product_error(x: Tensor, encoder: Tensor) -> Tensor:
    """The error of the bf16 product as a share of what `slack` allows."""
    weights = {"encoder": encoder, "W_dec": torch.ones_like(encoder)}
    weights |= {"b_enc": torch.zeros(len(encoder)), "b_dec": torch.zeros(encoder.shape[1])}
    state, kernels = State.of(weights, True), Native(torch.float32, "bf16")
    exact = x.double() @ encoder.double().T
    allowed = slack(x.shape[1]) * x.double().norm(dim=1)[:, None] * encoder.double().norm(dim=1)
    return (scores(kernels, x, state).product(slice(None)).double() - exact).abs() / allowed


@many
@given(st.sampled_from([1, 7, 64, 65, 700]), st.sampled_from([1, 19, 61]), st.integers(0, 99), st.floats(-12, 12))
def test_bf16_products_stay_within_the_slack(d_in, d_sae, seed, exponent):
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(5, d_in, generator=stream) * 10**exponent
    encoder = torch.randn(d_sae, d_in, generator=stream)
    encoder[0] = x[0] * (1 + 1e-4) / 10**exponent  # aligned: nothing cancels
    assert product_error(x, encoder).max() <= 1


@pytest.mark.parametrize("d_in", [1, 33, 257])
def test_the_slack_is_nearly_reached(d_in):
    # All factors lie just under a midpoint of two bf16 numbers and are rounded down, by nearly 2^-8 of themselves.
    below = torch.full((1, d_in), 1 + 2**-8 - 2**-20)
    share = product_error(below, below)
    assert 0.6 < share.max() <= 1


def near_ties(d_in: int, d_sae: int, batch: int, seed: int) -> tuple[Tensor, State]:
    """Latents in groups that differ by 1e-4 to 1e-3, of their rows or only of their biases."""
    stream = torch.Generator().manual_seed(seed)
    state = state_of(d_sae, d_in, dtype=torch.float32, seed=seed)
    x = torch.randn(batch, d_in, generator=stream)
    step = 1 + 1e-4 * torch.randint(1, 11, (d_sae, 1), generator=stream)
    state.encoder.copy_(state.encoder[torch.arange(d_sae) // 5] * step)
    state.b_enc.copy_(1e-3 * torch.rand(d_sae, generator=stream))
    state.b_dec.zero_()
    return x, state


def fires(codes: Codes | None, batch: int, d_sae: int) -> Tensor:
    assert codes is not None
    return whole(codes, batch, d_sae) > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["top_k", "batch_top_k", "positive"])
def test_exact_selects_what_fp32_selects(method, seed):
    batch, d_in, d_sae = 37, 65, 257
    x, state = near_ties(d_in, d_sae, batch, seed)
    argument = {"top_k": 13, "batch_top_k": 13 * batch, "positive": batch * d_sae}[method]
    if method == "positive":
        # Each pre-latent of the first row, and of rows close to it, is nearly 0.
        x = x[:1] + 1e-3 * x
        state.b_enc.copy_(-(state.encoder @ x[0]))
    double = State.of({name: weight.double() for name, weight in state.weights()}, True)
    judge = Reference()
    expected = fires(getattr(judge, method)(scores(judge, x, double), argument), batch, d_sae)
    kernels = Native(torch.float32, "exact")
    codes = getattr(kernels, method)(scores(kernels, x, state), argument)
    chosen = fires(codes, batch, d_sae)
    error = whole(codes, batch, d_sae) - torch.where(expected, pre_latents(x.double(), double), 0.0)
    assert error.abs().max() < 2e-5  # float32 on sums of 65 terms
    rounded = Plain("bf16")
    by_bf16 = fires(getattr(judge, method)(scores(rounded, x, state), argument), batch, d_sae)
    assert not torch.equal(by_bf16, expected), "the case must be too hard for bf16"
    certain = (pre_latents(x.double(), double).abs() > 1e-5) | (method != "positive")
    assert torch.equal(chosen & certain, expected & certain)


@pytest.mark.parametrize("precision", ["bf16", "exact"])
@pytest.mark.parametrize("unit_norm", [True, False])
def test_the_rounded_encoder_follows_the_encoder(precision, unit_norm):
    state = state_of(61, 13, unit_norm, dtype=torch.float32)
    x = torch.randn(5, 13, generator=torch.Generator().manual_seed(0))
    kernels = Native(torch.float32, precision)
    codes = kernels.top_k(scores(kernels, x, state), 5)
    decoded = kernels.decode(codes, state, x, 0.0)
    before = state.encoder.clone()
    kernels.update_(
        state, Now.at(1, 0.1, 1.0), Change(x, decoded.gradient, kernels.invert(codes, decoded.code_gradients, 61))
    )
    assert (state.encoder - before).abs().max() > 0.05
    fresh = Native(torch.float32, precision)
    ours = kernels.scores(kernels.centre(x, 1.0, state.b_dec), state)
    theirs = scores(fresh, x, state)
    assert torch.equal(ours.product(slice(None)), theirs.product(slice(None)))
    assert torch.equal(kernels.top_k(ours, 5).latents, fresh.top_k(theirs, 5).latents)
    if precision == "exact":
        close(kernels._buffer.kept["encoder_norms"], state.encoder.norm(dim=1), 1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "exact"])
def test_products_puts_the_setting_back(precision):
    settings, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = settings.fp32_precision
    cuda_before, cuda.fp32_precision = cuda.fp32_precision, "tf32"
    with products(precision):
        assert settings.fp32_precision == ("bf16" if precision == "bf16" else "ieee")
        assert cuda.fp32_precision == "ieee"  # TF32 would round in silence
    assert (settings.fp32_precision, cuda.fp32_precision) == (before, "tf32")
    with pytest.raises(KeyError), products(precision):
        raise KeyError
    assert (settings.fp32_precision, cuda.fp32_precision) == (before, "tf32")
    cuda.fp32_precision = cuda_before


# The choice


@pytest.mark.parametrize(
    ("dtype", "name", "precision", "message"),
    [
        (torch.float16, "native", "auto", "need a CPU and float32 or float64, not cpu and torch.float16"),
        (torch.float32, "torch", "exact", "precision exact is a mode of the native kernels"),
        (torch.float32, "reference", "bf16", "the reference kernels compute in fp32, not bf16"),
        (torch.float32, "reference", "exact", "the reference kernels compute in fp32, not exact"),
    ],
)
def test_what_cannot_work_is_refused(dtype, name, precision, message):
    with pytest.raises(UsageError, match=message) as raised:
        choose(CPU, dtype, name, precision)
    assert "\n" not in str(raised.value)


def test_no_native_kernels_off_the_cpu():
    meta = torch.device("meta")
    with pytest.raises(UsageError, match="native kernels need a CPU"):
        choose(meta, torch.float32, "native")
    with pytest.raises(UsageError, match="exact is a mode of the native kernels"):
        choose(meta, torch.float32, "auto", "exact")
    assert choose(meta, torch.float32).name == "torch"


@pytest.mark.parametrize("units", [True, False])
def test_auto_is_bf16_where_that_is_fast(units, monkeypatch, caplog):
    monkeypatch.setattr("sae.kernels.has_bf16_units", lambda device: units)
    with caplog.at_level(logging.INFO, "sae"):
        kernels = choose(CPU, torch.float32)
    assert (kernels.name, kernels.precision) == ("native", "bf16" if units else "fp32")
    assert f"kernels: native, products in {kernels.precision}, on cpu" in caplog.text
    assert choose(CPU, torch.float32, "torch").precision == kernels.precision
    # The judge does not round, and who trains in float64 wants no rounding either.
    assert choose(CPU, torch.float32, "reference").precision == choose(CPU, torch.float64).precision == "fp32"
    caplog.clear()
    choose(CPU, torch.float32, "native", "bf16")
    assert ("bf16 products are emulated, and slower" in caplog.text) is not units


def test_types_that_c_does_not_know_go_to_torch():
    assert choose(CPU, torch.float16).name == "torch"


# The build


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


def compiler(path, *lines: str) -> str:
    """A program that answers the compiler's call with these shell lines."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("says", ["", "echo cannot >&2; echo go on >&2", "echo 'native.c:1: error: no' >&2"])
def test_without_a_working_compiler(says, fresh_cache, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler(fresh_cache / "broken", says, "exit 1") if says else "/bin/false")
    monkeypatch.setattr("sae.kernels.has_bf16_units", lambda device: False)
    with pytest.raises(
        UsageError, match=r"native needs native kernels, which cannot be built: .* failed: .*; install a C compiler"
    ) as raised:
        choose(CPU, torch.float32, "native")
    assert "\n" not in str(raised.value)
    with caplog.at_level(logging.INFO, "sae"):
        kernels = choose(CPU, torch.float32)
    assert (kernels.name, kernels.precision) == ("torch", "fp32")
    warning, chosen = caplog.records
    assert warning.levelname == "WARNING"
    assert "training will be slower: native kernels cannot be built" in warning.message
    assert "\n" not in warning.message
    assert chosen.message == "kernels: torch, products in fp32, on cpu"
    assert not list((fresh_cache / "sae").glob("*.so"))


def test_exact_without_a_compiler_says_what_is_missing(fresh_cache, monkeypatch):
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(UsageError, match=r"precision exact needs native kernels, which cannot be built"):
        choose(CPU, torch.float32, "auto", "exact")


def test_the_compiler_that_cc_names_is_the_one(fresh_cache, monkeypatch):
    monkeypatch.setenv("CC", "nonesuch-cc -O2")
    with pytest.raises(UsageError, match="CC names 'nonesuch-cc', which is not there"):
        choose(CPU, torch.float32, "native")
    monkeypatch.setenv("CC", "env LANG=C cc")
    assert choose(CPU, torch.float32, "native").name == "native"


def test_what_the_environment_spoils_is_one_line(fresh_cache, monkeypatch):
    monkeypatch.setenv("CC", '"gcc -x')
    with pytest.raises(UsageError, match="cannot be read: No closing quotation"):
        choose(CPU, torch.float32, "native")
    monkeypatch.setenv("CC", compiler(fresh_cache / "odd", "exit 1"))
    (fresh_cache / "odd").write_text("no program")
    with pytest.raises(UsageError, match=r"odd cannot be run: Exec format error"):
        choose(CPU, torch.float32, "native")


def nowhere(case: str, fresh_cache, monkeypatch) -> str:
    """A cache that cannot be written; returns what the log says of it."""
    if case == "a file in the way":
        (fresh_cache / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(fresh_cache / "file"))
        return "file/sae: Not a directory"
    if case == "a full disk":
        lines = ['case "$*" in *"$XDG_CACHE_HOME"/sae/*) echo "No space left on device" >&2; exit 1; esac']
        monkeypatch.setenv("CC", compiler(fresh_cache / "quick", *lines, 'exec cc "$@" -O0'))
        return "No space left on device"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    return "there is no home directory"


@pytest.mark.parametrize("case", ["a file in the way", "a full disk", "no home"])
def test_where_kernels_cannot_be_kept_they_are_built_for_the_process(case, fresh_cache, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler(fresh_cache / "quick", 'exec cc "$@" -O0'))
    reason = nowhere(case, fresh_cache, monkeypatch)
    monkeypatch.setenv("TMPDIR", str(fresh_cache))
    monkeypatch.setattr(build.tempfile, "tempdir", None)
    assert choose(CPU, torch.float32, "native").name == "native"
    assert choose(CPU, torch.float32, "native").name == "native"
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "native kernels cannot be kept" in warning
    assert reason in warning
    assert "set XDG_CACHE_HOME" in warning
    assert not list(fresh_cache.rglob("*.so"))


def test_where_nothing_can_be_written_at_all(fresh_cache, monkeypatch):
    (fresh_cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh_cache / "file"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(fresh_cache / "file"))
    with pytest.raises(UsageError, match=r"cannot write to the temporary directory: Not a directory"):
        choose(CPU, torch.float32, "native")


def test_native_functions_have_the_types_of_their_heads():
    for real, ctype in (("float", ctypes.c_float), ("double", ctypes.c_double)):
        loaded = build.library(real)
        assert (loaded.centre.restype, loaded.at_least.restype, loaded.nth_largest.restype) == (
            None,
            ctypes.c_long,
            ctype,
        )
        pointer, number = ctypes.c_void_p, ctypes.c_long
        assert loaded.centre.argtypes == [pointer, ctype, *[pointer] * 3, *[number] * 3]
    kernels, vector = make("native"), torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ctypes.ArgumentError):  # the address alone would not tell how its rows lie
        kernels._call("centre", torch.zeros(4, 4).double().T, 1.0, vector, torch.zeros(4, 4).double(), None, 4, 4)


@pytest.mark.parametrize(("units", "share"), [("AVX2", 1 / 6), ("AVX512", 1 / 12)])
def test_small_weights_count_codes_as_sparse_sooner_where_products_are_slow(monkeypatch, units, share):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: units)
    small, large = torch.zeros(256, 64), torch.zeros(1025, 64)
    assert [sparse_share(small, precision) for precision in ("fp32", "exact", "bf16")] == [share, 1 / 12, 1 / 40]
    assert [sparse_share(large, precision) for precision in ("fp32", "exact", "bf16")] == [1 / 12, 1 / 12, 1 / 40]
    scores = Scores(torch.zeros(12, 64), small, torch.zeros(256), lambda rows: torch.zeros(12, 256))
    assert capacity(scores) == 2 * 12 * 256 // 6


def test_a_damaged_library_is_built_again(fresh_cache):
    compiler = build._compiler()
    path = fresh_cache / "sae" / f"kernels-float-{build._fingerprint(compiler, 'float')}.so"
    path.parent.mkdir()
    path.write_bytes(b"half a library")
    assert choose(CPU, torch.float32, "native").name == "native"
    assert path.stat().st_size > 1000


def test_bf16_batchtopk_fires_as_many_as_asked_for():
    stream = torch.Generator().manual_seed(0)
    x, encoder = torch.randn(64, 256, generator=stream), torch.randn(1024, 256, generator=stream)
    weights = {"encoder": encoder, "W_dec": encoder.clone(), "b_enc": torch.zeros(1024), "b_dec": torch.zeros(256)}
    state, kernels = State.of(weights, True), Native(torch.float32, "bf16")
    codes = kernels.batch_top_k(scores(kernels, x, state), 64 * 16)
    assert len(codes.values) == 64 * 16


@pytest.mark.usefixtures("fresh_cache")
def test_without_any_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="no C compiler found"):
        choose(CPU, torch.float32, "native")


def test_two_processes_build_at_once(fresh_cache, monkeypatch):
    monkeypatch.setenv("CC", compiler(fresh_cache / "quick", 'exec cc "$@" -O0'))
    program = (
        "import runpy, sys; build = runpy.run_path(sys.argv[1]); compiler = build['_compiler']();"
        "name = 'kernels-float-' + build['_fingerprint'](compiler, 'float') + '.so';"
        "build['_compile'](compiler, 'float', build['_folder']() / name)"
    )
    command = [sys.executable, "-c", program, build.__file__]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[1] for process in running] == [b"", b""]
    Native(torch.float32, "fp32")  # a third would have to compile under the same name
    left = list((fresh_cache / "sae").iterdir())  # one library, and no scraps
    assert [path.suffix for path in left] == [".so"]
