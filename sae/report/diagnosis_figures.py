"""The figures of a diagnosis: where the F1 went, why features are missed, what predicts it, what units carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sae.metrics.ground_truth import FOUND
from sae.report import drawing
from sae.report.data import Run
from sae.report.figures import unit
from sae.report.html import Figure

FEW = 5


def waterfall(run: Run, limit: str) -> Figure:
    """From the SAE's F1 to 1: each bar is what one part loses; `limit` is "" or "_k"."""
    value = {
        key.removeprefix("diagnosis/"): number for key, number in run.result.items() if key.startswith("diagnosis/")
    }
    size = value.get(f"size_gap{limit}", 0.0)
    steps = [
        ("SAE", value["f1"], "var(--series-0)"),
        ("threshold", value["threshold_gap"], "var(--series-1)"),
        ("encoder", value[f"amortisation_gap{limit}"] - value["threshold_gap"], "var(--series-1)"),
        ("directions", value[f"dictionary_gap{limit}"] - size, "var(--series-2)"),
        *([("too few latents", size, "var(--series-2)")] if f"size_gap{limit}" in value else []),
        ("unreachable", value[f"unreachable{limit}"], "var(--muted)"),
    ]
    at, bars, joints = 0.0, [], []
    for place, (name, width, colour) in enumerate(steps):
        edge = max(at, at + width)
        outside = edge < 0.85
        bars.append(
            {
                "type": "bar",
                "orientation": "h",
                "y": [name],
                "x": [round(width, 5)],
                "base": [round(at, 5)],
                "marker": {"color": colour},
                "width": 0.62,
                "hovertemplate": f"{name} {_signed(width, place)}<extra></extra>",
            }
        )
        joints.append(
            {
                "text": _signed(width, place),
                "x": edge if outside else min(at, at + width),
                "y": name,
                "xanchor": "left" if outside else "right",
                "xshift": 4 if outside else -4,
                "showarrow": False,
                "font": {"color": "var(--ink)", "size": 12},
            }
        )
        at += width
    y = drawing.axis("", autorange="reversed", showgrid=False, ticks="", automargin=True, type="category")
    return drawing.figure(
        bars,
        xaxis=drawing.axis("macro F1", range=[0, 1.02]),
        yaxis=y,
        annotations=joints,
        margin={"l": 104, "r": 12, "t": 8, "b": 44},
        bargap=0.3,
    )


def reasons_by_count(run: Run) -> list[dict[str, Any]]:
    """The reasons that occur, the most frequent first."""
    assert run.diagnosis is not None
    found = [reason for reason in run.diagnosis["reasons"] if reason["n"]]
    return sorted(found, key=lambda reason: -reason["n"])


def reason_bars(run: Run) -> Figure:
    """How many features are missed for each reason."""
    reasons = reasons_by_count(run)
    names = [reason["means"] for reason in reasons]
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": [reason["n"] for reason in reasons],
        "text": [f"{reason['n']:,}" for reason in reasons],
        "textposition": "outside",
        "cliponaxis": False,
        "width": 0.62,
        "marker": {"color": [_look(place)[0] for place in range(len(reasons))]},
        "hovertemplate": "%{y}: %{x} features<extra></extra>",
    }
    # One feature, or one reason, does not fill the panel.
    most = max([FEW, *(reason["n"] for reason in reasons)])
    last = max(FEW, len(reasons)) - 0.5
    y = drawing.axis("", range=[last, -0.5], showgrid=False, ticks="", automargin=True, type="category")
    x = drawing.axis("missed features", range=[0, 1.14 * most], **({"dtick": 1} if most == FEW else {}))
    return drawing.figure([bar], xaxis=x, yaxis=y, margin={"l": 200, "r": 8, "t": 8, "b": 44})


def reason_points(run: Run) -> Figure:
    """A point a feature: frequency, matched cosine, and why it is missed."""
    assert run.diagnosis is not None
    rows = [row for row in run.diagnosis["features"] if float(row["frequency"]) > 0]
    kept = [rows[i] for i in drawing.spread(len(rows), drawing.MAX_POINTS).tolist()]
    traces = [_points([row for row in kept if not row["reason"]], "found", "var(--rule)", "circle")]
    for place, reason in enumerate(reasons_by_count(run)):
        colour, symbol = _look(place)
        own = [row for row in kept if row["reason"] == reason["name"]]
        traces.append(_points(own, reason["means"], colour, symbol))
    traces[0]["marker"]["line"] = {"color": "var(--muted)", "width": 0.8}
    return drawing.figure(
        traces,
        xaxis=drawing.axis("firing frequency of the feature", type="log", tickformat="~g"),
        yaxis=drawing.axis("matched cosine"),
        shapes=[drawing.level(FOUND)],
    )


