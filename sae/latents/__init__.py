"""What latents fire on: the texts in which each of them fires most."""

from sae.latents.describe import describe
from sae.latents.examples import Examples, find_examples

__all__ = ["Examples", "describe", "find_examples"]
