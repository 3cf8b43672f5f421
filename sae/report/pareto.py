"""The figures of a sweep: what sparsity costs, a point a member, and how members came to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import numpy as np

from sae.metrics.seeds import interval
from sae.report import drawing
from sae.report.html import Figure
from sae.scores import L0

# Points of all curves of a figure together.
MAX_CURVE_POINTS = 20_000
# Of two seeds a 95 % interval is nine standard deviations to either side: it would hide the rest.
SEEDS_FOR_BARS = 3


@dataclass(frozen=True, eq=False)
class Point:
    """What the figures need of a member: `line` is the same for members that differ in sparsity and seed alone,
    `setting` for those that differ in their seed alone."""

    name: str
    group: str
    line: str
    setting: str
    done: bool
    result: dict[str, float]
    lines: list[dict[str, Any]]
    source: str = ""
    """The same for members on the same activations: errors on others are others."""


def groups(points: Sequence[Point]) -> list[str]:
    """In order of appearance: the place decides colour and shape."""
    return list(dict.fromkeys(point.group for point in points))


def pareto(points: Sequence[Point], key: str) -> set[str]:
    """Names of the members that no other on the same activations beats in both L0 and this (lower is better for both).
    An L0 counts to six digits: what a mean of whole numbers leaves behind them decides nothing."""
    placed = [(float(f"{p.result[L0]:.6g}"), p.result[key], p.source, p.name) for p in points if p.done]
    return {
        name
        for l0, value, source, name in placed
        if not any(s == source and (a <= l0 and b <= value) and (a < l0 or b < value) for a, b, s, _ in placed)
    }


def trade_off(
    points: Sequence[Point], key: str, name: str, log: bool, chance: float | None = None, truth: float | None = None
) -> Figure:
    """L0 against a score. Lines join the means over seeds; `truth` is how many true features fire at a time."""
    done = [point for point in points if point.done and isfinite(point.result.get(key, nan))]
    traces: list[dict[str, Any]] = []
    for place, group in enumerate(groups(points)):
        own = [point for point in done if point.group == group]
        colour, dash = drawing.series(place)
        for line in dict.fromkeys(point.line for point in own):
            traces.append(_means([point for point in own if point.line == line], key, colour, dash))
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": group,
                "x": drawing.short(np.array([point.result[L0] for point in own])),
                "y": drawing.short(np.array([point.result[key] for point in own])),
                "marker": {"color": colour, "symbol": drawing.symbol(place), "size": 9, "opacity": 0.8},
                "customdata": [point.name for point in own],
                "hovertemplate": f"%{{customdata}}<br>L0 %{{x:.2f}}<br>{name} %{{y:.4f}}<extra></extra>",
            }
        )
    best = pareto(done, key) if log else set()
    for source in dict.fromkeys(point.source for point in done) if best else ():
        traces.insert(0, _front([point for point in done if point.name in best and point.source == source], key))
    across = drawing.positive_axis([{"y": [point.result[L0] for point in done]}, {"y": [truth or 0.0]}])
    y = drawing.positive_axis([{"y": [point.result[key] for point in done]}]) if log else {"range": [-0.03, 1.04]}
    layout: dict[str, Any] = {
        "xaxis": drawing.axis("L0: latents firing at a time", **across),
        "yaxis": drawing.axis(name, **y),
        "shapes": [] if chance is None else [drawing.level(chance)],
        "annotations": [] if chance is None else [drawing.note("chance", chance)],
    }
    if truth is not None and truth > 0:
        layout["shapes"].append(
            {**drawing.level(0.0), "xref": "x", "yref": "paper", "x0": truth, "x1": truth, "y0": 0, "y1": 1}
        )
        l0s = [point.result[L0] for point in done] or [truth]
        late = truth > (min(l0s) + max(l0s)) / 2  # on the right, where words would leave the figure
        layout["annotations"].append(
            {
                "text": f"the truth fires {truth:.2f}",
                "showarrow": False,
                **{
                    "xref": "x",
                    "x": float(np.log10(truth)) if "type" in across else truth,
                    "xanchor": "right" if late else "left",
                    "xshift": -3 if late else 3,
                },
                **{"yref": "paper", "y": 0, "yanchor": "bottom"},
            }
        )
    return drawing.figure(traces, **layout)


def curves(points: Sequence[Point], key: str, name: str, log: bool) -> Figure:
    """One line a member against the training step, in the colour of its group."""
    traces = []
    place_of = {group: place for place, group in enumerate(groups(points))}
    most = max(MAX_CURVE_POINTS // max(len(points), 1), 20)
    for point in points:
        lines = [line for line in point.lines if isfinite(line.get(key, nan))]
        colour, dash = drawing.series(place_of[point.group])
        kept = [lines[i] for i in drawing.spread(len(lines), most)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": point.name,
                "x": [line["step"] for line in kept],
                "y": drawing.short(np.array([line[key] for line in kept])),
                "line": {"color": colour, "dash": dash, "width": 1.4 if point.done else 3.5},
                "opacity": 0.8,
                "hovertemplate": f"{point.name}<br>step %{{x}}<br>{name} %{{y:.4g}}<extra></extra>",
            }
        )
    axis = drawing.positive_axis(traces) if log else {"range": [-0.03, 1.04]}
    return drawing.figure(traces, xaxis=drawing.axis("step", rangemode="tozero"), yaxis=drawing.axis("", **axis))


def _means(own: Sequence[Point], key: str, colour: str, dash: str) -> dict[str, Any]:
    """Means over the seeds of each setting, joined in order of L0, with 95 % intervals in both."""
    settings = dict.fromkeys(point.setting for point in own)
    same = [[point.result for point in own if point.setting == setting] for setting in settings]
    places = sorted((interval([r[L0] for r in results]), interval([r[key] for r in results])) for results in same)
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines",
        "line": {"color": colour, "dash": dash, "width": 1.6},
        "hoverinfo": "skip",
    }
    for axis, found in zip("xy", zip(*places, strict=True), strict=True):
        trace[axis] = drawing.short(np.array([each.mean for each in found]))
        bars = [each.half if each.n >= SEEDS_FOR_BARS else 0.0 for each in found]
        if any(bars):
            trace[f"error_{axis}"] = {
                "type": "data",
                "array": drawing.short(np.array(bars)),
                **{"color": colour, "thickness": 1.2, "width": 4},
            }
    return trace


def _front(best: Sequence[Point], key: str) -> dict[str, Any]:
    """The stairs below which no member lies."""
    places = sorted((point.result[L0], point.result[key]) for point in best)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": drawing.short(np.array([x for x, _ in places])),
        "y": drawing.short(np.array([y for _, y in places])),
        "line": {"color": "var(--rule)", "width": 7, "shape": "hv"},
        "hoverinfo": "skip",
    }
