"""A training step of each sparsifier at d_in 64, d_sae 512, batch 1024: forward, backward, Adam, counters."""

from itertools import cycle

import pytest
import torch

from sae.config import TrainConfig
from sae.run import start
from sae.sources import WorldSource
from toymodels import Features, ToyModel, generator
from toymodels.worlds import ToyWorld

D_IN, D_SAE, K, BATCH = 64, 512, 8, 1024
KINDS = {
    "topk": {"kind": "topk", "k": K},
    "batchtopk": {"kind": "batchtopk", "k": K},
    "relu": {"kind": "relu", "l1_coefficient": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_step(benchmark, say, kind):
    config = TrainConfig.model_validate({"sae": KINDS[kind] | {"d_sae": D_SAE}, "train": {"batch_size": BATCH}})
    source = WorldSource(ToyWorld(ToyModel(D_SAE, D_IN, generator=generator(0, "bench")), Features(D_SAE, K / D_SAE)))
    trainer, unit = start(config, source, source.held_out("calibration", 4096))
    stream = source.batches(BATCH, seed=0)
    batches = cycle([next(stream) / unit for _ in range(32)])

    def step() -> None:
        trainer.refresh_dead()
        trainer.step(next(batches))

    benchmark.pedantic(step, rounds=200, warmup_rounds=50)
    seconds = benchmark.stats.stats.median
    # Forward, and twice as much backward, through a dense encoder and decoder: the count that sparsity saves on.
    dense_flops = 3 * 2 * 2 * BATCH * D_IN * D_SAE
    say(
        f"{kind}: {1e3 * seconds:.2f} ms a step, {BATCH / seconds:,.0f} samples/s, "
        f"{dense_flops / seconds / 1e9:.1f} dense-equivalent GFLOP/s"
    )
    assert torch.isfinite(trainer.window).all()
