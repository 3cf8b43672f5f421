"""A leaderboard from its recipe to its rows: a sweep of SAEs, their speed, and the baselines."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.bench.machine import machine
from sae.config import parse_config
from sae.config_text import read_yaml
from sae.directory import require_out, require_same
from sae.errors import Interrupted, UsageError
from sae.extras import require
from sae.kernels import resolve_device
from sae.leaderboard.baselines import Fit, fit_all, fits
from sae.leaderboard.recipe import Definite, Entry, Recipe, definite
from sae.leaderboard.speed import samples_per_second
from sae.locks import cannot_write, held
from sae.names import CONFIG, LEADERBOARD, RECIPE, REPORT, SWEEP
from sae.run import write_report_if_installed
from sae.sources import SharedSource
from sae.stopping import Stop, stop_requested
from sae.sweep.plan import Member, Plan, SweepSection
from sae.sweep.run import OnEvent, check_sweep, quiet, run_sweep
from toymodels.files import write_text

logger = logging.getLogger("sae")

SAES = "saes"
# What decides a row beside its entry: where one of these differs, rows are of two leaderboards.
SHARED = ("source", "d_sae", "l0", "train", "evaluation")
SPEED, SECONDS = "details/samples_per_second", "seconds"
# As many steps from one checkpoint to the next, at most.
CHECKPOINT_STEPS = 1000
SCIKIT = {"ica", "dictionary_learning"}
STOPPED = "stopped; continue with --resume"

Row = dict[str, Any]
WatchSweep = Callable[[Plan], AbstractContextManager[OnEvent]]
"""Receives a sweep's lines and ends, for as long as it lasts."""
WatchStage = Callable[[str, int], AbstractContextManager[Callable[[], object]]]
"""Of a stage beside training, by its name and the number of its parts: what is called after each part."""


@dataclass(frozen=True)
class Outcome:
    """How a leaderboard ended."""

    out: Path
    rows: list[Row]
    missing: list[Row]
    """SAEs and baselines without a row of metrics: `method`, `seed`, `status` and `reason`."""
    report: Path | None
    signal_number: int = 0
    """The number of the signal that stopped it, or 0."""


def run_leaderboard(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch_sweep: WatchSweep = lambda plan: nullcontext(lambda message: None),
    watch_stage: WatchStage = lambda stage, n: nullcontext(lambda: None),
) -> Outcome:
    """Trains, times, fits and measures all of a recipe into `out`: leaderboard.json, report.html, and the SAEs.

    With `resume` what ended is left as it is, and a recipe may have more entries, baselines or seeds than before.
    `watch_sweep` and `watch_stage` give callbacks that report progress.

    Raises:
        UsageError: it cannot begin; nothing was trained or written.
    """
    require_out(out, "leaderboard", RECIPE, resume, overwrite, {CONFIG: "run", SWEEP: "sweep"})
    for name in sorted(SCIKIT & set(recipe.baselines)):
        require("sklearn", "baselines", name)
    board = definite(recipe)
    if resume and (out / RECIPE).is_file():
        _require_same(board, out)
    elif resume:
        logger.warning("nothing to resume in %s: starting the leaderboard", out)
    plan = sweep_of(board, out)
    if plan.members:
        check_sweep(plan, resume, overwrite)
    with held(out):
        try:
            if not resume:
                _discard(out)
            write_text(out / RECIPE, board.recipe.to_yaml())
        except OSError as error:
            raise cannot_write(out, error) from error
        return _run(Table(board, plan, out, _rows_before(out)), resume, overwrite, watch_sweep, watch_stage)


