"""Sixteen SAEs at S and eight at M, shapes of `sae bench`: trained together, one by one, by autograd in a loop.

On all cores, as members share them; one after the other each step has all of them.
"""

import os
from itertools import cycle
from typing import Any

import pytest
import torch

from sae.bench.shapes import SHAPES, Shape
from sae.config import TrainConfig
from sae.members import Members
from sae.sources import Source, as_source
from sae.start import start
from sae.trainer import Trainer


@pytest.fixture
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


class ByAutograd:
    """The same SAE as anybody would write it: TopK, dense decoding, fused Adam, unit rows."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.k = shape.k
        stream = torch.Generator().manual_seed(seed)
        rows = torch.nn.functional.normalize(torch.randn(shape.d_sae, shape.d_in, generator=stream), dim=1)
        self.W_dec = rows.clone().requires_grad_()
        self.W_enc = rows.T.clone().contiguous().requires_grad_()
        self.b_enc = torch.zeros(shape.d_sae, requires_grad=True)
        self.b_dec = torch.zeros(shape.d_in, requires_grad=True)
        weights = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.optimizer = torch.optim.Adam(weights, lr=1e-3, fused=True)

    def step(self, x: torch.Tensor) -> None:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        values, latents = pre.topk(self.k, dim=1)
        z = torch.zeros_like(pre).scatter(1, latents, values.relu())
        (x - z @ self.W_dec - self.b_dec).square().sum(dim=1).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


def trainers(shape: Shape, n: int, source: Source) -> list[Trainer]:
    made = []
    for seed in range(n):
        options = {"kind": "topk", "k": shape.k, "d_sae": shape.d_sae, "aux_coefficient": 0.0}
        train = {"batch_size": shape.batch, "lr": 1e-3, "seed": seed}
        config = TrainConfig.model_validate({"sae": options, "train": train})
        made.append(start(config, source, source.held_out("calibration", 4096)))
    return made


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize(
    ("name", "n", "other", "rounds"),
    [
        ("S", 16, "by autograd", 30),
        ("S", 16, "one after the other", 30),
        ("M", 8, "one after the other", 5),
    ],
)
def test_members(against, say, name, n, other, rounds):
    shape = SHAPES[name]
    x = shape.activations()
    source, batches = as_source(x), cycle(x.split(shape.batch))
    if other == "by autograd":
        alone: list[Any] = [ByAutograd(shape, seed) for seed in range(n)]
    else:
        alone = trainers(shape, n, source)
    side_by_side = trainers(shape, n, source)
    with Members(side_by_side) as members:

        def loop() -> None:
            batch = next(batches)
            for member in alone:
                member.step(batch)

        def all_at_once() -> None:
            assert not any(members.step(side_by_side, next(batches)))

        together, apart = against(all_at_once, loop, rounds=rounds)
    say(f"{n} SAEs at {name}, {1000 * together:.1f} ms a step together, {apart / together:.1f} x {other}")
