"""The figures, each a plain plotly figure. Colours are names from palette.py, filled in by the page."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sae.report import drawing
from sae.report.data import Collection, Run
from sae.report.html import Figure
from toymodels import palette

# Rows and columns of a map that can be told apart on a screen.
MAX_FEATURES = 256
BINS_PER_DECADE = 16
Cosines = Float[np.ndarray, "rows columns"]


def unit(rows: Cosines) -> Cosines:
    """Rows of norm 1; a zero row stays zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def shown_features(run: Run) -> Int[np.ndarray, " shown"]:
    """The features in order; of very many, some at even distances."""
    return run.order[drawing.spread(len(run.order), MAX_FEATURES)]


def latents_in_order(run: Run, features: Int[np.ndarray, " shown"]) -> Int[np.ndarray, " ordered"]:
    """The matched latents in the order of their features, then the unmatched ones."""
    matched = run.feature("matched_latent").astype(int)
    rest = np.setdiff1d(np.arange(len(run.W_dec)), matched)
    own = matched[features]
    return np.concatenate([own[own >= 0], rest[drawing.spread(len(rest), MAX_FEATURES)]])


def neuron_map(run: Run) -> Figure:
    """Before: cosines of the features with the axes of the activation space, d_i . e_k."""
    assert run.truth is not None
    features = shown_features(run)
    neurons = drawing.spread(run.truth.shape[1], 2 * MAX_FEATURES)
    cosines = unit(run.truth)[features][:, neurons]
    return _map(cosines, features, neurons, "neuron")


def latent_map(run: Run) -> Figure:
    """After: cosines of the features with the latents, columns in the order of the match."""
    assert run.truth is not None
    features = shown_features(run)
    latents = latents_in_order(run, features)
    cosines = unit(run.truth)[features] @ unit(run.W_dec)[latents].T
    return _map(cosines, features, latents, "latent")


def frequency(collection: Collection, column: str, name: str) -> Figure:
    """A point a feature: its firing frequency, and how well it was recovered."""
    traces = []
    runs = [run for run in collection.shown if run.knows_activations]
    look = {"size": 5, "opacity": 0.65} if len(runs) == 1 else {"size": 4.5, "opacity": 0.4}  # none may hide another
    for run in runs:
        order = run.order[drawing.spread(len(run.order), drawing.MAX_POINTS)]
        place = collection.methods.index(run.method)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": run.name,
                "x": drawing.short(run.feature("frequency")[order]),
                "y": drawing.short(run.feature(column)[order]),
                "marker": {"color": drawing.series(place)[0], "symbol": drawing.symbol(place), **look},
                "customdata": order.tolist(),
                "hovertemplate": f"feature %{{customdata}}<br>frequency %{{x:.2%}}<br>{name} %{{y:.3f}}",
            }
        )
    fired = np.concatenate([run.feature("frequency") for run in runs])
    wide = fired.max() > 5 * max(fired.min(), 1e-9)
    axis = {"type": "log", "tickformat": "~g"} if wide else {"tickformat": ".2~%"}
    lowest = min([0.0, *(value for trace in traces for value in trace["y"] if value is not None)])
    x = drawing.axis("firing frequency of the feature", **axis)
    return drawing.figure(traces, xaxis=x, yaxis=drawing.axis(name, range=[lowest - 0.03, 1.04]))


def curves(collection: Collection, key: str, name: str, log: bool, chance: float | None = None) -> Figure:
    """One line a run against the training step."""
    traces = []
    for run in collection.runs:
        steps, values = run.curve(key)
        kept = drawing.spread(len(steps), drawing.MAX_POINTS // 4)
        colour, dash = _series(collection, run)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": run.name,
                "x": np.array(steps)[kept].tolist(),
                "y": drawing.short(np.array(values)[kept]),
                "line": {"color": colour, "dash": dash, "width": 1.6},
                "hovertemplate": f"step %{{x}}<br>{name} %{{y:.4g}}",
            }
        )
    axis = drawing.positive_axis(traces) if log else {"range": [-0.03, 1.04]}
    layout: dict[str, Any] = {"xaxis": drawing.axis("step", rangemode="tozero"), "yaxis": drawing.axis("", **axis)}
    if chance is not None:
        layout["shapes"] = [drawing.level(chance)]
        layout["annotations"] = [drawing.note("chance", chance)]
    return drawing.figure(traces, **layout)


