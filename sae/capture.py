"""Steps as CUDA graphs: recorded once, replayed without the host. Imported only on CUDA.

A step is recorded in two graphs, one up to its codes and one from there on. Between them the host may check whether the
codes of a ReLU fit their slots, before anything has changed; a batch whose codes do not is recomputed, unrecorded.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sae.kernels.triton import Triton

logger = logging.getLogger("sae")

# Recordings that are kept: each width of AuxK has one, and its own memory for what lies between operations.
KEPT = 3
# Steps of a kind before it is recorded: as many as lie between two looks.
WARM_UP_STEPS = 10
Key = tuple[object, ...]


@runtime_checkable
class Steps(Protocol):
    """A trainer, as far as it is recorded."""

    sae: Any
    engine: Any
    dead: Tensor
    window: Tensor
    n_steps_done: int

    def advance(self, activations: Tensor, target: Tensor | None = None) -> None:
        """A whole step."""

    def begin(self, activations: Tensor, target: Tensor | None = None) -> Any:
        """Up to its codes; changes nothing that is saved."""

    def finish(self, begun: Any) -> None:
        """The rest of it."""


@runtime_checkable
class Graph(Protocol):
    """A CUDA graph, as far as it is used once it is recorded."""

    def replay(self) -> None:
        """Does on the device what was recorded."""


@dataclass
class Recording:
    """Both graphs of a step, and the memory that they read and write."""

    inputs: tuple[Tensor, ...]
    dead: Tensor
    graphs: tuple[Graph, Graph]
    n_codes: Tensor | None
    """How many codes the batch has, where that may be too many."""
    n_slots: int
    held: list[Tensor]
    """Buffers that later steps may replace by larger ones: the graphs know these."""


class Recorder:
    """Takes a trainer's steps: as they come in the first of a kind, then from a recording of one.

    What the host decides at its looks (which latents are dead, whether steps are dense, how large k is) makes the kind
    of a step. The first steps, as they come, compile kernels and fill buffers; a kind that lasts from one look to the
    next alone, as while k is annealed, is not worth a recording.
    """

    def __init__(self, trainer: Steps) -> None:
        kernels = trainer.engine.kernels
        assert isinstance(kernels, Triton)
        self.trainer, self.kernels = trainer, kernels
        self.recordings: OrderedDict[Key, Recording] = OrderedDict()
        self.seen: dict[Key, int] = {}
        self.fails = False

    def play(self, activations: Tensor, target: Tensor | None) -> None:
        """One step."""
        trainer = self.trainer
        inputs = (activations,) if target is None else (activations, target)
        key = self._key(inputs)
        first = self.seen.setdefault(key, trainer.n_steps_done)
        if key in self.recordings:
            self.recordings.move_to_end(key)
        elif self._can_be_recorded() and trainer.n_steps_done >= first + WARM_UP_STEPS:
            self._keep(key, inputs)
        recording = self.recordings.get(key)
        if recording is None or not self._replay(recording, inputs):
            trainer.advance(*inputs)

    def _key(self, inputs: tuple[Tensor, ...]) -> Key:
        trainer, sparsifier = self.trainer, self.trainer.sae.sparsifier
        numbers = tuple((name, value) for name, value in vars(sparsifier).items() if isinstance(value, int | float))
        shapes = tuple((tuple(part.shape), part.dtype) for part in inputs)
        return (shapes, len(trainer.dead), trainer.engine.dense, self.kernels.n_slots, numbers)

    def _can_be_recorded(self) -> bool:
        """Neither autograd nor a sparsifier of one's own is recorded, which may ask the device."""
        if self.fails:
            return False
        engine = self.trainer.engine
        own = not type(engine.sae.sparsifier).__module__.startswith("sae.sparsifiers")
        return not (own or engine.by_autograd or (engine.dense and not engine.dense_products))

    def _keep(self, key: Key, inputs: tuple[Tensor, ...]) -> None:
        """Records a step of this kind. Where that fails steps go on as they come, and a line says so."""
        try:
            self.recordings[key] = self._record(inputs)
        except RuntimeError as error:
            self.fails = True
            cause: BaseException = error
            while cause.__context__ is not None:  # the end of a recording fails as well, for no reason of its own
                cause = cause.__context__
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            logger.warning(
                "a step could not be recorded as a CUDA graph (%s): steps continue without, more slowly", reason
            )
        while len(self.recordings) > KEPT:
            self.recordings.popitem(last=False)

    def _record(self, given: tuple[Tensor, ...]) -> Recording:
        trainer, kernels, device = self.trainer, self.kernels, self.trainer.window.device
        inputs, dead = tuple(part.clone() for part in given), trainer.dead.clone()
        before, trainer.dead = trainer.dead, dead
        kernels.recording, kernels.n_positive = True, None
        try:
            with torch.cuda.device(device):
                graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
                # The loader's copies on another stream go on meanwhile.
                options: dict[str, Any] = {"pool": torch.cuda.graph_pool_handle(), "stream": torch.cuda.Stream()}
                options["capture_error_mode"] = "thread_local"
                # Products know the memory that they work in by stream. Both graphs get one of their own: members play
                # theirs at the same time, and a recording that is given up must not take another's along.
                torch._C._cuda_clearCublasWorkspaces()
                with torch.cuda.graph(graphs[0], **options):
                    begun = trainer.begin(*inputs)
                n_codes = kernels.n_positive
                with torch.cuda.graph(graphs[1], **options):
                    trainer.finish(begun)
                torch._C._cuda_clearCublasWorkspaces()
        finally:
            kernels.recording, trainer.dead = False, before
        held = [*kernels.buffer.kept.values(), *trainer.engine.buffer.kept.values()]
        return Recording(inputs, dead, graphs, n_codes, kernels.n_slots, held)

    def _replay(self, recording: Recording, given: tuple[Tensor, ...]) -> bool:
        """False: the codes do not fit the slots of the recording, and nothing has changed."""
        for static, part in zip(recording.inputs, given, strict=True):
            static.copy_(part, non_blocking=True)
        if self.trainer.dead is not recording.dead:
            recording.dead.copy_(self.trainer.dead)
            self.trainer.dead = recording.dead
        recording.graphs[0].replay()
        n_codes = 0 if recording.n_codes is None else int(recording.n_codes)
        fits = n_codes <= recording.n_slots
        if fits:
            recording.graphs[1].replay()
        if not fits or (recording.n_codes is not None and 4 * n_codes < recording.n_slots):
            # Steps that are not recorded find out how many slots batches need now.
            self.recordings.clear()
            self.seen.clear()
        return fits
