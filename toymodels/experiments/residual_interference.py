"""Row 14: interference in the residual stream, and many small networks in one.

T small networks write into a stream of width D and read from it, each in a random direction of its own. Random
directions are orthogonal only up to 1/√D, so that whoever reads hears the z − 1 others that are active:

    variance of a read-in                    (z − 1) E[a²]/D
    change of read-out i when j is zeroed    a_j ⟨e_i, e_j⟩, of variance E[a²]/D

Networks of one unit suffer no more than that. Those of two layers do: the T − z that should rest hear noise of
variance z E[a²]/D, answer it, and put T z/D² back into the stream, so that the error grows with T. A threshold
at three standard deviations of that noise keeps them silent, and the error hardly depends on T any more; its
price is that small inputs go unheard.

PROPOSED targets were measured with --fast over seeds 0–7, mean (standard deviation): error over theory 1.016
(.019); the threshold leaves .121 (.003) of the read-out effect at most, and divides the error by 2.26 (.10) at
T = 2048 and by 3.57 (.06) at T = 4096; from T = 256 to 4096 the error grows 4.94-fold (.18) plain, 1.26-fold (.09)
with the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toymodels import plots, residual
from toymodels.experiments.base import Claims, Context, Experiment, Outcome, Picture
from toymodels.residual import MEAN_SQUARE, CompressedNetworks, ResidualRecipe, exactly_active

UNITS, WIDTHS, ACTIVE, SAMPLES = 512, (32, 64, 128, 256, 512), (2, 4, 8, 16, 32), 8192
"""Networks of one unit: T, every D, every z, and how many active units are listened to."""
READ_OUTS = ("linear", "ReLU", "threshold")

BASE = {"T": 2048, "D": 256, "z": 4}
FAST = {"T": (256, 512, 1024, 2048, 4096), "D": (64, 128, 256, 512), "z": (1, 2, 4, 8, 16)}
FULL = {"T": (128, *FAST["T"], 8192), "D": FAST["D"], "z": (*FAST["z"], 32)}
"""Networks of two layers: one size at a time departs from the base."""
HIDDEN_UNITS, BATCH = 3, 128
THRESHOLDS = {"plain": 0, "threshold": 3}
"""In standard deviations of the interference."""
SHOWN, SHOWN_ROWS = 3, 200
"""Networks whose graphs are drawn, and points on each."""


def label(sizes: Mapping[str, int]) -> str:
    """ "T=2048 D=256 z=4"."""
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def run(context: Context) -> Outcome:
    """Networks of one unit, then of two layers, then the graphs of a few."""
    n_seeds, sweeps = context.pick(fast=5, full=10), context.pick(fast=FAST, full=FULL)
    grid = {label(sizes): sizes for axis, values in sweeps.items() for sizes in ({**BASE, axis: v} for v in values)}
    context.expect(len(WIDTHS) + len(grid))
    claims = Claims("14")
    tensors: dict[str, Tensor] = {}
    conditions: dict[str, dict[str, object]] = {}
    by_width = [one_unit(context, width, n_seeds) for width in WIDTHS]
    tensors |= {key: torch.stack([measured[key] for measured in by_width]) for key in by_width[0]}
    for condition in {key.split("/")[0]: None for key in tensors}:
        conditions[condition] = {"n_networks": UNITS, "n_active": BASE["z"], "widths": WIDTHS}
    for z in ACTIVE:
        conditions[f"read-in z={z}"]["n_active"] = z
        variance = tensors[f"read-in z={z}/interference"].var(dim=(1, 2))
        power_law(claims, f"read_in_z={z}", f"read-in variance, z = {z}", variance, (z - 1) * MEAN_SQUARE)
    changes = {kind: tensors[f"read-out {kind}/mean_square"].mean(1) for kind in READ_OUTS}
    power_law(claims, "read_out", "read-out variance", changes["linear"], MEAN_SQUARE)
    left = (changes["threshold"] / changes["linear"]).max()
    claims.at_most("read_out_threshold", "share of the read-out effect that a threshold leaves", left, 0.15, "PROPOSED")

    errors, ratios = {}, []
    for condition, sizes in grid.items():
        answers, predicted = two_layers(context.stream(condition), sizes, n_seeds)
        tensors |= {f"{condition}/{key}": answer for key, answer in answers.items()}
        off = {kind: residual.relative_error(answers[kind], answers["truth"]).mean() for kind in THRESHOLDS}
        errors[condition] = error = {kind: float(value) for kind, value in off.items()}
        conditions[condition] = {**sizes, "hidden_units": HIDDEN_UNITS, "error": error, "predicted": predicted}
        ratios += [error[kind] / predicted[kind] for kind in THRESHOLDS]
        context.tick()
    few, base, many = (errors[label({**BASE, "T": T})] for T in (256, BASE["T"], 4096))
    for name, text, measured, target, tolerance in (
        ("theory", "two-layer networks: error over theory, mean over all sizes", sum(ratios) / len(ratios), 1, 0.1),
        ("gain", f"the threshold divides the error at {label(BASE)} by", base["plain"] / base["threshold"], 2.25, 0.5),
        ("gain_many", "the same at T=4096", many["plain"] / many["threshold"], 3.55, 0.5),
        ("growth", "error at T=4096 over T=256, plain", many["plain"] / few["plain"], 4.95, 1),
        ("growth_threshold", "the same with the threshold", many["threshold"] / few["threshold"], 1.25, 0.4),
    ):
        claims.within(name, text, measured, target, tolerance, "PROPOSED")

    tensors |= {f"graphs/{key}": value for key, value in graphs(context.stream("graphs")).items()}
    conditions["graphs"] = {**BASE}
    return Outcome(claims.made, tensors, conditions, n_seeds)


def power_law(claims: Claims, name: str, text: str, variance: Tensor, numerator: float) -> None:
    """variance = numerator/D at every width: the one furthest from it, and the slope of the logarithms."""
    widths = torch.tensor(WIDTHS)
    worst = max(variance * widths / numerator, key=lambda ratio: abs(ratio - 1))
    claims.within(name, f"{text}: over theory, at the worst D", worst, 1, 0.1, "DERIVED")
    slope = float(np.polyfit(widths.log().numpy(), variance.log().numpy(), 1)[0])
    claims.within(f"{name}_slope", f"{text}: log–log slope in D", slope, -1, 0.1, "DERIVED")


def one_unit(context: Context, width: int, n_seeds: int) -> dict[str, Tensor]:
    """What active units hear of one another, and how the other read-outs change when an active one is zeroed."""
    directions = residual.random_directions(UNITS, width, n_seeds, context.stream("directions", width))
    measured = {}
    for z in ACTIVE:
        a = exactly_active(z, UNITS, SAMPLES // z, n_seeds, context.stream("active", width, z))
        measured[f"read-in z={z}/interference"] = residual.read_in_interference(a, directions)
    z = BASE["z"]
    a = exactly_active(z, UNITS, SAMPLES // z, n_seeds, context.stream("zeroed", width))
    above = partial(residual.gate, threshold=thresholds(z, width)["threshold"])
    reads: tuple[Callable[[Tensor], Tensor], ...] = (torch.clone, torch.relu, above)
    for kind, read in zip(READ_OUTS, reads, strict=True):
        measured[f"read-out {kind}/mean_square"] = residual.read_out_effect(a, directions, read)
    context.tick()
    return measured


def two_layers(
    stream: torch.Generator, sizes: Mapping[str, int], n_seeds: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What active networks answer, alone (`truth`) and compressed, [n_seeds, samples], and the error expected."""
    n_networks, width, z = sizes.values()
    networks = CompressedNetworks.random(n_networks, width, HIDDEN_UNITS, n_seeds, stream)
    x = exactly_active(z, n_networks, BATCH, n_seeds, stream)
    active = x.indices.view(n_seeds, BATCH, z)
    answers = {kind: y.gather(2, active).flatten(1) for kind, y in networks.compare(x, thresholds(z, width)).items()}
    return answers, {kind: networks.expected_error(z, t) for kind, t in thresholds(z, width).items()}


