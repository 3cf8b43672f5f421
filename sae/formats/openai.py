"""OpenAI's autoencoders of 2024: a `.pt` file. They are read, not written.

Those with TopK normalise each row first: x <- (x - mean(x)) / std(x), and x_hat <- x_hat std(x) + mean(x). No weight
holds that: the SAE read here takes normalised rows, and reconstructs these.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sae.errors import UsageError
from sae.formats.files import exactly, field, of_shapes, read_pickled
from sae.formats.portable import Largest, Portable, Positive, Rule

logger = logging.getLogger("sae")

# And how many axes each has.
TENSORS = {"pre_bias": 1, "encoder.weight": 2, "latent_bias": 1, "decoder.weight": 2}
COUNTERS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
SELECTION = ("activation", "activation_state_dict")


def is_here(path: Path) -> bool:
    """Whether the path looks like one."""
    return path.is_file() and path.suffix == ".pt"


def read(path: Path) -> Portable:
    """The autoencoder in a file, from which only tensors and plain values are read."""
    given = read_pickled(path)
    t = exactly(given, TENSORS, path, "autoencoder of OpenAI", (*COUNTERS, *SELECTION))
    d_sae, d_in = t["encoder.weight"].shape
    of_shapes(path, t, {"pre_bias": (d_in,), "latent_bias": (d_sae,), "decoder.weight": (d_in, d_sae)})
    activation = given.get("activation", "ReLU")
    rule: Rule
    if activation == "TopK":
        selection = field(given, "activation_state_dict", dict, path)
        rule = Largest(field(selection, "k", int, path))
        if selection.get("postact_fn", "ReLU") != "ReLU":
            raise UsageError(f"{path}: postact_fn {selection['postact_fn']!r} has no counterpart here; known: ReLU")
        logger.warning("%s reads normalised rows, (x - mean) / std of each; normalise yours in the same way", path)
    elif activation == "ReLU":
        rule = Positive()
    else:
        raise UsageError(f"{path}: activation {activation!r} has no counterpart here; known: ReLU, TopK")
    return Portable(t["encoder.weight"].T, t["latent_bias"], t["decoder.weight"].T, t["pre_bias"], rule)
