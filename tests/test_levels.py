"""Prefixes that are detached, and prefixes that are sorted: the step against autograd, the order, and runs."""

import copy

import pytest
import torch
from test_engine import (
    D_IN,
    D_SAE,
    RATE,
    UNIT,
    Judge,
    batches,
    both_decoders,
    every_case,
    every_kernel,
    make_engine,
    make_sae,
    same_gradients,
    same_terms,
    same_weights,
    with_unit,
)

import sae
from sae import SAEConfig, UsageError
from sae.config import parse_config
from sae.levels import Levels, by_frequency
from sae.metrics import reconstruction
from sae.optim import Now
from toymodels import Features, generator

DEAD = torch.tensor([2, 60, 64, 69])
NESTED = {"prefixes": (3, 20, D_SAE), "prefix_weights": (1.0, 5.0, 2.0)}


def shuffle(engine, judge) -> None:
    """Latents fill the prefixes in an order of their own."""
    firing = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))
    engine.levels.sorts = True
    engine.levels.look_(firing)
    judge.order = by_frequency(firing.double())
    assert not torch.equal(judge.order, torch.arange(D_SAE))


# The step


@every_kernel
@both_decoders
@every_case
@pytest.mark.parametrize("order", [False, True], ids=["rows", "sorted"])
@pytest.mark.parametrize("options", [{}, {"tied_bias": False}], ids=["plain", "own centre"])
def test_detached_prefixes_of_every_kind(case, order, unit_norm, kernels, precision, options):
    made = make_sae(case, unit_norm, detach_prefixes=True, **NESTED | options)
    engine, judge = make_engine(case, made, kernels, precision), Judge(made)
    if order:
        shuffle(engine, judge)
    for number, x in enumerate(batches(4), 1):
        terms, expected = (by(x, Now.at(number, RATE, 0.7), DEAD) for by in (with_unit(engine), judge.step))
        same_terms(terms, expected)
        if number == 1:
            assert expected.auxiliary > 0
            same_gradients(engine, judge)
    same_weights(engine, judge, 1e-9)


@every_kernel
@every_case
def test_sorted_prefixes_of_every_kind(case, kernels, precision):
    made = make_sae(case, **NESTED)
    engine, judge = make_engine(case, made, kernels, precision), Judge(made)
    shuffle(engine, judge)
    for number, x in enumerate(batches(4), 1):
        terms, expected = (by(x, Now.at(number, RATE, 0.7), DEAD) for by in (with_unit(engine), judge.step))
        same_terms(terms, expected)
    same_weights(engine, judge, 1e-9)


@every_kernel
@pytest.mark.parametrize("n_parts", [1, 3])
def test_the_kind_itself(n_parts, kernels, precision):
    made = make_sae("topk", detach_prefixes=True, refine=0.3, **NESTED)
    engine, judge = make_engine("topk", made, kernels, precision), Judge(made)
    engine.n_parts, engine.at_once = n_parts, n_parts == 1
    shuffle(engine, judge)
    for number, x in enumerate(batches(4), 1):
        terms, expected = (by(x, Now.at(number, RATE, 0.7), DEAD) for by in (with_unit(engine), judge.step))
        same_terms(terms, expected)
    same_weights(engine, judge, 1e-9)


@pytest.mark.parametrize("detached", [False, True])
def test_a_batch_whose_codes_do_not_fit_is_differentiated(detached, monkeypatch):
    made = make_sae("batchtopk", refine=0.3, detach_prefixes=detached, **NESTED)
    engine, judge = make_engine("batchtopk", made), Judge(made)
    shuffle(engine, judge)
    monkeypatch.setattr(engine, "_choose", lambda x: None)
    for number, x in enumerate(batches(3), 1):
        terms, expected = (by(x, Now.at(number, RATE, 0.7), DEAD) for by in (with_unit(engine), judge.step))
        same_terms(terms, expected)
    same_weights(engine, judge, 1e-9)


# The order


def levels(**options) -> Levels:
    config = {"kind": "topk", "k": 1, "d_sae": 5, "prefixes": [1, 3, 5], "sort_prefixes": True} | options
    return Levels(SAEConfig.of_kind(config), torch.device("cpu"))


def test_the_most_frequent_come_first():
    ours = levels()
    assert ours.of.tolist() == [0, 1, 1, 2, 2]
    ours.look_(torch.tensor([3, 9, 3, 0, 4]))
    assert ours.of.tolist() == [1, 0, 2, 2, 1]  # 1 | 4, 0 | 2, 3: of equals the first in the file
    ours.look_(torch.tensor([3, 9, 3, 8, 4]))  # 2.7, 8.1, 2.7, 8, 3.6
    assert ours.of.tolist() == [2, 0, 2, 1, 1]
    ours.look_(torch.tensor([3, 9, 3, 9, 4]))  # 2.43, 7.29, 2.43, 8.2, 3.24
    assert ours.of.tolist() == [2, 1, 2, 0, 1]
    fixed = levels(sort_prefixes=False)
    fixed.look_(torch.tensor([0, 0, 0, 0, 4]))
    assert fixed.of.tolist() == [0, 1, 1, 2, 2]
    assert fixed.saved() == {}


