"""AdamW (Loshchilov & Hutter 2019), as torch.optim.AdamW has it, to the bit.

The class in torch.optim imports all of torch's compiler the first time it is made, which takes longer than many a toy
model; the function that it calls does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW:
    """w -= lr (weight_decay w + m̂ / (√v̂ + 1e-8)), with β = (.9, .999), in one pass over each parameter."""

    def __init__(self, parameters: Iterable[Tensor], weight_decay: float = 0.01) -> None:
        self.parameters, self.weight_decay = list(parameters), weight_decay
        self.first, self.second = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """One step; a gradient for each parameter, in their order."""
        adamw(
            self.parameters,
            # One pass reads memory in the parameter's order, whatever the gradient's strides say.
            [gradient.contiguous() for gradient in gradients],
            self.first,
            self.second,
            [],
            self.steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )
