"""Superposition made and undone, in one picture drawn from a run: the first thing that the README shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from sae.errors import UsageError
from sae.extras import require
from sae.report.data import Run, read_run
from sae.report.figures import latents_in_order, shown_features, unit
from toymodels import palette
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.streams import generator
from toymodels.training import train

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager
    from matplotlib.image import AxesImage
except ImportError:
    require("matplotlib", "report", "the overview")
    raise

# In pixels. The maps are MAP high, so that each of 256 features has two rows of its own.
WIDTH, HEIGHT, MAP, TOP, LEFT = 1640, 740, 512, 130, 60
LEFT_OF_NEURONS, LEFT_OF_LATENTS = 690, 1060
FONTS = ("Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")
INK, MUTED, RULE = palette.LIGHT["ink"], palette.LIGHT["muted"], palette.LIGHT["rule"]


def draw_overview(run: Path, target: Path) -> None:
    """Three panels: five features in two dimensions, the run's features × neurons, its features × latents.

    The first is trained on the spot (Elhage et al. 2022): a superposition that can be drawn as it is.
    The others are maps of cosines on one scale from -1 to 1, latents in the order of their match.

    Raises:
        UsageError: the true features of the run are not known.
    """
    data = read_run(run, run.name, run.name)
    if data.truth is None:
        raise UsageError(f"the true features of {run} are not known; give a run on activations of a toy model")
    features = shown_features(data)
    truth = unit(data.truth)[features]
    latents = unit(data.W_dec)[latents_in_order(data, features)]
    installed = {font.name for font in fontManager.ttflist}
    with rc_context({"font.family": next(name for name in FONTS if name in installed)}):
        figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="white")
        _pentagon(_axes(figure, LEFT, MAP))
        neurons = _axes(figure, LEFT_OF_NEURONS, MAP // 2)
        _map(neurons, truth)
        image = _map(_axes(figure, LEFT_OF_LATENTS, MAP), truth @ latents.T)
        n, (d_sae, d_in) = len(data.truth), data.W_dec.shape
        neurons.set_ylabel(f"{n:,} true features", fontsize=15, color=MUTED, labelpad=10)
        found = f"{int(data.feature('found').sum()):,} of {n:,} features have their own latent"
        _words(figure, LEFT, "Superposition", "more features than dimensions", "5 features in 2 dimensions")
        _words(figure, LEFT_OF_NEURONS, "Before", "features share neurons", _units(data, "neuron", d_in))
        _words(figure, LEFT_OF_LATENTS, "After", found, _units(data, "latent", d_sae))
        _step(figure, LEFT_OF_NEURONS + MAP // 2, LEFT_OF_LATENTS, "SAE")
        bar = figure.add_axes((0, 0, 1, 1))
        bar.set_position(_box(LEFT_OF_LATENTS + MAP - 150, TOP + MAP + 30, 150, 12))
        colours = figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[-1, 0, 1])
        colours.ax.set_xticklabels(["−1", "cosine", "1"], fontsize=13, color=MUTED)
        colours.ax.tick_params(length=0, pad=5)
        colours.outline.set_edgecolor(RULE)
        figure.savefig(target)


def _pentagon(axes: Axes) -> None:
    """W of a model that keeps five features in two dimensions, an arrow a feature."""
    model = ToyModel(5, 2, generator=generator(0, "overview", "model"))
    train(model, Features(5, 0.05), 1500, generator=generator(0, "overview", "training"))
    directions = model.W[0].detach().numpy()
    axes.axhline(0, color=RULE, linewidth=1.5)
    axes.axvline(0, color=RULE, linewidth=1.5)
    for (x, y), colour in zip(directions, palette.SERIES_LIGHT, strict=False):
        arrow = {"arrowstyle": "-|>,head_width=.7,head_length=1.2", "color": colour, "linewidth": 4.5}
        axes.annotate("", xy=(x, y), xytext=(0, 0), arrowprops=arrow | {"shrinkA": 0, "shrinkB": 0})
    axes.plot(0, 0, "o", color=INK, markersize=7)
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
    axes.text(1.3, 0.04, "neuron 1", ha="right", va="bottom", fontsize=15, color=MUTED)
    axes.text(0.04, 1.3, "neuron 2", ha="left", va="top", fontsize=15, color=MUTED)


def _map(axes: Axes, cosines: Float[np.ndarray, "features units"]) -> AxesImage:
    """Features from top to bottom, units from left to right."""
    colours = LinearSegmentedColormap.from_list("cosine", palette.DIVERGING_LIGHT)
    for side in axes.spines.values():
        side.set(visible=True, color=RULE)
    return axes.imshow(cosines, cmap=colours, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")


def _units(run: Run, name: str, count: int) -> str:
    """How many units there are, and how many features each stands for where that was measured."""
    measured = run.result.get(f"polysemanticity/{name}_features_per_unit")
    return f"{count:,} {name}s" + ("" if measured is None else f", {measured:.3g} features each")


def _words(figure: Figure, left: int, title: str, claim: str, count: str) -> None:
    for text, top, size, weight, colour in (
        (title, 40, 24, "bold", INK),
        (claim, 80, 18, "normal", INK),
        (count, TOP + MAP + 20, 16, "normal", MUTED),
    ):
        place = (left / WIDTH, 1 - top / HEIGHT)
        figure.text(*place, text, fontsize=size, weight=weight, color=colour, va="top")


def _step(figure: Figure, start: int, end: int, name: str) -> None:
    """What leads from one panel to the next."""
    axes = figure.add_axes(_box(start + 22, TOP + MAP // 2 - 30, end - start - 44, 60))
    axes.axis("off")
    arrow = {"arrowstyle": "-|>,head_width=.5,head_length=.9", "color": INK, "linewidth": 2}
    axes.annotate("", xy=(1, 0.3), xytext=(0, 0.3), arrowprops=arrow)
    axes.text(0.5, 0.5, name, ha="center", va="bottom", fontsize=17, color=INK)


def _axes(figure: Figure, left: int, width: int) -> Axes:
    axes = figure.add_axes(_box(left, TOP, width, MAP))
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _box(left: int, top: int, width: int, height: int) -> tuple[float, float, float, float]:
    """Pixels from the upper left corner, as matplotlib wants them."""
    return left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT
