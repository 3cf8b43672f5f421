"""Products in whole numbers only screen: what is selected, and its values, are those of float32."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels import Codes, Scores, State, selection, small
from sae.kernels.native import Native
from sae.kernels.reference import dense

SHAPES = [(1, 1, 1), (5, 7, 3), (7, 13, 61), (37, 64, 257), (50, 65, 128), (49, 200, 2048), (13, 33, 1000)]
DATA = ["spread", "close", "twins", "spiky", "few", "faint", "dim", "vast", "zero"]
many = settings(max_examples=60, deadline=None)
sizes = {"shape": st.sampled_from(SHAPES), "data": st.sampled_from(DATA), "seed": st.integers(0, 99)}


@pytest.fixture(autouse=True)
def _screened_at_every_size(monkeypatch):
    """Small products are not screened, as it does not pay; here they are."""
    monkeypatch.setattr(small, "ENTRIES", -1)
    monkeypatch.setattr(selection, "FEWEST_SCREENED", 1)
    monkeypatch.setattr(selection, "LOOSE", float("inf"))
    if not Native(torch.float32, "fp32")._screen_bits:
        pytest.skip("whole numbers are no faster on this CPU")


def case(data: str, batch: int, d_in: int, d_sae: int, seed: int) -> tuple[Tensor, State]:
    """Activations and weights in float32 whose pre-latents are hard to tell apart in one way."""
    stream = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream)

    x, encoder, bias = normal(batch, d_in), normal(d_sae, d_in), 0.1 * normal(d_sae)
    if data == "close":  # latents closer to each other than a step of 16 bits, and further than float32 blurs
        encoder = normal(1, d_in) + 1e-4 * encoder
        bias = torch.zeros(d_sae)
    elif data == "twins":  # pairs of them
        encoder[d_sae // 2 :] = encoder[: d_sae - d_sae // 2] * (1 + 3e-5 * normal(d_sae - d_sae // 2, 1))
        bias = torch.zeros(d_sae)
    elif data == "spiky":  # one entry takes all of the range
        x[:, 0] *= 1e4
        encoder[::2, -1] *= 1e4
    elif data == "few":
        bias -= 2.5 * d_in**0.5
    elif data == "faint":  # some rows far below the others, some below what can be screened
        x[::2] *= 1e-14
        encoder[1::3] *= 1e-6
        encoder[2::3] *= 1e-14
        bias *= 1e-14
    elif data == "dim":  # all weights below it
        encoder *= 1e-14
        bias = torch.zeros(d_sae)
    elif data == "vast":  # squares leave the range of float32
        x[::3] *= 1e20
    elif data == "zero":
        x[::2] = 0
        encoder[::2] = 0
    weights = {"encoder": encoder, "W_dec": normal(d_sae, d_in), "b_enc": bias, "b_dec": torch.zeros(d_in)}
    return x, State.of(weights, False)


def scored(kernels: Native, x: Tensor, state: State) -> Scores:
    kernels.refresh(state)
    return kernels.scores(x, state)


def judged(x: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Pre-latents in float64, and how far those of float32 may be from them."""
    sizes = x.double().abs() @ state.encoder.double().abs().T + state.b_enc.double().abs()
    return x.double() @ state.encoder.double().T + state.b_enc.double(), (x.shape[1] / 4 + 4) * 2**-24 * sizes


def selects(codes: Codes, x: Tensor, state: State, cut: Tensor) -> None:
    """Values are those of float32; all that is surely above the cut of its row fires, nothing surely below."""
    pre, blur = judged(x, state)
    z = dense(codes, len(state.encoder)).double()
    assert ((z - pre).abs() <= blur)[z > 0].all()
    assert (z > 0)[(pre - blur > cut + blur) & (pre > blur)].all()
    assert (z == 0)[pre + blur < cut - blur].all()


@many
@given(k_share=st.floats(0, 1), **sizes)
@example(k_share=0.05, shape=(37, 64, 257), data="close", seed=0)
@example(k_share=0.02, shape=(49, 200, 2048), data="twins", seed=0)
def test_top_k(k_share, shape, data, seed):
    x, state = case(data, *shape, seed)
    k = 1 + int(k_share * (shape[2] - 1))
    kernels = Native(torch.float32, "fp32")
    codes = kernels.top_k(scored(kernels, x, state), k)
    pre, _ = judged(x, state)
    selects(codes, x, state, pre.topk(k, dim=1).values[:, -1:].clamp_min(0))
    assert (codes.offsets.diff() == k).all()
    assert (dense(codes, shape[2]).count_nonzero(dim=1) <= k).all()


