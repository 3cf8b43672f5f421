"""The inside of the training loop: what a step is given, what it leaves behind, and how that is saved and resumed.

Activations are divided by sqrt(s), the square root of their total variance s = E|x - mean x|^2. Losses, learning
rates and initial values then mean the same at every scale of the data; the trained SAE is rescaled to the units of
the data at the end (`SAE.rescale_`). A target other than the activations is divided by the square root of its own.
"""

from __future__ import annotations

import logging
import time
import weakref
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae import schedules
from sae.config import TrainConfig
from sae.engine import Begun, Engine, Terms, padded
from sae.errors import UsageError
from sae.heavy_tails import Ball
from sae.model import SAE
from sae.ranks import ALONE, Ranks
from sae.resampling import raise_, resample_
from toymodels.streams import generator

logger = logging.getLogger("sae")
# How often the host looks at the device: which latents are dead, and whether codes are sparse; it then writes down the
# learning rates to come. Between looks no step waits, and all do the same.
REFRESH_STEPS = 10
TERMS = ("overall_loss", "mse_loss", "auxiliary_reconstruction_loss", "sparsity_loss")


class Trainer:
    """Trains `sae` in place on activations in units of `unit`, and targets in units of `target_unit`. A step never
    waits for the device: sums stay there until `take_window` reads them. Rows outside `ball` are pulled in to it."""

    def __init__(
        self,
        sae: SAE,
        config: TrainConfig,
        unit: float,
        target_unit: float | None = None,
        ball: Ball | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.sae, self.config, self.unit = sae, config, unit
        self.ball = None if ball is None else ball.to(sae.W_dec.device)
        self.target_unit = unit if target_unit is None else target_unit
        train = config.train
        given = (train.kernels, train.precision, train.clip_norm, train.accumulate, train.moments)
        self.engine = Engine(sae, *given, ranks)
        self.n_steps_done, self.looked_at = 0, -1  # a step that fails behind its look is taken again, without it
        device = sae.W_dec.device
        self.clock = schedules.Clock(REFRESH_STEPS, sae.W_dec.dtype, device)
        self.dead = torch.zeros(0, dtype=torch.int64, device=device)
        self.window = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=device)
        self.window_steps = 0
        self.n_resampled = 0
        self.seconds = 0.0  # that this process spent on steps
        self.recorder = self._recorder()

    def step(
        self, activations: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None
    ) -> None:
        """One batch, in the units of the data; `target` is what to reconstruct, if that is something else."""
        began = time.perf_counter()
        if self.ball is not None:
            activations = self.ball.draw_in(activations)
        if self.n_steps_done % REFRESH_STEPS == 0 and self.looked_at != self.n_steps_done:
            self.look()
            self.resample(activations)
            self.looked_at = self.n_steps_done
        try:
            if self.recorder is None:
                self.advance(activations, target)
            else:
                self.recorder.play(activations, target)
        except torch.OutOfMemoryError as error:
            raise UsageError(self._too_large(len(activations))) from error
        self.window_steps += 1
        self.n_steps_done += 1
        self.seconds += time.perf_counter() - began

    def advance(
        self, activations: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None
    ) -> None:
        """What a step does on the device. Between two looks of the host each step does the same, to the address."""
        self._note(self.engine.step(activations, self.unit, self.clock.tick(), self.dead, self._scaled(target)))

    def begin(
        self, activations: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None
    ) -> Begun:
        """The first part of `advance`, which changes nothing that is saved."""
        return self.engine.begin(activations, self.unit, self._scaled(target))

    def finish(self, begun: Begun) -> None:
        """The second part."""
        self._note(self.engine.finish(begun, self.clock.tick(), self.dead))

    def _scaled(self, target: Tensor | None) -> Tensor | None:
        return None if target is None else target.to(self.sae.W_dec.dtype) / self.target_unit

    def _note(self, terms: Terms) -> None:
        """Adds a step's terms to the window."""
        error, mse, auxiliary, penalty, l0 = terms
        loss = error + self.sae.config.aux_coefficient * auxiliary + penalty
        self.window += torch.stack([loss, mse, auxiliary, penalty, l0])

    def _recorder(self) -> Any:
        """What takes steps in place of `advance`, with Triton's kernels on CUDA: it records and replays them."""
        if self.window.device.type != "cuda" or self.engine.kernels.name != "triton":
            return None
        if not self.engine.at_once:
            logger.info("steps are not recorded, since each takes its batch in parts (train.accumulate, or processes)")
            return None
        from sae.capture import Recorder  # noqa: PLC0415 - where there is no CUDA it is not imported

        return Recorder(weakref.proxy(self))  # in a circle, memory would outlive the trainer

    def _too_large(self, batch: int) -> str:
        """What to do about a batch that did not fit: each sample takes its pre-latents and a few rows."""
        free, whole = torch.cuda.mem_get_info(self.window.device) if self.window.device.type == "cuda" else (0, 0)
        state = self.engine.state
        kept = [*(weight for _, weight in state.weights()), *state.moments().values()]
        weights = sum(tensor.nbytes for tensor in kept)
        sample = 4 * (4 * self.sae.d_sae + 8 * (self.sae.d_in + self.sae.d_out))
        fits = min(self.engine.ranks.n * max(whole - int(1.2 * weights), 0) // sample, batch // 2)
        rule = f"a batch of {batch} at d_sae={self.sae.d_sae} does not fit on {self.window.device}"
        if fits < 1:
            return f"{rule}, nor would a smaller one; lower sae.d_sae={self.sae.d_sae}"
        return (
            f"{rule} ({free / 2**30:.1f} of {whole / 2**30:.1f} GiB free); lower train.batch_size to {fits}, "
            f"or raise train.accumulate to {-(-batch * self.engine.n_parts // fits)}"
        )

    def _at(self, step: int) -> tuple[float, float]:
        config = self.config
        warmed = schedules.warmup(step, config.n_steps, config.sparsity_warmup_fraction)
        return self.learning_rate(step), config.sae.sparsity_share(warmed)

    def learning_rate(self, step: int) -> float:
        """The rate of the step with this number, counted from 0."""
        train = self.config.train
        return schedules.learning_rate(
            step, self.config.n_steps, self.config.lr, train.warmup_steps, train.decay_fraction
        )

    def look(self) -> None:
        """Checks which latents are dead, and raises them, and whether codes are sparse; sets the clock and what is
        annealed. Here the host waits."""
        silent = self.engine.state.silent_samples
        dead = (silent >= self.config.dead_after_samples).nonzero().squeeze(1)
        self.dead = padded(dead)
        if self.sae.sparsifier.raises_dead and self.sae.config.aux_coefficient:
            raise_(self.engine, dead, REFRESH_STEPS)
        self.engine.refresh(self.n_steps_done)
        self.sae.sparsifier.look_(self.n_steps_done, self.n_steps_done + REFRESH_STEPS, self.config.n_steps)
        self.clock.wind(self.n_steps_done, self._at)
        self.sae.sparsifier.anneal_(self.n_steps_done / self.config.n_steps)

    def resample(self, activations: Float[Tensor, "batch d_in"]) -> None:
        """Restarts dead latents on this batch, if that has become due since the last look."""
        every, step, dead = self.sae.config.resample_every, self.n_steps_done, self.dead[self.dead >= 0]
        if every is None or step >= self.config.n_resampling_steps or not len(dead):
            return
        n_samples, at_last_look = (n * self.config.train.batch_size for n in (step, step - REFRESH_STEPS))
        if n_samples // every > at_last_look // every:
            stream = generator(self.config.train.seed, "resampling", step)
            n = resample_(self.engine, activations, self.unit, dead, stream)
            logger.info("step %d: %d of %d dead latents restarted", step, n, len(dead))
            self.n_resampled += n
            self.dead = padded(dead[n:])
            if self.engine.ranks.n > 1:  # which rows are drawn may hang on the last bits
                self.follow(self.engine.ranks)

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
        values |= {f"details/{name}": float(value) for name, value in self.sae.sparsifier.details().items()}
        if self.sae.config.resample_every is not None:
            values["sparsity/resampled"] = self.n_resampled
        fired = self.engine.take_firing() > 0
        self.window.zero_()
        self.window_steps = 0
        return values, fired

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors, and plain values."""
        tensors, values = self.engine.saved()
        tensors |= {"dead": self.dead, "window": self.window}
        return tensors, values | {
            "unit": self.unit,
            "target_unit": self.target_unit,
            "n_steps_done": self.n_steps_done,
            "window_steps": self.window_steps,
            "n_resampled": self.n_resampled,
            "looked_at": self.looked_at,
        }

    def follow(self, ranks: Ranks) -> None:
        """Takes over the state of rank 0."""
        tensors, values = self.state()
        tensors, values = ranks.tensors_of_lead(tensors, self.window.device), ranks.of_lead(values)
        if not ranks.lead:
            self.load_state(tensors, values)

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores what `state` gave."""
        self.engine.restore(tensors, values)
        device = self.window.device
        dead = tensors["dead"].to(device)
        self.dead, self.window = padded(dead[dead >= 0]), tensors["window"].to(device)  # padded as this device wants
        self.unit, self.target_unit = values["unit"], values["target_unit"]
        self.recorder = self._recorder()  # what was recorded knows neither these tensors nor, perhaps, these kernels
        self.n_steps_done, self.window_steps = values["n_steps_done"], values["window_steps"]
        self.n_resampled, self.looked_at = values["n_resampled"], values.get("looked_at", -1)
        self.clock.wind(self.n_steps_done, self._at)
        last_look = self.n_steps_done // REFRESH_STEPS * REFRESH_STEPS
        self.sae.sparsifier.anneal_(last_look / self.config.n_steps)
