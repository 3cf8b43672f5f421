"""Triton's kernels, stage by stage against the reference in float64: in its interpreter where there is no GPU."""

import copy

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")

from sae.kernels import Change, Codes, Rows, Scores, State  # noqa: E402
from sae.kernels.reference import Reference, dense  # noqa: E402
from sae.kernels.triton import Triton, dead, index, launch, update  # noqa: E402
from sae.optim import Now  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SINGLE = 3e-6  # of the largest entry: float32 on sums of up to a few hundred terms
WEIGHTS = (0.2, 0.5, 0.3)
# batch, d_in, d_out, d_sae, k: no power of two, one of everything, all latents at once
SIZES = [(1, 1, 1, 1, 1), (5, 7, 3, 2, 2), (37, 13, 21, 61, 6), (5, 33, 70, 99, 19)]
every_size = pytest.mark.parametrize(("batch", "d_in", "d_out", "d_sae", "k"), SIZES)
both_norms = pytest.mark.parametrize("unit_norm", [True, False])


@pytest.fixture(autouse=True, scope="module")
def _quick_interpreter():
    """The interpreter prepares triton's language anew for each call inside a kernel: here once a launch and module."""
    if not launch.interpreted():
        yield
        return
    from triton.runtime import interpreter

    prepare, launch_grid, prepared = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def call(self, *arguments, **options):
        module = id(self.fn.__globals__)
        if module not in prepared:
            prepare(self.fn)
            prepared.add(module)
        return self.rewrite()(*arguments, **options)

    def begin(self, *arguments, **options):
        prepared.clear()
        return launch_grid(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter.GridExecutor, "__call__", begin)
        yield


@pytest.fixture(autouse=True, scope="module")
def _fill_new_memory():
    """NaN and extreme integers in what torch.empty gives, so that memory which nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def make(precision: str = "fp32", rounded: torch.dtype = torch.float16) -> Triton:
    """The interpreter computes nothing in bf16; float16 takes its place."""
    return Triton(DEVICE, torch.float32, precision, rounded)


def close(ours: Tensor, theirs: Tensor, tolerance: float = SINGLE) -> None:
    """Within `tolerance` of the largest entry."""
    assert ours.shape == theirs.shape
    size = float(theirs.abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours.to(theirs.dtype).cpu(), theirs.cpu(), rtol=0, atol=tolerance * size)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def state_of(d_sae: int, d_in: int, d_out: int, unit_norm: bool = True, tied: bool = False) -> State:
    """A state in mid-training: no weight, moment or counter is 0."""
    weights = {"encoder": normal(d_sae, d_in, seed=1), "W_dec": normal(d_sae, d_out, seed=2)}
    weights |= {"b_enc": normal(d_sae, seed=3), "b_dec": normal(d_out, seed=4)}
    if unit_norm:
        weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
    state = State.of(weights, unit_norm, tied)
    for number, moment in enumerate(state.first.values()):
        moment.copy_(0.1 * normal(*moment.shape, seed=5 + number))
    for number, moment in enumerate(state.second.values()):
        moment.copy_(0.01 + 0.01 * normal(*moment.shape, seed=9 + number).square())
    state.silent_samples.random_(1000)
    state.window_firing.random_(1000)
    return state


def double(state: State) -> State:
    """The same for the judge."""
    other = copy.deepcopy(state)
    for name in ("encoder", "W_dec", "b_enc", "b_dec", "norms"):
        setattr(other, name, getattr(other, name).double())
    other.first = {name: moment.double() for name, moment in other.first.items()}
    other.second = {name: moment.double() for name, moment in other.second.items()}
    return other


def as_double(codes: Codes) -> Codes:
    pre = None if codes.pre_latents is None else codes.pre_latents.double()
    return codes._replace(values=codes.values.double(), pre_latents=pre)


# The encoder and the selection


def scored(data: str, batch: int, d_sae: int, dtype: torch.dtype) -> tuple[Scores, Tensor]:
    """Scores with a product of this type, and the pre-latents that they stand for."""
    product, bias = normal(batch, d_sae, seed=1).to(dtype), normal(d_sae, seed=2)
    if data == "few":
        bias -= 2.5
    elif data == "none":
        bias -= 99
    elif data == "tied":
        product, bias = product.round(), bias.round()
    elif data == "alike":
        product, bias = torch.ones_like(product), torch.ones_like(bias)
    elif data == "heavy":
        product[-1] *= 1000
    x, encoder = normal(batch, 3), normal(d_sae, 3)
    return Scores(x, encoder, bias, lambda rows: product[rows]), product.float() + bias


def whole(codes: Codes, batch: int, d_sae: int) -> Tensor:
    """The codes as a matrix, once it is sure that their slots are in order."""
    assert codes.offsets[0] == 0
    assert codes.offsets[-1] <= len(codes.values) == len(codes.latents)
    assert len(codes.offsets) == batch + 1
    assert (codes.offsets.diff() >= 0).all()
    n = int(codes.offsets[-1])
    assert (codes.values[n:] == 0).all()
    assert ((codes.latents >= 0) & (codes.latents < d_sae)).all()
    return dense(codes._replace(latents=codes.latents[:n], values=codes.values[:n]), d_sae)


def same_codes(codes: Codes, expected: Tensor, pre: Tensor) -> None:
    """Both fire at values of `pre`, to the bit; where two latents tie, either may fire."""
    z = whole(codes, *pre.shape)
    assert torch.equal(z, torch.where(z != 0, pre, 0.0))
    assert torch.equal(z.sort(dim=1).values, expected.sort(dim=1).values)


def row_largest(pre: Tensor, k: int) -> Tensor:
    values, latents = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, latents, values.relu())


DATA = ["spread", "few", "none", "tied", "alike", "heavy"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    ("batch", "d_sae", "k"), [(1, 1, 1), (5, 257, 1), (5, 257, 9), (37, 61, 61), (3, 700, 130), (33, 1000, 3)]
)
def test_top_k(data, batch, d_sae, k, dtype):
    scores, pre = scored(data, batch, d_sae, dtype)
    codes = make().top_k(scores, k)
    assert (codes.offsets.diff() == k).all()
    same_codes(codes, row_largest(pre, k), pre)
    taken = codes.latents.view(batch, k).long().sort(dim=1).values
    assert (taken.diff(dim=1) > 0).all(), "no latent is taken twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("batch", "d_sae", "n"), [(1, 1, 1), (5, 257, 30), (37, 61, 1), (3, 700, 2100), (7, 70, 100)])
def test_batch_top_k(data, batch, d_sae, n, dtype):
    scores, pre = scored(data, batch, d_sae, dtype)
    codes = make().batch_top_k(scores, n)
    z = whole(codes, batch, d_sae)
    assert codes.offsets[-1] == len(codes.values) == n
    assert torch.equal(z, torch.where(z != 0, pre, 0.0))
    assert torch.equal(z[z > 0].sort().values, pre[pre > 0].sort().values[-n:])
    if data == "none":  # empty slots are shared out
        assert codes.offsets.diff().amax() - codes.offsets.diff().amin() <= 1


@pytest.mark.parametrize(("shift", "steps"), [(0.0, 4), (9.0, 2**12), (99.0, 4)])
def test_batch_top_k_scores_its_candidates_again(shift, steps):
    """Products in steps of 1/4 tie by the dozen at the cut; what fires is decided by float32, and has its values."""
    state, x, n = state_of(300, 13, 13), normal(9, 13), 200
    state.b_enc -= shift  # at 9 fewer than n are positive, at 99 none
    rounded = ((x @ state.encoder.T) * steps).round() / steps
    scores = Scores(x, state.encoder, state.b_enc, lambda rows: rounded[rows])
    expected = (x.double() @ state.encoder.double().T + state.b_enc.double()).relu()
    least = expected.flatten().topk(n).values[-1].clamp_min(1e-9)
    z = whole(make("bf16").batch_top_k(scores, n), 9, 300)
    close(z, torch.where(expected >= least, expected, 0.0))
    if not shift:
        alone = whole(make().batch_top_k(scores, n), 9, 300)
        assert ((alone > 0) != (z > 0)).sum() >= 4, "rounding must have chosen others"


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("batch", "d_sae"), [(1, 1), (5, 257), (37, 61), (2, 3000)])
def test_positive(data, batch, d_sae):
    scores, pre = scored(data, batch, d_sae, torch.float32)
    kernels, n = make(), int((pre > 0).sum())
    for _ in range(2):
        codes = kernels.positive(scores, batch * d_sae)
        assert torch.equal(whole(codes, batch, d_sae), pre.relu())
        assert codes.offsets[-1] == kernels.n_positive == n
        assert (codes.values[:n] > 0).all()
    if n > 1:
        assert kernels.positive(scores, n - 1) is None
        kernels.recording = True
        kernels.n_slots = n - 1
        beyond = kernels.buffer("values", (n + 9,))[n - 1 :].fill_(7.0)
        codes = kernels.positive(scores, batch * d_sae)
        assert len(codes.values) == n - 1 < kernels.n_positive
        assert (beyond == 7).all(), "nothing is written where no slot is"


def test_top_k_of_more_than_tiles_are_made_for():
    scores, pre = scored("spread", 3, 700, torch.float32)
    same_codes(make().top_k(scores, 600), row_largest(pre, 600), pre)


def test_bad_pre_latents_are_not_hidden():
    scores, _ = scored("spread", 2, 70, torch.float32)
    scores.product(slice(None))[0] = torch.nan
    scores.product(slice(None))[1, 5] = torch.inf
    codes = make().top_k(scores, 3)
    assert codes.values[:3].isnan().all()
    assert codes.values[3:].isinf().any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores(precision):
    state, x = state_of(61, 13, 13), normal(5, 13)
    kernels = make(precision)
    kernels.refresh(state)
    product = kernels.scores(x, state).product(slice(None))
    assert product.dtype == (torch.float32 if precision == "fp32" else torch.float16)
    close(product, x.double() @ state.encoder.double().T, SINGLE if precision == "fp32" else 3e-3)


# The decoder and the gradients


def codes_of(state: State, batch: int, k: int, silent: bool = False, n_levels: int = 1) -> Codes:
    """TopK's, with empty slots (or silent ones that have a gradient), and a level for each slot."""
    pre = normal(batch, len(state.b_enc), seed=20)
    values, latents = pre.topk(k, dim=1)
    offsets = torch.arange(batch + 1, device=DEVICE) * k
    codes = Codes(offsets, latents.flatten().int(), values.relu().flatten())
    codes.values[::5] = 0
    own = {"pre_latents": codes.values - 0.1} if silent else {}
    if n_levels > 1:
        levels = torch.randint(n_levels, codes.latents.shape, generator=torch.Generator().manual_seed(1))
        own |= {"levels": levels.to(DEVICE), "weights": WEIGHTS[:n_levels]}
    return codes._replace(**own)


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("n_levels", [1, 3])
@both_norms
@every_size
def test_decode(silent, n_levels, unit_norm, batch, d_in, d_out, d_sae, k):
    state, target = state_of(d_sae, d_in, d_out, unit_norm), normal(batch, d_out)
    codes = codes_of(state, batch, k, silent, n_levels)
    kernels, judge, cost = make(), double(state), torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    for reading, detached, given in ((0, False, 0.3), (-1, True, 0.3), (-1, False, cost))[3 - min(n_levels, 3) :]:
        read = codes._replace(reading=reading, detached=detached)
        theirs = Reference().decode(as_double(read), judge, target.double(), 0.3)
        for ours, other in zip(kernels.decode(read, state, target, given), theirs, strict=True):
            close(ours, other)