def density(collection: Collection) -> Figure:
    """How many latents fire how often, on a logarithmic scale; those that never fire have no place on it."""
    fired = {run.name: run.tables["latent/frequency"] for run in collection.shown}
    logs = {name: np.log10(frequency[frequency > 0]) for name, frequency in fired.items()}
    decades = int(-np.floor(min([-3.0, *(values.min() for values in logs.values() if len(values))])))
    edges = np.linspace(-decades, 0.0, BINS_PER_DECADE * decades + 1)
    traces = []
    for number, run in enumerate(collection.shown):
        counts, _ = np.histogram(logs[run.name], bins=edges)
        colour, dash = _series(collection, run)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": run.name,
                "x": drawing.short(np.repeat(edges, 2)[1:-1]),
                "y": np.repeat(counts, 2).tolist(),
                "line": {"color": colour, "dash": dash, "width": 1.6},
                "fill": "tozeroy" if number == 0 else "none",
                "hovertemplate": "frequency 10^%{x:.2f}<br>%{y} latents",
            }
        )
    ticks = list(range(-decades, 1))
    words = [f"10<sup>{tick}</sup>".replace("-", "−") if tick else "1" for tick in ticks]
    axis = drawing.axis("firing frequency of the latent", tickvals=ticks, ticktext=words)
    return drawing.figure(traces, xaxis=axis, yaxis=drawing.axis("latents", rangemode="tozero"))


def plane(run: Run) -> Figure:
    """The plane of a two-dimensional space: true features and decoder rows as arrows from the origin."""
    truth = [] if run.truth is None else [_arrows(unit(run.truth), "var(--rule)", 9.0, "true feature")]
    latents = _arrows(unit(run.W_dec), "var(--series-0)", 2.0, "latent")
    axis = {"range": [-1.15, 1.15], "zeroline": True}
    return drawing.figure(
        [*truth, latents],
        xaxis=drawing.axis("neuron 0", **axis),
        yaxis=drawing.axis("neuron 1", scaleanchor="x", **axis),
        showlegend=bool(truth),
    )


def _map(
    cosines: Cosines,
    features: Int[np.ndarray, " rows"],
    units: Int[np.ndarray, " columns"],
    kind: str,
) -> Figure:
    """Cosines in steps of 1/127: a byte each, which page.js unpacks."""
    bytes_ = np.rint(np.clip(cosines, -1, 1) * 127).astype(np.int8).tobytes()
    trace = {
        "type": "heatmap",
        "z": {"cosines": b64encode(bytes_).decode(), "columns": cosines.shape[1]},
        "x": [f"{kind} {j}" for j in units.tolist()],
        "y": [f"feature {i}" for i in features.tolist()],
        "zmin": -1,
        "zmax": 1,
        "colorscale": diverging_scale(),
        "showscale": False,
        "hovertemplate": "%{y}, %{x}<br>cosine %{z:.2f}<extra></extra>",
    }
    none = {"type": "category", "showticklabels": False, "showgrid": False, "ticks": ""}
    return drawing.figure(
        [trace],
        xaxis=drawing.axis(f"{len(units)} {kind}s", **none),
        yaxis=drawing.axis(f"{len(features)} features", autorange="reversed", **none),
        margin={"l": 28, "r": 2, "t": 2, "b": 28},
    )


def _arrows(rows: Cosines, colour: str, width: float, name: str) -> dict[str, Any]:
    """Lines from the origin, parted by gaps, with a head at each tip."""
    x, y = ([value for tip in rows[:, axis] for value in (0.0, float(tip), None)] for axis in (0, 1))
    sizes = [0, 9 + 1.5 * width, 0] * len(rows)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": x,
        "y": y,
        "line": {"color": colour, "width": width},
        "marker": {
            "symbol": "arrow",
            "angleref": "previous",
            "opacity": 1,
            "line": {"width": 0},
            "size": sizes,
            "color": colour,
        },
        "hovertemplate": f"{name}<br>(%{{x:.2f}}, %{{y:.2f}})",
    }


def _series(collection: Collection, run: Run) -> tuple[str, str]:
    return drawing.series(collection.methods.index(run.method))


def diverging_scale() -> list[tuple[float, str]]:
    """The map of signed cosines for plotly."""
    last = len(palette.DIVERGING_LIGHT) - 1
    return [(stop / last, f"var(--map-{stop})") for stop in range(last + 1)]
