"""How figures look, and the drawings that several of them share.

`figure` is the only place that imports matplotlib: experiments can be read, listed and used as sources without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from toymodels import palette
from toymodels.errors import UsageError

Figure = Any
"""matplotlib's Figure."""
Axes = Any
"""matplotlib's Axes."""

INK, MUTED, RULE, WASH = (palette.LIGHT[name] for name in ("ink", "muted", "rule", "wash"))
SERIES = palette.SERIES_LIGHT
"""Colours of lines and groups, in order."""
FONTS = ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"]
STYLE: Any = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.hinting": "none",  # hinted digits of small labels look like another font
    "svg.fonttype": "path",
    "mathtext.fontset": "custom",
    "mathtext.default": "regular",
    "svg.hashsalt": "toymodels",
    "figure.facecolor": palette.LIGHT["paper"],
}


def figure(
    n_rows: int = 1, n_columns: int = 1, *, width: float = 8.0, height: float = 3.2, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of width × height inches and its axes [n_rows, n_columns]; options go to Figure.subplots.

    Raises:
        UsageError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure as MatplotlibFigure  # noqa: PLC0415

    made = MatplotlibFigure(figsize=(width, height), layout="constrained")
    options.setdefault("squeeze", False)
    axes = made.subplots(n_rows, n_columns, **options)
    return made, axes


@contextmanager
def style() -> Iterator[None]:
    """Draw and save inside of it."""
    require_matplotlib()
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.font_manager import fontManager  # noqa: PLC0415

    installed = {font.name for font in fontManager.ttflist}
    family = next((name for name in FONTS if name in installed), "sans-serif")
    mathtext = {f"mathtext.{face}": family for face in ("rm", "it", "bf", "cal", "sf", "tt")}
    with rc_context(STYLE | mathtext | {"font.family": [family]}):
        yield


def require_matplotlib() -> None:
    """Raises a UsageError with the remedy when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401, PLC0415
    except ImportError as missing:
        raise UsageError("matplotlib is not installed; pip install 'sae[plot]'") from missing


def save(made: Figure, path: Path) -> None:
    """Writes path.png and path.svg, without dates, so that the same figure is the same file."""
    made.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})
    made.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def diverging() -> Any:
    """The colour map of signed values, white at zero."""
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415

    return LinearSegmentedColormap.from_list("diverging", palette.DIVERGING_LIGHT)


def sequential() -> Any:
    """The colour map of values from 0 up: white to blue."""
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415

    return LinearSegmentedColormap.from_list("sequential", palette.DIVERGING_LIGHT[5:])


def vectors(
    axes: Axes,
    W: Float[np.ndarray, "n_features 2"],
    colours: Sequence[str] = SERIES,
    *,
    limit: float = 1.35,
    title: str = "",
) -> None:
    """Features as arrows in the plane of two hidden dimensions (Elhage et al. 2022, the figures of section 2)."""
    for start, end in (((-limit, 0), (limit, 0)), ((0, -limit), (0, limit))):
        axes.plot(*zip(start, end, strict=True), color=RULE, linewidth=0.8, zorder=0)
    for i, (x, y) in enumerate(W):
        colour = colours[i % len(colours)]
        axes.plot([0, x], [0, y], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot(x, y, "o", color=colour, markersize=5.5)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[], title=title)
    for side in axes.spines.values():
        side.set_visible(False)


def matrix(axes: Axes, values: Float[np.ndarray, "rows columns"], *, limit: float = 1.0, title: str = "") -> Any:
    """A signed matrix as colours from -limit to limit; returns the image, for a colour bar."""
    image = axes.imshow(values, cmap=diverging(), vmin=-limit, vmax=limit, aspect="equal", interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=title)
    for side in axes.spines.values():
        side.set(visible=True, color=RULE)
    return image


def norms_and_interference(
    axes: Axes,
    norms: Float[np.ndarray, " n_features"],
    interference: Float[np.ndarray, " n_features"],
    *,
    title: str = "",
) -> Any:
    """An upright bar ‖W_i‖ for each feature, coloured by Σ_{j≠i} (Ŵ_i·W_j)² (Elhage et al. 2022, section 2), at the
    places of a matrix's columns above it; returns the colour scale, for a colour bar."""
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415
    from matplotlib.colors import LinearSegmentedColormap, Normalize  # noqa: PLC0415

    # Blue is alone in its direction, orange shares it; grey lies between, so that every bar can be seen.
    colours = LinearSegmentedColormap.from_list("shared", [SERIES[0], "#b9c0c7", SERIES[1]])
    scale = ScalarMappable(Normalize(0, 1), colours)
    places = np.arange(len(norms))
    axes.bar(places, norms, color=scale.to_rgba(np.clip(interference, 0, 1)), width=0.8)
    axes.set(xlim=(-0.5, len(norms) - 0.5), ylim=(0, 1.3), title=title, xticks=[])
    return scale