def test_slots_that_no_row_owns_have_no_gradient():
    state, target = state_of(19, 7, 7), normal(2, 7)
    codes = Codes(
        torch.tensor([0, 1, 2], device=DEVICE),
        torch.tensor([3, 4, 0, 0], dtype=torch.int32, device=DEVICE),
        torch.tensor([1.0, 2.0, 0.0, 0.0], device=DEVICE),
    )
    kernels = make()
    decoded = kernels.decode(codes._replace(pre_latents=codes.values), state, target, 0.3)
    assert (decoded.code_gradients[2:] == 0).all()
    plan = kernels.invert(codes, decoded.code_gradients, 19)
    assert plan.offsets[-1] == plan.n_codes == 2
    empty = codes._replace(offsets=torch.zeros(3, dtype=torch.int64, device=DEVICE), values=torch.zeros(4).to(DEVICE))
    close(kernels.decode(empty, state, target, 0.3).squares, target.square().sum(dim=1))
    assert kernels.invert(empty, torch.zeros(4, device=DEVICE), 19).offsets.count_nonzero() == 0


@pytest.mark.parametrize("n_levels", [1, 3])
@every_size
def test_invert_is_a_stable_inverted_index(n_levels, batch, d_in, d_out, d_sae, k):
    state = state_of(d_sae, d_in, d_out)
    codes = codes_of(state, batch, k, True, n_levels)
    gradients = torch.where(codes.values > 0, normal(len(codes.values)), 0.0)
    plan = make().invert(codes, gradients, d_sae)
    z, by_code = dense(codes, d_sae), dense(codes._replace(values=gradients), d_sae)
    level = torch.zeros_like(codes.latents) if codes.levels is None else codes.levels
    levels = dense(codes._replace(values=level.to(z.dtype)), d_sae).long()
    for j in range(d_sae):
        entries = slice(int(plan.offsets[j]), int(plan.offsets[j + 1]))
        rows = plan.rows[entries]
        assert torch.equal(rows, z[:, j].nonzero().squeeze(1))
        assert torch.equal(plan.decoder_rows[entries], rows + batch * levels[rows, j])
        assert torch.equal(plan.codes[entries], z[rows, j])
        assert torch.equal(plan.gradients[entries], by_code[rows, j])
        assert (plan.owners[entries] == j).all()
    assert torch.equal(plan.firing, (z > 0).sum(dim=0))