def predictors(run: Run) -> Figure:
    """Share of features that are missed with an attribute and without it, and the share of all."""
    assert run.diagnosis is not None
    rows = run.diagnosis["predictors"]
    names = [row["name"] for row in rows]
    missed, n = int(run.result["diagnosis/missed"]), len(run.diagnosis["features"])
    base = missed / max(n, 1)
    lines: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [value for row in rows for value in (row["missed_without"], row["missed_with"], None)],
            "y": [name for name in names for _ in range(3)],
            "line": {"color": "var(--rule)", "width": 4},
            "hoverinfo": "skip",
        }
    ]
    for key, words, colour, fill in (
        ("missed_without", "without it", "var(--muted)", "circle-open"),
        ("missed_with", "with it", "var(--series-0)", "circle"),
    ):
        lines.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": words,
                "x": drawing.short(np.array([row[key] for row in rows])),
                "y": names,
                "marker": {"color": colour, "size": 10, "symbol": fill, "line": {"width": 2, "color": colour}},
                "hovertemplate": f"%{{y}}<br>missed {words}: %{{x:.1%}}<extra></extra>",
            }
        )
    level = {"color": "var(--ink)", "width": 1, "dash": "dot"}
    return drawing.figure(
        lines,
        xaxis=drawing.axis("share missed", range=[-0.02, 1.02], tickformat=".0%"),
        yaxis=drawing.axis("", autorange="reversed", automargin=True, type="category", ticks=""),
        shapes=[{"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": base, "x1": base, "line": level}],
        annotations=[
            {
                "text": f"all: {missed:,} of {n:,}",
                "x": base,
                "xanchor": "left" if base < 0.5 else "right",
                "yref": "paper",
                "y": 1.0,
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"color": "var(--ink)", "size": 12},
            }
        ],
        margin={"l": 210, "r": 12, "t": 24, "b": 44},
    )


def unit_curves(run: Run, measure: str, name: str, log: bool, before: str) -> Figure:
    """Share of units at or below a value, neurons and latents."""
    assert run.diagnosis is not None
    traces = []
    for place, (kind, words) in enumerate((("neuron", before), ("latent", "latents"))):
        values = np.array(run.diagnosis["units"][kind][measure], dtype=float)
        values = values[values > 0] if log else values  # 0 features a unit: it tells of none
        traces.append(_cumulative(values, words, place))
    axis: dict[str, Any] = {"type": "log", "tickformat": "~g"} if log else {"range": [-0.02, 1.02]}
    return drawing.figure(
        traces, xaxis=drawing.axis(name, **axis), yaxis=drawing.axis("share of units", range=[0, 1.02])
    )


def dimension_curves(run: Run) -> Figure:
    """Share of directions at or below a D_i, for latents that fire and for true features."""
    assert run.truth is not None
    rows = {"true features": unit(run.truth), "latents": _alive(run)}
    traces = [_cumulative(np.sort(_dimensionality(rows[name])), name, place) for place, name in enumerate(rows)]
    return drawing.figure(
        traces,
        xaxis=drawing.axis("D<sub>i</sub> of a direction", rangemode="tozero"),
        yaxis=drawing.axis("share", range=[0, 1.02]),
    )


def spectrum(run: Run) -> Figure:
    """Shares of the variance of all directions, from the largest down."""
    assert run.truth is not None
    traces = []
    for place, (name, rows) in enumerate({"true features": unit(run.truth), "latents": _alive(run)}.items()):
        values = np.linalg.eigvalsh((rows.T @ rows).astype(float))[::-1].clip(min=0)
        share = values / max(values.sum(), 1e-30)
        kept = drawing.spread(len(share), drawing.MAX_POINTS // 4)
        colour, dash = drawing.series(place)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": (kept + 1).tolist(),
                "y": drawing.short(share[kept]),
                "line": {"color": colour, "dash": dash, "width": 1.8},
                "hovertemplate": f"{name}<br>direction %{{x}}: %{{y:.3%}}<extra></extra>",
            }
        )
    return drawing.figure(
        traces,
        xaxis=drawing.axis("principal direction", rangemode="tozero"),
        yaxis=drawing.axis("share of λ", tickformat="~%", rangemode="tozero"),
    )


def _alive(run: Run) -> np.ndarray:
    return unit(run.W_dec[run.tables["latent/frequency"] > 0])


def _dimensionality(rows: np.ndarray) -> np.ndarray:
    """D_i of unit rows."""
    overlap = ((rows @ (rows.T @ rows)) * rows).sum(axis=1)
    return (rows * rows).sum(axis=1) / np.where(overlap > 0, overlap, 1.0)


def _cumulative(values: np.ndarray, name: str, place: int) -> dict[str, Any]:
    """Sorted values against their rank."""
    kept = drawing.spread(len(values), drawing.MAX_POINTS // 4)
    colour, dash = drawing.series(place)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": drawing.short(np.asarray(values)[kept]),
        "y": drawing.short((kept + 1) / max(len(values), 1)),
        "line": {"color": colour, "dash": dash, "width": 1.8, "shape": "hv"},
        "hovertemplate": f"{name}<br>%{{y:.0%}} at or below %{{x:.3g}}<extra></extra>",
    }


def _points(rows: Sequence[dict[str, str]], name: str, colour: str, symbol: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": drawing.short(np.array([float(row["frequency"]) for row in rows])),
        "y": drawing.short(np.array([float(row["matched_cosine"]) for row in rows])),
        "marker": {"color": colour, "symbol": symbol, "size": 6, "opacity": 0.8},
        "text": [row["feature"] for row in rows],
        "hovertemplate": f"feature %{{text}}: {name}<br>frequency %{{x:.2%}}<br>cosine %{{y:.3f}}<extra></extra>",
    }


def _look(place: int) -> tuple[str, str]:
    """Colour and marker of the reason at a place; the rarest share the last marker."""
    return drawing.series(place)[0], drawing.SYMBOLS[min(place, len(drawing.SYMBOLS) - 1)]


def _signed(width: float, place: int) -> str:
    return f"{width:.3f}" if place == 0 else f"{width:+.3f}".replace("-", "−")
