"""The phenomena of superposition, each an experiment that can be run by name. See `toymodels list`."""

from __future__ import annotations

from importlib import import_module

from toymodels.errors import UsageError, nearest
from toymodels.experiments.base import Experiment

NAMES = (
    "antipodal",
    "polygons",
    "linear",
    "sparsity",
    "phase_diagram",
    "uniform",
    "pentagon_to_digons",
    "correlated",
    "hierarchy",
    "energy_levels",
    "privileged_basis",
    "absolute_value",
    "dropout",
    "no_superposition",
    "induction",
    "residual_interference",
    "adversarial",
    "associative_memory",
)
"""In the order of the gallery; each is the module of that name, which is imported when it is asked for."""


def experiment(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        UsageError: there is none; the nearest name is given.
    """
    if name not in NAMES:
        raise UsageError(f"unknown experiment {name!r}{nearest(name, NAMES)}")
    return import_module(f"toymodels.experiments.{name}").EXPERIMENT
