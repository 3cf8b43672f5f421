"""From pre-activations to sparse codes. One class per idea; everything else about an SAE is shared.

To add one, subclass `SAEConfig` (its options, under a `kind`) and `Sparsifier` (the selection, and any penalty).
`docs/sparsifiers.md` walks through an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae import losses
from sae.codes import SparseCodes
from sae.errors import UsageError
from sae.kernels import Codes, Decoded, Kernels, Scalar, Scores, State

Error = Callable[[SparseCodes, Tensor], Tensor]
"""|x_hat - target|^2 of codes under a decoder, averaged over samples (and over readings, where there are several)."""


class Decode(NamedTuple):
    """Decodes codes; `cost` is what an L1 penalty charges a unit of z |W_dec_j|."""

    kernels: Kernels
    state: State
    target: Float[Tensor, "batch d_out"]

    def __call__(self, codes: Codes, cost: Scalar) -> Decoded:
        return self.kernels.decode(codes, self.state, self.target, cost)

    def by_latent(self, latents: Int[Tensor, " slots"], values: Float[Tensor, " slots"]) -> Float[Tensor, " d_sae"]:
        """The sum of each latent's values."""
        return self.kernels.by_latent(latents, values, len(self.state.b_enc))

    @property
    def norms(self) -> Float[Tensor, " d_sae"] | None:
        """|W_dec_j|, as penalties charge it; None: 1."""
        return self.state.charged_norms


class Flow(NamedTuple):
    """What a step gets from its codes: errors and penalty, and the gradients of both in the pre-latents."""

    decoded: Decoded
    gradients: Float[Tensor, " slots"]
    """In the pre-latent of each slot."""
    error: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    cost: Scalar = 0.0
    """What the penalty charges a unit of z |W_dec_j|."""
    pull: Float[Tensor, " d_sae"] | None = None
    """What any other penalty adds to the gradient in |W_dec_j|."""


class Objective(NamedTuple):
    """The same as differentiable terms, for autograd."""

    codes: SparseCodes
    error: Float[Tensor, ""]
    penalty: Float[Tensor, ""] | None


