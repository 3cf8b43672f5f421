"""Activation stores: what a network computed once, on disk, to train on as often as wanted."""

from sae.stores.files import Store
from sae.stores.source import StoreSource, StoreSourceConfig, open_store, recorded

__all__ = ["Store", "StoreSource", "StoreSourceConfig", "open_store", "recorded"]
