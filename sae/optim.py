"""torch's optimiser, for parameters that the engine's own kernels do not update."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
    """Fused Adam: one pass over each parameter and its moments. The trainer sets the learning rate each step."""
    return torch.optim.Adam(parameters, lr=0.0, betas=(0.9, 0.999), fused=True)
