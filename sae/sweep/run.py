"""A sweep from its plan to its table: directories, who trains what, and how each member ended."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.directory import check_out, discard, require_out, require_same_run
from sae.errors import UsageError
from sae.extras import require
from sae.kernels import require_device
from sae.locks import LOCK, cannot_write, held
from sae.log import require_wandb
from sae.names import CONFIG, REPORT, RESULT, STATUS, SWEEP
from sae.run import as_it_begins, write_report_if_installed
from sae.stopping import Stop, stop_requested
from sae.sweep.group import Ended, Group, Logged, OpenSource, Tell, opener
from sae.sweep.machines import connect, on_machines
from sae.sweep.plan import Member, Plan
from sae.sweep.rules import read_lines, verdict
from sae.sweep.workers import in_processes
from sae.warm_start import require_start
from toymodels.files import write_text

logger = logging.getLogger("sae")

UNFINISHED = "unfinished"
OnEvent = Callable[[Logged | Ended], None]


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended: a row for each member, and the page if there is one."""

    rows: list[dict[str, Any]]
    report: Path | None
    signal_number: int = 0
    """The number of the signal that stopped it, or 0."""

    @property
    def not_done(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] != "done"]


def run_sweep(
    plan: Plan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    open_source: OpenSource | None = None,
) -> Outcome:
    """Trains every member in its own directory, and writes sweep.json and report.html next to them.

    A member that diverges, is stopped by a rule or fails does not stop the others. `on_event` is called for each logged
    line and each end. With `resume` members that ended are left as they are, and others continue from their
    checkpoints. `open_source` gives sources that are already open to the members that this process trains.

    Raises:
        UsageError: the sweep cannot begin; nothing was trained or written.
    """
    check_sweep(plan, resume, overwrite)
    table = {member.name: _row(member, _ended_before(plan, member, resume)) for member in plan.members}
    left = [member for member in plan.members if table[member.name]["status"] == UNFINISHED]
    open_source = open_source or opener()
    if plan.section.n_jobs == 1 and not plan.section.ray:
        for member in left:
            try:
                open_source(member)  # bad data are told before an earlier sweep is given up
            except UsageError as error:
                raise UsageError(f"member {member.name}: {error}") from error
    if plan.section.ray and left:
        connect()
    with held(plan.out):
        _claim(plan, resume)
        return _run(plan, left, table, open_source, resume, on_event)


def _run(
    plan: Plan,
    left: list[Member],
    table: dict[str, dict[str, Any]],
    open_source: OpenSource,
    resume: bool,
    on_event: OnEvent | None,
) -> Outcome:
    """Trains the members that are left; the table is kept as it stands."""
    members = {member.name: member for member in plan.members}

    def tell(message: Logged | Ended) -> None:
        if isinstance(message, Ended):
            if message.reason:
                logger.warning("%s: %s: %s", message.name, message.status, message.reason)
            table[message.name] = _row(members[message.name], message)
            _write(plan, table)
        if on_event is not None:
            on_event(message)

    _write(plan, table)
    with stop_requested() as stop:
        _train(plan, [Group(part, plan.section, resume) for part in _parts(plan, left)], open_source, tell, stop)
        rows = list(table.values())
        signal_number = stop() if any(row["status"] == "interrupted" for row in rows) else 0
        begun = any((member.config.out / CONFIG).exists() for member in plan.members)
        return Outcome(rows, write_report_if_installed(plan.out) if begun else None, signal_number)


def _train(plan: Plan, groups: list[Group], open_source: OpenSource, tell: Tell, stop: Stop) -> None:
    if plan.section.ray:
        on_machines(groups, tell, stop)
    elif plan.section.n_jobs > 1:
        in_processes(groups, plan.section.n_jobs, tell, stop)
    else:
        with quiet():
            for group in groups:
                if stop():
                    for member in group.members:
                        tell(Ended(member.name, "interrupted"))
                else:
                    group.run(open_source, tell, stop)