def test_a_counter_that_begins_anew_loses_nothing():
    engine = make_engine("topk", make_sae("topk", sort_prefixes=True, **NESTED))
    total = torch.zeros(D_SAE, dtype=torch.int64)
    for number, x in enumerate(batches(6), 1):
        engine.step(x, UNIT, Now.at(number, RATE, 1.0), DEAD)
        if number in (2, 3, 6):
            total += engine.take_firing()
        assert engine.state.window_firing.any() == (number not in (2, 3, 6))
    assert torch.equal(engine.levels.frequency, total.double())
    engine.levels.look_(engine.state.window_firing)
    torch.testing.assert_close(engine.levels.frequency, 0.9 * total.double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu", "gated", "jumprelu", "refined", "matching_pursuit"])
def test_a_latent_moves_with_all_that_is_its_own(kind):
    options = {"l0": 4} if kind in ("relu", "gated", "jumprelu") else {"k": 4}
    model = sae.SAE(D_IN, SAEConfig.of_kind({"kind": kind, "d_sae": D_SAE} | options))
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=stream))
            if "threshold" in name:
                tensor.abs_()
    model.eval().requires_grad_(False)
    x = torch.randn(50, D_IN, generator=stream)
    order = torch.randperm(D_SAE, generator=stream)
    before, x_hat = model.encode(x).dense(), model(x)
    model.reorder_(order)
    assert (before > 0).any()
    torch.testing.assert_close(model.encode(x).dense(), before[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), x_hat, rtol=1e-5, atol=1e-5)


# Runs

FEATURES = torch.nn.functional.normalize(torch.randn(40, 12, generator=torch.Generator().manual_seed(1)), dim=1)
PROB = 0.3 / torch.arange(1, 41)
X = Features(n_features=40, feature_prob=PROB).sample(20_000, generator(0, "acts")).embed(FEATURES)


def run(out, log_every=100, resume=False, **train):
    sections = {
        "sae": {"kind": "lista_matryoshka", "d_sae": 48, "k": 3.0},
        "train": {"n_samples": 100_000, "batch_size": 256} | train,
        "checkpoint": {"every_steps": 50},
        "log": {"every": log_every},
        "evaluation": {"n_samples": 2000},
    }
    return sae.train(sae.TrainConfig(**sections, out=out), X, report=False, resume=resume)


def test_a_trained_sae_has_its_latents_in_order(tmp_path):
    result = run(tmp_path / "run")
    model = sae.load(tmp_path / "run")
    frequency = (model.encode(X).dense() > 0).double().mean(dim=0)
    ranks = frequency.argsort(descending=True).argsort().double()
    assert float((ranks - torch.arange(48)).abs().mean()) < 5, "by recent batches: close to what all rows say"
    means = [frequency[a:b].mean() for a, b in zip((0, *model.config.widths), model.config.widths, strict=False)]
    assert means == sorted(means, reverse=True)
    by_width = [result.metrics[f"metrics/fvu_prefix_{width}"] for width in model.config.widths[:-1]]
    assert by_width == sorted(by_width, reverse=True)
    z, first = model.encode(X[:4000]).dense(), model.config.widths[0]
    fvu = reconstruction.fvu(X[:4000], z[:, :first] @ model.W_dec[:first] + model.b_dec)
    assert by_width[0] == pytest.approx(float(fvu), rel=0.05)
    unsorted = z[:, -first:] @ model.W_dec[-first:] + model.b_dec
    assert reconstruction.fvu(X[:4000], unsorted) > 1.5 * fvu


@pytest.mark.parametrize("more", [{}, {"accumulate": 2}], ids=["plain", "parts"])
def test_how_often_a_run_logs_and_stops_changes_nothing(more, tmp_path, stopped_at):
    whole = run(tmp_path / "whole", **more).sae
    often = run(tmp_path / "often", log_every=7, **more).sae
    with stopped_at(73):
        run(tmp_path / "stopped", **copy.deepcopy(more))
    early = sae.load_checkpoint(tmp_path / "stopped", X)
    frequency = (early.encode(X).dense() > 0).double().mean(dim=0)
    assert frequency[:6].mean() > frequency[6:24].mean() > frequency[24:].mean()
    resumed = run(tmp_path / "stopped", resume=True, **more).sae
    for other in (often, resumed):
        for name, tensor in whole.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name


# The options


def test_the_kind():
    given = SAEConfig.of_kind({"kind": "lista_matryoshka", "d_sae": 64, "k": 3})
    assert given.widths == (4, 8, 16, 32, 64)
    assert (given.refine, given.detach_prefixes, given.sort_prefixes) == (0.3, True, True)
    assert SAEConfig.of_kind(given.model_dump()) == given


@pytest.mark.parametrize("name", ["detach_prefixes", "sort_prefixes"])
@pytest.mark.parametrize("more", [{"kind": "topk"}, {"kind": "lista_matryoshka", "prefixes": [8]}])
def test_one_prefix_has_nothing_to_detach_or_sort(name, more):
    with pytest.raises(UsageError, match=r"prefixes need several prefixes, got \[8\]; give more, or set (it|both) to"):
        parse_config({"sae": {"d_sae": 8, "k": 2, name: True} | more})
