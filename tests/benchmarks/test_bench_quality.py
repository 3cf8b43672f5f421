"""Speed must not cost quality: the fast kernels and the reference, after the same samples, over seeds.

The table is printed; whether two columns differ by more than seeds do is for the reader to judge.
"""

import statistics

import pytest
import torch

import sae
from sae.config import TrainConfig
from sae.sources import ToySourceConfig, WorldSource
from toymodels.features import Features
from toymodels.streams import generator
from toymodels.worlds import Sample, World

N_SEEDS = 5
PATHS = [("reference", "fp32"), ("native", "fp32"), ("native", "bf16"), ("native", "exact")]
KINDS = {
    "topk": {"kind": "topk", "k": 3},
    "batchtopk": {"kind": "batchtopk", "k": 2.56},
    "relu": {"kind": "relu", "l1_coefficient": 0.15},
}


class Directions(World):
    """n unit directions in d dimensions, each on in a share of the samples, at a strength in [0, 1)."""

    def __init__(self, n: int, d: int, l0: float) -> None:
        self.features, self.d_hidden = Features(n, l0 / n), d
        self.truth = torch.nn.functional.normalize(torch.randn(n, d, generator=generator(0, "directions")), dim=1)

    def sample(self, n: int, stream: torch.Generator) -> Sample:
        acts = self.features.sample(n, stream)
        return Sample(acts.embed(self.truth), acts)


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


def test_quality_at_a_large_shape(benchmark, say, tmp_path):
    source = WorldSource(Directions(n=8192, d=512, l0=32.0))
    train = {"n_samples": 200 * 2048, "batch_size": 2048, "lr": 1e-3, "warmup_steps": 20}
    options = {"kind": "topk", "d_sae": 8192, "k": 32}
    paths = PATHS[:2]
    run = [[score(source, options, train, *path, s, tmp_path) for s in range(N_SEEDS)] for path in paths[:1]]
    native = benchmark.pedantic(
        lambda: [score(source, options, train, *paths[1], s, tmp_path) for s in range(N_SEEDS)], rounds=1
    )
    table(say, "d 512, F 8192, k 32", paths, dict(zip(paths, [run[0], native], strict=True)))
