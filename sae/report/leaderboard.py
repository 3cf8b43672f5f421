"""What the page of a leaderboard says: who is first, of whom that cannot be said, and how all were measured."""

from __future__ import annotations

from math import isfinite
from typing import Any

from sae.report import leaderboard_figures as figures
from sae.report.html import plot
from sae.report.keys import SHAPES
from sae.report.leaderboard_figures import FAMILIES, name_of
from sae.report.standings import SCALES, Leaderboard, Standing
from sae.report.tables import join_words, number, seed_table
from sae.scores import F1, FVU, MCC, PURITY, SECONDS, Score
from toymodels.pages import Html, folded, grid, join, section, table, tag

# Of the figures: where an error is 0, as PCA's, it would stand very far from all others.
DECADES_OF_ERROR, DECADES_OF_SECONDS = 2.3, 1.2


def leaderboard_contents(board: Leaderboard) -> Html:
    """Every section of the page."""
    return join([_headline(board), _standings(board), _table(board), _trades(board), _conditions(board)])


def _headline(board: Leaderboard) -> Html:
    about, world = board.about, board.about["world"]
    said = (
        f"{world['n_features']:,} true features in {world['d_in']:,} dimensions, {_fires(board)} Every SAE has "
        f"{about['d_sae']:,} latents, of which {about['l0']:g} are to fire, and saw the same {about['n_samples']:,} "
        f"samples; {_seeds(board)}"
    )
    verdict: list[object] = []
    if board.ranked:
        first = board.ranked[0]
        chance = first.scores.get(f"{MCC}_chance")
        verdict += [tag("strong", f"{name_of(first)} is first"), f": MCC {_said(first, MCC)}"]
        verdict += [f", where chance is {chance.mean:.3f}." if chance else "."]
        level = [name_of(each) for each in board.ranked[1:] if each.level]
        apart = first.scores[MCC].n > 1
        if level:
            verdict.append(f" The seeds do not tell it apart from {join_words(level)}.")
        elif apart and len(board.ranked) > 1:
            verdict.append(" Its interval overlaps that of no other.")
        best = max(
            (each for each in board.ranked if F1 in each.scores), key=lambda each: each.scores[F1].mean, default=None
        )
        if best is not None and best is not first:
            verdict.append(f" The highest F1 is that of {name_of(best)}: {_said(best, F1)}.")
    if board.doubt:
        verdict.append(f" {board.doubt}")
    heading = tag("h1", board.title)
    return tag(
        "header", heading, tag("p", said, class_="reading"), tag("p", *verdict, class_="verdict"), _missing(board)
    )


def _fires(board: Leaderboard) -> str:
    truth = board.about["world"]["l0_truth"]
    return "of which it is not known when they fire." if truth is None else f"of which {truth:g} fire at a time."


def _seeds(board: Leaderboard) -> str:
    n = board.n_seeds
    return "there is one seed, and no interval." if n == 1 else f"seeds of initial weights: {n}."


def _standings(board: Leaderboard) -> Html:
    scores = [score for score in board.columns if score.key in (MCC, F1, PURITY)]
    reading = "Higher is better. Large marks are means"
    reading += (
        ", with 95 % intervals over seeds; faint marks are single seeds." if board.n_seeds > 1 else " of one seed."
    )
    reading += " A short stroke is what random directions would score."
    figure = figures.rows_of_dots(board.standings, scores)
    names = join_words([score.name for score in scores])
    words = {score.key: score.meaning for score in scores}
    note = "; ".join(f"{score.name}: {words[score.key]}" for score in scores) + "."
    if board.ranked and isfinite(board.ranked[0].scores[MCC].half):
        note += " The band is the first one's interval: methods whose own reaches into it are not told apart from it."
    picture = plot(figure, f"{names}, a row a method", f"{names} of every method", shape="rows")
    return section("Who found the features", reading, _key(board), picture, tag("p", note, class_="note"))


def _table(board: Leaderboard) -> Html:
    columns, best = board.columns, board.ranked[0] if board.ranked else None
    header: list[object] = ["", "rank"]
    for score in columns:
        header += [score.name, "by chance"] if score.key == MCC else [score.name]
    rows: list[list[object]] = []
    for each in board.standings:
        name = [_mark(each.family), name_of(each)]
        cells: list[object] = [tag("span", *name, id=f"member-{each.method}", title=each.options), _rank(each, best)]
        for score in columns:
            cells.append(_cell(each, score))
            if score.key == MCC:
                chance = each.scores.get(f"{MCC}_chance")
                cells.append(number(chance.mean if chance else None, score.form))
        rows.append(cells)
    reading = "Ranked by MCC, and by F1 where that is the same to three digits. "
    if board.n_seeds > 1:
        reading += "Mean over seeds ± half of the 95 % interval (Student's t). = marks those whose interval of the MCC "
        reading += "overlaps the first one's. "
    reading += "Methods that know the features have no rank."
    meanings = tag(
        "ul", *(tag("li", tag("strong", score.name), f": {score.meaning}") for score in columns), class_="reasons"
    )
    boxes = [
        folded(f"Every metric over the {len(each.rows)} seeds of {name_of(each)}", seed_table(each.rows, name_of(each)))
        for each in board.standings
        if len(each.rows) > 1
    ]
    inner = tag("div", *boxes)
    return section(
        "Standings",
        reading,
        tag("div", table(header, rows, "Standings"), class_="standings"),
        folded("What the columns are", meanings),
        folded("Every metric", inner),
    )


