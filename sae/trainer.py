"""The training loop: one step, what it keeps, and how it is saved and resumed.

Activations enter divided by sqrt(s), the square root of their total variance s = E|x - mean x|^2. Losses, learning
rates and initial values then mean the same at every scale of the data; the trained SAE is rescaled to the units of
the data at the end (`SAE.rescale_`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae import losses, schedules
from sae.config import TrainConfig
from sae.model import SAE
from sae.optim import adam, normalise_rows_, project_gradient_

# How often the host looks which latents are dead. Between looks the list is fixed, so that no step waits for it.
DEAD_REFRESH_STEPS = 10
TERMS = ("overall_loss", "mse_loss", "auxiliary_reconstruction_loss", "sparsity_loss")
COUNTERS = ("silent_samples", "dead", "window", "window_firing")


class Trainer:
    """Trains `sae` in place. A step never waits for the device: sums stay there until `take_window` reads them."""

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        self.sae, self.config = sae, config
        self.aux_k = sae.config.aux_k or max(sae.d_in // 2, 1)
        self.optimizer = adam(sae.parameters())
        self.n_steps_done = 0
        device = sae.W_dec.device
        self.silent_samples = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.dead = torch.zeros(0, dtype=torch.int64, device=device)
        self.window = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=device)
        self.window_firing = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.window_steps = 0

    def step(self, x: Float[Tensor, "batch d_in"]) -> None:
        """One batch: forward, loss, backward, Adam, decoder rows back to norm 1, counters."""
        sae = self.sae
        codes, x_hat = sae.reconstruct(x)
        mse = losses.reconstruction(x, x_hat)
        zero = mse.new_zeros(())
        auxiliary, sparsity = zero, zero
        if sae.config.aux_coefficient and self.dead.numel():
            auxiliary = losses.aux_k(x - x_hat, sae.pre_latents(x, self.dead), sae.W_dec[self.dead], self.aux_k)
        penalty = sae.sparsifier.penalty(codes, sae.W_dec)
        if penalty is not None:
            sparsity = penalty * schedules.warmup(
                self.n_steps_done, self.config.n_steps, self.config.train.sparsity_warmup_fraction
            )
        loss = mse + sae.config.aux_coefficient * auxiliary + sparsity
        loss.backward()

        if sae.config.unit_norm_decoder and sae.W_dec.grad is not None:
            project_gradient_(sae.W_dec.grad, sae.W_dec)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if sae.config.unit_norm_decoder:
            normalise_rows_(sae.W_dec)

        with torch.no_grad():
            firing = codes.firing()
            self.silent_samples.add_(len(x)).masked_fill_(firing > 0, 0)
            self.window_firing += firing
            l0 = firing.sum() / len(x)
            self.window += torch.stack([loss, mse, auxiliary, sparsity, l0])
        self.window_steps += 1
        self.n_steps_done += 1

    @property
    def learning_rate(self) -> float:
        train = self.config.train
        return schedules.learning_rate(
            self.n_steps_done, self.config.n_steps, self.config.lr, train.warmup_steps, train.decay_fraction
        )

    def refresh_dead(self) -> None:
        """Looks which latents are dead; called between steps, as it makes the host wait for the device."""
        if self.n_steps_done % DEAD_REFRESH_STEPS == 0:
            self.dead = (self.silent_samples >= self.config.dead_after_samples).nonzero().squeeze(1)

    def take_window(self) -> tuple[dict[str, float], Bool[Tensor, " d_sae"]]:
        """Means over the steps since the last call under the names of the log, and which latents fired in them."""
        *terms, l0 = (self.window / max(self.window_steps, 1)).tolist()
        values = {f"losses/{name}": value for name, value in zip(TERMS, terms, strict=True)}
        fvu = values["losses/mse_loss"]  # s is 1 in the trainer's units
        n_dead = int((self.silent_samples >= self.config.dead_after_samples).sum())
        values |= {
            "metrics/l0": l0,
            "metrics/fvu": fvu,
            "metrics/explained_variance": 1 - fvu,
            "metrics/dead": n_dead / self.sae.d_sae,
            "sparsity/dead_features": n_dead,
            "details/current_learning_rate": self.optimizer.param_groups[0]["lr"],
            "details/n_training_samples": self.n_steps_done * self.config.train.batch_size,
        }
        fired = self.window_firing > 0
        self.window.zero_()
        self.window_firing.zero_()
        self.window_steps = 0
        return values, fired

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors, and plain values."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            tensors |= {f"adam.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        tensors |= {name: getattr(self, name) for name in COUNTERS}
        return tensors, {"n_steps_done": self.n_steps_done, "window_steps": self.window_steps}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Puts back what `state` gave."""
        self.sae.load_state_dict(
            {key.removeprefix("sae."): value for key, value in tensors.items() if key.startswith("sae.")}
        )
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam.{name}."
            moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if moments:
                self.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
        for name in COUNTERS:
            setattr(self, name, tensors[name].to(self.silent_samples.device))
        self.n_steps_done, self.window_steps = values["n_steps_done"], values["window_steps"]