@many
@given(share=st.floats(0, 1), **sizes)
@example(share=0.02, shape=(49, 200, 2048), data="twins", seed=0)
def test_batch_top_k(share, shape, data, seed):
    x, state = case(data, *shape, seed)
    n = 1 + int(share * (shape[0] * shape[2] - 1))
    kernels = Native(torch.float32, "fp32")
    pre, blur = judged(x, state)
    top = pre.flatten().topk(n)
    for _ in range(2):  # the second time with the first cut as its guess
        codes = kernels.batch_top_k(scored(kernels, x, state), n)
        if codes is None:
            assert data in ("close", "faint", "dim", "vast", "zero")  # all alike, or too far apart to guess a cut
            return
        cut = top.values[-1:].clamp_min(0)
        slack = blur.flatten()[top.indices[-1]]  # of the code at the cut
        above, below = pre - blur > cut + slack, pre + blur < cut - slack
        z = dense(codes, shape[2]).double()
        assert ((z - pre).abs() <= blur)[z > 0].all()
        assert (z > 0)[above & (pre > blur)].all()
        assert (z == 0)[below].all()


@many
@given(**sizes)
def test_positive(shape, data, seed):
    x, state = case(data, *shape, seed)
    kernels = Native(torch.float32, "fp32")
    codes = kernels.positive(scored(kernels, x, state), shape[0] * shape[2])
    assert codes is not None
    selects(codes, x, state, torch.zeros(1))
    assert (codes.values > 0).all()


def test_a_batch_that_needs_more_slots_says_so():
    x, state = case("spread", 37, 64, 257, 0)
    kernels = Native(torch.float32, "fp32")
    assert kernels.positive(scored(kernels, x, state), 10) is None


@pytest.mark.parametrize("rounded", ["activations", "weights"])
def test_rounding_at_its_worst(rounded):
    """All entries but one lose .49 of a step: the first latent is largest, and screening puts it behind the second."""
    d, kernels = 101, Native(torch.float32, "fp32")
    lossy = torch.full((d,), 3.49 / (32766 if kernels._screen_bits == 16 else 127))
    lossy[0] = 1
    plain = torch.ones(d)
    x, first = (lossy, plain) if rounded == "activations" else (plain, lossy)
    second = torch.zeros(d)
    second[0] = float(x.double() @ first.double()) / float(x[0]) - 1e-5
    weights = {"encoder": torch.stack([first, second]), "W_dec": torch.ones(2, d), "b_enc": torch.zeros(2)}
    state = State.of(weights | {"b_dec": torch.zeros(d)}, False)
    level = torch.stack([x, (2 - x**2).sqrt()])  # both rows together: no column asks for a scale of its own
    assert kernels.top_k(scored(kernels, level, state), 1).latents.tolist()[0] == 0
    assert kernels._screened


