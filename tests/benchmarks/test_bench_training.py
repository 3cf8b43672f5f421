"""A training step of each sparsifier at d_in 64, d_sae 512, batch 1024: native kernels against torch operations."""

from itertools import cycle

import pytest

from sae.config import TrainConfig
from sae.start import start
from sae.world_source import WorldSource
from toymodels import Features, ToyModel, generator
from toymodels.worlds import ToyWorld

D_IN, D_SAE, K, BATCH = 64, 512, 8, 1024
KINDS = {
    "topk": {"kind": "topk", "k": K},
    "batchtopk": {"kind": "batchtopk", "k": K},
    "relu": {"kind": "relu", "l1_coefficient": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_step(against, say, kind):
    source = WorldSource(ToyWorld(ToyModel(D_SAE, D_IN, generator=generator(0, "bench")), Features(D_SAE, K / D_SAE)))
    stream = source.batches(BATCH, seed=0)
    batches = cycle([next(stream) for _ in range(32)])

    def step(kernels: str):
        train = {"batch_size": BATCH, "kernels": kernels}
        config = TrainConfig.model_validate({"sae": KINDS[kind] | {"d_sae": D_SAE}, "train": train})
        trainer = start(config, source, source.held_out("calibration", 4096))

        def steps() -> None:
            for _ in range(10):
                trainer.step(next(batches))

        return steps

    native, plain = against(step("native"), step("torch"), rounds=20)
    say(f"{kind}: {100 * native:.2f} ms a step, {10 * BATCH / native:,.0f} samples/s, {plain / native:.1f} x torch's")
