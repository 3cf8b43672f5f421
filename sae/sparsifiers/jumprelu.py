"""Each latent fires above its own learned threshold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from sae.codes import SparseCodes, cut_between
from sae.config import SAEConfig
from sae.kernels import Codes, Kernels, Scalar, Scores, capacity
from sae.sparsifiers.base import Decode, Error, Flow, Objective, Sparsifier
from sae.sparsifiers.control import tell_if_far

# The default bandwidth, as a share of what latents must exceed at the start, on average: wider means smoother
# gradients, and more silent slots in each step.
BANDWIDTH = 0.2
# What thresholds take of it, b_enc the rest. At 0 nothing but the price of L0 would move them.
START = 0.1


class JumpReLUConfig(SAEConfig):
    """JumpReLU SAE (Rajamanoharan et al. 2024b)."""

    kind: Literal["jumprelu"] = "jumprelu"
    l0: float | None = Field(default=None, gt=0)
    """Target for the mean number of latents that fire for one activation; may be fractional."""
    penalty: Literal["l0", "tanh"] = "l0"
    """The sparsity penalty: on the number of latents that fire, or sum_j tanh(c z_j |W_dec_j|), which has no target."""
    l0_coefficient: float | None = Field(default=None, ge=0)
    """lambda of lambda * L0 or lambda * sum_j tanh; if l0 is given, of lambda * (L0 / l0 - 1)^2, default 1.5. l0 or
    l0_coefficient is required."""
    tanh_scale: float = Field(default=4.0, gt=0)
    """c of the tanh penalty."""
    bandwidth: float | None = Field(default=None, gt=0)
    """epsilon, in units of sqrt(s): pre-latents within epsilon / 2 of a threshold move it; default a fifth of the mean
    pre-latent at the edge of firing in the first step."""
    initial_l0: float | None = Field(default=None, gt=0)
    """Mean number of latents that fire in the first step; default d_sae / 50, but within l0 .. 4 * l0."""
    # More revives latents faster than thresholds let them stay. On the Zipf set of docs/performance.md, dead latents
    # being raised by a gradient, MCC at L0 4 was .258 at 1/32, .312 here, .292 at 1; at 8.6 .209, .252, .232.
    aux_coefficient: float = Field(default=1 / 4, ge=0)
    """Weight of AuxK, the loss that revives dead latents (0 turns it off)."""

    @model_validator(mode="after")
    def _sparsity_is_paid_for(self) -> JumpReLUConfig:
        for name, value in (("l0", self.l0), ("initial_l0", self.initial_l0)):
            if value is not None and not value < self.d_sae:
                raise ValueError(
                    f"{name} must lie below d_sae={self.d_sae}, got {value:g}; lower {name} or raise d_sae"
                )
        if self.l0 is not None and self.penalty == "tanh":
            raise ValueError(f"penalty tanh has no target, got l0={self.l0:g}; give l0_coefficient instead of l0")
        if self.l0 is None and self.l0_coefficient is None:
            raise ValueError("jumprelu needs a price of sparsity; give l0, the L0 to reach, or l0_coefficient")
        return self

    @property
    def sparsity_warmup_fraction(self) -> float:
        """A target is approached slowly, from above: reached at once, fewer features are found."""
        return super().sparsity_warmup_fraction if self.l0 is None else 1.0

    # The cube is small until the features are found, and large enough in the end to arrive: for the line alone, at .3,
    # FVU .1895 -> .1875 and MCC .181 -> .203 at L0 8.6 on the Zipf set of docs/performance.md, .064 -> .063 on the toy
    # model, .1127 -> .1134 on synth1k (MCC .465 and .465).
    def sparsity_share(self, warmed: float) -> float:
        """(w + 4 w^3) / 5 on the way to a target: slowly first, then ever faster."""
        return warmed if self.l0 is None else (warmed + 4 * warmed**3) / 5

    def build(self) -> JumpReLU:
        coefficient = 1.5 if self.l0_coefficient is None else self.l0_coefficient
        least, most = (self.l0, 4 * self.l0) if self.l0 else (1.0, self.d_sae)
        start = self.initial_l0 or min(max(self.d_sae / 50, least), most)
        tanh_scale = self.tanh_scale if self.penalty == "tanh" else None
        return JumpReLU(self.d_sae, self.bandwidth, coefficient, self.l0, tanh_scale, start)


class JumpReLU(Sparsifier):
    """z = pre * 1[pre > theta], theta_j >= 0, with a penalty of

        lambda * L0,   lambda * (L0 / l0 - 1)^2,   or   lambda * sum_j tanh(c z_j |W_dec_j|)

    averaged over samples (L0 before it is squared). The first two are those of Rajamanoharan et al. 2024b ("Jumping
    Ahead", section 3 and appendix), the third is that of Anthropic's "Circuits Updates, January 2025". The jump has no
    gradient in theta, but its expectation does: `Jump` and `Step` are its straight-through estimators. Theta itself is
    learned, not log theta, since Adam's steps would then be proportional to it. It starts small, with b_enc low enough
    for a sparse first step (likewise Anthropic): AuxK can revive what dies, which a high theta would keep silent.
    Those it does not reach, because their low b_enc keeps all pre-latents below 0, are raised (`resampling.raise_`).
    """

    raises_dead = True
    bandwidth: Float[Tensor, ""]

    def __init__(
        self,
        d_sae: int,
        bandwidth: float | None,
        coefficient: float,
        l0: float | None = None,
        tanh_scale: float | None = None,
        initial_l0: float | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.l0, self.tanh_scale = coefficient, l0, tanh_scale
        self.initial_l0 = initial_l0
        self.threshold = nn.Parameter(torch.zeros(d_sae))
        # epsilon; where none is given it comes from `start_`.
        self.register_buffer("bandwidth", torch.tensor(math.nan if bandwidth is None else bandwidth))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Files from before the bandwidth was saved have none; inference does not need it."""
        state_dict.setdefault(f"{prefix}bandwidth", self.bandwidth)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def look_(self, step: int, next_look: int, n_steps: int) -> None:
        assert not self.bandwidth.isnan(), "start_ comes first, as no bandwidth was given"

    def choose(self, kernels: Kernels, scores: Scores) -> Codes | None:
        """All slots that theta has a gradient from: those that fire, and the silent ones just below."""
        threshold = self.threshold.detach()
        bias = scores.bias - threshold + self.bandwidth / 2
        found = kernels.positive(dataclasses.replace(scores, bias=bias), capacity(scores))
        if found is None:
            return None
        own = threshold.index_select(0, found.latents)
        pre_latents = (found.values + own).sub_(self.bandwidth / 2)
        pre_latents = pre_latents.where(found.values > 0, -torch.inf)  # empty slots, where kernels leave some
        return found._replace(values=pre_latents.where(pre_latents > own, 0), pre_latents=pre_latents)

    def differentiate(self, codes: Codes, decode: Decode, sparsity: Scalar) -> Flow:
        assert codes.pre_latents is not None
        batch, latents, fires = len(codes.offsets) - 1, codes.latents, codes.values > 0
        decoded = decode(codes, 0.0)
        through, pull = decoded.code_gradients, None
        price: Scalar = 0.0
        if self.tanh_scale is None:
            penalty, slope = self._penalty(fires.to(through.dtype).sum() / batch)
            penalty, price = sparsity * penalty, sparsity * slope / batch
        else:
            norms = 1.0 if decode.norms is None else decode.norms.index_select(0, latents)
            tanh = (self.tanh_scale * norms * codes.values).tanh()
            charged = self.weight * sparsity / batch
            penalty, steepness = charged * tanh.sum(), self.tanh_scale * charged * (1 - tanh.square())
            through = through + steepness * norms
            if decode.norms is not None:
                pull = decode.by_latent(latents, steepness * codes.values)
        threshold = self.threshold.detach()
        own = threshold.index_select(0, latents)
        margin = codes.pre_latents - own
        near = (margin < self.bandwidth / 2) & (margin > -torch.inf)  # all but empty slots lie above the other end
        jumps = own.mul_(through).add_(price).where(near, 0)
        self.threshold.grad = decode.by_latent(latents, jumps).div_(-self.bandwidth)
        return Flow(decoded, through.where(fires, 0), decoded.losses.mean(), penalty, pull=pull)

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        return SparseCodes(Jump.apply(pre_latents, self.threshold, self.bandwidth), None, pre_latents.shape[1])

    def objective(self, pre_latents: Float[Tensor, "batch d_sae"], W_dec: Tensor, error: Error) -> Objective:
        codes = self(pre_latents)
        if self.tanh_scale is None:
            fires = Step.apply(pre_latents, self.threshold, self.bandwidth)
            penalty, _ = self._penalty(fires.sum(dim=1).mean())
        else:
            tanh = (self.tanh_scale * codes.values * W_dec.norm(dim=1)).tanh()
            penalty = self.weight * tanh.sum(dim=1).mean()
        return Objective(codes, error(codes, W_dec), penalty)

    def _penalty(self, l0: Tensor) -> tuple[Tensor, Scalar]:
        """What a mean L0 costs, and the derivative."""
        if self.l0 is None:
            return self.weight * l0, self.weight
        excess = l0 / self.l0 - 1
        return self.weight * excess.square(), self.weight * 2 / self.l0 * excess

    def edge(self, pre_latents: Float[Tensor, "batch d_sae"]) -> tuple[Tensor, Tensor]:
        return self.threshold, pre_latents

    @torch.no_grad()
    def start_(self, cuts: Float[Tensor, " d_sae"], b_enc: Float[Tensor, " d_sae"]) -> None:
        cuts = cuts.clamp_min(0)
        self.threshold.copy_(START * cuts)
        b_enc -= (1 - START) * cuts
        if self.bandwidth.isnan():
            self.bandwidth.copy_((BANDWIDTH * cuts.mean()).clamp_min(torch.finfo(cuts.dtype).tiny))

    @torch.no_grad()
    def renew_(self, latents: Int[Tensor, " n"]) -> None:
        self.threshold.index_fill_(0, latents, 0)

    @torch.no_grad()
    def constrain_(self) -> None:
        self.threshold.clamp_min_(0)

    @torch.no_grad()
    def calibrate_(self, batches: Iterable[Float[Tensor, "batch d_sae"]], n_samples: int) -> None:
        """With a target, all thresholds are shifted by one number so that the mean L0 is l0 (or the mean number of
        positive pre-latents, where there are fewer)."""
        if self.l0 is None:
            return
        n_firing = 0

        def margins() -> Iterator[Tensor]:
            nonlocal n_firing
            for pre in batches:
                margin = (pre - self.threshold)[pre > 0]
                n_firing += int((margin > 0).sum())
                yield margin

        shift = cut_between(margins(), max(round(self.l0 * n_samples), 1), -torch.inf)
        self.threshold.add_(shift).clamp_min_(0)
        tell_if_far(n_firing / n_samples, self.l0, f"raise l0_coefficient={self.weight:g}")

    @torch.no_grad()
    def rescale_(self, scale: float) -> None:
        self.threshold.mul_(scale)
        self.bandwidth.mul_(scale)


class Step(torch.autograd.Function):
    """1[pre > theta]; in theta -(1/eps) K((pre - theta) / eps), with K(u) = 1[|u| < 1/2]; in pre 0."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, bandwidth)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold, bandwidth = ctx.saved_tensors
        near = (pre - threshold).abs() < bandwidth / 2
        return None, (gradients[0] * near).sum(dim=0) / -bandwidth, None


class Jump(torch.autograd.Function):
    """pre * 1[pre > theta]; in theta -(theta/eps) K((pre - theta) / eps), with K as above; in pre 1[pre > theta]."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, bandwidth)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold, bandwidth = ctx.saved_tensors
        near = (pre - threshold).abs() < bandwidth / 2
        own = threshold * (gradients[0] * near).sum(dim=0) / -bandwidth
        return gradients[0] * (pre > threshold), own, None
