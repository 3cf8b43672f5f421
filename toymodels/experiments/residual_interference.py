"""Row 14: interference in the residual stream, and many small networks in one.

T small networks write into a stream of width D and read from it, each in a random direction of its own. Random
directions are orthogonal only up to 1/√D, so that whoever reads hears the z − 1 others that are active:

    variance of a read-in                    (z − 1) E[a²]/D
    change of read-out i when j is zeroed    a_j ⟨e_i, e_j⟩, of variance E[a²]/D

Networks of one unit suffer no more than that. Those of two layers do: the T − z that should rest hear noise of
variance z E[a²]/D, answer it, and put T z/D² back into the stream, so that the error grows with T. A threshold
at three standard deviations of that noise keeps them silent, and the error hardly depends on T any more; its
price is that small inputs go unheard.

PROPOSED targets were measured with --fast over seeds 0–7: mean (standard deviation).
CALIBRATION
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toymodels import plots
from toymodels.experiments.base import Claims, Context, Experiment, Outcome, Picture
from toymodels.residual import (
    MEAN_SQUARE,
    CompressedNetworks,
    ResidualRecipe,
    exactly_active,
    gate,
    interference_sd,
    random_directions,
)

UNITS, WIDTHS, ACTIVE, SAMPLES = 512, (32, 64, 128, 256, 512), (2, 4, 8, 16, 32), 4096
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
    claims, tensors, conditions = Claims("14"), {}, {}

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
    claims.at_most("read_out_threshold", "share of the read-out effect that a threshold leaves", left, 0.1, "PROPOSED")

    ratios = []
    for condition, sizes in grid.items():
        answers, predicted = two_layers(context.stream(condition), sizes, n_seeds)
        tensors |= {f"{condition}/{key}": answer for key, answer in answers.items()}
        errors = {kind: float(error(answers, kind).mean()) for kind in THRESHOLDS}
        conditions[condition] = {**sizes, "hidden_units": HIDDEN_UNITS, "error": errors, "predicted": predicted}
        ratios += [errors[kind] / predicted[kind] for kind in THRESHOLDS]
        context.tick()
    few, base, many = (conditions[label({**BASE, "T": T})]["error"] for T in (256, BASE["T"], 4096))
    for name, text, measured, target, tolerance in (
        ("theory", "two-layer networks: error over theory, mean over all sizes", np.mean(ratios), 1, 0.1),
        ("gain", f"the threshold divides the error at {label(BASE)} by", base["plain"] / base["threshold"], 2.2, 0.6),
        ("gain_many", "the same at T=4096", many["plain"] / many["threshold"], 3.5, 1),
        ("growth", "error at T=4096 over T=256, plain", many["plain"] / few["plain"], 4.5, 1.5),
        ("growth_threshold", "the same with the threshold", many["threshold"] / few["threshold"], 1.25, 0.5),
    ):
        claims.within(name, text, measured, target, tolerance, "PROPOSED")

    tensors |= {f"graphs/{key}": value for key, value in graphs(context.stream("graphs")).items()}
    conditions["graphs"] = {**BASE, "networks": SHOWN}
    return Outcome(claims.made, tensors, conditions, n_seeds)


def power_law(claims: Claims, name: str, text: str, variance: Tensor, numerator: float) -> None:
    """variance = numerator/D at every width: the one furthest from it, and the slope of the logarithms."""
    widths = torch.tensor(WIDTHS)
    ratio = variance * widths / numerator
    furthest = int((ratio - 1).abs().argmax())
    claims.within(name, f"{text}: over theory, at the worst D", ratio[furthest], 1, 0.1, "DERIVED")
    slope = np.polyfit(widths.log().numpy(), variance.log().numpy(), 1)[0]
    claims.within(f"{name}_slope", f"{text}: log–log slope in D", slope, -1, 0.1, "DERIVED")


def one_unit(context: Context, width: int, n_seeds: int) -> dict[str, Tensor]:
    """What active units hear of one another, and how their read-outs change when one of them is zeroed."""
    directions = random_directions(UNITS, width, n_seeds, context.stream("directions", width))
    measured = {}
    for z in ACTIVE:
        a = exactly_active(z, UNITS, SAMPLES // z, n_seeds, context.stream("active", width, z))
        heard = a.embed(directions) @ directions.mT
        active = heard.gather(2, a.indices.view(n_seeds, -1, z)).flatten(1)
        measured[f"read-in z={z}/interference"] = active - a.values.view(n_seeds, -1)
    z = BASE["z"]
    a = exactly_active(z, UNITS, SAMPLES // z, n_seeds, context.stream("zeroed", width))
    heard = a.embed(directions) @ directions.mT
    zeroed, strength = (entries.view(n_seeds, -1, z)[..., 0] for entries in (a.indices, a.values))
    share = strength[..., None] * directions.gather(1, zeroed[..., None].expand(-1, -1, width))
    without = heard - share @ directions.mT
    others = torch.ones_like(heard, dtype=torch.bool).scatter(2, zeroed[..., None], False)
    threshold = THRESHOLDS["threshold"] * interference_sd(z, width)
    for kind, read in zip(READ_OUTS, (lambda u: u, torch.relu, lambda u: gate(u, threshold)), strict=True):
        change = (read(heard) - read(without)).square() * others
        measured[f"read-out {kind}/mean_square"] = change.sum((1, 2)) / others.sum((1, 2))
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
    thresholds = {kind: sds * interference_sd(z, width) for kind, sds in THRESHOLDS.items()}
    outputs = {"truth": networks.networks(x.dense())} | {kind: networks(x, t) for kind, t in thresholds.items()}
    predicted = {kind: networks.expected_error(z, t) for kind, t in thresholds.items()}
    return {kind: y.gather(2, active).flatten(1) for kind, y in outputs.items()}, predicted


def error(answers: Mapping[str, Tensor], kind: str) -> Tensor:
    """Σ(y − f)²/Σf² over the active networks of each seed."""
    return (answers[kind] - answers["truth"]).square().sum(1) / answers["truth"].square().sum(1)


def graphs(stream: torch.Generator) -> dict[str, Tensor]:
    """Inputs and outputs of the first few networks, [n_networks, n_points], in increasing order of the input."""
    n_networks, width, z = BASE.values()
    networks = CompressedNetworks.random(n_networks, width, HIDDEN_UNITS, 1, stream)
    drawn: dict[str, list[Tensor]] = {"x": [], "truth": [], **{kind: [] for kind in THRESHOLDS}}
    for i in range(SHOWN):
        x = exactly_active(z, n_networks, SHOWN_ROWS, 1, stream, always=i)
        inputs, order = x.dense()[0, :, i].sort()
        drawn["x"].append(inputs)
        drawn["truth"].append(networks.networks(x.dense())[0, order, i])
        for kind, sds in THRESHOLDS.items():
            drawn[kind].append(networks(x, sds * interference_sd(z, width))[0, order, i])
    return {key: torch.stack(values) for key, values in drawn.items()}


COLOURS = {"plain": plots.SERIES[1], "threshold": plots.SERIES[0]}


def draw(outcome: Outcome) -> Sequence[Picture]:
    """Interference against width, the graphs of three networks, and errors against T, D and z."""
    return [draw_interference(outcome), draw_graphs(outcome), draw_errors(outcome)]


def log_axes(ax: Any, ticks: Sequence[int]) -> None:
    """Both logarithmic, with a tick at each size."""
    ax.set(xscale="log", yscale="log", xticks=ticks)
    ax.set_xticks([], minor=True)
    ax.set_xticklabels([f"{tick}" for tick in ticks])


def draw_interference(outcome: Outcome) -> Picture:
    figure, axes = plots.figure(1, 2, width=8.6, height=3.6)
    widths = np.array(WIDTHS)
    for colour, z in zip(plots.SERIES, ACTIVE, strict=False):
        axes[0, 0].plot(widths, (z - 1) * MEAN_SQUARE / widths, color=colour, linewidth=1.2)
        variance = outcome.tensors[f"read-in z={z}/interference"].var(dim=(1, 2))
        axes[0, 0].plot(widths, variance, "o", color=colour)
        axes[0, 0].annotate(
            f"z = {z}", (widths[-1], variance[-1]), (8, 0), textcoords="offset points", va="center", color=colour
        )
    axes[0, 0].set(title="Read-in: what an active unit hears", ylabel="variance of the interference")
    axes[0, 1].plot(widths, MEAN_SQUARE / widths, color=plots.SERIES[1], linewidth=1.2)
    for colour, kind in zip((plots.SERIES[1], plots.MUTED, plots.SERIES[0]), READ_OUTS, strict=True):
        change = outcome.tensors[f"read-out {kind}/mean_square"].mean(1)
        axes[0, 1].plot(widths, change, "o", color=colour)
        axes[0, 1].annotate(
            kind, (widths[-1], change[-1]), (8, 0), textcoords="offset points", va="center", color=colour
        )
    axes[0, 1].set(title="Read-out: zeroing one active unit", ylabel="mean squared change of another")
    for ax in axes[0]:
        log_axes(ax, WIDTHS)
        ax.set(xlabel="width D of the stream", xlim=(WIDTHS[0] / 1.2, WIDTHS[-1] * 1.15))
    return Picture("interference", figure, "")


def draw_graphs(outcome: Outcome) -> Picture:
    figure, axes = plots.figure(2, SHOWN, width=8.6, height=4.6, sharex=True, sharey=True)
    shown = {key: outcome.tensors[f"graphs/{key}"] for key in ("x", "truth", *THRESHOLDS)}
    for row, kind in zip(axes, THRESHOLDS, strict=True):
        for i, ax in enumerate(row):
            ax.plot(shown["x"][i], shown[kind][i], "o", color=COLOURS[kind], markersize=3, alpha=0.55, markeredgewidth=0)
            ax.plot(shown["x"][i], shown["truth"][i], color=plots.INK, linewidth=1.4)
    return Picture("graphs", figure, "")


def draw_errors(outcome: Outcome) -> Picture:
    figure, axes = plots.figure(1, 3, width=10, height=3.6, sharey=True)
    return Picture("errors", figure, "")


EXPERIMENT = Experiment(
    name="residual_interference",
    row="14",
    title="Interference in the residual stream",
    claim="Small networks in random directions of one stream disturb one another as 1/D; a threshold keeps the idle ones silent.",
    reference="Elhage et al. 2021; Hänni et al. 2024; Bushnaq & Mendel 2024",
    seconds=15,
    run=run,
    draw=draw,
    recipe=ResidualRecipe(),
)
