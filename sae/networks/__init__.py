"""Activations of networks: read while training, or harvested into a store."""

from sae.networks.harvest import harvest
from sae.networks.source import ModelSourceConfig

__all__ = ["ModelSourceConfig", "harvest"]
