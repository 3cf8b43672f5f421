"""The figures of row 10, after Elhage et al. 2022, "Computation in Superposition"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toymodels import plots
from toymodels.experiments import absolute_value_geometry as neurons
from toymodels.experiments.base import Outcome, Picture

ALONE, LONG = "n=3, S=0", "S=0.99, longer"
"""The conditions of 10a, and of 10c and d; those of 10b are S=0.8 and the like."""
SHOWN = (0.0, 0.8, 0.95, 0.99)
"""The sparsities of 10b whose neurons are drawn."""
COMPUTED = 0.5
"""A feature is computed when less of its variance than this stays unexplained."""


def draw(outcome: Outcome) -> Sequence[Picture]:
    """The figures of Elhage et al. 2022, "Computation in Superposition"."""
    return [_alone(outcome), _neurons(outcome), _sharing(outcome), _computed(outcome), _motif(outcome)]


def _best(outcome: Outcome, condition: str) -> int:
    """The run of lowest loss."""
    return int(outcome.tensors[f"{condition}/losses"].argmin())


def _weights(outcome: Outcome, condition: str) -> tuple[Tensor, Tensor, Tensor]:
    """W, W_out and b of the best run."""
    best = _best(outcome, condition)
    W, W_out, b = (outcome.tensors[f"{condition}/{name}"][best] for name in ("W", "W_out", "b"))
    return W, W_out, b


def _colours(n_features: int) -> Any:
    """A colour for each feature, by importance; all features past the 40th, which hardly matter, are grey."""
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap  # noqa: PLC0415

    hues: Any = LinearSegmentedColormap.from_list("features", [plots.SERIES[i] for i in (0, 5, 2, 4, 1, 7, 3)])
    shown = [hues(i / max(1, min(n_features, 40) - 1)) for i in range(min(n_features, 40))]
    return ListedColormap([*shown, *["#c3c9cf"] * (n_features - len(shown))])


def _stacked(axes: plots.Axes, W: Tensor, W_out: Tensor) -> None:
    """A bar for each neuron, ordered by the feature that it serves most: its weight, stacked by feature."""
    weight = neurons.service(W[None], W_out[None])[0]
    weight = weight[:, weight.argmax(0).argsort(stable=True)]
    colours, places = _colours(len(weight)), np.arange(weight.shape[1])
    for k, column in enumerate(weight.T):
        # The largest share stands at the bottom. Crumbs under 2 % of a neuron's weight would only blur the colours.
        order = column.argsort(descending=True)
        order = order[column[order] > 0.02 * column.sum()]
        tops = column[order].cumsum(0)
        axes.bar(
            places[[k] * len(order)], column[order], bottom=tops - column[order], width=0.85,
            color=[colours(int(i)) for i in order], edgecolor="white", linewidth=0.4,
        )  # fmt: skip
    axes.set(xlim=(-0.8, len(places) - 0.2), xticks=[])


def _alone(outcome: Outcome) -> Picture:
    figure, axes = plots.figure(1, 4, width=10, height=2.7, width_ratios=(1.5, 1, 1, 1))
    W, W_out, b = _weights(outcome, ALONE)
    colours = _colours(3)
    _stacked(axes[0, 0], W, W_out)
    axes[0, 0].set(ylabel="in × out weight", xlabel="six neurons", title="each neuron serves one feature")
    sweep = torch.linspace(-1, 1, 101)
    for i in range(3):
        ax, x = axes[0, 1 + i], torch.zeros(len(sweep), 3)
        x[:, i] = sweep
        y = ((x @ W).relu() @ W_out + b).relu()
        ax.plot(sweep, y[:, i], color=colours(i), linewidth=3)
        ax.plot(sweep, sweep.abs(), "--", color=plots.INK, linewidth=1, zorder=3)
        ax.set(
            xlabel=f"x, feature {i + 1} alone",
            title=f"feature {i + 1}",
            xticks=(-1, 0, 1),
            yticks=(0, 1),
            ylim=(-0.05, 1.1),
        )
    axes[0, 1].set(ylabel="output y")
    caption = (
        "Three features that always fire, six neurons: two for each feature, one for each sign. The outputs lie on "
        "|x| (dashed)."
    )
    return Picture("alone", figure, caption)


def _superposed_conditions(outcome: Outcome) -> list[tuple[float, str]]:
    """The sparsities of 10b, from dense to sparse, and their conditions."""
    return [(float(name[2:]), name) for name in outcome.conditions if name not in (ALONE, LONG)]


def _neurons(outcome: Outcome) -> Picture:
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415
    from matplotlib.colors import ListedColormap, Normalize  # noqa: PLC0415

    shown = [(S, condition) for S, condition in _superposed_conditions(outcome) if S in SHOWN]
    figure, axes = plots.figure(len(shown), 1, width=10, height=0.6 + 1.75 * len(shown), sharey=True)
    for ax, (S, condition) in zip(axes[:, 0], shown, strict=True):
        W, W_out, _ = _weights(outcome, condition)
        _stacked(ax, W, W_out)
        pure = float(neurons.pure_neurons(W[None], W_out[None]))
        ax.set(ylabel="in × out weight", title=f"S = {S:g}: {pure:.0%} of the neurons are pure")
    axes[-1, 0].set(xlabel="40 neurons, ordered by the feature that each serves most")
    scale = ScalarMappable(Normalize(0.5, 40.5), ListedColormap([_colours(100)(i) for i in range(40)]))
    bar = figure.colorbar(
        scale, ax=axes, label="feature, by falling importance", aspect=45, pad=0.01, ticks=(1, 20, 40)
    )
    bar.outline.set_visible(False)
    caption = (
        "What each neuron carries, coloured by feature. From dense (top) to sparse features (bottom), neurons turn "
        "from serving one feature to serving four or five. Grey: features past the 40th."
    )
    return Picture("neurons", figure, caption)


def _sharing(outcome: Outcome) -> Picture:
    shown = _superposed_conditions(outcome)
    figure, axes = plots.figure(1, 2, width=10, height=3.2)
    quantities = (("share of pure neurons", neurons.pure_neurons), ("features per neuron", neurons.features_per_neuron))
    for ax, (label, quantity) in zip(axes[0], quantities, strict=True):
        means = []
        for place, (_, condition) in enumerate(shown):
            values = quantity(outcome.tensors[f"{condition}/W"], outcome.tensors[f"{condition}/W_out"])
            ax.plot([place] * len(values), values, "o", color=plots.SERIES[0], alpha=0.45, markeredgewidth=0)
            means.append(float(values.mean()))
        ax.plot(means, color=plots.SERIES[0], zorder=0)
        ticks = {"xticks": range(len(shown)), "xticklabels": [f"{S:g}" for S, _ in shown]}
        ax.set(xlabel="sparsity S = 1 − p", ylabel=label, xlim=(-0.3, len(shown) - 0.7), **ticks)
    axes[0, 0].set(ylim=(-0.04, 1.04))
    axes[0, 1].set(ylim=(0, 5.4))
    caption = (
        f"Left: neurons of which one feature has more than {neurons.PURE:.0%} of the weight. Right: features with at "
        f"least {neurons.SERVED:.1%} of a neuron's weight. A point is a run, the line their mean."
    )
    return Picture("sharing", figure, caption)


def _computed(outcome: Outcome) -> Picture:
    figure, axes = plots.figure(width=7, height=3.4)
    ax, unexplained = axes[0, 0], outcome.tensors[f"{LONG}/unexplained"]
    ranks = np.arange(1, unexplained.shape[1] + 1)
    n_neurons = outcome.tensors[f"{LONG}/W"].shape[2]
    for values in unexplained:
        ax.plot(ranks, values.sort().values, color=plots.SERIES[0], alpha=0.6, linewidth=1.4)
    ax.axhline(COMPUTED, color=plots.RULE, zorder=0)
    ax.axvline(n_neurons / 2, color=plots.SERIES[1], linewidth=1.4, linestyle="--")
    count = (unexplained < COMPUTED).sum(1)
    ax.text(n_neurons / 2 - 0.8, 0.97, "m/2 = 20: two neurons each", color=plots.SERIES[1], ha="right", va="top")
    ax.text(59.5, COMPUTED - 0.02, f"computed: {int(count.min())} to {int(count.max())} features",
            color=plots.MUTED, ha="right", va="top")  # fmt: skip
    ax.set(xlim=(0, 60), ylim=(0, 1.05), xlabel="features, sorted", ylabel="variance unexplained (FVU)")
    caption = (
        "How well each feature's |x| is computed at S = 0.99, a line for each run. Forty neurons that serve one "
        "feature each could compute m/2 = 20; relu(x) alone, one neuron's worth, leaves half of the variance."
    )
    return Picture("computed", figure, caption)


def _motif(outcome: Outcome) -> Picture:
    W, W_out, b = _weights(outcome, LONG)
    unexplained = outcome.tensors[f"{LONG}/unexplained"][_best(outcome, LONG)]
    found = neurons.motifs(W[None], W_out[None])
    leak = W[found.loud, found.neuron].abs() * W_out[found.neuron, found.faint]
    well = (unexplained[found.loud] < COMPUTED / 2) & (unexplained[found.faint] < COMPUTED / 2)
    loud, faint, k = (int(t[(leak * well).argmax()]) for t in found[1:])
    figure, axes = plots.figure(1, 4, width=11, height=3.0, width_ratios=(1.25, 1, 1, 1))
    colours = {loud: plots.SERIES[0], faint: plots.SERIES[1]}

    ax, places = axes[0, 0], np.arange(2)
    for offset, i in ((-0.2, loud), (0.2, faint)):
        heights = [float(W[i, k].abs()), float(W_out[k, i])]
        ax.bar(places + offset, heights, 0.36, color=colours[i], label=f"feature {i + 1}")
    ax.set(xticks=places, xticklabels=("in: |W|", "out: W_out"), ylabel="weight", title="one neuron, two features")
    ax.tick_params(axis="x", length=0)
    ax.legend(loc="upper left")

    sweep = torch.linspace(-1, 1, 201)
    for ax, i in ((axes[0, 1], loud), (axes[0, 2], faint)):
        hidden = (sweep[:, None] * W[i]).relu()
        ax.plot(sweep, sweep.abs(), "--", color=plots.INK, linewidth=1, zorder=3)
        ax.plot(sweep, (hidden @ W_out[:, i] + b[i]).relu(), color=colours[i], linewidth=2.4)
        ax.set(xlabel=f"x, feature {i + 1} alone", title=f"output {i + 1}", xticks=(-1, 0, 1), ylim=(-0.05, 1.15))
    axes[0, 1].set(ylabel="y")

    ax, hidden = axes[0, 3], (sweep[:, None] * W[loud]).relu()
    ax.plot(sweep, (hidden @ W_out[:, faint].relu() + b[faint]).relu(), ":", color=plots.MUTED, label="uninhibited")
    ax.plot(sweep, (hidden @ W_out[:, faint] + b[faint]).relu(), color=colours[faint], linewidth=2.4, label="trained")
    ax.set(xlabel=f"x, feature {loud + 1} alone", title=f"output {faint + 1}, which should be 0", xticks=(-1, 0, 1))
    ax.legend(loc="upper center")
    caption = (
        f"The asymmetric motif: a neuron reads feature {loud + 1} strongly and writes it weakly, and the other way "
        f"round for feature {faint + 1}. Both come out near |x| (dashed). Right: when feature {loud + 1} fires alone, "
        f"output {faint + 1} would rise (dotted: negative weights removed), but other neurons inhibit it."
    )
    return Picture("motif", figure, caption)
