"""One training step, without autograd: what it computes, in order. `docs/engine.md` draws it.

    x     = activation / sqrt(s) - b_dec
    codes = sparsifier(x W_enc + b_enc)
    loss  = mean |codes W_dec - x|^2 + penalty + alpha * AuxK

Codes stay sparse from the selection to the weights: the decoder is read once for each code, both weight gradients are
sums over the samples that a latent fired for, and a latent's gradients, projection, Adam and counters happen in one
visit to its rows. When many latents fire, as in a ReLU's first steps, dense products are cheaper and take over; a
sparsifier that knows nothing of kernels is differentiated by autograd.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.config import KernelName, PrecisionName
from sae.errors import UsageError
from sae.kernels import (
    SPARSE_SHARE,
    Buffers,
    Codes,
    DenseStep,
    Now,
    Rows,
    State,
    base,
    blocks,
    choose,
    products,
)
from sae.model import SAE
from sae.optim import adam
from sae.sparsifiers import Sparsifier

logger = logging.getLogger("sae")
# Columns up to which a product is faster by its transpose.
NARROW = 256


class Terms(NamedTuple):
    """What a step measured, as scalars on its device: the parts of the loss, and the mean L0."""

    mse: Tensor
    auxiliary: Tensor
    sparsity: Tensor
    l0: Tensor


class Engine:
    """Changes the weights of `sae` step by step.

    Raises:
        UsageError: the kernels or the precision asked for cannot work on the SAE's device.
    """

    def __init__(self, sae: SAE, kernels: KernelName = "auto", precision: PrecisionName = "auto") -> None:
        self.sae = sae
        self.kernels = choose(sae.W_dec.device, sae.W_dec.dtype, kernels, precision)
        self.state = State.of(dict(sae.named_parameters()), sae.config.unit_norm_decoder)
        self.kernels.refresh(self.state)
        self.aux_k = sae.config.aux_k or max(sae.d_in // 2, 1)
        own = list(sae.sparsifier.parameters())
        self.optimizer = adam(own) if own else None
        self.by_autograd = type(sae.sparsifier).penalty is not Sparsifier.penalty
        self.dense = sae.sparsifier.passes_positive
        self.buffer = Buffers(sae.W_dec.dtype, sae.W_dec.device)
        self.l0 = torch.zeros((), dtype=torch.float64, device=sae.W_dec.device)

    def step(
        self, activations: Float[Tensor, "batch d_in"], unit: float, now: Now, sparsity: float, dead: Int[Tensor, " n"]
    ) -> Terms:
        """One batch. `sparsity` scales the penalty, `dead` are the latents that AuxK trains."""
        with torch.no_grad(), products(self.kernels.precision):
            return self._step(activations, unit, now, sparsity, dead)

    def _step(self, activations: Tensor, unit: float, now: Now, sparsity: float, dead: Tensor) -> Terms:
        x = self.kernels.centre(activations, unit, self.state.b_dec)
        codes = None
        if not (self.dense or self.by_autograd):
            codes = self.sae.sparsifier.choose(self.kernels, self.kernels.scores(x, self.state))
        if codes is not None:
            terms = self._sparse(x, codes, now, sparsity, dead)
        elif self.sae.sparsifier.passes_positive and not self.by_autograd:
            terms = self._dense(x, now, sparsity, dead)
        else:
            terms = self._by_autograd(x, now, sparsity, dead)
        self.l0.copy_(terms.l0)
        return terms

    def _sparse(self, x: Tensor, codes: Codes, now: Now, sparsity: float, dead: Tensor) -> Terms:
        kernels, state, weight = self.kernels, self.state, self.sae.sparsifier.l1_coefficient * sparsity
        cost = weight / len(x)
        decoded = kernels.decode(codes, state, x, cost)
        auxiliary, extra = self._auxiliary(x, decoded.gradient, dead)
        plan = kernels.invert(codes, decoded.code_gradients, self.sae.d_sae)
        l0 = plan.n_codes / len(x)
        kernels.update_(state, now, x, decoded.gradient, plan=plan, extra=extra, cost=cost)
        return Terms(decoded.squares.mean(), auxiliary, weight * decoded.code_sums.mean(), l0)

    def _dense(self, x: Tensor, now: Now, sparsity: float, dead: Tensor) -> Terms:
        """z = max(0, pre) with most of z positive: five dense products."""
        kernels, state, weight = self.kernels, self.state, self.sae.sparsifier.l1_coefficient * sparsity
        cost = weight / len(x)
        step = kernels.dense_step(x, state, cost) or self._dense_by_blocks(x, cost)
        auxiliary, extra = self._auxiliary(x, step.gradient, dead)
        kernels.update_(state, now, x, step.gradient, extra=_with(step.rows, extra), firing=step.firing)
        return Terms(step.squares / len(x), auxiliary, cost * step.code_sum, step.firing.sum() / len(x))

    def _dense_by_blocks(self, x: Tensor, cost: float) -> DenseStep:
        """A block of rows at a time."""
        kernels, state, buffer = self.kernels, self.state, self.buffer
        rows = Rows(None, buffer("encoder", state.encoder.shape), buffer("W_dec", state.W_dec.shape), x.new_zeros(0))
        gradient, squares, code_sum = buffer("gradient", x.shape), x.new_zeros(()), x.new_zeros(())
        bias, charged = torch.zeros_like(state.b_enc), torch.zeros_like(state.b_enc)
        firing = torch.zeros_like(state.silent_samples)
        for block in blocks(len(x), self.sae.d_sae, base.DENSE_BLOCK_ENTRIES):
            part, add = x[block], block.start > 0
            z = kernels.relu(part, state)
            residual = torch.mm(z.values, state.W_dec, out=gradient[block]).sub_(part)
            squares += residual.square().sum()
            own = residual.mul_(2 / len(x))
            through = torch.mm(own, state.W_dec.T, out=buffer("through", tuple(z.values.shape)))
            masked, g_bias = kernels.relu_backward(through, z, state, cost)
            _inner_product_(rows.encoder, masked, part, add)
            _inner_product_(rows.W_dec, z.values, own, add)
            bias += g_bias
            firing += z.firing
            code_sum += z.code_sums.sum()
            if not state.unit_norm:
                charged += z.values.sum(dim=0)
        if not state.unit_norm:
            rows.W_dec.addcmul_((cost * charged / state.norms.clamp_min(1e-12))[:, None], state.W_dec)
        return DenseStep(rows._replace(b_enc=bias), gradient, firing, squares, code_sum)

    def _by_autograd(self, x: Tensor, now: Now, sparsity: float, dead: Tensor) -> Terms:
        """For any differentiable sparsifier; also what a batch falls back to whose codes do not fit their slots."""
        state, sparsifier = self.state, self.sae.sparsifier
        pre_latents = (x @ state.encoder.T).add_(state.b_enc).requires_grad_()
        W_dec = state.W_dec.detach().requires_grad_()
        with torch.enable_grad():
            codes = sparsifier(pre_latents)
            residual = codes.decode(W_dec) - x
            mse = residual.square().sum(dim=1).mean()
            penalty = sparsifier.penalty(codes, W_dec)
            loss = mse if penalty is None else mse + penalty * sparsity
            loss.backward()
        gradient = residual.detach() * (2 / len(x))
        auxiliary, extra = self._auxiliary(x, gradient, dead)
        g_pre, g_decoder = (t.grad if t.grad is not None else torch.zeros_like(t) for t in (pre_latents, W_dec))
        rows = Rows(None, g_pre.T @ x, g_decoder, g_pre.sum(dim=0))
        if self.optimizer is not None:
            self.optimizer.param_groups[0]["lr"] = now.rate
            self.optimizer.step()
            self.optimizer.zero_grad()
        firing = codes.firing()
        self.kernels.update_(state, now, x, gradient, extra=_with(rows, extra), firing=firing)
        charged = x.new_zeros(()) if penalty is None else penalty.detach() * sparsity
        return Terms(mse.detach(), auxiliary, charged, firing.sum() / len(x))

    def _auxiliary(self, x: Tensor, gradient: Tensor, dead: Tensor) -> tuple[Tensor, Rows | None]:
        """AuxK: its value, and the gradient rows of the dead latents. `gradient` is the reconstruction's."""
        alpha, state = self.sae.config.aux_coefficient, self.state
        if not alpha or not dead.numel():
            return x.new_zeros(()), None
        value, rows = self.kernels.aux_k(
            gradient, x, state.encoder[dead], state.b_enc[dead], state.W_dec[dead], self.aux_k
        )
        return value, Rows(dead, *(alpha * row for row in rows))

    def refresh(self, step: int) -> None:
        """Decides from the last step's L0 whether a ReLU's next steps are dense. Here the host waits for the device."""
        if not (self.sae.sparsifier.passes_positive and step):
            return
        share = float(self.l0) / self.sae.d_sae
        dense = share >= SPARSE_SHARE[self.kernels.precision]
        if dense != self.dense:
            logger.info(
                "step %d: %.1f %% of latents fire, steps go %s", step, 100 * share, "dense" if dense else "sparse"
            )
            self.dense = dense
            self.buffer.kept.clear()

    def finite(self) -> bool:
        """Whether every weight is a number. Here the host waits for the device."""
        return all(bool(weight.sum().isfinite()) for _, weight in self.state.weights())

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on: tensors, and plain values."""
        state = self.state
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, _ in state.weights():
            tensors |= {f"adam.{name}.exp_avg": state.first[name], f"adam.{name}.exp_avg_sq": state.second[name]}
        for name, parameter in self.sae.sparsifier.named_parameters():
            assert self.optimizer is not None
            moments = self.optimizer.state[parameter].items()
            tensors |= {f"adam.sparsifier.{name}.{key}": value for key, value in moments}
        counters = {"silent_samples": state.silent_samples, "window_firing": state.window_firing, "l0": self.l0}
        counters["norms"] = state.norms  # what an update left, to the bit
        return tensors | counters, {
            "dense": self.dense,
            "precision": self.kernels.precision,
            "kernels": self.kernels.name,
        }

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Puts back what `saved` gave; the run goes on with the kernels and the precision that it began with.

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
                    f"the run began with {name} kernels in {precision}, and must go on so: {error}, "
                    "or start again in another --out"
                ) from error
        self.sae.load_state_dict({key[4:]: value for key, value in tensors.items() if key.startswith("sae.")})
        state = self.state
        for name, _ in state.weights():
            state.first[name].copy_(tensors[f"adam.{name}.exp_avg"])
            state.second[name].copy_(tensors[f"adam.{name}.exp_avg_sq"])
        for name, parameter in self.sae.sparsifier.named_parameters():
            prefix = f"adam.sparsifier.{name}."
            assert self.optimizer is not None
            moments = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
            if moments:
                self.optimizer.state[parameter] = {key: v.to(parameter.device) for key, v in moments.items()}
        state.silent_samples.copy_(tensors["silent_samples"])
        state.window_firing.copy_(tensors["window_firing"])
        self.l0.copy_(tensors["l0"])
        self.dense = values["dense"]
        self.kernels.refresh(state)
        state.norms.copy_(tensors["norms"])


def _inner_product_(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """out = left^T right, or added to it.

    The threads of a BLAS share a narrow product better by its transpose: a third of the time at 64 columns.
    """
    if right.shape[1] > NARROW:
        torch.addmm(out, left.T, right, beta=float(add), out=out)
    elif add:
        out.add_((right.T @ left).T)
    else:
        out.copy_((right.T @ left).T)


def _with(rows: Rows, extra: Rows | None) -> Rows:
    """Rows of all latents, with those of some added."""
    if extra is not None and extra.latents is not None:
        for total, part in zip(rows[1:], extra[1:], strict=True):
            total.index_add_(0, extra.latents, part)
    return rows
