"""Rows far from all others: told, and drawn in."""

import pytest
import torch

import sae
from sae import HeldOut, UsageError
from sae.heavy_tails import Ball, share_of_heaviest
from sae.metrics import recovery
from sae.sources import as_source
from sae.start import start

D, N_FEATURES = 8, 16


def rows(n: int = 6000) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse features whose rows are scaled by a heavy-tailed factor, far from 0; and the directions."""
    stream = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(N_FEATURES, D, generator=stream), dim=1)
    fires = torch.rand(n, N_FEATURES, generator=stream) < 0.08
    scale = torch.rand(n, 1, generator=stream) ** -0.7
    return (fires * scale) @ truth + 20, truth


def config(out, **train) -> sae.TrainConfig:
    given = {"n_samples": 300_000, "batch_size": 256} | train
    return sae.TrainConfig(sae={"kind": "topk", "d_sae": N_FEATURES, "k": 2}, train=given, out=out)


def test_the_share_of_the_heaviest_rows():
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) + 50
    squares = (x - x.mean(dim=0)).square().sum(dim=1).sort(descending=True).values
    assert share_of_heaviest(x, 0.01) == pytest.approx(float(squares[:10].sum() / squares.sum()), rel=1e-4)
    assert share_of_heaviest(x, 1e-9) == pytest.approx(float(squares[0] / squares.sum()), rel=1e-4)
    x[7] += 1e4
    assert share_of_heaviest(x, 0.001) > 0.99


def test_far_rows_are_drawn_in_and_near_ones_stay_to_the_bit():
    x = torch.randn(501, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([7.0, 0.0, -3.0])
    x[::50] = 100 * (x[::50] - x.mean(dim=0)) + x.mean(dim=0)
    ball = Ball.around(x, 1.5)
    distances = (x - ball.centre).norm(dim=1)
    assert ball.radius == pytest.approx(1.5 * float(distances.median()))
    drawn = ball.draw_in(x)
    inside = distances <= ball.radius
    assert 0.3 < inside.float().mean() < 0.95
    assert torch.equal(drawn[inside], x[inside])
    torch.testing.assert_close((drawn[~inside] - ball.centre).norm(dim=1), torch.full(((~inside).sum(),), ball.radius))
    cosines = torch.cosine_similarity(drawn - ball.centre, x - ball.centre)
    torch.testing.assert_close(cosines, torch.ones(501))
    at_the_centre = ball.centre.to(x)[None]
    assert torch.equal(ball.draw_in(at_the_centre), at_the_centre)


def test_more_features_are_found_and_codes_are_those_of_the_rows_as_they_are(tmp_path):
    x, truth = rows()
    plain = sae.train(config(tmp_path / "plain"), x, report=False)
    clipped = sae.train(config(tmp_path / "clipped", clip_rows=2.0), x, report=False)
    found, before = (recovery(result.sae.W_dec, truth)["mcc"] for result in (clipped, plain))
    assert found > before + 0.05
    assert clipped.metrics["metrics/fvu"] < plain.metrics["metrics/fvu"]
    far = x[x.norm(dim=1).argmax()][None]
    assert (clipped.sae(far) - far).norm() < 0.5 * (far - x.mean(dim=0)).norm(), "it is not drawn in any more"


def test_a_trainer_sees_drawn_in_rows_alone(tmp_path):
    """Also its unit, its centre and its first thresholds are theirs."""
    x, _ = rows(2000)
    calibration = as_source(x).held_out("calibration", 100)
    ball = Ball.around(calibration.x, 2.0)
    seen = start(config(tmp_path, clip_rows=2.0), as_source(x), calibration)
    judge = start(config(tmp_path), as_source(x), HeldOut(ball.draw_in(calibration.x)))
    assert seen.unit == judge.unit < start(config(tmp_path), as_source(x), calibration).unit
    for batch in x.split(256)[:3]:
        seen.step(batch)
        judge.step(ball.draw_in(batch))
    assert torch.equal(seen.sae.W_dec, judge.sae.W_dec)
    assert torch.equal(seen.sae.b_dec, judge.sae.b_dec)


def test_resuming_draws_in_alike(tmp_path):
    x, _ = rows(3000)
    given = config(tmp_path / "whole", n_samples=256 * 40, clip_rows=2.0)
    whole = sae.train(given, x, report=False)
    part = given.model_copy(update={"out": tmp_path / "part", "log": given.log.model_copy(update={"every": 10})})
    part = part.model_copy(update={"checkpoint": part.checkpoint.model_copy(update={"every_steps": 10})})

    def interrupt(step, values):
        if step == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sae.train(part, x, report=False, on_line=interrupt)
    resumed = sae.train(part, x, report=False, resume=True)
    assert torch.equal(resumed.sae.W_dec, whole.sae.W_dec)


def test_a_target_would_not_follow(tmp_path):
    given = sae.TrainConfig(
        sae={"kind": "transcoder", "d_sae": 16, "k": 2}, train={"clip_rows": 3.0}, out=tmp_path / "run"
    )
    x, _ = rows(500)
    with pytest.raises(UsageError, match=r"train\.clip_rows=3 pulls x in, but a target would not follow; leave it out"):
        sae.train(given, (x, x[:, :3]))