def test_rows_too_small_to_screen_are_found():
    weights = {"encoder": torch.full((2, 101), 0.99e-12), "W_dec": torch.ones(2, 101), "b_enc": torch.zeros(2)}
    weights["encoder"][1] = 0
    weights["encoder"][1, 0] = 2e-12
    kernels = Native(torch.float32, "fp32")
    scores = scored(kernels, torch.ones(1, 101), State.of(weights | {"b_dec": torch.zeros(101)}, False))
    assert kernels.top_k(scores, 1).latents.tolist() == [0]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads):
    x, state = case("twins", 49, 200, 2048, 3)
    kernels = Native(torch.float32, "fp32")
    torch.set_num_threads(threads)
    try:
        codes = kernels.top_k(scored(kernels, x, state), 9)
        several = tuple(part.clone() for part in codes[:3])
    finally:
        torch.set_num_threads(1)
    alone = kernels.top_k(scored(kernels, x, state), 9)
    for one, other in zip(several, alone[:3], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(bad):
    x, state = case("spread", 37, 64, 257, 0)
    kernels = Native(torch.float32, "fp32")
    before = kernels.top_k(scored(kernels, x, state), 5)
    good = dense(before, 257).clone()
    x[3, 7] = bad
    after = dense(kernels.top_k(scored(kernels, x, state), 5), 257)
    others = torch.arange(37) != 3
    assert torch.equal(after[others], good[others])


def test_weights_that_are_no_numbers_hide_no_other():
    x, state = case("spread", 37, 64, 257, 0)
    kernels = Native(torch.float32, "fp32")
    state.encoder[11, 5] = float("nan")
    z = dense(kernels.top_k(scored(kernels, x, state), 5), 257)
    pre, _ = judged(x, state)
    pre[:, 11] = -1
    assert torch.equal(z > 0, pre >= pre.topk(5, dim=1).values[:, -1:])


@pytest.fixture
def bytes_screen(monkeypatch):
    monkeypatch.setattr(selection, "LOOSE", 1.5)
    kernels = Native(torch.float32, "fp32")
    if kernels._screen_bits != 8:
        pytest.skip("words screen on this CPU: their bound is never loose")
    return kernels


@pytest.mark.parametrize("uneven", ["activations", "weights", "neither"])
def test_columns_of_any_size_are_screened(bytes_screen, uneven):
    """A few dimensions far larger than all others, as language models have them, take no range from these."""
    x, state = case("spread", 96, 768, 512, 0)
    x[:, ::256] *= 50 if uneven == "activations" else 1
    state.encoder[:, ::256] *= 5 if uneven == "weights" else 1
    codes = bytes_screen.top_k(scored(bytes_screen, x, state), 5)
    pre, _ = judged(x, state)
    selects(codes, x, state, pre.topk(5, dim=1).values[:, -1:].clamp_min(0))
    assert bytes_screen._screened


def test_a_bound_that_lets_too_much_pass_is_not_used(bytes_screen):
    """A spike of its own in each row takes all of the range, and no column is to blame."""
    x, state = case("spread", 1024, 1024, 300, 0)
    x += torch.diag(torch.full((1024,), 200.0))
    codes = bytes_screen.top_k(scored(bytes_screen, x, state), 5)
    assert not bytes_screen._screened
    pre, _ = judged(x, state)
    selects(codes, x, state, pre.topk(5, dim=1).values[:, -1:].clamp_min(0))


def test_few_rows_are_not_worth_rounding_the_encoder(bytes_screen, monkeypatch):
    monkeypatch.setattr(selection, "FEWEST_SCREENED", 64)
    x, state = case("spread", 63, 64, 257, 0)
    scored(bytes_screen, x, state)
    assert not bytes_screen._screened


@pytest.mark.parametrize("n_rows", [50, 700])
def test_rows_that_began_too_high_are_searched_again(n_rows):
    x, state = case("spread", n_rows, 65, 257, 0)
    kernels = Native(torch.float32, "fp32")
    first = dense(kernels.top_k(scored(kernels, x, state), 5), 257).clone()
    cuts = first.topk(5, dim=1).values[:, -1] / x.norm(dim=1)
    kernels.row_cut = float(cuts.median())
    assert torch.equal(dense(kernels.top_k(scored(kernels, x, state), 5), 257), first)


def test_some_rows_alone():
    """As the first guess of a BatchTopK's cut looks at them."""
    x, state = case("spread", 301, 65, 257, 0)
    kernels = Native(torch.float32, "fp32")
    block = kernels._block(scored(kernels, x, state), slice(0, 301))
    found = kernels._at_least(block, 10.0, 301 * 257, 0, stride=3)
    pre, _ = judged(x[::3], state)
    for b in range(101):
        entries = slice(int(found.starts[b]), int(found.starts[b] + found.counts[b]))
        assert sorted(found.latents[entries].tolist()) == (pre[b] >= 10).nonzero().flatten().tolist()


def test_rows_that_scaling_makes_vanish_are_found():
    """Columns of 1e18 are scaled by 2^-30: a row of 4e-37 becomes 0, and is none."""
    x, encoder = torch.full((64, 16), 1e18), torch.arange(1.0, 65.0)[:, None].expand(64, 16).contiguous()
    x[1] = 0
    x[1, 3] = 4.1e-37
    weights = {"encoder": encoder, "W_dec": encoder.clone(), "b_enc": torch.zeros(64), "b_dec": torch.zeros(16)}
    kernels = Native(torch.float32, "fp32")
    codes = kernels.top_k(scored(kernels, x, State.of(weights, False)), 1)
    assert codes.latents.tolist() == [63] * 64
    assert (codes.values > 0).all()


def test_a_bias_that_is_no_number_hides_no_other():
    """Biases of 1 to which products of half of its last bit are added: whether these count is for floats to say."""
    kernels, stream = Native(torch.float32, "fp32"), torch.Generator().manual_seed(0)
    x, encoder = (1 + torch.rand(n, 16, generator=stream) for n in (64, 4000))
    encoder *= 0.501 * 2**-23 / (encoder @ x[0])[:, None]
    bias = torch.ones(4000)
    bias[-2:] = torch.tensor([torch.nan, 0.0])
    weights = {"encoder": encoder, "W_dec": encoder.clone(), "b_enc": bias, "b_dec": torch.zeros(16)}
    block = kernels._block(scored(kernels, x, State.of(weights, False)), slice(0, 64))
    found = kernels._at_least(block, 1 + 2**-23, 64 * 4000, 0)
    above = (x.double() @ encoder.double().T)[:, :-2] > 0.5002 * 2**-23
    assert found.total >= above.sum() > 64 * 1000
