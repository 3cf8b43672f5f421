"""Moments in eight bits: what rounding by chance keeps, and every kernel's update beside the reference's."""

import copy

import pytest
import torch
from torch import Tensor

import sae
from sae.kernels import Change, Rows, State, moments
from sae.kernels.moments import chance, pack_, unpacked
from sae.kernels.native import Native
from sae.kernels.plain import Plain
from sae.kernels.reference import Reference
from sae.optim import BETA1, BETA2, Now

D_SAE, D = 37, 23


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state_of(
    unit_norm: bool = True, shared: bool = False, moments: str = "int8", dtype: torch.dtype = torch.float64
) -> State:
    weights = {"encoder": normal(D_SAE, D, seed=1), "W_dec": normal(D_SAE, D, seed=2)}
    weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
    weights |= {"b_enc": normal(D_SAE, seed=3), "b_dec": normal(D, seed=4)}
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    if shared:
        weights["encoder"] = weights["W_dec"]
    return State.of(weights, unit_norm, moments=moments)


def step_(state: State, kernels: object, number: int, silent: Tensor | None = None) -> None:
    """An update by drawn gradients, of very different sizes from row to row; none for the `silent` rows."""
    dtype = state.W_dec.dtype
    sizes = 10 ** (2 * normal(D_SAE, 1, seed=5))
    if silent is not None:
        sizes = sizes.masked_fill(silent[:, None], 0)
    rows = [(sizes * normal(D_SAE, D, seed=100 * number + part)).to(dtype) for part in range(2)]
    extra = Rows(None, *rows, (sizes[:, 0] * normal(D_SAE, seed=number)).to(dtype))
    x = normal(5, D, seed=number).to(dtype)
    kernels.update_(
        state, Now.at(number, 0.01, 1.0), Change(x, x, extra=extra, firing=torch.ones(D_SAE, dtype=torch.int64))
    )


def test_only_matrices_are_kept_small() -> None:
    state = state_of()
    for name in ("encoder", "W_dec"):
        assert (state.first[name].dtype, state.second[name].dtype) == (torch.int8, torch.uint8)
        assert state.scales[name].shape == (D_SAE, 2)
    assert state.first["b_enc"].dtype == state.second["b_dec"].dtype == torch.float64
    assert set(state.scales) == {"encoder", "W_dec"}
    assert not state_of(moments="float32").scales
    small, large = (
        sum(kept.nbytes for kept in state_of(moments=name).moments().values()) for name in ("int8", "float32")
    )
    assert small < 0.3 * large


def test_what_is_kept_is_off_by_less_than_a_unit_and_right_on_average() -> None:
    state, sizes = state_of(), 10 ** normal(D_SAE, 1, seed=7)
    first, second = sizes * normal(D_SAE, D, seed=8), (sizes * normal(D_SAE, D, seed=9)).square()
    unit, unit_of_root = first.abs().amax(dim=1) / 127, second.sqrt().amax(dim=1) / 255
    mean, mean_root, n = torch.zeros_like(first), torch.zeros_like(first), 400
    for number in range(1, n + 1):
        pack_(state, "W_dec", first, second, Now.at(number, 0.01, 1.0))
        m, v = unpacked(state, "W_dec")
        assert ((m - first).abs() <= unit[:, None] * (1 + 1e-9)).all()
        assert ((v.sqrt() - second.sqrt()).abs() <= unit_of_root[:, None] * (1 + 1e-9)).all()
        mean, mean_root = mean + m / n, mean_root + v.sqrt() / n
    # A rounding by chance has a standard deviation of at most half a unit.
    assert ((mean - first).abs() <= 4.5 * 0.5 * unit[:, None] / n**0.5).all()
    above = second.sqrt() > unit_of_root[:, None]  # a root of less than a unit is kept as one
    assert ((mean_root - second.sqrt()).abs() <= 4.5 * 0.5 * unit_of_root[:, None] / n**0.5)[above].all()
    assert (unpacked(state, "W_dec")[1] > 0).all()


