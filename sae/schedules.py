"""How the learning rate and the sparsity penalty change over a run: functions of the step alone."""

from __future__ import annotations


def learning_rate(step: int, n_steps: int, peak: float, warmup_steps: int, decay_fraction: float) -> float:
    """Linear warm-up, constant, then linear decay to 0 over the last `decay_fraction` of the run.

    The first step already moves (lr = peak / warmup_steps), the last one still does.
    """
    rising = (step + 1) / warmup_steps if warmup_steps else 1.0
    decay_steps = decay_fraction * n_steps
    falling = (n_steps - step) / decay_steps if decay_steps else 1.0
    return peak * min(rising, falling, 1.0)


def warmup(step: int, n_steps: int, fraction: float) -> float:
    """Rises linearly from 0 to 1 over the first `fraction` of the run, then stays."""
    return min(1.0, step / (fraction * n_steps)) if fraction else 1.0
