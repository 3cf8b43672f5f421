"""`sae bench`: reads what is asked for, measures it part by part, prints each part as it is done."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sae.bench import ours, report
from sae.bench.ceiling import products, streams
from sae.bench.contenders import OURS, contenders, tell_once
from sae.bench.loading import RivalFailed
from sae.bench.machine import load, machine, synchroniser
from sae.bench.memory import STEPS, STEPS_ALONE, Job, measure, require_memory
from sae.bench.report import Race, Report
from sae.bench.rivals import RIVALS
from sae.bench.shapes import LEARNING_RATE, Shape, parse_kinds, parse_shapes
from sae.bench.stages import stages
from sae.bench.timing import SETTLING_STEPS, interleaved
from sae.errors import UsageError
from sae.kernels import require_device
from sae.plugins import LOADED
from toymodels.errors import nearest

logger = logging.getLogger("sae")

PARTS = ("ceiling", "stages", "steps", "memory")
DEFAULT_PARTS = ("ceiling", "stages", "steps")


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    parts: tuple[str, ...]
    shapes: tuple[Shape, ...]
    kinds: tuple[str, ...]
    device: str = "cpu"
    threads: int | None = None
    rounds: int = 10
    steps: int | None = None
    rivals: bool = False
    medium_too: bool = False
    out: Path | None = None


def plan(
    names: Sequence[str],
    *,
    shapes: str,
    kinds: str,
    device: str,
    threads: int | None,
    rounds: int,
    steps: int | None,
    rivals: bool,
    medium_too: bool,
    memory: bool,
    out: Path | None,
) -> Plan:
    """The plan that words of the command line ask for.

    Raises:
        UsageError: a name is unknown, a number too small, the device or the place of the file cannot be used.
    """
    for name in names:
        if name not in PARTS:
            raise UsageError(f"unknown part {name!r}{nearest(name, PARTS)}")
    for flag, number in (("threads", threads), ("rounds", rounds), ("steps", steps)):
        if number is not None and number < 1:
            raise UsageError(f"--{flag} must be at least 1, got {number}")
    parts = [part for part in PARTS if part in (names or DEFAULT_PARTS) or (memory and part == "memory")]
    found = Plan(
        tuple(parts),
        tuple(parse_shapes(shapes)),
        tuple(parse_kinds(kinds)),
        device,
        threads,
        rounds,
        steps,
        rivals,
        medium_too,
        out,
    )
    if medium_too and not (rivals and "steps" in parts):
        raise UsageError(
            "--precision medium-too lets rivals take further steps; give --rivals and the part steps with it"
        )
    require_device(device, "--device")
    for shape in found.shapes:
        for kind in found.kinds:
            ours.config(kind, shape, LEARNING_RATE, device)  # an option that does not fit is told before anything runs
    if "memory" in parts:
        require_memory(device)
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UsageError(f"--out {out} must name a file in a directory that exists")
    if out is not None and not os.access(out if out.exists() else out.absolute().parent, os.W_OK):
        raise UsageError(f"--out {out} cannot be written; give another file")
    return found


def run(plan: Plan) -> Report:
    """Measures, prints, and writes the file when one is asked for."""
    with _threads(plan.threads):
        done = Report(machine(plan.device))
        report.print_machine(done.machine)
        for part in plan.parts:
            {"ceiling": _ceiling, "stages": _stages, "steps": _steps, "memory": _memory}[part](plan, done)
        done.machine["load_after"] = load()
    if plan.out is not None:
        done.save(plan.out)
        print(f"wrote {plan.out}")
    return done


def _ceiling(plan: Plan, done: Report) -> None:
    done.ceilings = products(plan.shapes, plan.device) + streams(plan.device)
    report.print_ceilings(done.ceilings)


def _stages(plan: Plan, done: Report) -> None:
    for shape in plan.shapes:
        for kind in plan.kinds:
            with _no_small_talk():
                found = stages(shape, kind, plan.device, plan.rounds, synchroniser(plan.device))
            done.stages.append((shape, kind, found))
            report.print_stages(shape, kind, found, done.ceilings)


def _steps(plan: Plan, done: Report) -> None:
    for shape in plan.shapes:
        for kind in plan.kinds:
            with _no_small_talk():
                taking_part = contenders(
                    shape, kind, LEARNING_RATE, plan.device, plan.rivals, plan.medium_too, done.left_out
                )
            settling = SETTLING_STEPS.get(torch.device(plan.device).type, 1)
            timings = interleaved(
                taking_part, plan.rounds, plan.steps, synchroniser(plan.device), settling_steps=settling
            )
            done.races.append(Race(shape, kind, timings))
            report.print_race(done.races[-1])


def _memory(plan: Plan, done: Report) -> None:
    names = [OURS, STEPS_ALONE, *(RIVALS if plan.rivals else ())]
    for shape in plan.shapes:
        found = []
        for kind in plan.kinds:
            for name in names:
                if name in RIVALS and not RIVALS[name].races(kind, plan.device):
                    continue
                steps = plan.steps or STEPS
                plugins = tuple(map(str, LOADED))
                job = Job(name, kind, shape, LEARNING_RATE, plan.device, torch.get_num_threads(), steps, plugins)
                try:
                    found.append(measure(job))
                except RivalFailed as error:
                    tell_once(str(error), done.left_out)
        done.memory += found
        report.print_memory(shape, found)


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_small_talk() -> Iterator[None]:
    """The line with which every run begins would come once for each contender."""

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("activations:")

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
