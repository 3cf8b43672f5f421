"""Activations of networks: read while training, harvested into a store, or replaced."""

from sae.networks.harvest import harvest
from sae.networks.source import ModelSourceConfig
from sae.networks.splice import Splice, splice

__all__ = ["ModelSourceConfig", "Splice", "harvest", "splice"]