def _parts(plan: Plan, members: list[Member]) -> Iterator[tuple[Member, ...]]:
    """Members of one stream, at most as many as are held at once; several parts of a stream where processes wait."""
    streams: dict[str, list[Member]] = {}
    for member in members:
        streams.setdefault(member.stream, []).append(member)
    section = plan.section
    most = -(-len(members) // section.n_jobs) if section.n_jobs > 1 else len(members)
    size = max(1, min(section.together or most, most))
    for same in streams.values():
        # Parts of equal size, so that no process is left with a long last one.
        n_parts = -(-len(same) // size)
        for number in range(n_parts):
            yield tuple(same[len(same) * number // n_parts : len(same) * (number + 1) // n_parts])


def check_sweep(plan: Plan, resume: bool, overwrite: bool) -> None:
    """Reports what can be found before anything runs.

    Raises:
        UsageError: the sweep cannot begin.
    """
    out = plan.out
    for member in plan.members:
        try:
            if member.config.source is None:
                raise UsageError("the configuration has no source; add one")
            require_wandb(member.config)
            require_device(member.config.train.device, "train.device")
        except UsageError as error:
            raise UsageError(f"member {member.name}: {error}") from error
    if plan.section.ray:
        require("ray", "ray", "sweep.ray", "use sweep.n_jobs")
    require_out(out, "sweep", SWEEP, resume, overwrite, {CONFIG: "single run"})
    gone = [name for name in _names_before(out) if name not in {member.name for member in plan.members}]
    if gone and resume:
        raise UsageError(f"{out} has members that this sweep does not have, such as {gone[0]}; give another --out")
    for member in plan.members:
        _check_member(plan, member, resume, overwrite)


def _check_member(plan: Plan, member: Member, resume: bool, overwrite: bool) -> None:
    """Its directory, and what computes its steps, as `sae.train` checks them."""
    check_out(member.config.out, resume, overwrite)
    if resume and (member.config.out / CONFIG).exists():
        require_same_run(member.config)
    if _ended_before(plan, member, resume) is None:
        try:
            as_it_begins(member.config, resume)
            if not (resume and (member.config.out / CONFIG).exists()):
                require_start(member.config)
        except UsageError as error:
            raise UsageError(f"member {member.name}: {error}") from error


def _names_before(out: Path) -> list[str]:
    """Of the members of an earlier sweep in this directory."""
    if not (out / SWEEP).is_file():
        return []
    try:
        return [str(row["name"]) for row in json.loads((out / SWEEP).read_text(encoding="utf-8"))["members"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{out / SWEEP} is not a list of a sweep's members; delete it to continue with --resume"
        ) from error


def _ended_before(plan: Plan, member: Member, resume: bool) -> Ended | None:
    """How a member ended in an earlier attempt, if it needs no further step."""
    out = member.config.out
    if not resume:
        return None
    if (out / RESULT).exists():
        return Ended(member.name, "done")
    if not (out / STATUS).exists():
        return None
    before = json.loads((out / STATUS).read_text(encoding="utf-8"))
    if before["status"] == "stopped" and verdict(read_lines(out), member.config, plan.section) is None:
        return None  # by rules that have been changed since
    return Ended(member.name, before["status"], before["reason"])


def _claim(plan: Plan, resume: bool) -> None:
    """Makes `plan.out` this sweep's directory; what an earlier one left is deleted unless it is to be resumed."""
    if resume:
        return
    names = {*_names_before(plan.out), *(member.name for member in plan.members)}
    folders = [plan.out / name for name in sorted(names) if (plan.out / name).is_dir()]
    with ExitStack() as stack:
        for folder in folders:  # all, before anything is deleted
            stack.enter_context(held(folder))
        try:
            for folder in folders:
                discard(folder)
                if [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                    folder.rmdir()
            (plan.out / REPORT).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(plan.out, error) from error


def _row(member: Member, end: Ended | None) -> dict[str, Any]:
    """How a member stands: its final metrics when it is done, else the last line of its log."""
    status, reason = (end.status, end.reason) if end else (UNFINISHED, "")
    if status == "done":
        metrics = json.loads((member.config.out / RESULT).read_text(encoding="utf-8"))
    else:
        metrics = next(iter(read_lines(member.config.out)[-1:]), {})
    return {"name": member.name, "values": member.values, "status": status, "reason": reason, "metrics": metrics}


def _write(plan: Plan, table: dict[str, dict[str, Any]]) -> None:
    """The table of members as it stands, into sweep.json."""
    words = {"name": plan.out.name, "varies": plan.varies, "members": list(table.values())}
    write_text(plan.out / SWEEP, json.dumps(words, indent=1) + "\n")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses what each of many runs would log about itself, except warnings."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
