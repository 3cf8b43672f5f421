"""The figures of a leaderboard: a row a method in several panels, and what scores cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from sae.report import drawing
from sae.report.html import Figure
from sae.report.standings import Standing
from sae.report.tables import method_name
from sae.scores import MCC, Score

# One colour and one marker a family: a reader who cannot tell the colours tells these.
FAMILIES = {
    "sae": ("SAE", "var(--series-0)", "circle"),
    "baseline": ("other method", "var(--series-1)", "square"),
    "oracle": ("knows the features", "var(--series-2)", "diamond"),
}
ROW_PIXELS, FRAME_PIXELS = 25, 64
# Between two panels, as a share of the width.
GAP = 0.025
# What a label takes of a small figure, in shares of its width (a letter) and of its height (a line); how far off it
# stands.
LETTER, LINE, OFF = 0.0125, 0.038, 0.016


class Place(NamedTuple):
    """Where a label could stand: what plotly calls it, its left end in letters, its middle in lines."""

    name: str
    anchor: float
    dx: float
    dy: float


PLACES = (
    Place("middle right", 0.0, 1.0, 0.0),
    Place("middle left", 1.0, -1.0, 0.0),
    Place("top center", 0.5, 0.0, 1.0),
    Place("bottom center", 0.5, 0.0, -1.0),
    Place("top right", 0.0, 0.5, 0.9),
    Place("bottom right", 0.0, 0.5, -0.9),
    Place("top left", 1.0, -0.5, 0.9),
    Place("bottom left", 1.0, -0.5, -0.9),
)


# Names that a label has room for, where those of other tables are long.
SHORT = {
    "random": "random",
    "data_points": "data points",
    "oracle": "oracle",
    "oracle_k": "oracle, k at most",
    "oracle_pursuit": "oracle, pursuit",
}


def name_of(standing: Standing) -> str:
    """What a reader calls a method."""
    return SHORT.get(standing.method, method_name(standing.method))


def rows_of_dots(standings: Sequence[Standing], scores: Sequence[Score]) -> Figure:
    """A row a method, a panel a score: each seed, the mean, and its 95 % interval. A short stroke in the panel of the
    MCC is chance, the band there the interval of the first."""
    order = list(reversed(range(len(standings))))
    names = [name_of(each) for each in standings]
    width = (1 - GAP * (len(scores) - 1)) / len(scores)
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "height": FRAME_PIXELS + ROW_PIXELS * len(standings),
        "margin": {"l": 8, "r": 12, "t": 8, "b": 40},
        "yaxis": drawing.axis(
            "",
            tickvals=order,
            ticktext=names,
            range=[-0.6, len(standings) - 0.4],
            automargin=True,
            showgrid=True,
            fixedrange=True,
            tickfont={"color": "var(--ink)"},
        ),
        "shapes": [],
    }
    for panel, score in enumerate(scores):
        number = "" if panel == 0 else str(panel + 1)
        left = panel * (width + GAP)
        own = [(y, each) for y, each in zip(order, standings, strict=True) if score.key in each.scores]
        layout[f"xaxis{number}"] = drawing.axis(
            score.name,
            domain=[left, left + width],
            range=[-0.03, 1.03],
            tickvals=[0, 0.25, 0.5, 0.75, 1],
            fixedrange=True,
        )
        layout[f"xaxis{number}"]["ticktext"] = ["0", "", ".5", "", "1"]
        if score.key == MCC:
            traces.append(_chance(own, number))
            first = standings[0].scores[MCC]
            if isfinite(first.half):
                band = {"type": "rect", "xref": f"x{number}", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
                band |= {"x0": first.low, "x1": first.high, "line": {"width": 0}, "fillcolor": "var(--rule)"}
                layout["shapes"].append(band)
        for family in FAMILIES:
            same = [(y, each) for y, each in own if each.family == family]
            if same:
                traces += [_seeds(same, score, number), _means(same, score, number)]
    return drawing.figure(traces, **layout)


def trade(standings: Sequence[Standing], across: Score, up: Score, decades: float) -> Figure:
    """Two scores against each other, a labelled point a method. The horizontal axis is logarithmic, so many decades
    from its largest value down; what lies below these stands at its left end."""
    shown = [each for each in standings if across.key in each.scores and up.key in each.scores]
    values = np.array([each.scores[across.key].mean for each in shown])
    x = values.clip(min=max(float(values.max()), 1e-9) / 10**decades)
    y = np.array([each.scores[up.key].mean for each in shown])
    frames = [_frame(np.log10(x), 0.07), _frame(y, 0.07)]
    labels = [name_of(each) for each in shown]
    at_x, at_y = ((at - low) / (high - low) for at, (low, high) in zip((np.log10(x), y), frames, strict=True))
    places = _placed(at_x, at_y, labels)
    ticks = [step * 10.0**power for power in range(-9, 7) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if frames[0][0] <= np.log10(tick) <= frames[0][1]]
    traces = []
    for family, (_, colour, marker) in FAMILIES.items():
        own = [i for i, each in enumerate(shown) if each.family == family]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": drawing.short(x[own]),
                "y": drawing.short(y[own]),
                "text": [labels[i] for i in own],
                "textposition": [places[i] for i in own],
                "textfont": {"size": 11, "color": "var(--ink)"},
                "marker": {"color": colour, "symbol": marker, "size": 9},
                "customdata": [shown[i].method for i in own],
                "hovertemplate": f"%{{text}}<br>{across.name} %{{x:.4g}}<br>{up.name} %{{y:.3f}}<extra></extra>",
                "cliponaxis": False,
            }
        )
    axis = {"type": "log", "range": frames[0], "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return drawing.figure(traces, xaxis=drawing.axis(across.name, **axis), yaxis=drawing.axis(up.name, range=frames[1]))


def _frame(values: np.ndarray, margin: float) -> list[float]:
    """From the least to the largest, and a share of that more on both sides."""
    low, high = float(values.min()), float(values.max())
    more = margin * (high - low) or margin
    return [low - more, high + more]


def _seeds(own: Sequence[tuple[int, Standing]], score: Score, number: str) -> dict[str, Any]:
    """A faint dot a seed."""
    dots = [(row[score.key], y) for y, each in own if len(each.rows) > 1 for row in each.rows if score.key in row]
    colour, marker = FAMILIES[own[0][1].family][1:]
    return {
        "type": "scatter",
        "mode": "markers",
        "xaxis": f"x{number}",
        "x": drawing.short(np.array([x for x, _ in dots])),
        "y": [y for _, y in dots],
        "marker": {"color": colour, "symbol": marker, "size": 5, "opacity": 0.35},
        "hoverinfo": "skip",
    }


def _means(own: Sequence[tuple[int, Standing]], score: Score, number: str) -> dict[str, Any]:
    """The mean, with its interval where there are several seeds."""
    colour, marker = FAMILIES[own[0][1].family][1:]
    found = [each.scores[score.key] for _, each in own]
    halves = [each.half if isfinite(each.half) else 0.0 for each in found]
    return {
        "type": "scatter",
        "mode": "markers",
        "xaxis": f"x{number}",
        "x": drawing.short(np.array([each.mean for each in found])),
        "y": [y for y, _ in own],
        "error_x": {
            "type": "data",
            "array": drawing.short(np.array(halves)),
            "color": colour,
            "thickness": 1.6,
            "width": 4,
        },
        "marker": {"color": colour, "symbol": marker, "size": 9},
        "text": [f"{name_of(each)}<br>{score.name} {_said(each, score)}" for _, each in own],
        "customdata": [each.method for _, each in own],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _said(standing: Standing, score: Score) -> str:
    found = standing.scores[score.key]
    return f"{found.mean:{score.form}}" + (f" ± {found.half:{score.form}}" if isfinite(found.half) else "")


def _chance(own: Sequence[tuple[int, Standing]], number: str) -> dict[str, Any]:
    """What random dictionaries with as many alive latents score."""
    places = [(each.scores[f"{MCC}_chance"].mean, y) for y, each in own if f"{MCC}_chance" in each.scores]
    return {
        "type": "scatter",
        "mode": "markers",
        "xaxis": f"x{number}",
        "x": drawing.short(np.array([x for x, _ in places])),
        "y": [y for _, y in places],
        "marker": {
            "symbol": "line-ns",
            "size": 11,
            "color": "var(--muted)",
            "line": {"width": 1.5, "color": "var(--muted)"},
        },
        "hovertemplate": "chance %{x:.3f}<extra></extra>",
    }


def _placed(x: np.ndarray, y: np.ndarray, labels: Sequence[str]) -> list[str]:
    """For each point of the unit square the side on which its label covers least: other labels, points, the frame."""
    boxes: list[tuple[float, float, float, float]] = []
    points = [(a - OFF, b - OFF, a + OFF, b + OFF) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    chosen: dict[int, str] = {}
    for i in np.argsort(-y, kind="stable").tolist():
        tried = []
        for preference, place in enumerate(PLACES):
            width = LETTER * len(labels[i])
            left = x[i] + place.dx * OFF - place.anchor * width
            middle = y[i] + place.dy * (OFF + LINE / 2)
            box = (float(left), float(middle - LINE / 2), float(left + width), float(middle + LINE / 2))
            others = [*boxes, *(point for j, point in enumerate(points) if j != i)]
            outside = max(0.0, -box[0]) + max(0.0, box[2] - 1)
            tried.append((sum(_overlap(box, other) for other in others) + outside * LINE, preference, place.name, box))
        _, _, chosen[i], box = min(tried)
        boxes.append(box)
    return [chosen[i] for i in range(len(labels))]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
