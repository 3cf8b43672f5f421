"""What the page of a sweep says: what sparsity costs each kind, and how every member ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from safetensors import safe_open

from sae.config_text import read_yaml
from sae.errors import UsageError
from sae.names import CONFIG, LINES, RESULT, SWEEP, TABLES
from sae.report import keys, pareto
from sae.report.data import SEEDS
from sae.report.html import plot
from sae.report.pareto import Point, groups
from sae.report.tables import comparison_table, join_words, method_name, number, seed_table
from sae.scores import CE, DEAD, F1, FVU, KL, L0, MCC, scores
from toymodels.pages import Html, folded, grid, join, section, table, tag

COLUMNS = scores(L0, FVU, CE, KL, MCC, F1, DEAD)
_FREQUENCY = "feature/frequency"


@dataclass(frozen=True, eq=False)
class Member:
    """A row of the table."""

    values: dict[str, Any]
    status: str
    reason: str
    config: dict[str, Any]
    point: Point

    @property
    def name(self) -> str:
        return self.point.name


@dataclass(frozen=True, eq=False)
class SweepPage:
    """All that the page is drawn from."""

    name: str
    varies: list[str]
    members: list[Member]
    truth_l0: float | None
    """How many true features fire at a time, when known."""

    @property
    def title(self) -> str:
        name = "Sweep" if self.name.lower() == "sweep" else f"Sweep {self.name}"
        return f"{name}: {len(self.members):,} dictionaries"

    @property
    def points(self) -> list[Point]:
        return [member.point for member in self.members]

    @property
    def done(self) -> list[Member]:
        return [member for member in self.members if member.point.done]

    @property
    def n_sources(self) -> int:
        """Kinds of activations that members look at."""
        return len({member.point.source for member in self.members})

    @property
    def knows_truth(self) -> bool:
        return any(MCC in member.point.result for member in self.done)


def read_sweep(path: Path) -> SweepPage:
    """Reads sweep.json and what its members have written so far.

    Raises:
        UsageError: it is damaged, or no member has begun.
    """
    try:
        summary = json.loads((path / SWEEP).read_text(encoding="utf-8"))
        rows = [row for row in summary["members"] if (path / row["name"] / CONFIG).is_file()]
        members = [_read_member(path / row["name"], row, summary["varies"]) for row in rows]
        name = summary["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path / SWEEP} cannot be read ({error}); run the sweep again with --resume") from error
    if not members:
        raise UsageError(f"{path}: no member of this sweep has begun; run it with --resume")
    return SweepPage(name, summary["varies"], members, _truth_l0(path, members))


def _read_member(folder: Path, row: dict[str, Any], varies: Sequence[str]) -> Member:
    config = read_yaml(folder / CONFIG)
    values = row["values"]
    done = row["status"] == "done" and (folder / RESULT).is_file()
    lines = (folder / LINES).read_text(encoding="utf-8").splitlines(keepends=True) if (folder / LINES).is_file() else []
    without_seed = _without_seed(values)
    own_options = [key for key in without_seed if key.startswith("sae.") and key not in ("sae.kind", "sae.d_sae")]
    on = {key: value for key, value in values.items() if key.startswith("source.")}
    kind = f"{method_name(config['sae']['kind'])}, {config['sae']['d_sae']:,} latents"
    kind += f", refine {config['sae']['refine']:g}" if config["sae"].get("refine") else ""
    point = Point(
        name=row["name"],
        group=", ".join([kind, *(_value(value) for value in on.values())]),
        source=json.dumps(on, sort_keys=True),
        line=json.dumps({key: value for key, value in without_seed.items() if key not in own_options}, sort_keys=True),
        setting=json.dumps(without_seed, sort_keys=True),
        done=done,
        result=json.loads((folder / RESULT).read_text(encoding="utf-8")) if done else {},
        lines=[json.loads(line) for line in lines if line.endswith("\n")],
    )
    return Member(values, row["status"], row["reason"], config, point)


def _without_seed(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key.rpartition(".")[2] not in SEEDS}


def _truth_l0(path: Path, members: Sequence[Member]) -> float | None:
    """The sum of the true features' frequencies, where all members look at the same source."""
    done = [member for member in members if member.point.done]
    if not done or any(member.config["source"] != done[0].config["source"] for member in done):
        return None
    with safe_open(path / done[0].name / TABLES, "np") as tables:
        return float(tables.get_tensor(_FREQUENCY).sum()) if _FREQUENCY in set(tables.keys()) else None