# Dense products


@pytest.mark.parametrize("k", [1, 5, 1000])
@pytest.mark.parametrize(("batch", "d_in", "d_out", "n_dead"), [(1, 1, 1, 1), (5, 7, 3, 20), (37, 13, 13, 61)])
def test_aux_k(k, batch, d_in, d_out, n_dead, monkeypatch):
    monkeypatch.setattr(dead, "BLOCK", 16)  # rows of more than one block
    gradient, x = normal(batch, d_out), normal(batch, d_in, seed=1)
    encoder, b_enc = normal(n_dead, d_in, seed=2), normal(n_dead, seed=3)
    b_enc[n_dead // 2 :] = -torch.inf  # as for what fills the list up
    given = (gradient, x, encoder, b_enc, normal(n_dead, d_out, seed=4))
    value, rows = make().aux_k(*given, k)
    expected, judged = Reference().aux_k(*(tensor.double() for tensor in given), k)
    for mine, other in zip((value, *rows), (expected, *judged), strict=True):
        close(mine, other)
    value, rows = make("bf16").aux_k(*given, k)
    for mine, other in zip((value, *rows), (expected, *judged), strict=True):
        close(mine, other, 5e-3)


@pytest.mark.parametrize("n_slots", [1, 7, 1000])
def test_sums_by_latent(n_slots):
    """Latent 3 has half of all slots; empty ones, which are many, belong to latent 0 by name alone."""
    latents = torch.randint(11, (n_slots,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    latents[: n_slots // 2] = 3
    latents, values = latents.to(DEVICE), normal(n_slots)
    empty = torch.arange(n_slots, device=DEVICE) % 3 == 1
    latents, values = latents.masked_fill(empty, 0), values.masked_fill(empty, 0)
    close(make().by_latent(latents, values, 13), Reference().by_latent(latents, values.double(), 13))


@both_norms
def test_a_dense_step_in_rounded_products(unit_norm):
    state, x, target = state_of(61, 13, 21, unit_norm), normal(37, 13), normal(37, 21, seed=9)
    judge, kernels = Reference(), make("bf16")
    kernels.refresh(state)
    assert make("fp32").dense_step(x, state, target, 0.3) is None
    step = kernels.dense_step(x, state, target, 0.3)
    z = judge.relu(x, state)
    residual = z.values @ state.W_dec - target
    gradient = 2 / len(x) * residual
    through, g_bias = judge.relu_backward(gradient @ state.W_dec.T, z, state, 0.3)
    g_decoder = z.values.T @ gradient
    if not unit_norm:
        g_decoder += (0.3 * z.values.sum(dim=0) / state.norms)[:, None] * state.W_dec
    expected = (through.T @ x, g_decoder, g_bias, gradient, residual.square().sum(), z.code_sums.sum())
    ours = (*step.rows[1:], step.gradient, step.squares, step.code_sum)
    for mine, other in zip(ours, expected, strict=True):
        close(mine, other, 1e-2)
    assert (step.firing - z.firing).abs().max() <= 1  # a pre-latent next to 0


# The update


def same_state(ours: State, theirs: State) -> None:
    for name, weight in ours.weights():
        close(weight, getattr(theirs, name))
        close(ours.first[name], theirs.first[name])
        close(ours.second[name], theirs.second[name])
    if not ours.unit_norm:
        close(ours.norms, theirs.norms)
    assert torch.equal(ours.silent_samples, theirs.silent_samples)
    assert torch.equal(ours.window_firing, theirs.window_firing)


def both_update(ours: State, theirs: State, codes: Codes, number: int, d_in: int, kernels: Triton, **options) -> None:
    """The same step by both; `through` and the gradient are drawn."""
    (d_sae, d_out), batch = ours.W_dec.shape, len(codes.offsets) - 1
    x, gradient = normal(batch, d_in, seed=30), 0.1 * normal(len(codes.weights) * batch, d_out, seed=31)
    through = 0.1 * normal(len(codes.values), seed=32)
    through[::3] = 0
    planned, extra = options.pop("planned"), options.pop("extra")
    for state, by in ((ours, kernels), (theirs, Reference())):
        to = torch.Tensor.double if state is theirs else torch.Tensor.float
        own = as_double(codes) if state is theirs else codes
        plan = by.invert(own, to(through), d_sae) if planned else None
        rows = extra and Rows(extra.latents, *(to(part) for part in extra[1:]))
        now = Now(*(value.to(DEVICE) for value in Now.at(number, 0.01, 1.0)))
        by.update_(state, now, Change(to(x), to(gradient), plan=plan, extra=rows, **options))


@pytest.mark.parametrize(
    ("unit_norm", "tied", "extra_of", "planned"),
    [
        (True, True, None, True),
        (True, True, "some", True),
        (False, False, "filled up", True),
        (False, True, "filled up", False),
        (True, False, "all", True),
        (False, False, "all", False),
    ],
)
@every_size
def test_update(unit_norm, tied, extra_of, planned, batch, d_in, d_out, d_sae, k, monkeypatch):
    monkeypatch.setattr(update, "MIN_PROGRAMS", 16)  # a program owns eight latents, four, or one
    d_out = d_in if tied else d_out
    ours = state_of(d_sae, d_in, d_out, unit_norm, tied)
    theirs, kernels = double(ours), make("bf16")
    kernels.refresh(ours)
    for number in (1, 1000):
        n = d_sae if extra_of == "all" else max(d_sae // 3, 1)
        latents = torch.randperm(d_sae, generator=torch.Generator().manual_seed(number))[:n].sort().values.to(DEVICE)
        rows = [normal(n, width, seed=40) for width in (d_in, d_out)]
        bias = normal(n, seed=41)
        if extra_of == "filled up":  # the last latent may be among them itself
            latents[-1] = d_sae - 1
            latents = torch.cat([latents, latents.new_full((3,), d_sae - 1)])
            rows = [torch.cat([part, part.new_zeros(3, part.shape[1])]) for part in rows]
            bias = torch.cat([bias, bias.new_zeros(3)])
        extra = extra_of and Rows(None if extra_of == "all" else latents, *rows, bias)
        firing = torch.arange(d_sae, device=DEVICE) % 3 if number == 1 else None
        pull = normal(d_sae, seed=42) if number == 1 and not unit_norm else None
        codes = codes_of(ours, batch, k, True, 3 if number == 1 else 1)
        options = {"planned": planned, "extra": extra, "firing": firing, "cost": 0.2}
        both_update(ours, theirs, codes, number, d_in, kernels, **options, pull=pull)
        same_state(ours, theirs)
        close(kernels._encoder.float(), ours.encoder, 1e-3)
    if unit_norm:
        close(ours.W_dec.norm(dim=1), torch.ones(d_sae, device=DEVICE))


@pytest.mark.parametrize("size", [2, 8])
def test_latents_that_fire_often_are_summed_in_chunks(size, monkeypatch):
    """Entries of one latent before, in and after whole chunks; chunks that two latents share are nobody's."""
    monkeypatch.setattr(index, "CHUNK", size)
    state = state_of(5, 7, 3, unit_norm=False)
    theirs, kernels = double(state), make()
    codes = codes_of(state, 37, 1)
    codes.latents[:] = torch.where(torch.arange(37, device=DEVICE) % 4 == 0, codes.latents, 2)
    options = {"planned": True, "extra": None, "cost": 0.2}
    both_update(state, theirs, codes, 2, 7, kernels, **options)
    same_state(state, theirs)


@pytest.mark.parametrize("n_levels", [1, 3])
@every_size
def test_gradient_rows(n_levels, batch, d_in, d_out, d_sae, k, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 4)
    state = state_of(d_sae, d_in, d_out)
    codes, x = codes_of(state, batch, k, True, n_levels), normal(batch, d_in, seed=30)
    gradient, through = normal(n_levels * batch, d_out, seed=31), normal(len(codes.values), seed=32)
    through[::3] = 0
    kernels, judge = make(), Reference()
    plans = kernels.invert(codes, through, d_sae), judge.invert(as_double(codes), through.double(), d_sae)
    rows, sums, firing = kernels.gradient_rows(state, x, gradient, plans[0])
    expected, expected_sums, expected_firing = judge.gradient_rows(
        double(state), x.double(), gradient.double(), plans[1]
    )
    for ours, theirs in zip((*rows, sums), (*expected, expected_sums), strict=True):
        close(ours, theirs)
    assert torch.equal(firing, expected_firing)


def test_one_memory_for_encoder_and_decoder():
    """As matching pursuit has it: the encoder has no gradient and no moments of its own."""
    ours = state_of(19, 7, 7)
    ours.encoder = ours.W_dec
    for moments in (ours.first, ours.second):
        del moments["encoder"]
    theirs = double(ours)
    theirs.encoder = theirs.W_dec
    codes = codes_of(ours, 5, 3)
    both_update(ours, theirs, codes, 2, 7, make(), planned=True, extra=None)
    same_state(ours, theirs)


@pytest.mark.parametrize("shared", [False, True])
@every_size
def test_moments_in_eight_bits(shared, batch, d_in, d_out, d_sae, k):
    """Rounded by the same chance as the reference's: what differs lay next to where one rounds."""
    d_out = d_in if shared else d_out
    ours = state_of(d_sae, d_in, d_out)
    if shared:
        ours.encoder = ours.W_dec
    weights = {name: getattr(ours, name) for name in ("encoder", "W_dec", "b_enc", "b_dec")}
    ours = State.of(weights, True, False, moments="int8")
    kernels = make()
    for number in (1, 2, 1000, 2**20 + 1):
        theirs = double(ours)  # each step from the same state: a code that was rounded otherwise moves weights
        theirs.scales = {name: scales.double() for name, scales in ours.scales.items()}
        for moments, kept in ((theirs.first, ours.first), (theirs.second, ours.second)):
            moments.update({name: kept[name].clone() for name in ours.scales})
        if shared:
            theirs.encoder = theirs.W_dec
        codes = codes_of(ours, batch, k, True)
        both_update(ours, theirs, codes, number, d_in, kernels, planned=True, extra=None)
        for name, scales in ours.scales.items():
            close(getattr(ours, name), getattr(theirs, name))
            torch.testing.assert_close(scales.double(), theirs.scales[name], rtol=1e-4, atol=1e-12)
            for mine, other in ((ours.first[name], theirs.first[name]), (ours.second[name], theirs.second[name])):
                assert mine.dtype == other.dtype
                off = (mine.int() - other.int()).abs()
                assert int(off.max()) <= 1
                assert int((off > 0).sum()) <= 0.01 * off.numel()
        assert ours.second["W_dec"].min() >= 1
