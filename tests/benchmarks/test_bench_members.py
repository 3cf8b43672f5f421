"""Sixteen SAEs (d_in 64, d_sae 512, k 8, batch 1024): trained together, one after the other, by autograd in a loop.

On all cores, as members share them.
"""

import os
from itertools import cycle

import pytest
import torch

from sae.bench.shapes import SHAPES
from sae.config import TrainConfig
from sae.members import Members
from sae.run import start
from sae.sources import as_source
from sae.trainer import Trainer

N_MEMBERS = 16
SHAPE = SHAPES["S"]


@pytest.fixture
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


class ByAutograd:
    """The same SAE as anybody would write it: TopK, dense decoding, fused Adam, unit rows."""

    def __init__(self, seed: int) -> None:
        stream = torch.Generator().manual_seed(seed)
        rows = torch.nn.functional.normalize(torch.randn(SHAPE.d_sae, SHAPE.d_in, generator=stream), dim=1)
        self.W_dec = rows.clone().requires_grad_()
        self.W_enc = rows.T.clone().contiguous().requires_grad_()
        self.b_enc = torch.zeros(SHAPE.d_sae, requires_grad=True)
        self.b_dec = torch.zeros(SHAPE.d_in, requires_grad=True)
        weights = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.optimizer = torch.optim.Adam(weights, lr=1e-3, fused=True)

    def step(self, x: torch.Tensor) -> None:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        values, latents = pre.topk(SHAPE.k, dim=1)
        z = torch.zeros_like(pre).scatter(1, latents, values.relu())
        (x - z @ self.W_dec - self.b_dec).square().sum(dim=1).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


def trainers(source) -> list[Trainer]:
    made = []
    for seed in range(N_MEMBERS):
        options = {"kind": "topk", "k": SHAPE.k, "d_sae": SHAPE.d_sae, "aux_coefficient": 0.0}
        train = {"batch_size": SHAPE.batch, "lr": 1e-3, "seed": seed}
        config = TrainConfig.model_validate({"sae": options, "train": train})
        made.append(start(config, source, source.held_out("calibration", 4096)))
    return made


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("other", ["by autograd", "one after the other"])
def test_sixteen_members(against, say, other):
    x = SHAPE.activations()
    source, batches = as_source(x), cycle(x.split(SHAPE.batch))
    alone = [ByAutograd(seed) for seed in range(N_MEMBERS)] if other == "by autograd" else trainers(source)
    side_by_side = trainers(source)
    with Members(side_by_side) as members:

        def loop() -> None:
            batch = next(batches)
            for member in alone:
                member.step(batch)

        def all_at_once() -> None:
            assert not any(members.step(side_by_side, next(batches)))

        together, apart = against(all_at_once, loop, rounds=30)
    say(f"16 SAEs, {1000 * together:.1f} ms a step together, {apart / together:.1f} x {other}")