class Table:
    """What is written into leaderboard.json: the rows so far, and the methods without one."""

    def __init__(self, board: Definite, plan: Plan, out: Path, before: Mapping[tuple[str, int], Row]) -> None:
        self.board, self.plan, self.out = board, plan, out
        pairs = itertools.product(board.entries, range(board.recipe.seeds))
        self.entries = dict(zip((member.name for member in plan.members), pairs, strict=True))
        self.fits = fits(board)
        self.ends: dict[str, Row] = {member.name: {"status": "unfinished", "reason": ""} for member in plan.members}
        self.speed = {
            name: before[entry.name, seed][SPEED]
            for name, (entry, seed) in self.entries.items()
            if SPEED in before.get((entry.name, seed), {})
        }
        self.fitted: dict[Fit, Row] = {fit: before[fit] for fit in self.fits if fit in before}
        self.reasons: dict[Fit, str] = {}
        self.earlier = _commands_before(out)

    @property
    def rows(self) -> list[Row]:
        """Flat: one row per SAE or baseline and seed, in the order of the recipe."""
        found = []
        for member in self.plan.members:
            entry, seed = self.entries[member.name]
            if self.ends[member.name]["status"] != "done":
                continue
            row = {"method": entry.name, "seed": seed, "family": "sae"}
            row |= {f"sae.{key}": value for key, value in options_of(entry).items()} | self.ends[member.name]["metrics"]
            if member.name in self.speed:
                speed, n = self.speed[member.name], member.config.n_steps * member.config.train.batch_size
                row |= {SPEED: speed, SECONDS: n / speed}
            found.append(row)
        return found + [self.fitted[fit] for fit in self.fits if fit in self.fitted]

    @property
    def missing(self) -> list[Row]:
        """Those without metrics, and why."""
        found = []
        for name, (entry, seed) in self.entries.items():
            status, reason = self.ends[name]["status"], self.ends[name]["reason"]
            if status != "done":
                found.append({"method": entry.name, "seed": seed, "status": status, "reason": reason})
        for fit in self.fits:
            if fit not in self.fitted:
                reason = self.reasons.get(fit, "")
                status = "failed" if fit in self.reasons else "unfinished"
                found.append({"method": fit.name, "seed": fit.seed, "status": status, "reason": reason})
        return found

    def commands(self, now: str) -> str:
        """This one, behind those of earlier attempts, one on each line."""
        return "\n".join(dict.fromkeys([*self.earlier, now]))

    def write(self) -> None:
        """As it stands."""
        recipe, source = self.board.recipe, self.board.source
        assert source.truth is not None
        about = machine(resolve_device(recipe.train.device))
        words = {
            "world": {
                "name": world_name(recipe),
                "source": recipe.model_dump(mode="json")["source"],
                "n_features": len(source.truth),
                "d_in": source.d_in,
                "l0_truth": self.board.l0_truth,
            },
            "d_sae": recipe.d_sae,
            "l0": recipe.l0,
            "k": self.board.k,
            "seeds": list(range(recipe.seeds)),
            "n_samples": recipe.train.n_samples,
            "n_evaluation": recipe.evaluation.n_samples,
            "command": self.commands(str(about.pop("command"))),
            "date": about.pop("date"),
            "versions": about.pop("versions"),
            "hardware": about,
            "rows": self.rows,
            "missing": self.missing,
        }
        write_text(self.out / LEADERBOARD, json.dumps(words, indent=1) + "\n")


def _run(table: Table, resume: bool, overwrite: bool, watch_sweep: WatchSweep, watch_stage: WatchStage) -> Outcome:
    plan, source, signal_number = table.plan, SharedSource(table.board.source), 0
    with stop_requested() as stop:
        try:
            if plan.members:
                with watch_sweep(plan) as on_event:
                    swept = run_sweep(
                        plan,
                        resume=resume,
                        overwrite=overwrite,
                        on_event=on_event,
                        open_source=lambda member: source,
                    )
                table.ends = {row["name"]: row for row in swept.rows}
                table.write()
                if swept.signal_number:
                    raise Interrupted(STOPPED, swept.signal_number)
                _time(table, source, stop, watch_stage)
            _fit(table, stop, watch_stage)
        except Interrupted as stopped:
            signal_number = stopped.signal_number
    table.write()
    page = write_report_if_installed(table.out) if table.rows else None
    return Outcome(table.out, table.rows, table.missing, page, signal_number)


def _time(table: Table, source: SharedSource, stop: Stop, watch_stage: WatchStage) -> None:
    """The speed of all SAEs, or of none where each has one: those that are compared take turns."""
    done = [member for member in table.plan.members if table.ends[member.name]["status"] == "done"]
    if all(member.name in table.speed for member in done):
        return
    by_seed: dict[int, list[Member]] = {}
    for member in done:
        by_seed.setdefault(member.config.train.seed, []).append(member)
    with watch_stage("speed, one core", len(by_seed)) as one_more, quiet():
        for members in by_seed.values():
            if stop():
                raise Interrupted(STOPPED, stop())
            table.speed |= samples_per_second(members, source)
            one_more()
    table.write()


