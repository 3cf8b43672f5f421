"""`sae sweep`: many runs from one file, those on one stream of batches trained together."""

from sae.sweep.plan import Plan, load_sweep
from sae.sweep.run import Outcome, run_sweep

__all__ = ["Outcome", "Plan", "load_sweep", "run_sweep"]
