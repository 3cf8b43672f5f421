"""Who takes part: this library, and the rivals that are installed, each with a first step behind it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import cycle

from torch import Tensor

from sae.bench import ours
from sae.bench.loading import RivalFailed, first_line
from sae.bench.rivals import RIVALS, Rival, Step
from sae.bench.shapes import Shape, parts
from sae.bench.timing import Contender

logger = logging.getLogger("sae")

OURS = "sae"
MEDIUM = "medium"


def contenders(
    shape: Shape, kind: str, lr: float, device: str, with_rivals: bool, medium_too: bool, left_out: list[str]
) -> list[Contender]:
    """This library first. A rival that cannot take part adds a line to `left_out`, which is also logged once."""
    x = shape.activations().to(device)
    found = [Contender(OURS, ours.advance(kind, shape, x, lr, device))]
    if not with_rivals:
        return found
    batches = list(zip(*(part.split(shape.batch) for part in parts(kind, x)), strict=True))
    for rival in RIVALS.values():
        if not rival.races(kind, device):
            continue
        precisions = [rival.precision, MEDIUM] if medium_too else [rival.precision]
        for precision in precisions:
            try:
                step = _begun(rival, kind, shape, lr, device, batches)
            except RivalFailed as error:
                tell_once(str(error), left_out)
                break
            name = rival.name if precision == rival.precision else f"{rival.name} ({precision})"
            found.append(Contender(name, _over(batches, step), precision, rival.version))
    return found


def tell_once(line: str, left_out: list[str]) -> None:
    """A rival fails in the same way at each shape and kind."""
    if line not in left_out:
        left_out.append(line)
        logger.warning("%s", line)


def _begun(rival: Rival, kind: str, shape: Shape, lr: float, device: str, batches: list[tuple[Tensor, ...]]) -> Step:
    step = rival.step(kind, shape, lr, device)
    try:
        step(*batches[0])
    except Exception as error:
        raise RivalFailed(f"{rival.name} is left out of {kind}, its step fails: {first_line(error)}") from error
    return step


def _over(batches: list[tuple[Tensor, ...]], step: Step) -> Callable[[], object]:
    stream = cycle(batches)
    return lambda: step(*next(stream))