def sweep_contents(sweep: SweepPage) -> Html:
    """Every section of the page."""
    parts = [_headline(sweep)]
    if sweep.done:
        parts.append(_trade_offs(sweep))
    parts += [_members(sweep), _training(sweep), _configuration(sweep)]
    return join(parts)


def _headline(sweep: SweepPage) -> Html:
    n, done = len(sweep.members), len(sweep.done)
    fields = join_words([f"{key} ({_range(sweep, key)})" for key in sweep.varies])
    first = f"Members differ in {fields}." if sweep.varies else "Nothing varies."
    ends = [status for status in ("stopped", "diverged", "failed", "interrupted", "unfinished") if _n(sweep, status)]
    others = join_words([f"{_n(sweep, status)} {status}" for status in ends])
    verdict: list[object] = [tag("strong", f"{done:,} of {n:,} members are done"), f", {others}." if others else "."]
    if sweep.knows_truth:
        settings = _settings(sweep)
        best = max(settings, key=lambda setting: setting.mean(MCC))
        verdict.append(
            f" The best recovery is that of {best.name}: MCC {best.over_seeds(MCC)}, at L0 {best.mean(L0):.2f}, where "
            f"a random dictionary scores {best.mean(f'{MCC}_chance'):.3f}."
        )
        lowest = min(settings, key=lambda setting: setting.mean(FVU))
        if lowest is not best:
            verdict.append(
                f" The lowest error is that of {lowest.name}: FVU {lowest.over_seeds(FVU)}, MCC {lowest.mean(MCC):.3f}."
            )
    heading = tag("h1", sweep.title)
    return tag("header", heading, tag("p", first, class_="reading"), tag("p", *verdict, class_="verdict"))


def _trade_offs(sweep: SweepPage) -> Html:
    reading = (
        "Each point is a member, and leads to its row below; lines join means over seeds. Fewer latents explain "
        "less, so dictionaries are compared at the same L0."
    )
    if any(len(setting.results) >= pareto.SEEDS_FOR_BARS for setting in _settings(sweep)):
        reading += f" Bars are 95 % intervals, from {pareto.SEEDS_FOR_BARS} seeds on."
    fvu = pareto.trade_off(sweep.points, FVU, "FVU", log=True, truth=sweep.truth_l0)
    pictures = [plot(fvu, "Error: FVU, lower is better", "FVU against L0")]
    note = (
        "Of the errors, down and to the left is better; no member lies below the broad grey stairs, the Pareto front."
    )
    if sweep.n_sources > 1:
        note += " Errors on different activations cannot be compared: each of them has stairs of its own."
    if sweep.knows_truth:
        chance = next(m.point.result.get(f"{MCC}_chance") for m in sweep.done if MCC in m.point.result)
        same = len({member.config["sae"]["d_sae"] for member in sweep.done}) == 1
        mcc = pareto.trade_off(
            sweep.points, MCC, "MCC", log=False, chance=chance if same else None, truth=sweep.truth_l0
        )
        pictures.append(plot(mcc, "Recovery of the truth: MCC, higher is better", "MCC against L0"))
    key, words = keys.dots(groups(sweep.points)), tag("p", note, class_="note")
    return section("What sparsity costs", reading, key, grid(*pictures, columns=len(pictures)), words)


def _members(sweep: SweepPage) -> Html:
    columns = [score for score in COLUMNS if any(score.key in member.point.result for member in sweep.done)]
    best: dict[tuple[str, str], float] = {}
    for key, pick in ((FVU, min), (CE, max), (KL, min), (MCC, max), (F1, max)):
        for member in sweep.done:
            there, measured = (member.point.source, key), member.point.result.get(key)
            if measured is not None:
                best[there] = pick(best.get(there, measured), measured)
    front = pareto.pareto(sweep.points, FVU)
    place_of = {group: at for at, group in enumerate(groups(sweep.points))}
    rows: list[list[object]] = []
    for member in sweep.members:
        result = member.point.result
        dot = keys.dot(place_of[member.point.group])
        cells: list[object] = [tag("span", dot, member.name, id=f"member-{member.name}")]
        cells += [_varying(_value(member.values.get(key))) for key in sweep.varies]
        for key, form in ((score.key, score.form) for score in columns):
            value, most = number(result.get(key), form), best.get((member.point.source, key))
            cells.append(tag("strong", value) if key in result and result[key] == most else value)
        status = tag("span", member.status, class_="status bad" if member.reason else "status")
        cells += ["front" if member.name in front else "", status]
        rows.append(cells)
    header = [
        "",
        *(_varying(key.partition(".")[2]) for key in sweep.varies),
        *(score.name for score in columns),
        "Pareto",
        "status",
    ]
    of = "a column" if sweep.n_sources == 1 else "a column on each of the activations"
    reading = f"Measured on held-out activations; the best of {of} is bold."
    if len(sweep.done) < len(sweep.members):
        reading += " Members that are not done have no final metrics."
    return section("Members", reading, _reasons(sweep), table(header, rows, "Members"), *_over_seeds(sweep))