@pytest.mark.parametrize("kernels", [Native(torch.float32, "fp32"), Reference()], ids=["native", "reference"])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-33])
def test_moments_of_next_to_nothing_are_nothing(kernels: object, size: float) -> None:
    """A scale that is so small has no inverse in float32."""
    state = state_of(unit_norm=False, dtype=torch.float32)
    gradient = torch.full((D_SAE, D), size)
    gradient[:, 1] = 0
    before, x = state.encoder.clone(), normal(5, D, seed=6).float()
    for number in range(1, 4):
        rows = Rows(None, gradient.clone(), gradient.clone(), torch.zeros(D_SAE))
        fires = torch.ones(D_SAE, dtype=torch.int64)
        kernels.update_(state, Now.at(number, 0.01, 1.0), Change(x, x, extra=rows, firing=fires))
    assert not state.first["encoder"].any()
    for moment in unpacked(state, "encoder"):
        assert float(moment.abs().max()) <= size
    torch.testing.assert_close(state.encoder, before, rtol=1e-6, atol=0)


def test_chance_is_even_and_that_of_the_place_and_the_seed() -> None:
    like = torch.zeros(400, 250, dtype=torch.float64)
    up, other = chance(like, torch.tensor(8))
    for values in (up, other):
        assert float(values.min()) >= 0
        assert float(values.max()) < 1
        assert float(values.mean()) == pytest.approx(0.5, abs=4 / (12 * values.numel()) ** 0.5)
        assert float(values.var()) == pytest.approx(1 / 12, rel=0.02)
    later, _ = chance(like, torch.tensor(9))
    for pair in ((up, other), (up, later), (up[:, 1:], up[:, :-1]), (up[1:], up[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([part.flatten() for part in pair]))[0, 1])) < 4 / up.numel() ** 0.5
    assert torch.equal(chance(like, torch.tensor(8))[0], up)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("name", ["native", "torch", "native in float32"])
