"""How the learning rate and the sparsity penalty change over a run: functions of only the step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sae.optim import Now, row


def learning_rate(step: int, n_steps: int, peak: float, warmup_steps: int, decay_fraction: float) -> float:
    """Linear warm-up, constant, then linear decay to 0 over the last `decay_fraction` of the run.

    The first step already moves (lr = peak / warmup_steps), and the last one still does.
    """
    rising = (step + 1) / warmup_steps if warmup_steps else 1.0
    decay_steps = decay_fraction * n_steps
    falling = (n_steps - step) / decay_steps if decay_steps else 1.0
    return peak * min(rising, falling, 1.0)


def warmup(step: int, n_steps: int, fraction: float) -> float:
    """Rises linearly from 0 to 1 over the first `fraction` of the run, then stays."""
    return min(1.0, step / (fraction * n_steps)) if fraction else 1.0


class Clock:
    """Tells each step its learning rate on the device: the host writes the rows of the next steps from time to time,
    and a step takes the next of them, so that recorded steps can be played again without the host."""

    def __init__(self, n_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(n_rows, len(Now._fields), dtype=dtype, device=device)
        self.next = torch.zeros(1, dtype=torch.int64, device=device)

    def wind(self, step: int, at: Callable[[int], tuple[float, float]]) -> None:
        """Makes `step` the next one; `at` gives the rate and the share of the penalty of a step, counted from 0."""
        rows = [row(number + 1, *at(number)) for number in range(step, step + len(self.rows))]
        self.rows.copy_(torch.tensor(rows, dtype=torch.float64))
        self.next.zero_()

    def tick(self) -> Now:
        """Of the next step; it must have been wound for that."""
        now: Tensor = self.rows.index_select(0, self.next)[0]
        self.next += 1
        return Now(*now.unbind())
