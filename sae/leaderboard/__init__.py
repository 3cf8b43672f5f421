"""`sae leaderboard`: every architecture and every baseline on one world whose true features are known."""

from sae.leaderboard.recipe import Recipe, read_recipe
from sae.leaderboard.run import Outcome, run_leaderboard

__all__ = ["Outcome", "Recipe", "read_recipe", "run_leaderboard"]
