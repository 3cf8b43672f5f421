"""Peak memory of a few training steps, each contender alone in a fresh process.

Counted is what comes on top of what the process holds once everything is imported and the activations lie in memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sae.bench import ours
from sae.bench.contenders import OURS
from sae.bench.loading import RivalFailed
from sae.bench.rivals import RIVALS
from sae.bench.shapes import Shape, parts
from sae.errors import UsageError
from sae.plugins import load_plugin
from sae.run import train

STEPS = 10
TINY = Shape("tiny", 4, 8, 2, 64)
# `sae` is a whole run of `sae.train`, final metrics included; rivals do steps alone, and this is the same of ours.
STEPS_ALONE = f"{OURS}, steps alone"


@dataclass(frozen=True)
class Job:
    """What a process of its own measures."""

    name: str
    kind: str
    shape: Shape
    lr: float
    device: str
    threads: int
    steps: int = STEPS
    plugins: tuple[str, ...] = ()
    """Files that define kinds of one's own."""


@dataclass(frozen=True)
class Memory:
    """Bytes: before the first step, and at most."""

    name: str
    kind: str
    shape: str
    baseline: int
    peak: int

    @property
    def growth(self) -> int:
        return self.peak - self.baseline


def measure(job: Job) -> Memory:
    """Starts the process and reads its answer.

    Raises:
        RivalFailed: the contender does not work; the message says why in one line.
    """
    words = json.dumps(asdict(job))
    command = [sys.executable, "-m", "sae.bench.memory", words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        reason = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise RivalFailed(reason if reason.startswith(job.name) else f"{job.name} is left out: {reason}")
    answer = json.loads(ended.stdout.splitlines()[-1])
    return Memory(job.name, job.kind, job.shape.name, answer["baseline"], answer["peak"])


def require_memory(device: str) -> None:
    """Refuses where the peak of a process cannot be read.

    Raises:
        UsageError: this is not Linux, and the device is a CPU.
    """
    if torch.device(device).type != "cuda" and not Path("/proc/self/clear_refs").exists():
        raise UsageError("memory is read from Linux's /proc, which is not here; leave `memory` out")


class Peak:
    """Largest size since it was made: of the process, or of what CUDA handed out."""

    def __init__(self, device: str) -> None:
        self.device = device if torch.device(device).type == "cuda" else None
        if self.device is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.baseline = torch.cuda.memory_allocated(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets VmHWM back to VmRSS
            self.baseline = _status_bytes("VmRSS")

    def read(self) -> int:
        return _status_bytes("VmHWM") if self.device is None else torch.cuda.max_memory_allocated(self.device)


def _status_bytes(name: str) -> int:
    (line,) = [
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(name)
    ]
    return int(line.split()[1]) * 1024


def run(job: Job) -> dict[str, int]:
    """In the process: a tiny run that imports all that is imported late, activations, the baseline, then the steps."""
    torch.set_num_threads(job.threads)
    steps = _train if job.name == OURS else _step
    steps(replace(job, shape=TINY, steps=2), TINY.activations().to(job.device))
    x = job.shape.activations().to(job.device)
    peak = Peak(job.device)
    steps(job, x)
    return {"baseline": peak.baseline, "peak": peak.read()}


def _train(job: Job, x: Float[Tensor, "rows d_in"]) -> None:
    """`sae.train` as a user calls it, with all that comes after the last step."""
    with tempfile.TemporaryDirectory() as folder:
        given = parts(job.kind, x)
        config = ours.config(job.kind, job.shape, job.lr, job.device, job.steps, out=f"{folder}/run")
        train(config, source=given if len(given) > 1 else x, report=False)


def _step(job: Job, x: Float[Tensor, "rows d_in"]) -> None:
    if job.name == STEPS_ALONE:
        advance = ours.advance(job.kind, job.shape, x, job.lr, job.device)
        for _ in range(job.steps):
            advance()
        return
    batches = list(zip(*(part.split(job.shape.batch) for part in parts(job.kind, x)), strict=True))
    step = RIVALS[job.name].step(job.kind, job.shape, job.lr, job.device)
    for number in range(job.steps):
        step(*batches[number % len(batches)])


def main() -> None:
    """Answers one job, given as JSON, with one line of JSON."""
    values = json.loads(sys.argv[1])
    for path in values["plugins"]:
        load_plugin(path)
    try:
        print(json.dumps(run(Job(**values | {"shape": Shape(**values["shape"])}))))
    except RivalFailed as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
