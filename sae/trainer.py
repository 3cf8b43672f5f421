"""The training loop's inside: what a step is given, what it leaves behind, and how that is saved and resumed.

Activations are divided by sqrt(s), the square root of their total variance s = E|x - mean x|^2. Losses, learning
rates and initial values then mean the same at every scale of the data; the trained SAE is rescaled to the units of
the data at the end (`SAE.rescale_`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae import schedules
from sae.config import TrainConfig
from sae.engine import Engine, padded
from sae.model import SAE

# How often the host looks at the device: which latents are dead, and whether codes are sparse; it then writes down the
# learning rates to come. Between looks no step waits, and all do the same.
REFRESH_STEPS = 10
TERMS = ("overall_loss", "mse_loss", "auxiliary_reconstruction_loss", "sparsity_loss")


class Trainer:
    """Trains `sae` in place on activations in units of `unit`. A step never waits for the device: sums stay there
    until `take_window` reads them."""

    def __init__(self, sae: SAE, config: TrainConfig, unit: float) -> None:
        self.sae, self.config, self.unit = sae, config, unit
        self.engine = Engine(sae, config.train.kernels, config.train.precision)
        self.n_steps_done = 0
        device = sae.W_dec.device
        self.clock = schedules.Clock(self._at, REFRESH_STEPS, sae.W_dec.dtype, device)
        self.dead = torch.zeros(0, dtype=torch.int64, device=device)
        self.window = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=device)
        self.window_steps = 0

    def step(self, activations: Float[Tensor, "batch d_in"]) -> None:
        """One batch, in the units of the data."""
        if self.n_steps_done % REFRESH_STEPS == 0:
            self.look()
        self.advance(activations)
        self.window_steps += 1
        self.n_steps_done += 1

    def advance(self, activations: Float[Tensor, "batch d_in"]) -> None:
        """What a step does on the device. Between two looks of the host each step does the same, to the address."""
        now = self.clock.tick()
        error, mse, auxiliary, penalty, l0 = self.engine.step(activations, self.unit, now, self.dead)
        loss = error + self.sae.config.aux_coefficient * auxiliary + penalty
        self.window += torch.stack([loss, mse, auxiliary, penalty, l0])

    def _at(self, step: int) -> tuple[float, float]:
        config = self.config
        sparsity = schedules.warmup(step, config.n_steps, config.sparsity_warmup_fraction)
        return self.learning_rate(step), sparsity

    def learning_rate(self, step: int) -> float:
        """Of the step with this number, counted from 0."""
        train = self.config.train
        return schedules.learning_rate(
            step, self.config.n_steps, self.config.lr, train.warmup_steps, train.decay_fraction
        )

    def look(self) -> None:
        """Looks which latents are dead and whether codes are sparse, and sets the clock; here the host waits."""
        silent = self.engine.state.silent_samples
        self.dead = padded((silent >= self.config.dead_after_samples).nonzero().squeeze(1))
        self.engine.refresh(self.n_steps_done)
        self.clock.wind(self.n_steps_done)

    def take_window(self) -> tuple[dict[str, float], Bool[Tensor, " d_sae"]]:
        """Means over the steps since the last call under the names of the log, and which latents fired in them."""
        *terms, l0 = (self.window / max(self.window_steps, 1)).tolist()
        values = {f"losses/{name}": value for name, value in zip(TERMS, terms, strict=True)}
        fvu = values["losses/mse_loss"]  # s is 1 in the trainer's units
        state = self.engine.state
        n_dead = int((state.silent_samples >= self.config.dead_after_samples).sum())
        values |= {
            "metrics/l0": l0,
            "metrics/fvu": fvu,
            "metrics/explained_variance": 1 - fvu,
            "metrics/dead": n_dead / self.sae.d_sae,
            "sparsity/dead_features": n_dead,
            "details/current_learning_rate": self.learning_rate(max(self.n_steps_done - 1, 0)),
            "details/n_training_samples": self.n_steps_done * self.config.train.batch_size,
        }
        fired = state.window_firing > 0
        self.window.zero_()
        state.window_firing.zero_()
        self.window_steps = 0
        return values, fired

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors, and plain values."""
        tensors, values = self.engine.saved()
        tensors |= {"dead": self.dead, "window": self.window}
        return tensors, values | {
            "unit": self.unit,
            "n_steps_done": self.n_steps_done,
            "window_steps": self.window_steps,
        }

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Puts back what `state` gave."""
        self.engine.restore(tensors, values)
        device = self.window.device
        self.dead, self.window = tensors["dead"].to(device), tensors["window"].to(device)
        self.unit = values["unit"]
        self.n_steps_done, self.window_steps = values["n_steps_done"], values["window_steps"]
        self.clock.wind(self.n_steps_done)