def thresholds(z: int, width: int) -> dict[str, float]:
    """θ of each kind, for this interference."""
    return {kind: sds * residual.interference_sd(z, width) for kind, sds in THRESHOLDS.items()}


def graphs(stream: torch.Generator) -> dict[str, Tensor]:
    """Input and outputs of one network in each of a few streams, [SHOWN, SHOWN_ROWS], by increasing input."""
    n_networks, width, z = BASE.values()
    networks = CompressedNetworks.random(n_networks, width, HIDDEN_UNITS, SHOWN, stream)
    x = exactly_active(z, n_networks, SHOWN_ROWS, SHOWN, stream, always=0)
    inputs, order = x.dense()[..., 0].sort(dim=1)
    outputs = networks.compare(x, thresholds(z, width))
    return {"x": inputs, **{kind: y[..., 0].gather(1, order) for kind, y in outputs.items()}}


COLOURS = {"plain": plots.SERIES[1], "threshold": plots.SERIES[0]}


def draw(outcome: Outcome) -> Sequence[Picture]:
    """Interference against width, the graphs of three networks, and errors against T, D and z."""
    return [draw_interference(outcome), draw_graphs(outcome), draw_errors(outcome)]


def draw_interference(outcome: Outcome) -> Picture:
    """What is heard, and what a read-out loses, over the widths."""
    figure, axes = plots.figure(1, 2, width=8.6, height=3.7)
    heard, changed = axes[0]
    widths, shades = np.array(WIDTHS), plots.sequential()(np.linspace(0.4, 1, len(ACTIVE)))
    lines = [(heard, z - 1, f"z = {z}", shade) for z, shade in zip(ACTIVE, shades, strict=True)]
    lines += [(changed, 1, "linear", plots.SERIES[1]), (changed, 0, "ReLU", plots.MUTED)]
    for ax, others, text, colour in [*lines, (changed, 0, "threshold", plots.SERIES[0])]:
        if ax is heard:
            measured = outcome.tensors[f"read-in z={others + 1}/interference"].var(dim=(1, 2))
        else:
            measured = outcome.tensors[f"read-out {text}/mean_square"].mean(1)
        if others:
            ax.plot(widths, others * MEAN_SQUARE / widths, color=colour, linewidth=1.2)
        ax.plot(widths, measured, "o", color=colour)
        ax.annotate(text, (widths[-1], measured[-1]), (8, 0), textcoords="offset points", va="center", color=colour)
    heard.set(title="Read-in: what an active unit hears", ylabel="variance of the interference")
    changed.set(title="Read-out: an active unit is zeroed", ylabel="mean squared change of another unit")
    for ax in axes[0]:
        logarithmic(ax, WIDTHS)
        ax.set(xlabel="width D of the stream", xlim=(WIDTHS[0] / 1.2, WIDTHS[-1] * 2.2))
    caption = (
        f"{UNITS} units in random directions. Left: an active unit hears the z − 1 others; points are measured, lines "
        "are (z − 1)·E[a²]/D. Right: the effect of one active unit on the read-out of the others, z = 4; the line is "
        "E[a²]/D. A ReLU halves it; a threshold at three standard deviations of the interference leaves an eighth."
    )
    return Picture("interference", figure, caption)


