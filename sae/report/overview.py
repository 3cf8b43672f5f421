"""Superposition made and undone, in one picture drawn from a run: the first thing that the README shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae.errors import UsageError
from sae.report import palette
from sae.report.data import read_run
from sae.report.figures import latents_in_order, unit
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.streams import generator
from toymodels.training import train

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Pixels: the picture, and the cells of its maps.
WIDTH, HEIGHT, DPI = 1640, 700, 100
CELL = 2
INK, MUTED, RULE = palette.LIGHT["ink"], palette.LIGHT["muted"], palette.LIGHT["rule"]


def draw_overview(run: Path, target: Path) -> None:
    """Three panels: five features in two dimensions, then the run's features × neurons and features × latents.

    The first trains five features in two dimensions on the spot (Elhage et al. 2022): the smallest superposition.
    The others are maps of cosines, latents in the order of their match, on one scale from -1 to 1.

    Raises:
        UsageError: matplotlib is missing, or the truth of the run is not known.
    """
    try:
        from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise UsageError("the overview needs matplotlib, which is not installed; pip install 'sae[report]'") from error
    data = read_run(run, run.name, run.name)
    if data.truth is None:
        raise UsageError(f"{run} does not know the true features, so there is nothing to compare; give a run that does")