class Setting(NamedTuple):
    """Finished members that differ in their seed alone."""

    name: str
    results: list[dict[str, float]]

    def mean(self, key: str) -> float:
        """Over the seeds; -inf where the metric is not known."""
        return fmean(result.get(key, -inf) for result in self.results)

    def over_seeds(self, key: str) -> str:
        """`0.982 ± 0.004 over 2 seeds`."""
        n, mean = len(self.results), f"{self.mean(key):.3f}"
        return mean if n == 1 else f"{mean} ± {stdev(result[key] for result in self.results):.3f} over {n} seeds"


def _settings(sweep: SweepPage) -> list[Setting]:
    groups: dict[str, list[Member]] = {}
    for member in sweep.done:
        groups.setdefault(member.point.setting, []).append(member)
    return [Setting(_values(own[0]), [member.point.result for member in own]) for own in groups.values()]


def _values(member: Member) -> str:
    """A setting by its values: `TopK, k = 4`."""
    values = {key: value for key, value in _without_seed(member.values).items() if key != "sae.kind"}
    words = [f"{key.rpartition('.')[2].replace('_', ' ')} = {_value(value)}" for key, value in values.items()]
    return ", ".join([method_name(member.config["sae"]["kind"]), *words])


def _over_seeds(sweep: SweepPage) -> list[Html]:
    """Means over seeds in a table, and every metric of each setting with its interval in a box."""
    settings = _settings(sweep)
    if all(len(own) == 1 for _, own in settings):
        return []
    boxes = [
        folded(f"Every metric over the {len(own)} seeds of {name}", seed_table(own, f"{name} over seeds"))
        for name, own in settings
        if len(own) > 1
    ]
    heading, words = tag("h3", "Settings over seeds"), tag("p", "Mean ± standard deviation.", class_="reading")
    return [heading, words, comparison_table(settings, "Settings over seeds"), *boxes]


def _training(sweep: SweepPage) -> Html:
    begun = [point for point in sweep.points if point.lines]
    reading = "One line a member, over the steps of training, in the colour and dash of its group."
    if len(sweep.done) < len(sweep.members):
        reading += " Those of members that are not done are thick."
    pictures = [
        plot(pareto.curves(begun, FVU, "FVU", log=True), "FVU", "FVU over training"),
        plot(pareto.curves(begun, L0, "L0", log=True), "L0: latents firing at a time", "L0 over training"),
    ]
    if any(MCC in line for point in begun for line in point.lines[-1:]):
        mcc = pareto.curves(begun, MCC, "MCC", log=False)
        pictures.append(plot(mcc, "MCC: recovery of the truth", "MCC over training"))
    return section("Training", reading, keys.lines(groups(sweep.points)), grid(*pictures, columns=len(pictures)))


def _configuration(sweep: SweepPage) -> Html:
    first = sweep.members[0]
    command = tag("code", "sae report DIRECTORY")
    reading = join(["Each member's own folder has its resolved config.yaml;", command, "draws it by itself."])
    words = json.dumps(first.config, indent=1, ensure_ascii=False)
    return section("Configuration", reading, folded(f"{first.name}, with all defaults", tag("pre", words)))


def _reasons(sweep: SweepPage) -> Html:
    """Why members ended before their last step."""
    entries = [
        tag("li", tag("strong", member.name), f" {member.status}: {member.reason}")
        for member in sweep.members
        if member.reason
    ]
    return tag("ul", *entries, class_="reasons") if entries else Html("")


def _varying(words: str) -> Html:
    """A cell that the member's name repeats: left out where there is little room."""
    return tag("span", words, class_="varying")


def _n(sweep: SweepPage, status: str) -> int:
    return sum(member.status == status for member in sweep.members)


def _range(sweep: SweepPage, key: str) -> str:
    values = list(dict.fromkeys(_value(m.values[key]) for m in sweep.members if key in m.values))
    return ", ".join(values) if len(values) <= 6 else f"{values[0]}, ..., {values[-1]}"


def _value(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case _:
            return str(value)
