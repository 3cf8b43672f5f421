"""What torchrun, or another launcher that speaks as it does, says of this process."""

from __future__ import annotations

import os


def n_started() -> int:
    """How many processes were started to work together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def speaks() -> bool:
    """Whether this process is the one of them that talks to the user."""
    return n_started() == 1 or os.environ["RANK"] == "0"
