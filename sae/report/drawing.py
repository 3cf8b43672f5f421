"""What figures are made of: a frame, axes, levels, and the look of a series, as plotly has them."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np
from jaxtyping import Int

from sae.report.html import Figure
from toymodels import palette

# Points of a scatter that stays quick.
MAX_POINTS = 2000
# Of the largest value over the least: a logarithmic axis would have hardly a tick, or blow up what does not change.
LINEAR_UP_TO = 5
# One shape of marker a series beside its colour: a reader who cannot tell the colours tells these.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon", "hexagon2")


def figure(data: list[dict[str, Any]], **layout: Any) -> Figure:
    """Traces in the frame that all figures have."""
    base = {
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 52, "r": 12, "t": 8, "b": 44},
        "showlegend": False,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--muted)", "activecolor": "var(--ink)"},
        "hoverlabel": {
            "bgcolor": "var(--paper)",
            "bordercolor": "var(--rule)",
            "font": {"color": "var(--ink)", "family": "system-ui, sans-serif", "size": 12},
        },
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
    return {"data": data, "layout": base | layout}


def axis(title: str, **options: Any) -> dict[str, Any]:
    """An axis with its title."""
    base = {"title": {"text": title, "standoff": 8}, "gridcolor": "var(--rule)", "zeroline": False}
    return base | {"zerolinecolor": "var(--rule)", "linecolor": "var(--rule)"} | options


def positive_axis(traces: list[dict[str, Any]]) -> dict[str, Any]:
    """From 0 on where values are near each other; else logarithmic, at fewer places the more decades it spans."""
    values = [value for trace in traces for value in trace["y"] if value and value > 0] or [1.0]
    if max(values) <= LINEAR_UP_TO * min(values):
        return {"rangemode": "tozero"}
    low, high = np.log10(min(values)), np.log10(max(values))
    steps = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [step * 10.0**power for power in range(int(np.floor(low)) - 1, int(high) + 2) for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def level(y: float) -> dict[str, Any]:
    """A dotted line across the figure."""
    line = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


def note(words: str, y: float) -> dict[str, Any]:
    """Words at the right end of such a line."""
    place = {"xref": "paper", "x": 1, "xanchor": "right", "y": y, "yanchor": "bottom"}
    return {"text": words, "showarrow": False, **place}


def short(values: np.ndarray) -> list[float | None]:
    """Five digits are more than a screen shows; what is not finite is a gap."""
    return [float(f"{value:.5g}") if isfinite(value) else None for value in values.tolist()]


def spread(n: int, most: int) -> Int[np.ndarray, " kept"]:
    """0..n-1, or `most` of them at even distances."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(int)


def series(place: int) -> tuple[str, str]:
    """Colour and dash of the method at a place."""
    n = len(palette.SERIES_LIGHT)
    return f"var(--series-{place % n})", palette.DASHES[(place + place // n) % len(palette.DASHES)]


def symbol(place: int) -> str:
    """The marker of the series at a place."""
    return SYMBOLS[place % len(SYMBOLS)]
