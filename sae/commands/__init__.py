"""The commands: what each takes, and what it calls. Slow imports happen when a command runs."""

from sae.commands.activations import Harvest, Store
from sae.commands.base import Command, SetsFields
from sae.commands.bench import Bench
from sae.commands.results import Convert, Eval, Latents, Report
from sae.commands.training import Demo, Leaderboard, Sweep, Train

COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "train": Train,
    "sweep": Sweep,
    "leaderboard": Leaderboard,
    "harvest": Harvest,
    "store": Store,
    "eval": Eval,
    "latents": Latents,
    "report": Report,
    "convert": Convert,
    "bench": Bench,
}

__all__ = ["COMMANDS", "Command", "SetsFields"]
