"""What all contenders share: sizes, activations of these sizes, and the settings of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.config import SAEConfig
from sae.errors import UsageError
from toymodels.errors import nearest
from toymodels.streams import generator

# Enough that the larger shapes do not fit in a cache; contenders go round and round over them.
N_BATCHES = 16
# The same for all. Schedules are those of a run of N_STEPS steps, from its beginning; lambda is that of
# |e|^2 + lambda * sum |z|, as it decides how many latents of the L1-penalised kind fire.
LEARNING_RATE = 1e-3
N_STEPS = 100_000
L1_COEFFICIENT = 0.1


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a training step."""

    name: str
    d_in: int
    d_sae: int
    k: int
    batch: int

    def __str__(self) -> str:
        return f"{self.name}: d {self.d_in}, F {self.d_sae}, k {self.k}, B {self.batch}"

    @property
    def product_flops(self) -> int:
        """Of the encoder's product, 2 B d F."""
        return 2 * self.batch * self.d_in * self.d_sae

    def activations(self, n_batches: int = N_BATCHES) -> Float[Tensor, "rows d_in"]:
        """Sums of k of d_sae random directions with strengths in [0, 1), scaled to a mean squared norm of 1."""
        stream = generator(0, "bench", self.name)
        directions = torch.nn.functional.normalize(torch.randn(self.d_sae, self.d_in, generator=stream))
        chosen = torch.randint(self.d_sae, (n_batches * self.batch, self.k), generator=stream)
        strengths = torch.rand(chosen.shape, generator=stream)
        x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=strengths, mode="sum")
        return x.div_(x.square().sum(dim=1).mean().sqrt())


def parts(kind: str, x: Float[Tensor, "rows d_in"]) -> tuple[Tensor, ...]:
    """What a step of this kind is given: activations, and for a transcoder targets of the same width, made of them."""
    return (x, x.flip(1)) if kind == "transcoder" else (x,)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S", 64, 512, 8, 1024),
        Shape("M", 512, 8192, 32, 2048),
        Shape("L", 768, 24576, 32, 1024),
    )
}


def groups(shape: Shape) -> list[int]:
    """Latents that each further reading of a Matryoshka SAE adds: 1, 1, 2, 4 and 8 sixteenths of them."""
    sixteenth = shape.d_sae // 16
    return [sixteenth, sixteenth, 2 * sixteenth, 4 * sixteenth, shape.d_sae - 8 * sixteenth]


# What a measurement decides by itself.
DECIDED = ("train.batch_size", "train.n_samples", "train.device", "sae.d_sae")


def parse_shapes(text: str) -> list[Shape]:
    """Shapes from `S,M`, from `64,512,8,1024` (d, F, k, B), or from several of these with spaces between.

    Raises:
        UsageError: a name is unknown, or four numbers are no shape.
    """
    shapes = []
    for words in text.split():
        if words[0].isdigit() or words[0] == "-":
            shapes.append(_own_shape(words))
        else:
            shapes += [_named(word) for word in words.split(",") if word]
    if not shapes:
        raise UsageError(f"--shapes is empty; give names such as S,M or numbers d,F,k,B; known: {', '.join(SHAPES)}")
    return shapes


def _named(name: str) -> Shape:
    if name not in SHAPES:
        raise UsageError(f"unknown shape {name!r}{nearest(name, SHAPES)}, or four numbers d,F,k,B")
    return SHAPES[name]


def _own_shape(words: str) -> Shape:
    numbers = words.split(",")
    if len(numbers) != 4 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise UsageError(f"a shape is four positive whole numbers d,F,k,B as in 64,512,8,1024, got {words!r}")
    d_in, d_sae, k, batch = map(int, numbers)
    if k > d_sae:
        raise UsageError(f"shape {words}: k must lie in 1..F={d_sae}, got {k}; lower k or raise F")
    return Shape(words, d_in, d_sae, k, batch)


def parse_kinds(text: str) -> list[str]:
    """Kinds from `topk,relu`, each with options of its own where wanted: `topk,topk:multi_k=32,mykind:groups=[2,3]`.

    Raises:
        UsageError: one of them is unknown, or there is none.
    """
    kinds = [word for word in re.split(r"[,\s]+(?![^\[]*\])", text) if word]
    for kind in kinds:
        options_of(kind)
    if not kinds:
        raise UsageError(f"--kinds is empty; known: {', '.join(sorted(SAEConfig.kinds))}")
    return kinds


def options_of(kind: str) -> tuple[str, list[str]]:
    """The name of a kind and the flags that its options are: `topk:k=3` is topk with --sae.k=3, and
    `topk:train.moments=int8` with --train.moments=int8.

    Raises:
        UsageError: the kind is unknown, or what follows it is no option.
    """
    name, *options = kind.split(":")
    if name not in SAEConfig.kinds:
        raise UsageError(
            f"unknown kind {name!r}{nearest(name, SAEConfig.kinds)}; a kind of your own needs --plugin FILE"
        )
    for option in options:
        if not all(option.partition("=")):
            raise UsageError(f"an option of kind {name!r} is name=value, got {option!r}; as in {name}:name=value")
        if option.partition("=")[0] in DECIDED:
            raise UsageError(f"{option!r} of kind {name!r} is decided by --shapes, --steps or --device; leave it out")
    return name, [f"--{option}" if "." in option.partition("=")[0] else f"--sae.{option}" for option in options]
