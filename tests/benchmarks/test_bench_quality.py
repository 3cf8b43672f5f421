"""Speed must not cost quality: the fast kernels and the reference, after the same samples, over seeds.

The table is printed; whether two columns differ by more than seeds do is for the reader to judge.
"""

import statistics

import pytest
import torch

import sae
from sae.config import TrainConfig
from sae.world_source import ToySourceConfig
from toymodels.streams import generator

N_SEEDS = 5
PATHS = [("reference", "fp32"), ("native", "fp32"), ("native", "bf16"), ("native", "exact")]
KINDS = {
    "topk": {"kind": "topk", "k": 3},
    "batchtopk": {"kind": "batchtopk", "k": 2.56},
    "relu": {"kind": "relu", "l1_coefficient": 0.15},
}


def score(source, options, train, kernels, precision, seed, out) -> tuple[float, float]:
    config = TrainConfig.model_validate(
        {
            "sae": options,
            "train": {**train, "seed": seed, "kernels": kernels, "precision": precision},
            "log": {"every": 10_000},
            "out": out / f"{kernels}-{precision}-{seed}",
        }
    )
    metrics = sae.train(config, source, report=False).metrics
    return metrics["recovery/mcc"], metrics["metrics/fvu"]


def table(say, title, paths, scores) -> None:
    for path in paths:
        cells = [
            f"{name} {statistics.fmean(column):.4f} ± {statistics.stdev(column):.4f}"
            for name, column in zip(("MCC", "FVU"), zip(*scores[path], strict=True), strict=True)
        ]
        say(f"{title}, {' '.join(path)}: {', '.join(cells)} ({len(scores[path])} seeds)")


@pytest.mark.parametrize("kind", KINDS)
def test_quality_on_the_toy_model(benchmark, say, tmp_path, kind):
    toy = ToySourceConfig(seed=0, weights=tmp_path / "toy.safetensors")
    toy.recipe.build(0).model.save(tmp_path / "toy.safetensors")
    source = toy.open()
    train = {"n_samples": 6_144_000, "batch_size": 2048, "lr": 3e-3}
    options = {"d_sae": 256} | KINDS[kind]
    scores = {path: [score(source, options, train, *path, s, tmp_path) for s in range(N_SEEDS)] for path in PATHS[:-1]}
    scores[PATHS[-1]] = benchmark.pedantic(
        lambda: [score(source, options, train, *PATHS[-1], s, tmp_path) for s in range(N_SEEDS)], rounds=1
    )
    table(say, f"toy model, {kind}", PATHS, scores)


def at_a_large_shape(seed: int, kernels: str, precision: str, out) -> tuple[float, float]:
    """MCC and FVU after 60 steps on 32 of 8192 random directions in 512 dimensions, strengths in [0, 1)."""
    n, d, k, batch, n_steps = 8192, 512, 32, 2048, 60
    stream = generator(0, "directions")
    truth = torch.nn.functional.normalize(torch.randn(n, d, generator=stream), dim=1)
    chosen = torch.randint(n, (n_steps * batch, k), generator=stream)
    strengths = torch.rand(chosen.shape, generator=stream)
    x = torch.nn.functional.embedding_bag(chosen, truth, per_sample_weights=strengths, mode="sum")
    config = TrainConfig.model_validate(
        {
            "sae": {"kind": "topk", "d_sae": n, "k": k},
            "train": {"n_samples": len(x), "batch_size": batch, "lr": 3e-3, "warmup_steps": 10, "seed": seed}
            | {"kernels": kernels, "precision": precision},
            "out": out / f"large-{kernels}-{precision}-{seed}",
        }
    )
    result = sae.train(config, x, report=False)
    matching = sae.metrics.match_dictionary(result.sae.W_dec, truth)
    return float(matching.cosine.mean()), result.metrics["metrics/fvu"]


def test_quality_at_a_large_shape(benchmark, say, tmp_path):
    scores = {path: [at_a_large_shape(seed, *path, tmp_path) for seed in range(N_SEEDS)] for path in PATHS[:-2]}
    scores[PATHS[-2]] = benchmark.pedantic(
        lambda: [at_a_large_shape(seed, *PATHS[-2], tmp_path) for seed in range(N_SEEDS)], rounds=1
    )
    table(say, "d 512, F 8192, k 32", PATHS[:-1], scores)
