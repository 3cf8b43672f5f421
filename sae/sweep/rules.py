"""When a member is stopped: rules on the last lines of its log, the same however often it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sae.config import TrainConfig
from sae.errors import UsageError
from sae.names import LINES
from sae.sweep.plan import SweepSection

Line = Mapping[str, float | int]
"""A line of metrics.jsonl."""


class Stopped(UsageError):
    """A rule stopped the member."""


def verdict(lines: Sequence[Line], config: TrainConfig, section: SweepSection) -> str | None:
    """Why a member is to be stopped after these lines, or None.

    A rule holds when each of the last `stop_lines` lines breaks its threshold. The last line of a run stops nothing:
    only measuring is left.
    """
    last = lines[-section.stop_lines :]
    if len(last) < section.stop_lines or last[-1]["step"] >= config.n_steps:
        return None

    def every(breaks: Callable[[Line], bool]) -> bool:
        return all(breaks(line) for line in last)

    dead, fvu = section.stop_dead, section.stop_fvu
    step = last[-1]["step"]
    if dead is not None and every(
        lambda line: line["step"] > config.train.warmup_steps and line["metrics/dead"] > dead
    ):
        share = last[-1]["metrics/dead"]
        return f"{share:.1%} of its latents are dead at step {step:.0f} (sweep.stop_dead is {dead:g})"
    if fvu is not None and every(lambda line: 2 * line["step"] > config.n_steps and line["metrics/fvu"] > fvu):
        value = last[-1]["metrics/fvu"]
        return f"its FVU is {value:.3g} at step {step:.0f} of {config.n_steps} (sweep.stop_fvu is {fvu:g})"
    return None


def read_lines(out: Path) -> list[Line]:
    """What a member has logged so far; a line truncated by a kill is left out."""
    if not (out / LINES).is_file():
        return []
    lines = (out / LINES).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
