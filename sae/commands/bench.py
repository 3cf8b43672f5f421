"""The command that measures speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from sae.commands.base import WithPlugins


@dataclass
class Bench(WithPlugins):
    """How fast this machine trains SAEs, how far that is from its limits, and how fast other libraries are on it.

    NAMES are parts: `ceiling` (what the hardware can do), `stages` (the parts of a training step), `steps` (whole
    training steps), `memory` (their peak). Without names, all but memory.
    """

    names: Annotated[Positional[tuple[str, ...]], arg(metavar="[{ceiling,stages,steps,memory} ...]")] = ()
    device: str = "cpu"
    """A torch device: cpu, cuda."""
    shapes: str = "S,M,L"
    """Sizes by name, or as numbers d,F,k,B; separate several of these by spaces."""
    kinds: str = "topk,batchtopk,relu"
    """Kinds, each with its own options if needed: topk,topk:multi_k=32,topk:train.moments=int8."""
    threads: int | None = None
    """CPU threads; default torch's own number."""
    rounds: int = 10
    """In each round every contender takes one turn."""
    steps: int | None = None
    """Training steps per turn; default as many as the slowest does in a fifth of a second, and 10 for memory."""
    rivals: bool = False
    """Also measure the other libraries that are installed."""
    precision: Literal["default", "medium-too"] = "default"
    """Rivals run with their defaults; medium-too: also under torch.set_float32_matmul_precision("medium")."""
    memory: bool = False
    """Also measure the part `memory`."""
    out: Path | None = None
    """A JSON file for every number and sample."""

    def run(self) -> None:
        from sae.bench.run import plan, run  # noqa: PLC0415

        self.load_plugins()
        run(
            plan(
                self.names,
                shapes=self.shapes,
                kinds=self.kinds,
                device=self.device,
                threads=self.threads,
                rounds=self.rounds,
                steps=self.steps,
                rivals=self.rivals,
                medium_too=self.precision == "medium-too",
                memory=self.memory,
                out=self.out,
            )
        )
