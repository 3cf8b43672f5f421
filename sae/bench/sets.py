"""The sets that quality is compared on: each is the same for everyone and every time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from sae.arrays import Pairs, table
from sae.bench.shapes import Shape
from sae.errors import UsageError
from sae.sources import HELD_OUT_ROWS, ArraySource, PairSource, Source
from sae.world_source import ToySourceConfig
from toymodels.errors import nearest
from toymodels.streams import generator


@dataclass(frozen=True)
class Data:
    """Activations whose features are known, and how long to train on them."""

    source: Source
    shape: Shape
    n_steps: int
    l1: float
    """lambda of an L1 penalty, in units of the data, that leads to an L0 of about the shape's k."""

    @property
    def l0_price(self) -> float:
        """lambda of an L0 penalty that silences the same codes: below lambda / 2 an L1 penalty leaves nothing."""
        return self.l1**2 / 4


def toy() -> Data:
    """Row 16: 256 features that fire with probability .01, in 64 dimensions of a toy model; each step sees new rows."""
    return Data(ToySourceConfig(seed=0).open(), Shape("toy", 64, 256, 3, 2048), 3000, 0.25)


def zipf(transcode: bool = False) -> Data:
    """1024 features in 64 dimensions, the i-th as frequent as 1 / i, about 8 of them in a row, for 512 latents.

    A row draws each of 16 places with probability 1/2, its feature by frequency and its strength from [0, 1); it is
    seen once. Rows have a mean squared norm of 1. To transcode is to find the same features in other directions.
    """
    n_features, shape, n_steps, places = 1024, Shape("zipf", 64, 512, 8, 256), 2400, 16
    stream = generator(0, "zipf")
    truth, elsewhere = normalize(torch.randn(2, n_features, shape.d_in, generator=stream), dim=2)
    n_rows = n_steps * shape.batch + HELD_OUT_ROWS
    frequency = 1 / torch.arange(1, n_features + 1)
    features = torch.multinomial(frequency, n_rows * places, replacement=True, generator=stream).view(n_rows, places)
    fires = torch.rand(features.shape, generator=stream) < 0.5
    strengths = torch.rand(features.shape, generator=stream) * fires

    def rows(directions: Tensor) -> Tensor:
        x = embedding_bag(features, directions, per_sample_weights=strengths, mode="sum")
        return x.div_(x.square().sum(dim=1).mean().sqrt())

    x = table(rows(truth), "zipf")
    if transcode:
        source: Source = PairSource(
            ArraySource(Pairs(x, table(rows(elsewhere), "zipf, elsewhere"))), shape.d_in, elsewhere
        )
    else:
        source = ArraySource(x, truth)
    return Data(source, shape, n_steps, 0.35)


SETS = ("toy", "zipf")


def data(name: str, kind: str) -> Data | None:
    """The set of this name for this kind; None: it has no targets to transcode to.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in SETS:
        raise UsageError(f"unknown set {name!r}{nearest(name, SETS)}")
    if name == "toy":
        return None if kind == "transcoder" else toy()
    return zipf(kind == "transcoder")
