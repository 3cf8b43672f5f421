"""Codes that are selected twice: the step against autograd, inference against the equations, and what may not be."""

import copy

import pytest
import torch
from pydantic import ValidationError

import sae
from sae import SAEConfig, UsageError
from sae.engine import Engine
from sae.optim import Now
from tests.test_engine import (
    BATCH,
    D_SAE,
    RATE,
    UNIT,
    Judge,
    batches,
    both_decoders,
    every_kernel,
    make_engine,
    make_sae,
    same_gradients,
    same_terms,
    same_weights,
    with_unit,
)
from toymodels import Features, generator

DEAD = torch.tensor([2, 3, 11, 60, 64, 69])
OPTIONS = {
    "plain": {},
    "prefixes": {"prefixes": (3, 20, D_SAE)},
    "own centre": {"tied_bias": False},
    "both": {"prefixes": (50, D_SAE), "tied_bias": False},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
both_kinds = pytest.mark.parametrize("case", ["topk", "batchtopk"])


@every_kernel
@both_decoders
@both_kinds
@every_option
def test_steps_are_those_of_autograd(case, unit_norm, kernels, precision, options):
    model = make_sae(case, unit_norm, refine=0.4, **options)
    engine, judge, once = make_engine(case, model, kernels, precision), Judge(model), Judge(make_sae(case, unit_norm))
    for number, x in enumerate(batches(5), 1):
        terms, expected = (by(x, Now.at(number, RATE, 0.7), DEAD) for by in (with_unit(engine), judge.step))
        same_terms(terms, expected)
        if number == 1:
            assert expected.auxiliary > 0
            same_gradients(engine, judge)
            once.step(x, Now.at(1, RATE, 0.7), DEAD)
            assert not torch.equal(once.z > 0, judge.z > 0), "the second selection must be another one"
    same_weights(engine, judge, 1e-9)


@every_kernel
def test_the_selections_may_have_codes_in_different_number(kernels, precision):
    """Fewer pre-latents are positive than may fire, and not as many in both."""
    model = make_sae("batchtopk", refine=0.4, k=40.0)
    engine, judge = make_engine("batchtopk", model, kernels, precision), Judge(model)
    for number, x in enumerate(batches(3), 1):
        terms, expected = (by(x, Now.at(number, RATE, 1.0), DEAD) for by in (with_unit(engine), judge.step))
        assert expected.l0 < 35
        same_terms(terms, expected)
    same_weights(engine, judge, 1e-9)


@every_kernel
@both_kinds
@pytest.mark.parametrize("n_parts", [1, 3])
def test_gradients_as_matrices_and_clipped(case, n_parts, kernels, precision):
    model = make_sae(case, refine=0.4, **({"k": 1.0 * BATCH} if case == "batchtopk" and n_parts > 1 else {}))
    engine, judge, x = make_engine(case, model, kernels, precision), Judge(model), batches(1)[0]
    engine.n_parts = n_parts
    expected = judge.step(x, Now.at(1, RATE, 1.0), DEAD)
    terms, gradients = engine.gradients(x, UNIT, Now.at(1, RATE, 1.0), DEAD)
    if case == "topk" or n_parts == 1:
        same_terms(terms._replace(l0=expected.l0), expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, judge.gradients[name], rtol=0, atol=1e-9, msg=name)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    engine.clip_norm = float(norm) / 2
    engine.step(x, UNIT, Now.at(1, RATE, 1.0), DEAD)
    for name, gradient in gradients.items():
        torch.testing.assert_close(engine.state.first[name] / 0.1, gradient / 2, rtol=0, atol=1e-9, msg=name)
    if case == "topk" or n_parts == 1:
        assert torch.equal(engine.state.silent_samples, judge.silent)


@both_kinds
@every_option
def test_a_batch_whose_codes_do_not_fit_is_differentiated(case, options, monkeypatch):
    model = make_sae(case, refine=0.4, **options)
    engine, judge = make_engine(case, model), Judge(model)
    real, calls = engine._choose, []
    fails = {0: 1, 1: 2}  # the first selection of the first step, the second one of the second
    for number, x in enumerate(batches(3)):
        calls.clear()

        def choose(x, number=number):
            calls.append(1)
            return None if fails.get(number) == len(calls) else real(x)

        monkeypatch.setattr(engine, "_choose", choose)
        terms, expected = (by(x, Now.at(number + 1, RATE, 1.0), DEAD) for by in (with_unit(engine), judge.step))
        same_terms(terms, expected)
        assert len(calls) == fails.get(number, 2), "a selection that fails is the last one"
    same_weights(engine, judge, 1e-9)


def test_a_stop_keeps_where_both_searches_begin():
    model = make_sae("batchtopk", refine=0.4)
    engine = make_engine("batchtopk", model)
    for number, x in enumerate(batches(3), 1):
        engine.step(x, UNIT, Now.at(number, RATE, 1.0), DEAD)
    tensors, values = engine.saved()
    again = make_engine("batchtopk", make_sae("batchtopk", refine=0.4))
    again.restore({name: tensor.clone() for name, tensor in tensors.items()}, values)
    cuts = (engine.kernels.cut, engine.refinement.cut)
    assert (again.kernels.cut, again.refinement.cut) == cuts
    assert cuts[0] != cuts[1]
    assert 0 not in cuts


def test_with_no_second_look_it_is_the_plain_kind():
    """An eta of next to nothing: both selections are the same, and q vanishes."""
    plain, refined = (make_sae("topk", **options) for options in ({}, {"refine": 1e-12}))
    for model in (plain, refined):
        engine = Engine(model, "native", "fp32")
        for number, x in enumerate(batches(3), 1):
            engine.step(x, UNIT, Now.at(number, RATE, 1.0), DEAD)
    for (name, one), (_, other) in zip(plain.named_parameters(), refined.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=name)


# Runs

FEATURES = torch.nn.functional.normalize(torch.randn(40, 12, generator=torch.Generator().manual_seed(1)), dim=1)
X = Features(n_features=40, feature_prob=0.1).sample(20_000, generator(0, "acts")).embed(FEATURES)


def run(out, kind="batchtopk", k=4.0, **more):
    options = {"kind": kind, "d_sae": 48, "k": k, "refine": 0.5} | more.pop("sae", {})
    config = sae.TrainConfig(
        sae=options, train={"n_samples": 100_000, "batch_size": 256} | more, checkpoint={"every_steps": 50}, out=out
    )
    return sae.train(config, X, report=False)


@pytest.mark.parametrize(("kind", "k"), [("topk", 4), ("batchtopk", 4.0), ("matryoshka", 3.5)])
def test_inference_is_what_the_equations_say(kind, k, tmp_path):
    model = run(tmp_path / "run", kind, k).sae
    first, x = model.sparsifier.first, X[:500]

    def select(read, sparsifier):
        pre = (read - model.b_dec) @ model.W_enc + model.b_enc
        if kind == "topk":
            return torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0) * pre.relu()
        return pre * (pre > sparsifier.threshold)

    z = select(x, first)
    left = x - z @ model.W_dec - model.b_dec
    again = select(x + 0.5 * left, model.sparsifier)
    codes = model.encode(x)
    torch.testing.assert_close(codes.dense(), again, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.pre_latents(x), model.affine(x + 0.5 * left), rtol=1e-4, atol=1e-4)
    assert not torch.equal(again > 0, z > 0)
    left_again = x - again @ model.W_dec - model.b_dec
    assert left_again.square().sum() < left.square().sum()
    with torch.enable_grad():  # and where gradients are wanted
        torch.testing.assert_close(model.encode(x).dense(), codes.dense(), rtol=1e-5, atol=1e-5)
    loaded = sae.load(tmp_path / "run")
    assert torch.equal(loaded.encode(x).dense(), codes.dense())
    if kind != "topk":  # both thresholds give k on held-out rows
        assert float((select(X, first) > 0).sum(dim=1).float().mean()) == pytest.approx(k, rel=0.05)
        assert float(model.encode(X).counts.float().mean()) == pytest.approx(k, rel=0.05)
        assert float(first.threshold) != float(model.sparsifier.threshold)


