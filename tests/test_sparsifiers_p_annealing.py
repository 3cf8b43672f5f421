"""p-annealing against its definition, written with autograd in float64, and its schedule."""

import pytest
import torch
from pydantic import ValidationError
from test_engine import (
    BATCH,
    D_SAE,
    KERNELS,
    RATE,
    UNIT,
    Judge,
    batches,
    make_engine,
    make_sae,
    same_gradients,
    same_terms,
    same_weights,
    with_unit,
)

from sae import SAE, SAEConfig, TrainConfig
from sae.optim import Now
from sae.sparsifiers import PAnnealing, PAnnealingConfig
from sae.sparsifiers.p_annealing import FLOOR
from sae.trainer import REFRESH_STEPS, Trainer

LAMBDA, P, SCALE = 0.3, 0.4, 1.7
every_kernel = pytest.mark.parametrize(("kernels", "precision"), KERNELS, ids=["-".join(pair) for pair in KERNELS])


def made(case: str, unit_norm: bool, **options) -> SAE:
    """The weights of an SAE of test_engine, in the middle of its annealing."""
    own = {"kind": "p_annealing", "l1_coefficient": LAMBDA}
    sae = make_sae(case, unit_norm, **(own | options))
    with torch.no_grad():
        sae.sparsifier.exponents.copy_(torch.tensor([P, 0.3], dtype=torch.float64))
        sae.sparsifier.scale.fill_(SCALE)
    return sae


class Annealed(Judge):
    """lambda * sum_j ((z_j |W_dec_j| + f)^p - f^p)."""

    def penalty(self, z, W_dec):
        charged = z * W_dec.norm(dim=1)
        return LAMBDA * SCALE * ((charged + FLOOR) ** P - FLOOR**P).sum(dim=1).mean()


@every_kernel
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("case", ["relu sparse", "relu dense"])
@pytest.mark.parametrize("options", [{}, {"prefixes": (3, 20, D_SAE)}], ids=["plain", "prefixes"])
def test_steps_are_those_of_the_definition(options, case, unit_norm, kernels, precision):
    sae = made(case, unit_norm, **options)
    engine, judge, dead = make_engine(case, sae, kernels, precision), Annealed(sae), torch.tensor([2, 60, 66])
    engine.dense = False
    called = []
    original = engine._by_autograd
    engine._by_autograd = lambda *arguments: called.append(1) or original(*arguments)
    for number, x in enumerate(batches(5), 1):
        now = Now.at(number, RATE, 0.7)
        same_terms(with_unit(engine)(x, now, dead), judge.step(x, now, dead))
        if number == 1:
            same_gradients(engine, judge)
            expected = [((judge.z * norms(judge) + FLOOR) ** p - FLOOR**p).sum() for p in sae.sparsifier.exponents]
            if unit_norm:
                torch.testing.assert_close(sae.sparsifier.sums, torch.stack(expected))
    same_weights(engine, judge, 1e-9)
    assert len(called) == (5 if case == "relu dense" else 0)


def norms(judge: Judge) -> torch.Tensor:
    return torch.ones(D_SAE, dtype=torch.float64)


def test_p_falls_linearly_and_the_penalty_keeps_its_size():
    options = {"kind": "p_annealing", "d_sae": D_SAE, "anneal_start": 0.2, "anneal_end": 0.8, "l1_coefficient": LAMBDA}
    config = TrainConfig(sae=options, train={"n_samples": 100 * BATCH, "batch_size": BATCH, "lr": 1e-9})
    sae = made("relu sparse", True)
    sae.sparsifier = PAnnealing(config.sae).double()
    sae.sparsifier.raises_dead = False  # what fires would change
    trainer, ps, penalties, lambdas = Trainer(sae, config, UNIT), [], [], []
    for x in batches(10) * 10:
        trainer.step(x)
        ps.append(float(trainer.take_window()[0]["details/p"]))
        lambdas.append(float(trainer.sae.sparsifier.coefficient))
        penalties.append(penalty(trainer, batches(10)))
    done = torch.arange(100) // REFRESH_STEPS * REFRESH_STEPS / 100
    expected = 1 - 0.8 * ((done - 0.2) / 0.6).clamp(0, 1)
    torch.testing.assert_close(torch.tensor(ps), expected)
    assert lambdas[:20] == [pytest.approx(LAMBDA)] * 20
    assert not 0.7 < lambdas[-1] / LAMBDA < 1.4
    torch.testing.assert_close(torch.tensor(penalties), torch.full((100,), penalties[0]), rtol=1e-4, atol=0)


@torch.no_grad()
def penalty(trainer: Trainer, data: list[torch.Tensor]) -> float:
    sae, sparsifier = trainer.sae, trainer.sae.sparsifier
    z = sparsifier(sae.pre_latents(torch.cat(data) / UNIT)).dense()
    p = sparsifier.exponents[0]
    return float(sparsifier.coefficient * ((z + FLOOR) ** p - FLOOR**p).sum(dim=1).mean())


def test_silent_batches_leave_lambda_alone():
    sparsifier = PAnnealing(PAnnealingConfig(d_sae=8))
    for step in (0, 3, 6):
        sparsifier.look_(step, step + 3, 10)
        assert sparsifier.scale == 1
    torch.testing.assert_close(sparsifier.exponents, torch.tensor([1 - 0.8 * 5 / 6, 0.2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anneal_start": 0.5, "anneal_end": 0.5}, "anneal_start must be below anneal_end=0.5, got 0.5; lower it"),
        ({"p_end": 0.0}, "greater than 0"),
        ({"p_end": 1.5}, "less than or equal to 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        SAEConfig.of_kind({"kind": "p_annealing", "d_sae": 8} | options)
