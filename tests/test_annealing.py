"""What a sparsifier changes over a run: when it is told, what the log shows, and that a resumed run goes on alike."""

import json

import pytest
import torch

import sae
from sae import TrainConfig
from sae.run import Trainer
from sae.sparsifiers import TopK


def config(out, **options) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "source": {"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 20},
            "sae": {"kind": "topk", "d_sae": 24, "k": 3} | options,
            "train": {"n_samples": 35 * 64, "batch_size": 64, "warmup_steps": 5},
            "evaluation": {"n_samples": 200},
            "log": {"every": 5},
            "out": out,
        }
    )


def lines(out, name: str) -> list[tuple[int, float]]:
    """(step, value) of each line of a log."""
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in read]


def test_a_sparsifier_hears_of_the_run_at_each_look_and_at_its_end(tmp_path, monkeypatch):
    heard = []

    monkeypatch.setattr(TopK, "anneal_", lambda self, done: heard.append(done))
    monkeypatch.setattr(TopK, "details", lambda self: {"progress": heard[-1]})
    monkeypatch.setattr(TopK, "calibrate_", lambda self, batches, n_samples: heard.append("calibrate_"))
    sae.train(config(tmp_path / "run"), report=False)
    assert heard == [0, 10 / 35, 20 / 35, 30 / 35, 1, "calibrate_"]
    shown = lines(tmp_path / "run", "details/progress")
    assert shown == [(step, (step - 1) // 10 * 10 / 35) for step in range(5, 36, 5)]


@pytest.mark.parametrize("stop", [10, 13])
def test_a_resumed_run_hears_what_the_last_look_told(stop, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(TopK, "anneal_", lambda self, done: heard.append(done))
    first = config(tmp_path)
    trainers = [Trainer(sae.SAE(6, first.sae), first, 1.0) for _ in range(2)]
    for x in torch.randn(stop, 64, 6):
        trainers[0].step(x)
    told = heard[-1]
    heard.clear()
    trainers[1].load_state(*trainers[0].state())
    assert heard[0] == (told if stop % 10 else stop / 35)  # at a look's own step the next step looks


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"k": 3, "k_start": 10}, [10, 8, 5, 3]),  # whole numbers: 10, 7.5, 5, 3 at the shares 0, 10/35, 20/35, 30/35
        ({"kind": "batchtopk", "k": 2.5, "k_start": 9.0}, [9, 6.6785714, 4.3571429, 2.5]),
        ({"kind": "matryoshka", "k": 2.5, "k_start": 9.0}, [9, 6.6785714, 4.3571429, 2.5]),
    ],
    ids=["topk", "batchtopk", "matryoshka"],
)
def test_k_falls_linearly_then_stays(tmp_path, options, expected):
    given = config(tmp_path / "run", k_anneal_fraction=0.8, **options)
    result = sae.train(given, report=False)
    told = lines(tmp_path / "run", "details/k")
    assert [value for step, value in told if step % 10 == 0] == pytest.approx(expected[:3])
    assert told[-1] == (35, pytest.approx(expected[3]))
    l0 = lines(tmp_path / "run", "metrics/l0")
    for (_, k), (_, measured) in zip(told, l0, strict=True):
        assert measured == pytest.approx(k, rel=0.15)  # some rows have fewer positives, and empty samples tie
    assert result.metrics["metrics/l0"] <= 1.2 * expected[3]
    assert result.sae.sparsifier.k == given.sae.k


def test_without_k_start_nothing_is_told(tmp_path):
    sae.train(config(tmp_path / "run"), report=False)
    assert "details/k" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_a_source_that_ends_early_is_calibrated_for_the_k_asked_for(tmp_path):
    given = config(tmp_path / "run", kind="batchtopk", k=2.0, k_start=12.0, k_anneal_fraction=1.0)
    x = torch.randn(9000, 6, generator=torch.Generator().manual_seed(0))
    result = sae.train(given, iter(x.split(64)[:140]), report=False)
    assert result.metrics["metrics/l0"] == pytest.approx(2.0, rel=0.1)