def test_a_refined_sae_leaves_less_than_a_plain_one(tmp_path):
    refined = run(tmp_path / "refined").metrics["metrics/fvu"]
    assert refined < 0.8 * run(tmp_path / "plain", sae={"refine": 0.0}).metrics["metrics/fvu"]


@pytest.mark.parametrize("more", [{}, {"accumulate": 2}, {"clip_norm": 1.0}], ids=["plain", "parts", "clipped"])
def test_a_stopped_run_goes_on_bit_for_bit(more, tmp_path, stopped_at):
    options = more | {"sae": {"k_start": 8.0, "k_anneal_fraction": 0.5, "resample_every": 10_000}}
    whole = run(tmp_path / "whole", **copy.deepcopy(options)).sae
    with stopped_at(70):
        run(tmp_path / "stopped", **copy.deepcopy(options))
    assert sae.load_checkpoint(tmp_path / "stopped", X).encode(X).counts.float().mean() > 4.5  # k has not fallen yet
    config = sae.load_config(tmp_path / "stopped" / "config.yaml")
    resumed = sae.train(config, X, resume=True, report=False).sae
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_the_kind_begins_with_many_codes():
    def of(**options):
        return SAEConfig.of_kind({"kind": "refined", "d_sae": 48, "k": 2.5} | options)

    def starts(**options):
        return of(**options).build().k_start

    assert (starts(), starts(k=20), starts(k_start=2.5), starts(k_start=5)) == (5.0, 40.0, 2.5, 5.0)
    assert (starts(k=30), of().refine) == (48, 0.3)
    assert SAEConfig.of_kind(of().model_dump()) == of()
    with pytest.raises(ValidationError, match="must lie above 0, got 0; kind batchtopk selects once"):
        of(refine=0)
    assert "k" not in of(k_start=2.5).build().details()
    with pytest.raises(ValidationError, match="k must lie in"):
        of(k=100)
    sparsifier = of().build()
    for done, k in ((0.0, 5.0), (0.25, 3.75), (0.5, 2.5), (1.0, 2.5)):
        sparsifier.anneal_(done)
        assert (sparsifier.k, sparsifier.first.k) == (k, k)


def test_what_does_not_go_together_is_told(tmp_path):
    topk = {"kind": "topk", "d_sae": 48, "k": 4, "refine": 0.5}
    for options, words in (
        (topk | {"multi_k": 16}, "multi_k=16 and refine=0.5 do not go together"),
        ({"kind": "transcoder", "d_sae": 48, "base": {"kind": "topk", "k": 4, "refine": 0.5}}, "base cannot refine"),
        (topk | {"refine": 1.5}, "refine"),
    ):
        with pytest.raises(ValidationError, match=words):
            SAEConfig.of_kind(options)
    model = run(tmp_path / "run", "topk", 4).sae
    for format in sae.formats.WRITTEN:
        with pytest.raises(UsageError, match="selects twice"):
            sae.formats.save(model, tmp_path / format, format)
