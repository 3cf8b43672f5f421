"""Gradients as matrices: those of autograd, of whole batches and summed over parts; and what clipping does to them."""

import copy

import pytest
import torch

from sae import SAE, SAEConfig, UsageError
from sae.config import parse_config
from sae.engine import Engine
from sae.optim import BETA1, Now
from sae.trainer import Trainer
from tests.test_engine import BATCH, D_IN, KERNELS, RATE, UNIT, Judge, batches, close, make_engine, make_sae, same_terms

DEAD = torch.tensor([2, 3, 11, 60, 64, 69])
NOW = Now.at(1, RATE, 0.7)
CASES = ["topk", "batchtopk", "relu dense", "relu sparse"]
every_kernel = pytest.mark.parametrize(("kernels", "precision"), KERNELS, ids=["-".join(pair) for pair in KERNELS])
both_decoders = pytest.mark.parametrize("unit_norm", [True, False])


@every_kernel
@both_decoders
@pytest.mark.parametrize("n_parts", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_those_of_autograd(case, n_parts, unit_norm, kernels, precision):
    sae = make_sae(case, unit_norm)
    engine, judge, x = make_engine(case, sae, kernels, precision), Judge(sae), batches(1)[0]
    before = copy.deepcopy(engine.saved()[0])
    engine.n_parts = n_parts
    terms, gradients = engine.gradients(x, UNIT, NOW, DEAD)
    expected = judge.step(x, NOW, DEAD)
    if case != "batchtopk" or n_parts == 1:  # each part has a budget of its own
        torch.testing.assert_close(terms.l0.float(), expected.l0, rtol=1e-6, atol=0)  # a quotient of integers: float32
        same_terms(terms._replace(l0=expected.l0), expected)
        assert set(gradients) == set(judge.gradients)
        for name, gradient in gradients.items():
            close(gradient, judge.gradients[name], 1e-10, name)
    after = engine.saved()[0]
    for name, tensor in before.items():  # a question changes nothing
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, equal_nan=True)


@every_kernel
@pytest.mark.parametrize("n_parts", [1, 4])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_clipping_shortens_what_is_too_long(share, n_parts, kernels, precision):
    sae = make_sae("topk")
    engine, judge, x = make_engine("topk", sae, kernels, precision), Judge(sae), batches(1)[0]
    judge.step(x, NOW, DEAD)
    norm = torch.cat([gradient.flatten() for gradient in judge.gradients.values()]).norm()
    engine.n_parts, engine.clip_norm = n_parts, float(share * norm)
    engine.step(x, UNIT, NOW, DEAD)
    for name, gradient in judge.gradients.items():
        close(engine.state.first[name], (1 - BETA1) * min(share, 1.0) * gradient, 1e-10, name)
    assert torch.equal(engine.state.silent_samples, judge.silent)
    assert torch.equal(engine.state.window_firing, judge.window)


@pytest.mark.parametrize("kernels", ["native", "torch", "reference"])
def test_own_parameters_are_part_of_the_norm(kernels):
    sae, x = SAE(D_IN, SAEConfig.of_kind({"kind": "jumprelu", "d_sae": 70, "l0": 4.0, "bandwidth": 2.0})), batches(1)[0]
    sae.initialise_(torch.zeros(D_IN), torch.Generator().manual_seed(0))
    sae.double().sparsifier.threshold.data.fill_(0.5)
    _, gradients = Engine(copy.deepcopy(sae), kernels).gradients(x, UNIT, NOW, DEAD)
    assert gradients["sparsifier.threshold"].abs().max() > 0
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    engine = Engine(sae, kernels, clip_norm=float(norm / 2))
    engine.step(x, UNIT, NOW, DEAD)
    _, first, _ = engine.own["sparsifier.threshold"]
    close(first, (1 - BETA1) / 2 * gradients["sparsifier.threshold"], 1e-10)
    close(engine.state.first["b_dec"], (1 - BETA1) / 2 * gradients["b_dec"], 1e-10)


@pytest.mark.parametrize("kernels", ["native", "torch", "reference"])
def test_own_parameters_are_summed_over_parts(kernels):
    options = {"kind": "jumprelu", "d_sae": 70, "l0_coefficient": 0.1, "bandwidth": 2.0}
    sae, x = SAE(D_IN, SAEConfig.of_kind(options)), batches(1)[0]
    sae.initialise_(torch.zeros(D_IN), torch.Generator().manual_seed(0))
    sae.double().sparsifier.threshold.data.fill_(0.5)
    engine = Engine(sae, kernels)
    _, whole = engine.gradients(x, UNIT, NOW, DEAD)
    engine.n_parts = 3
    _, summed = engine.gradients(x, UNIT, NOW, DEAD)
    assert set(summed) == set(whole)
    for name, gradient in whole.items():
        close(summed[name], gradient, 1e-7, name)  # the price of a code is float32
    assert whole["sparsifier.threshold"].abs().max() > 0


@pytest.mark.parametrize(("train", "rule"), [({"accumulate": 9}, "must lie in 1..batch_size=8, got 9; lower it")])
def test_more_parts_than_rows_are_refused(train, rule):
    with pytest.raises(UsageError, match=rule):
        parse_config({"sae": {"kind": "topk", "k": 2, "d_sae": 8}, "train": {"batch_size": 8} | train})


def test_a_run_has_both():
    config = {"sae": {"kind": "topk", "k": 2, "d_sae": 16}, "train": {"clip_norm": 1e-3, "accumulate": 3}}
    trainer = Trainer(make_sae("topk", d_sae=70), parse_config(config), 1.0)
    trainer.step(batches(1)[0])
    moments = torch.cat([moment.flatten() for moment in trainer.engine.state.first.values()])
    torch.testing.assert_close(moments.norm(), torch.tensor(1e-4, dtype=torch.float64))
    assert trainer.engine.n_parts == 3
    assert BATCH % 3, "parts of unequal size"