def draw_graphs(outcome: Outcome) -> Picture:
    """Three functions, and what becomes of them."""
    figure, axes = plots.figure(2, SHOWN, width=8.6, height=4.8, sharex=True, sharey="col")
    shown = {key: outcome.tensors[f"graphs/{key}"] for key in ("x", "truth", *THRESHOLDS)}
    for row, kind in zip(axes, THRESHOLDS, strict=True):
        for i, ax in enumerate(row):
            ax.axhline(0, color=plots.RULE, linewidth=0.8, zorder=0)
            ax.plot(shown["x"][i], shown[kind][i], "o", color=COLOURS[kind], markersize=3, alpha=0.6, mew=0)
            ax.plot(shown["x"][i], shown["truth"][i], color=plots.INK, linewidth=1.4)
        row[0].set(ylabel=f"output y, {kind}")
    for i in range(SHOWN):
        axes[0, i].set(title=f"network {i + 1}")
        axes[1, i].set(xlabel="its input x", xticks=[0, 0.5, 1])
    caption = (
        f"Three two-layer networks, each in a stream of width {BASE['D']} that it shares with {BASE['T'] - 1} others, "
        f"{BASE['z']} active at a time. Black: the network alone; points: compressed. Above, idle networks answer the "
        "interference and disturb all; below, a threshold keeps them silent, and small inputs with them."
    )
    return Picture("graphs", figure, caption)


def draw_errors(outcome: Outcome) -> Picture:
    """The error over each size, others at the base."""
    figure, axes = plots.figure(1, 3, width=9.6, height=3.5, sharey=True)
    texts = ("number of networks T", "width D of the stream", "active at a time z")
    for ax, axis, text in zip(axes[0], BASE, texts, strict=True):
        fixed = {other: size for other, size in BASE.items() if other != axis}
        swept = [facts for facts in outcome.conditions.values() if "error" in facts and fixed.items() <= facts.items()]
        runs: list[Any] = sorted(swept, key=lambda facts: int(str(facts[axis])))
        places = [facts[axis] for facts in runs]
        for kind, colour in COLOURS.items():
            ax.plot(places, [c["predicted"][kind] for c in runs], color=colour, linewidth=1.2)
            ax.plot(places, [c["error"][kind] for c in runs], "o", color=colour, label=kind)
        logarithmic(ax, places)
        ax.set(xlabel=text, title=", ".join(f"{other} = {size}" for other, size in fixed.items()))
    axes[0, 0].set(ylabel="error, as a share of the outputs' power")
    axes[0, 0].legend(loc="upper left")
    caption = (
        "Error of the compressed two-layer networks, Σ(y − f)²/Σf² over the active ones, as T, D or z departs from "
        f"{label(BASE)}. Lines: theory. Without a threshold the error grows with the number of networks, because "
        "those that should rest answer what they hear; with it, it hardly does."
    )
    return Picture("errors", figure, caption)


def logarithmic(ax: Any, ticks: Sequence[int]) -> None:
    """Both axes, with a tick at each size."""
    ax.set(xscale="log", yscale="log", xticks=ticks, xticklabels=ticks)
    ax.set_xticks([], minor=True)


EXPERIMENT = Experiment(
    name="residual_interference",
    row="14",
    title="Interference in the residual stream",
    claim="Networks in random directions of one stream disturb one another as 1/D; a threshold silences the idle ones.",
    reference="Elhage et al. 2021; Hänni et al. 2024; Bushnaq & Mendel 2024",
    seconds=8,
    run=run,
    draw=draw,
    recipe=ResidualRecipe(),
)
