"""SAEs in the place of a network's activations: exact where nothing is edited, and by hand where something is."""

import inspect
from contextlib import contextmanager

import pytest
import torch
from tiny_language_model import make
from torch import Tensor, nn

import sae
from sae.codes import SparseCodes
from sae.errors import UsageError
from sae.model import SAE

D, HIDDEN, D_SAE = 6, 10, 24


class Network(nn.Module):
    """x -> a tuple with tanh(x A) -> sums over positions -> one number a text."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = nn.Parameter(torch.randn(D, HIDDEN))

        def forward(self, x: Tensor, more: str = "") -> tuple[Tensor, str]:
            return torch.tanh(x @ self.A), "cache"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.out = self.Block(), nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return (self.block(x=x, more="words")[0] @ self.out).cumsum(dim=1)


def an_sae(d_in: int, d_out: int | None = None, **options: object) -> SAE:
    options = options or {"kind": "topk", "k": 4}
    if d_out is not None:
        options |= {"kind": "skip_transcoder"}
    made = SAE(d_in, sae.SAEConfig.of_kind({"d_sae": D_SAE, **options}), d_out)
    made.initialise_(torch.randn(d_out or d_in), torch.Generator().manual_seed(1), torch.randn(d_in))
    if made.W_skip is not None:
        made.W_skip.data.normal_()
    return made.eval().requires_grad_(False)


NETWORK = Network().eval()
X = torch.randn(5, 7, D, generator=torch.Generator().manual_seed(2))
ACTS = torch.tanh(X @ NETWORK.block.A).detach()


def after(acts: Tensor) -> Tensor:
    """The rest of the network."""
    return (acts @ NETWORK.out).cumsum(dim=1)


def test_unedited_the_network_computes_what_it_does_and_tells_the_codes():
    model = an_sae(HIDDEN)
    with torch.no_grad(), sae.splice(NETWORK, "block", model) as spliced:
        assert torch.equal(NETWORK(X), after(ACTS))
    assert torch.equal(spliced.codes.dense(), model.encode(ACTS.flatten(0, 1)).dense())
    assert float(spliced.codes.counts.float().mean()) > 1
    with torch.no_grad(), sae.splice(NETWORK, NETWORK.block, model, keep_error=False):
        torch.testing.assert_close(NETWORK(X), after(model(ACTS)))
    assert torch.equal(NETWORK(X), after(ACTS))  # nothing is left behind


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("options", [{}, {"kind": "relu", "l1_coefficient": 0.1}], ids=["padded", "full"])
def test_latents_set_to_values_are_what_a_matrix_with_them_is(keep_error, options):
    model = an_sae(HIDDEN, **options)
    z = model.encode(ACTS.flatten(0, 1)).dense()
    which = int((z > 0).sum(dim=0).argmax())
    changed = z.clone()
    changed[:, which], changed[:, 3] = 0, 2.5
    by_hand = model.decode(changed)
    if keep_error:
        by_hand = ACTS.flatten(0, 1) + by_hand - model.decode(z)

    def matrix(codes: SparseCodes) -> Tensor:
        dense = codes.dense().clone()
        dense[:, which], dense[:, 3] = 0, 2.5
        return dense

    for edit in ({which: 0.0, 3: 2.5}, matrix):
        with torch.no_grad(), sae.splice(NETWORK, "block", model, edit, keep_error=keep_error):
            torch.testing.assert_close(NETWORK(X), after(by_hand.view_as(ACTS)))

    def louder(codes: SparseCodes) -> SparseCodes:
        return codes.scaled(2.0)

    with torch.no_grad(), sae.splice(NETWORK, "block", model, louder) as spliced:
        expected = ACTS.flatten(0, 1) + z @ model.W_dec
        torch.testing.assert_close(NETWORK(X), after(expected.view_as(ACTS)))
    assert torch.equal(spliced.codes.dense(), z)  # as they were before


def test_what_goes_in_is_replaced_and_so_is_what_a_transcoder_writes():
    model = an_sae(D)
    with torch.no_grad(), sae.splice(NETWORK, "block", model, {2: 5.0}, reads="input") as spliced:
        found = NETWORK(X)
    z = model.encode(X.flatten(0, 1)).dense()
    assert torch.equal(spliced.codes.dense(), z)
    changed = X + ((5.0 - z[:, 2, None]) * model.W_dec[2]).view_as(X)
    torch.testing.assert_close(found, after(torch.tanh(changed @ NETWORK.block.A)).detach())

    transcoder = an_sae(D, HIDDEN)
    x = X.flatten(0, 1)
    codes = transcoder.encode(x)
    with torch.no_grad(), sae.splice(NETWORK, "block", transcoder, keep_error=False):
        torch.testing.assert_close(NETWORK(X), after(transcoder(X)))
    with torch.no_grad(), sae.splice(NETWORK, "block", transcoder, {1: 3.0}):
        edited = codes.dense()
        edited[:, 1] = 3.0
        by_hand = ACTS.flatten(0, 1) + transcoder.decode(edited, x) - transcoder.decode(codes, x)
        torch.testing.assert_close(NETWORK(X), after(by_hand.view_as(ACTS)))


def test_an_edit_is_not_lost_beside_large_activations():
    model = an_sae(HIDDEN)
    model.b_dec.data[0] = 1e6  # where bf16 has steps of 8192
    model.encoder.data[:, 0] = 0
    model.bfloat16()
    network = nn.Sequential(nn.Identity())
    rows = torch.randn(3, HIDDEN)
    for edit in ({2: 2.0}, lambda codes: _set(codes, 2, 2.0)):
        with torch.no_grad(), sae.splice(network, "0", model, edit) as spliced:
            found = network(rows)
        z = spliced.codes.dense()[:, 2].float()
        expected = rows + (2.0 - z)[:, None] * model.W_dec[2].float()
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


def _set(codes: SparseCodes, latent: int, value: float) -> Tensor:
    dense = codes.dense().clone()
    dense[:, latent] = value
    return dense


def test_an_edit_may_work_in_place_and_rows_may_have_no_batch():
    model = an_sae(HIDDEN)

    def silence(codes: SparseCodes) -> SparseCodes:
        codes.values.mul_(0)
        return codes

    for grad in (True, False):
        with torch.set_grad_enabled(grad), sae.splice(NETWORK, "block", model, silence, keep_error=False) as spliced:
            torch.testing.assert_close(NETWORK(X).detach(), after(model.b_dec.expand_as(ACTS)).detach())
        assert float(spliced.codes.values.detach().sum()) > 0
    plain = nn.Sequential(nn.Identity())
    with torch.no_grad(), sae.splice(plain, "0", model, keep_error=False):
        torch.testing.assert_close(plain(ACTS[0, 0]), model(ACTS[0, :1])[0])


def test_under_autocast():
    for options in ({}, {"kind": "batchtopk", "k": 3.0}):
        model = an_sae(HIDDEN, **options)
        if options:
            model.sparsifier.threshold.fill_(0.5)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), sae.splice(NETWORK, "block", model, {1: 2.0}):
            found = NETWORK(X)
        with torch.no_grad(), sae.splice(NETWORK, "block", model, {1: 2.0}):
            torch.testing.assert_close(found.float(), NETWORK(X), rtol=0.1, atol=0.5)


@pytest.mark.parametrize("keep_error", [True, False])
def test_gradients_in_codes_are_those_of_the_loss(keep_error):
    model, x = an_sae(HIDDEN), X.clone().requires_grad_()
    with sae.splice(NETWORK, "block", model, keep_error=keep_error) as spliced:
        NETWORK(x)[:, -1].sum().backward()
    # The rest of the network is linear: each of a text's positions counts once, by `out`.
    expected = (model.W_dec @ NETWORK.out).detach()[spliced.codes.indices]
    torch.testing.assert_close(spliced.codes.values.grad, expected)
    with torch.no_grad(), sae.splice(NETWORK, "block", model, lambda codes: codes.scaled(0.0), keep_error=keep_error):
        without = NETWORK(X)[:, -1].sum()
    with torch.no_grad(), sae.splice(NETWORK, "block", model, keep_error=keep_error):
        effect = NETWORK(X)[:, -1].sum() - without
    torch.testing.assert_close((spliced.codes.values * spliced.codes.values.grad).sum().detach(), effect)

    again = X.clone().requires_grad_()
    if keep_error:  # the network's own, past the SAE
        NETWORK(again)[:, -1].sum().backward()
    else:
        after(model(torch.tanh(again @ NETWORK.block.A)))[:, -1].sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize("edit", [None, {1: 3.0}, lambda codes: codes.scaled(0.5)], ids=["none", "values", "function"])
def test_the_gradient_past_a_skip_transcoder_is_the_networks_own(edit):
    transcoder = an_sae(D, HIDDEN)
    x, again = X.clone().requires_grad_(), X.clone().requires_grad_()
    with sae.splice(NETWORK, "block", transcoder, edit) as spliced:
        NETWORK(x)[:, -1].sum().backward()
    NETWORK(again)[:, -1].sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    factor = 0.5 if callable(edit) else 1.0
    expected = factor * (transcoder.W_dec @ NETWORK.out).detach()[spliced.codes.indices]
    if isinstance(edit, dict):  # what a code was does not matter where it is set
        expected = expected * (spliced.codes.indices != 1)
    torch.testing.assert_close(spliced.codes.values.grad, expected)


def test_a_language_model_writes_with_an_edit(tmp_path):
    tiny = make(tmp_path)
    network = tiny.network()
    model = an_sae(network.config.n_embd)
    tokens = torch.tensor([[0, 5, 9, 20]])
    plain = network.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with sae.splice(network, "transformer.h.1", model) as spliced:
        same = network.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert len(spliced.codes) == 1  # of the last pass, which reads the last token alone
    assert torch.equal(plain, same)
    with sae.splice(network, "transformer.h.1", model, {7: 200.0}):
        steered = network.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert not torch.equal(plain, steered)
    network.bfloat16()
    with torch.no_grad(), sae.splice(network, "transformer.h.1", model) as spliced:
        assert network(tokens).logits.dtype == torch.bfloat16
    assert spliced.codes.values.dtype == torch.float32


def unchecked(module: object, model: object, edit: object, reads: object = "output"):
    """As a user calls it, without the types that tests check."""
    function = inspect.unwrap(sae.splice)
    return contextmanager(function)(NETWORK, module, model, edit, reads=reads)


def test_two_at_once_and_an_error_within_leave_nothing_behind():
    inner, outer = an_sae(D), an_sae(HIDDEN)
    with torch.no_grad(), sae.splice(NETWORK, "block", outer, {0: 1.0}) as last:
        with sae.splice(NETWORK, "block", inner, {0: 1.0}, reads="input"):
            both = NETWORK(X)
        alone = NETWORK(X)
    assert not torch.equal(both, alone)
    assert last.codes.d_sae == D_SAE
    with pytest.raises(RuntimeError, match="of a test"), sae.splice(NETWORK, "block", outer, {0: 1.0}):
        raise RuntimeError("of a test")
    assert torch.equal(NETWORK(X), after(ACTS))


def test_what_cannot_be_spliced_is_told():
    model = an_sae(HIDDEN)
    with pytest.raises(UsageError, match=r"no module 'blok'.*block"), sae.splice(NETWORK, "blok", model):
        pass
    wrong = {24: 1.0, -1: 0.0}
    with pytest.raises(UsageError, match="to 23, got 24, -1"), sae.splice(NETWORK, "block", model, wrong):
        pass
    with pytest.raises(UsageError, match="has not run the module"), sae.splice(NETWORK, "block", model) as spliced:
        spliced.codes  # noqa: B018
    with pytest.raises(UsageError, match="did not run the module while"), sae.splice(NETWORK, "block", model):
        after(ACTS)
    for edit, words in (
        ({"512": 1.0}, "numbered 0 to 23, got '512'"),
        ({True: 1.0}, "numbered 0 to 23, got True"),
        ({5: None}, "set to numbers, got None"),
        ([5, 6], "edit must be {latent: value} or a function"),
    ):
        with pytest.raises(UsageError, match=words), unchecked("block", model, edit):
            pass
    with pytest.raises(UsageError, match="an SAE is spliced in, got str"), unchecked("block", "runs/mine", None):
        pass
    with (
        pytest.raises(UsageError, match="reads must be output or input, got 'in'"),
        unchecked("block", model, None, "in"),
    ):
        pass
    with pytest.raises(UsageError, match="must return codes or a matrix of them, got NoneType"):  # noqa: SIM117
        with unchecked("block", model, lambda codes: None):
            NETWORK(X)
    with pytest.raises(ValueError, match="d_in=6"), sae.splice(NETWORK, "block", an_sae(D)):
        NETWORK(X)
    with (
        pytest.raises(UsageError, match=r"gives \[1, 24\] for codes \[35, 24\]"),
        sae.splice(NETWORK, "block", model, lambda codes: codes[:1]),
    ):
        NETWORK(X)
    narrow = an_sae(D, HIDDEN - 1)
    with pytest.raises(UsageError, match=r"gives \[35, 9\] in place of"), sae.splice(NETWORK, "block", narrow):
        NETWORK(X)
    nothing = nn.Sequential(nn.Module())
    nothing[0].forward = lambda x: "words"
    with pytest.raises(UsageError, match="no tensor there"), sae.splice(nothing, "0", model):
        nothing(X)
