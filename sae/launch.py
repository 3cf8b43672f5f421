"""What torchrun, or a compatible launcher, says about this process."""

from __future__ import annotations

import os


def n_started() -> int:
    """The number of processes started to work together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def speaks() -> bool:
    """Whether this is the process that talks to the user."""
    return n_started() == 1 or os.environ["RANK"] == "0"