class Sparsifier(nn.Module, ABC):
    """Chooses which latents fire. State that inference needs (a threshold) is a buffer and is saved with the SAE."""

    passes_pre_latents = False
    """Codes equal the pre-latents wherever they fire: the engine then needs no gradient of the selection."""
    passes_positive = False
    """Codes are max(0, pre): while many fire, the engine computes them as a matrix."""
    pursuit_steps = 0
    """Where positive, codes are found from x and W_dec in this many steps: `pursue` replaces `forward`."""
    refine = 0.0
    """Where positive, codes are selected twice: first by `first`, then from x + refine (x - x_hat of the first)."""
    first: Sparsifier | None
    """The first selection, where there are two; it has thresholds of its own."""
    raises_dead = False
    """Where there is AuxK, the negative biases of dead latents shrink (`resampling.raise_`): it reaches none whose
    pre-latents are negative on all rows."""
    added_up: ClassVar[tuple[str, ...]] = ()
    """Buffers that a step adds to: sums over samples. Processes that train together sum what each has added; any
    other buffer that a step changes is taken from the first process."""
    weighted = True
    """The penalty charges z_j |W_dec_j|; off: z_j."""
    l1_coefficient = 0.0
    """lambda of the penalty lambda * sum_j z_j |W_dec_j|."""
    initial_l0: float | None = None
    """Mean number of latents that fire at the start, by the cuts passed to `start_`; None: no cuts are needed."""
    by_autograd: ClassVar[bool] = False
    """Steps are differentiated by autograd; by default those of classes with a `penalty` or an `objective` of their
    own, and no `differentiate` that knows their gradients."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "by_autograd" not in vars(cls) and {"penalty", "objective", "differentiate"} & vars(cls).keys():
            own = cls.penalty is not Sparsifier.penalty or cls.objective is not Sparsifier.objective
            cls.by_autograd = own and cls.differentiate is Sparsifier.differentiate

    @property
    def coefficient(self) -> Scalar:
        """lambda as it is now."""
        return self.l1_coefficient

    @abstractmethod
    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        """Codes to train on: differentiable in the pre-latents that were chosen."""

    @torch.no_grad()
    def require_codes(self, pre_latents: Float[Tensor, "batch d_sae"]) -> None:
        """Refuses the result of a `forward` that breaks its contract, as a user's own may.

        Raises:
            UsageError: it is not a `SparseCodes`, or a code is negative.
        """
        codes: object = self(pre_latents)
        name = f"{type(self).__name__}.forward"
        if not isinstance(codes, SparseCodes):
            raise UsageError(
                f"{name} must return sae.SparseCodes, got {type(codes).__name__}; return SparseCodes.where(fires, "
                "values) or SparseCodes(values, indices, d_sae)"
            )
        if bool((codes.values < 0).any()):
            raise UsageError(
                f"codes must not be negative, {name} gave {float(codes.values.min()):.4g}; clamp them at 0"
            )

    def edge(self, pre_latents: Float[Tensor, "batch d_sae"]) -> tuple[Tensor, Tensor] | None:
        """Where a cut decides in inference: what a pre-latent must exceed to fire, and the code that it then has."""
        return None

    def select(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        """Codes for inference, each row on its own. The same as in training unless a sparsifier says otherwise."""
        edge = self.edge(pre_latents)
        return self(pre_latents) if edge is None else SparseCodes.where(pre_latents > edge[0], edge[1])

    def infer(self, kernels: Any, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        """`select` without gradients, by a device's kernels where they support it."""
        edge = self.edge(pre_latents) if type(self).select is Sparsifier.select else None
        if edge is None:
            return self.select(pre_latents)
        values, latents = kernels.encode_above(pre_latents, *edge)
        return SparseCodes(values, latents, pre_latents.shape[1])

    def pursue(self, x: Float[Tensor, "batch d"], W_dec: Float[Tensor, "d_sae d"]) -> SparseCodes:
        """Codes of centred activations where `pursuit_steps`: differentiable, and each row on its own."""
        raise NotImplementedError(f"{type(self).__name__} selects among pre-latents; call forward or select")

    def choose(self, kernels: Kernels, scores: Scores) -> Codes | None:
        """Codes to train on, without a gradient, where `passes_pre_latents`; None: too many fire to be sparse."""
        if not self.passes_pre_latents:
            return None
        codes = self(scores.pre_latents())
        if codes.indices is None:
            return None
        batch, k_cap = codes.values.shape
        offsets = torch.arange(0, batch * k_cap + 1, k_cap, device=codes.values.device)
        return Codes(offsets, codes.indices.flatten(), codes.values.flatten())

    def differentiate(self, codes: Codes, decode: Decode, sparsity: Scalar) -> Flow:
        """From codes to the loss, and back to the pre-latents; own parameters get their `grad`. `sparsity` scales the
        penalty. Here codes are pre-latents, so both have the same gradient."""
        weight = self.charge(sparsity)
        cost = weight / (len(codes.offsets) - 1)
        decoded = decode(codes, cost)
        penalty = weight * decoded.code_sums.mean() if self.l1_coefficient else decoded.code_sums.new_zeros(())
        return Flow(decoded, decoded.code_gradients, decoded.losses.mean(), penalty, cost)

    def objective(self, pre_latents: Float[Tensor, "batch d_sae"], W_dec: Tensor, error: Error) -> Objective:
        """The terms of the loss except AuxK, for autograd."""
        codes = self(pre_latents)
        return Objective(codes, error(codes, W_dec), self.penalty(codes, W_dec))

    def penalty(self, codes: SparseCodes, W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, ""] | None:
        """What sparsity costs, for sparsifiers that charge for it in the loss.

        Where a subclass defines one, steps go through autograd.
        """
        return self.coefficient * losses.l1(codes, W_dec, self.weighted) if self.l1_coefficient else None

    def charge(self, sparsity: Scalar) -> Scalar:
        """lambda in a step, warm-up included; 0 where there is none."""
        return self.coefficient * sparsity if self.l1_coefficient else 0.0

    def observe_(self, l0: Float[Tensor, ""], sparsity: Scalar) -> None:
        """Receives each step's mean L0. As everywhere in a step, the host must not wait for the device here."""

    def look_(self, step: int, next_look: int, n_steps: int) -> None:
        """Called every few steps, before the step with this number, for what also depends on the steps so far."""

    def details(self) -> dict[str, Scalar]:
        """What the log shows besides the losses, by name."""
        return {}

    def start_(self, cuts: Float[Tensor, " d_sae"], b_enc: Float[Tensor, " d_sae"]) -> None:
        """Called once before training where `initial_l0` is set: latent j is to fire where its pre-latent exceeds
        cuts_j (`sae.initialise`), by a threshold or by what is taken off b_enc_j, in place."""

    def renew_(self, latents: Int[Tensor, " n"]) -> None:
        """Resets own parameters of restarted latents to values at which a latent can fire again."""

    def constrain_(self) -> None:
        """Puts own parameters back within their bounds, after each step."""

    def anneal_(self, done: float) -> None:
        """Sets what changes over a run, as a function of the fraction `done` of it.

        The trainer calls it at its looks, every ten steps, so that the steps in between are alike. It must depend only
        on `done`, since a resumed run calls it again; 1 comes last, before `calibrate_`, and is what is built.
        """

    def calibrate_(self, batches: Iterable[Float[Tensor, "batch d_sae"]], n_samples: int) -> None:
        """Fits what inference needs on the pre-latents of n_samples held-out activations, once training is over."""

    def rescale_(self, scale: float) -> None:
        """Follows the SAE when pre-latents are multiplied by `scale` (thresholds are in their units)."""
