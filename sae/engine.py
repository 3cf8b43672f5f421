"""One training step, without autograd: what it computes, in order. `docs/engine.md` draws it.

    x     = activation / sqrt(s) - b_dec
    codes = sparsifier(x W_enc + b_enc)
    loss  = mean |codes W_dec - target|^2 + penalty + alpha * AuxK

The target is x, unless b_dec does not centre the input (`tied_bias` off) or the target is something else.

Codes stay sparse from the selection to the weights: the decoder is read once for each code, both weight gradients are
sums over the samples that a latent fired for, and a latent's gradients, projection, Adam and counters happen in one
visit to its rows. When many latents fire, as in a ReLU's first steps, dense products are cheaper and take over; a
sparsifier that does not use kernels is differentiated by autograd.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.by_autograd import differentiated
from sae.config import KernelName, MomentsName, PrecisionName
from sae.dense_step import dense_by_blocks
from sae.errors import UsageError
from sae.gradients import Gradients, clipped, with_extra
from sae.kernels import (
    WEIGHTS,
    Buffers,
    Change,
    Codes,
    Rows,
    State,
    base,
    choose,
    host_sees,
    products,
    sparse_share,
)
from sae.levels import Levels
from sae.model import SAE
from sae.optim import Now, adam_
from sae.parts import whole_batch
from sae.ranks import ALONE, Ranks
from sae.refine import First, Refinement
from sae.sparsifiers import Decode, Sparsifier

logger = logging.getLogger("sae")

Given = ParamSpec("Given")
Found = TypeVar("Found")


class Terms(NamedTuple):
    """What a step measured, as scalars on its device: the parts of the loss, and the mean L0.

    `error` is what the loss charges for errors: the mse, or its mean over several readings and what a gate adds.
    """

    error: Tensor
    mse: Tensor
    auxiliary: Tensor
    sparsity: Tensor
    l0: Tensor


class Begun(NamedTuple):
    """A step up to its codes: what these were selected from, which is x or what a second selection reads, what is to be
    reconstructed, and the codes where they are sparse."""

    x: Float[Tensor, "batch d_in"]
    target: Float[Tensor, "batch d_out"]
    codes: Codes | None
    first: First | None = None


def _in_step(method: Callable[Concatenate[Engine, Given], Found]) -> Callable[Concatenate[Engine, Given], Found]:
    """A method as part of a step: without autograd, on the SAE's device, products in the kernels' precision."""

    @wraps(method)
    def inside(engine: Engine, *given: Given.args, **named: Given.kwargs) -> Found:
        with torch.no_grad(), products(engine.kernels.precision), torch.cuda.device_of(engine.l0):
            return method(engine, *given, **named)

    return inside


class Engine:
    """Changes the weights of `sae` step by step.

    Raises:
        UsageError: the requested kernels or precision cannot work on the SAE's device.
    """

    def __init__(
        self,
        sae: SAE,
        kernels: KernelName = "auto",
        precision: PrecisionName = "auto",
        clip_norm: float | None = None,
        n_parts: int = 1,
        moments: MomentsName = "float32",
        ranks: Ranks = ALONE,
    ) -> None:
        self.sae, self.clip_norm, self.n_parts, self.ranks = sae, clip_norm, n_parts, ranks
        self.at_once = n_parts == 1 and ranks.n == 1  # gradients need not exist as matrices
        self.kernels = choose(sae.W_dec.device, sae.W_dec.dtype, kernels, precision)
        self.state = State.of(
            dict(sae.named_parameters(remove_duplicate=False)),
            sae.config.unit_norm_decoder,
            sae.config.tied_bias,
            sae.sparsifier.weighted,
            moments,
        )
        self.kernels.refresh(self.state)
        self.aux_k = sae.config.aux_k or max(sae.d_in // 2, 1)
        own = {name: weight for name, weight in sae.named_parameters() if name not in WEIGHTS}
        self.own = {name: (weight, torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in own.items()}
        self.by_autograd = sae.sparsifier.by_autograd
        # Of codes that are read once.
        self.error_is_mse = type(sae.sparsifier).differentiate is Sparsifier.differentiate
        self.levels = Levels(sae.config, sae.W_dec.device)
        self.dense_products = sae.sparsifier.passes_positive and not self.levels.several and not self.by_autograd
        self.dense = sae.sparsifier.passes_positive
        self.buffer = Buffers(sae.W_dec.dtype, sae.W_dec.device)
        self.refinement = Refinement(sae.sparsifier.refine, self.buffer)
        self.l0 = torch.zeros((), dtype=torch.float64, device=sae.W_dec.device)

    @_in_step
    def step(
        self,
        activations: Float[Tensor, "batch d_in"],
        unit: float,
        now: Now,
        dead: Int[Tensor, " n"],
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> Terms:
        """One batch. `dead` are the latents that AuxK trains, as `padded` leaves them. `target` is what to reconstruct,
        in the trainer's units already, where that is not the activations themselves."""
        if self.at_once:
            return self._conclude(*self._measure(self._begin(activations, unit, target), now, dead), now)
        terms, whole = self._gradients(activations, unit, now, dead, target)
        return self._conclude(terms, whole.change(self.state.W_dec), now)

    @_in_step
    def gradients(
        self, activations: Tensor, unit: float, now: Now, dead: Tensor, target: Tensor | None = None
    ) -> tuple[Terms, dict[str, Tensor]]:
        """What a step would give Adam, by the names of the weights, including the sparsifier's own; none changes."""
        terms, whole = self._gradients(activations, unit, now, dead, target)
        found = whole.named(self.state)
        for name, (weight, _, _) in self.own.items():
            if weight.grad is not None:
                found[name], weight.grad = weight.grad, None
        return terms, found

    def _gradients(
        self, activations: Tensor, unit: float, now: Now, dead: Tensor, target: Tensor | None
    ) -> tuple[Terms, Gradients]:
        def measure(rows: slice) -> tuple[Terms, Change]:
            wanted = None if target is None else target[rows]
            return self._measure(self._begin(activations[rows], unit, wanted), now, dead)

        own = [weight for weight, _, _ in self.own.values()]
        given = (len(activations), self.n_parts, self.kernels, self.state, own, self.sae.sparsifier, self.ranks)
        terms, whole = whole_batch(measure, *given)
        return Terms(*terms.unbind()), whole

    @_in_step
    def finish(self, begun: Begun, now: Now, dead: Int[Tensor, " n"]) -> Terms:
        """What is left of a step after `begin`."""
        return self._conclude(*self._measure(begun, now, dead), now)

    def _begin(
        self, activations: Float[Tensor, "batch d_in"], unit: float, target: Float[Tensor, "batch d_out"] | None = None
    ) -> Begun:
        """A step up to its codes. Nothing that is saved has changed yet."""
        state = self.state
        x = self.kernels.centre(activations, unit, self.sae.input_centre.detach())
        wanted = x
        if target is not None or not state.tied:
            wanted = (activations.to(x.dtype) / unit if target is None else target.to(x.dtype)) - state.b_dec
            if self.sae.W_skip is not None:
                wanted -= x @ self.sae.W_skip.detach()
            wanted = wanted.contiguous()
        codes = self._choose(x)
        if codes is None or not self.refinement.rate:
            return Begun(x, wanted, codes)
        first, codes = self.refinement.again(self.kernels, state, codes, x, wanted, self._choose)
        return Begun(x, wanted, None) if codes is None else Begun(first.x[: len(x)], wanted, codes, first)

    begin = _in_step(_begin)

    def _choose(self, x: Tensor) -> Codes | None:
        sparsifier = self.sae.sparsifier
        if sparsifier.pursuit_steps:
            return self.kernels.pursue(x, self.state.W_dec, sparsifier.pursuit_steps)
        if self.dense or self.by_autograd:
            return None
        return sparsifier.choose(self.kernels, self.kernels.scores(x, self.state))

    def _measure(self, begun: Begun, now: Now, dead: Tensor) -> tuple[Terms, Change]:
        """From codes to what the weights are to change by; own parameters have their `grad`."""
        x, target, codes, first = begun
        if codes is not None:
            return self._sparse(x, target, codes, first, now, dead)
        if self.dense_products:
            return self._dense(x, target, now, dead)
        return self._by_autograd(x, target, now, dead)

    def _conclude(self, terms: Terms, change: Change, now: Now) -> Terms:
        sparsifier = self.sae.sparsifier
        if self.clip_norm is not None:
            own = [weight.grad for weight, _, _ in self.own.values() if weight.grad is not None]
            change = clipped(self.kernels, self.state, change, own, self.clip_norm)
        self.kernels.update_(self.state, now, change)
        self.l0.copy_(terms.l0)
        sparsifier.observe_(terms.l0, now.sparsity)
        for weight, first, second in self.own.values():
            if weight.grad is not None:
                adam_(weight.detach(), weight.grad, first, second, now)
                weight.grad = None
        sparsifier.constrain_()
        return terms

    def _sparse(
        self, x: Tensor, target: Tensor, codes: Codes, first: First | None, now: Now, dead: Tensor
    ) -> tuple[Terms, Change]:
        kernels, state, batch = self.kernels, self.state, len(x)
        codes = self.levels.split(codes)
        decode = Decode(kernels, state, target)
        decoded, gradients, error, penalty, cost, pull = self.sae.sparsifier.differentiate(codes, decode, now.sparsity)
        auxiliary, extra = self._auxiliary(x, decoded.gradient, dead, codes)
        self._skip(x, decoded.gradient)
        mse = error if self.error_is_mse and len(codes.weights) == 1 else decoded.squares.mean()
        gradient = decoded.gradient
        if self.sae.sparsifier.pursuit_steps:
            gradient, codes = kernels.unroll(codes, decoded, x, state)
            gradients = torch.zeros_like(codes.values)
        n_codes, firing = None, None
        if first is not None or codes.reading != -1:  # not all of what the plan has fires in inference
            fires = codes.values > 0
            if codes.levels is not None:
                fires &= codes.levels <= codes.reading % len(codes.weights)
            firing = torch.zeros_like(state.window_firing).index_add_(0, codes.latents, fires.long())
            n_codes = fires.sum()
        if first is not None:
            x, gradient, codes, gradients = self.refinement.back(kernels, state, first, codes, gradients, gradient)
        plan = kernels.invert(codes, gradients, self.sae.d_sae)
        l0 = (plan.n_codes if n_codes is None else n_codes) / batch
        cost = cost if state.weighted else 0.0
        change = Change(x, gradient, plan, extra, firing, cost, pull, batch)
        return Terms(error, mse, auxiliary, penalty, l0), change

    def _skip(self, x: Tensor, gradient: Tensor) -> None:
        """The gradient of x W_skip, which is part of x_hat."""
        if self.sae.W_skip is not None:
            self.sae.W_skip.grad = x.T @ gradient[: len(x)]

    def _dense(self, x: Tensor, target: Tensor, now: Now, dead: Tensor) -> tuple[Terms, Change]:
        """z = max(0, pre) with most of z positive: five dense products."""
        kernels, state, cost = self.kernels, self.state, self.sae.sparsifier.charge(now.sparsity) / len(x)
        at_once = kernels.dense_step(x, state, target, cost)
        done = at_once or dense_by_blocks(kernels, state, self.buffer, x, target, cost)
        rows, gradient, firing, squares, code_sum, plan = done
        auxiliary, extra = self._auxiliary(x, gradient, dead)
        self._skip(x, gradient)
        mse = squares / len(x)
        terms = Terms(mse, mse, auxiliary, cost * code_sum, firing.sum() / len(x))
        if rows is None:
            return terms, Change(x, gradient, plan, extra, firing, cost if state.weighted else 0.0)
        return terms, Change(x, gradient, extra=with_extra(rows, extra), firing=firing)

    def _by_autograd(self, x: Tensor, target: Tensor, now: Now, dead: Tensor) -> tuple[Terms, Change]:
        """For any differentiable sparsifier; also what a batch falls back to whose codes do not fit their slots."""
        found = differentiated(self.sae, self.state, self.levels, x, target, now.sparsity)
        residual = found.codes.decode(self.state.W_dec) - target
        auxiliary, extra = self._auxiliary(found.read, residual * (2 / len(x)), dead)
        self._skip(x, found.gradient)
        firing = found.codes.firing()
        mse = residual.square().sum(dim=1).mean()
        terms = Terms(found.error, mse, auxiliary, found.penalty, firing.sum() / len(x))
        return terms, Change(x, found.gradient, extra=with_extra(found.rows, extra), firing=firing)

    def _auxiliary(
        self, x: Tensor, gradient: Tensor, dead: Tensor, codes: Codes | None = None
    ) -> tuple[Tensor, Rows | None]:
        """AuxK: its value, and the gradient rows of the dead latents. `gradient` is the reconstruction's; where `codes`
        are read several times, it has all levels."""
        alpha, state = self.sae.config.aux_coefficient, self.state
        if not alpha or not dead.numel():
            return x.new_zeros(()), None
        if codes is not None and len(codes.weights) > 1:
            gradient = base.of_reading(gradient, codes)
        latents, bias = dead, state.b_enc[dead]
        if not host_sees(dead):  # filled up by `padded`: the latent -1 never fires
            latents, bias = dead.remainder(self.sae.d_sae), bias.masked_fill_(dead < 0, -torch.inf)
        pursues = bool(self.sae.sparsifier.pursuit_steps)
        if pursues:  # its dead latents read what is left, as they would in its steps
            x = gradient * (-len(gradient) / 2)
        own = state.encoder.index_select(0, latents), bias, state.W_dec.index_select(0, latents)
        value, rows = self.kernels.aux_k(gradient, x, *own, self.aux_k)
        if pursues:  # both gradients belong to the one row
            rows = (torch.zeros_like(rows[0]), rows[0] + rows[1], torch.zeros_like(rows[2]))
        return value, Rows(latents, *(alpha * row for row in rows))

    def take_firing(self) -> Int[Tensor, " d_sae"]:
        """In how many samples each latent fired since the last call."""
        taken = self.state.window_firing.clone()
        self.state.window_firing.zero_()
        self.levels.count_(taken)
        self.levels.counted.zero_()  # what it counts starts again
        return taken

    def refresh(self, step: int) -> None:
        """Sorts the prefixes, and decides from the last step's L0 whether a ReLU's next steps are dense. Here the host
        waits for the device."""
        self.levels.look_(self.state.window_firing)
        if not (self.sae.sparsifier.passes_positive and step):
            return
        share = float(self.l0) / self.sae.d_sae
        dense = share >= sparse_share(self.state.encoder, self.kernels.precision)
        if dense != self.dense:
            how = "dense" if dense else "sparse"
            logger.info("step %d: %.1f %% of latents fire, steps go %s", step, 100 * share, how)
            self.dense = dense
            self.buffer.kept.clear()

    def finite(self) -> bool:
        """Whether every weight is a number. Here the host waits for the device."""
        weights = [*self.state.weights(), *((name, weight) for name, (weight, _, _) in self.own.items())]
        return all(bool(weight.sum().isfinite()) for _, weight in weights)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors, and plain values."""
        state = self.state
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        if "encoder" not in state.first:
            tensors["sae.encoder"] = state.encoder.clone()  # a file holds no memory twice
        tensors |= state.moments()
        for name, (_, first, second) in self.own.items():
            tensors |= {f"adam.{name}.exp_avg": first, f"adam.{name}.exp_avg_sq": second}
        counters = {"silent_samples": state.silent_samples, "window_firing": state.window_firing, "l0": self.l0}
        counters["norms"] = state.norms  # what an update left, to the bit
        return tensors | counters | self.levels.saved(), {
            "dense": self.dense,
            "precision": self.kernels.precision,
            "kernels": self.kernels.name,
            "cut": self.kernels.cut,
            "refined_cut": self.refinement.cut,
        }

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores what `saved` gave; the run continues with the kernels and the precision that it began with.

        Raises:
            UsageError: these cannot work on this machine.
        """
        name, precision = values["kernels"], values["precision"]
        if (name, precision) != (self.kernels.name, self.kernels.precision):
            weight = self.state.W_dec
            try:
                self.kernels = choose(weight.device, weight.dtype, name, precision)
            except UsageError as error:
                raise UsageError(
                    f"the run began with {name} kernels in {precision} and must continue with them: {error}, "
                    "or start again in another --out"
                ) from error
        self.sae.load_state_dict({key[4:]: value for key, value in tensors.items() if key.startswith("sae.")})
        state = self.state
        for name, moment in state.moments().items():
            moment.copy_(tensors[name])
        for name, (_, first, second) in self.own.items():
            first.copy_(tensors[f"adam.{name}.exp_avg"])
            second.copy_(tensors[f"adam.{name}.exp_avg_sq"])
        state.silent_samples.copy_(tensors["silent_samples"])
        state.window_firing.copy_(tensors["window_firing"])
        self.l0.copy_(tensors["l0"])
        self.levels.restore(tensors)
        self.dense, self.kernels.cut = values["dense"], values["cut"]
        self.refinement.cut = values.get("refined_cut", 0.0)  # not in checkpoints from before
        self.kernels.refresh(state)
        state.norms.copy_(tensors["norms"])


def padded(dead: Int[Tensor, " n"]) -> Int[Tensor, " at_least_n"]:
    """On a GPU, padded to a power of two with the latent -1, so that few widths ever have to be recorded."""
    if host_sees(dead) or not len(dead):
        return dead
    return F.pad(dead, (0, (1 << (len(dead) - 1).bit_length()) - len(dead)), value=-1)