def test_an_update_is_the_references(name: str, unit_norm: bool, shared: bool) -> None:
    dtype = torch.float32 if name.endswith("float32") else torch.float64
    ours = state_of(unit_norm, shared, dtype=dtype)
    theirs = copy.deepcopy(ours)
    if shared:
        theirs.encoder = theirs.W_dec
    kernels = Plain("fp32") if name == "torch" else Native(dtype, "fp32")
    for number in range(1, 20):
        step_(ours, kernels, number)
        step_(theirs, Reference(), number)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
        for weight, given in ours.weights():
            expected = getattr(theirs, weight)
            torch.testing.assert_close(given, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
        for weight in ours.scales:
            torch.testing.assert_close(ours.scales[weight], theirs.scales[weight], rtol=tolerance, atol=0)
            for mine, other in ((ours.first, theirs.first), (ours.second, theirs.second)):
                off = (mine[weight].int() - other[weight].int()).abs()
                # In float32 a number may lie on the other side of where it is rounded.
                assert int(off.max()) <= (dtype == torch.float32)
                assert float((off > 0).double().mean()) <= (0.01 if dtype == torch.float32 else 0)
        if dtype == torch.float32:
            theirs = copy.deepcopy(ours)
            if shared:
                theirs.encoder = theirs.W_dec


def test_rows_that_are_unpacked_together_change_nothing(monkeypatch) -> None:
    whole, parts = state_of(), state_of()
    for number in range(1, 4):
        step_(whole, Native(torch.float64, "fp32"), number)
        with monkeypatch.context() as patch:
            patch.setattr(moments, "BLOCK_ENTRIES", 3 * D + 1)
            step_(parts, Plain("fp32"), number)
    for name in whole.scales:
        assert torch.equal(whole.first[name], parts.first[name])
        assert torch.equal(whole.second[name], parts.second[name])


@pytest.mark.parametrize("kernels", [Native(torch.float64, "fp32"), Reference()], ids=["native", "reference"])
def test_moments_of_a_silent_latent_shrink_and_nothing_else(kernels: object) -> None:
    state, silent = state_of(unit_norm=False), torch.arange(D_SAE) % 3 == 0
    step_(state, kernels, 1)
    before = {name: (state.first[name].clone(), *unpacked(state, name)) for name in state.scales}
    for number in range(2, 60):
        step_(state, kernels, number, silent)
    for name, (codes, first, second) in before.items():
        assert torch.equal(state.first[name][silent], codes[silent])
        m, v = unpacked(state, name)
        torch.testing.assert_close(m[silent], BETA1**58 * first[silent], rtol=1e-9, atol=0)
        torch.testing.assert_close(v[silent], BETA2**58 * second[silent], rtol=1e-9, atol=0)


def test_changes_smaller_than_a_unit_add_up() -> None:
    """v moves by a thousandth of what it lacks in each step: to the nearest, it would stay where it was."""
    state, kernels = state_of(unit_norm=False), Native(torch.float64, "fp32")
    gradient = 1 + 0.5 * normal(D_SAE, D, seed=3).tanh()
    extra = Rows(None, gradient, gradient, torch.zeros(D_SAE, dtype=torch.float64))
    x, fires = normal(5, D, seed=6), torch.ones(D_SAE, dtype=torch.int64)
    for number in range(1, 3001):
        parts = (part.clone() for part in extra[1:])
        kernels.update_(state, Now.at(number, 0.0, 1.0), Change(x, x, extra=Rows(None, *parts), firing=fires))
    first, second = unpacked(state, "encoder")
    torch.testing.assert_close(first, gradient, rtol=0.03, atol=0)
    expected = gradient.square() * (1 - BETA2**3000)
    assert float((second / expected - 1).mean().abs()) < 0.003
    torch.testing.assert_close(second, expected, rtol=0.12, atol=0)


def test_an_entry_far_smaller_than_its_row_makes_no_leap() -> None:
    state, kernels = state_of(unit_norm=False), Native(torch.float64, "fp32")
    before = state.encoder.clone()
    gradient = torch.full((D_SAE, D), 1e-6, dtype=torch.float64)
    gradient[:, 0] = 1.0
    x, fires = normal(5, D, seed=6), torch.ones(D_SAE, dtype=torch.int64)
    for number in range(1, 101):
        rows = Rows(None, gradient.clone(), gradient.clone(), torch.zeros(D_SAE, dtype=torch.float64))
        kernels.update_(state, Now.at(number, 0.001, 1.0), Change(x, x, extra=rows, firing=fires))
        moved, before = (state.encoder - before).abs(), state.encoder.clone()
        assert float(moved.max()) <= 0.005


def config(out: object, **train: object) -> sae.TrainConfig:
    given = {"n_samples": 40_960, "batch_size": 512, "moments": "int8"} | train
    section = {"kind": "topk", "d_sae": 64, "k": 3}
    return sae.TrainConfig.model_validate(
        {"sae": section, "train": given, "out": out, "checkpoint": {"every_steps": 20}}
    )


@pytest.mark.parametrize("kernels", ["native", "torch", "reference"])
def test_a_run_learns_as_much_as_with_all_bits(tmp_path, kernels) -> None:
    truth = torch.nn.functional.normalize(normal(48, 16, seed=1), dim=1).float()
    x = torch.rand(20_000, 48) * (torch.rand(20_000, 48) < 0.05) @ truth
    fvu = {}
    for name in ("float32", "int8"):
        made = config(tmp_path / name, moments=name, kernels=kernels, n_samples=153_600)
        fvu[name] = sae.train(made, x, report=False).metrics["metrics/fvu"]
    assert fvu["int8"] < 0.5
    assert fvu["int8"] == pytest.approx(fvu["float32"], rel=0.1)


def test_a_run_goes_on_to_the_bit(tmp_path) -> None:
    x = normal(4000, 16, seed=2).float()

    def stop(step: int, values: object) -> None:
        if step == 50:
            raise KeyboardInterrupt

    made = config(tmp_path / "whole")
    whole = sae.train(made, x, report=False)
    part = made.model_copy(update={"out": tmp_path / "part", "log": made.log.model_copy(update={"every": 50})})
    with pytest.raises(KeyboardInterrupt):
        sae.train(part, x, report=False, on_line=stop)
    resumed = sae.train(part, x, report=False, resume=True)
    assert torch.equal(whole.sae.W_dec, resumed.sae.W_dec)
    assert torch.equal(whole.sae.W_enc, resumed.sae.W_enc)