def _fit(table: Table, stop: Stop, watch_stage: WatchStage) -> None:
    """The baselines that have no row yet."""
    left = [fit for fit in table.fits if fit not in table.fitted]
    if not left:
        return
    with watch_stage("baselines", len(left)) as one_more:
        for fit, row, reason in fit_all(table.board, left, stop):
            if reason:
                logger.warning("%s, seed %d: %s", fit.name, fit.seed, reason)
                table.reasons[fit] = reason
            else:
                family = "oracle" if fit.name.startswith("oracle") else "baseline"
                table.fitted[fit] = {"method": fit.name, "seed": fit.seed, "family": family} | row
            table.write()
            one_more()


def sweep_of(board: Definite, out: Path) -> Plan:
    """The SAEs as a sweep in `out/saes`: every entry with every seed, on one stream."""
    recipe, folder = board.recipe, out / SAES
    shared = recipe.model_dump(mode="json", include={"source", "train", "evaluation", "log"})
    n_steps = -(-recipe.train.n_samples // recipe.train.batch_size)
    if board.entries and n_steps < 2:
        raise UsageError(
            f"train.n_samples={recipe.train.n_samples} is a single batch of {recipe.train.batch_size}, too few to "
            "measure a speed; raise it"
        )
    # Parts of equal size, the last step saved in any case: a member is timed from there.
    every = -(-n_steps // max(2, -(-n_steps // CHECKPOINT_STEPS)))
    shared |= {"checkpoint": {"every_steps": every, "keep": 1}}
    shared["log"] = {**shared["log"], "group": shared["log"]["group"] or out.name}
    members = []
    for entry in board.entries:
        for seed in range(recipe.seeds):
            name = f"{entry.name}-seed{seed}"
            sae = entry.sae.model_dump(mode="json")
            sections = {**shared, "sae": sae, "train": {**shared["train"], "seed": seed}, "out": str(folder / name)}
            values = {f"sae.{key}": value for key, value in options_of(entry).items()} | {"train.seed": seed}
            members.append(Member(name, values, parse_config(sections, where=f"entry {entry.name}")))
    varies = list(dict.fromkeys(key for member in members for key in member.values))
    section = SweepSection(grid={"train.seed": list(range(recipe.seeds))})
    return Plan(folder, section, tuple(varies), tuple(members))


def options_of(entry: Entry) -> dict[str, Any]:
    """The kind, and what the recipe says beside it."""
    own = entry.sae.model_dump(mode="json", exclude_unset=True, exclude={"d_sae"})
    return {"kind": entry.sae.kind, **own}


def world_name(recipe: Recipe) -> str:
    """What a reader calls it."""
    source = recipe.source
    path, experiment = getattr(source, "path", None), getattr(source, "experiment", None)
    return experiment or (source.kind if path is None else Path(path).stem)


def _discard(out: Path) -> None:
    """Deletes what an earlier leaderboard wrote beside its SAEs; the sweep deletes those."""
    for name in (LEADERBOARD, REPORT, RECIPE):
        (out / name).unlink(missing_ok=True)


def _require_same(board: Definite, out: Path) -> None:
    """Refuses rows that would not be comparable with the existing ones."""
    saved, ours = read_yaml(out / RECIPE), board.recipe.model_dump(mode="json")
    require_same(out, {key: saved.get(key) for key in SHARED}, {key: ours[key] for key in SHARED})


def _commands_before(out: Path) -> list[str]:
    """Of earlier attempts."""
    if not (out / LEADERBOARD).is_file():
        return []
    return str(json.loads((out / LEADERBOARD).read_text(encoding="utf-8"))["command"]).splitlines()


def _rows_before(out: Path) -> dict[tuple[str, int], Row]:
    """Of an earlier attempt."""
    if not (out / LEADERBOARD).is_file():
        return {}
    try:
        rows = json.loads((out / LEADERBOARD).read_text(encoding="utf-8"))["rows"]
        return {(row["method"], row["seed"]): row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{out / LEADERBOARD} is damaged; delete it to continue with --resume") from error