def _trades(board: Leaderboard) -> Html:
    by_key = {score.key: score for score in board.columns}
    pictures = []
    if F1 in by_key and FVU in by_key:
        error = figures.trade(board.standings, by_key[FVU], by_key[F1], DECADES_OF_ERROR)
        pictures.append(plot(error, "F1 against FVU: up and to the left is better", "F1 against FVU", shape="trade"))
    if board.ranked:
        cost = by_key[SECONDS]._replace(name="seconds on one core")
        seconds = figures.trade(board.ranked, cost, by_key[MCC], DECADES_OF_SECONDS)
        title = "MCC against time: up and to the left is better"
        pictures.append(plot(seconds, title, "MCC against time", shape="trade"))
    reading = "A low error does not say that the features were found; nor does a long time."
    note = "Errors and times that are smaller than an axis shows stand at its left end."
    return section("What it costs", reading, _key(board), grid(*pictures, columns=2), tag("p", note, class_="note"))


def _conditions(board: Leaderboard) -> Html:
    about = board.about
    hardware, versions = about["hardware"], about["versions"]
    on = hardware["gpu"] or f"{hardware['cpu']}, {hardware['cores']} cores"
    facts: list[tuple[str, Any]] = [
        ("command", join(tag("div", tag("code", line)) for line in about["command"].splitlines())),
        ("date", about["date"]),
        ("hardware", on),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)),
        ("measured on", f"{about['n_evaluation']:,} held-out samples"),
    ]
    rows = [[name, tag("span", value, class_="meaning words")] for name, value in facts]
    equal = (
        "Equal for all SAEs: the world, its samples and their order, the number of latents, and how many are asked to "
        "fire for a sample, on average (the column L0 says how many do). "
        "Baselines have as many latents (PCA and ICA a pair of opposite sign for each component, "
        f"K-SVD for each atom); those that choose a number for each sample take {about['k']}. Not equal: learning "
        "rates, of which each kind has its own; the way a kind comes to its L0; and what baselines are fitted on, "
        "which is 20,000 samples. Seconds are those of training steps or of the fit, on one core, without the drawing "
        "of samples; SAEs were timed in turns."
    )
    recipe = folded("The recipe: every entry and its options", tag("pre", board.recipe))
    return section("How it was measured", equal, table(["", ""], rows, "Conditions"), recipe)


def _missing(board: Leaderboard) -> Html:
    """SAEs and baselines that have no row, and why."""
    entries = [
        tag(
            "li",
            tag("strong", f"{row['method']}, seed {row['seed']}"),
            f" is {row['status']}{': ' * bool(row['reason'])}{row['reason']}",
        )
        for row in board.about["missing"]
    ]
    return tag("ul", *entries, class_="reasons") if entries else Html("")


def _key(board: Leaderboard) -> Html:
    """The families, by colour and shape."""
    present = {each.family for each in board.standings}
    items = [tag("li", _mark(family), FAMILIES[family][0]) for family in FAMILIES if family in present]
    return tag("ul", *items, class_="key")


def _mark(family: str) -> Html:
    _, colour, marker = FAMILIES[family]
    path = tag("path", d=SHAPES[marker], style=f"fill:{colour}")
    return tag("svg", path, viewBox="0 0 10 10", class_="dot", aria_hidden="true")


def _rank(standing: Standing, first: Standing | None) -> Html | str:
    if standing.rank is None:
        return "–"
    return (
        f"{standing.rank} ="
        if standing.level and standing is not first
        else tag("strong", standing.rank)
        if standing is first
        else f"{standing.rank}"
    )


def _cell(standing: Standing, score: Score) -> Html:
    found = standing.scores.get(score.key)
    if found is None:
        return Html("–")
    scale = SCALES.get(score.key, 1.0)
    return number(scale * found.mean, score.form, scale * found.half if isfinite(found.half) else None)


def _said(standing: Standing, key: str) -> str:
    found = standing.scores[key]
    return f"{found.mean:.3f}" + (f" ± {found.half:.3f}" if isfinite(found.half) else "")
