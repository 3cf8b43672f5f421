"""The common form of every library's SAE: two affine maps, and a rule for which latents fire between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sae.config import SAEConfig
from sae.errors import UsageError
from sae.model import SAE
from sae.sparsifiers.batchtopk import BatchTopK
from sae.sparsifiers.control import Penalised
from sae.sparsifiers.gated import Gated
from sae.sparsifiers.jumprelu import JumpReLU
from sae.sparsifiers.matching_pursuit import MatchingPursuit
from sae.sparsifiers.topk import TopK

# Rows within this of norm 1 are unit rows: weights may have been stored in 16 bits.
UNIT = 1e-2


@dataclass(frozen=True)
class Positive:
    """z = max(0, pre)."""

    name: ClassVar = "ReLU"


@dataclass(frozen=True)
class Largest:
    """z = max(0, pre) of each row's k largest."""

    name: ClassVar = "TopK"
    k: int


@dataclass(frozen=True)
class Above:
    """z = pre where pre > threshold >= 0; `k` is the mean number that a budget fitted one threshold to, where known."""

    name: ClassVar = "thresholds"
    threshold: Float[Tensor, " d_sae"]
    k: float | None = None

    @property
    def is_one(self) -> bool:
        """All latents have the same threshold."""
        return bool((self.threshold == self.threshold[0]).all())


@dataclass(frozen=True)
class Gate:
    """z = max(0, exp(r) pre + c) where pre > 0."""

    name: ClassVar = "gates"
    r: Float[Tensor, " d_sae"]
    c: Float[Tensor, " d_sae"]


@dataclass(frozen=True)
class Pursuit:
    """Matching pursuit of k steps on unit rows: no encoder."""

    name: ClassVar = "matching pursuit"
    k: int


Rule: TypeAlias = Positive | Largest | Above | Gate | Pursuit


@dataclass(frozen=True)
class Portable:
    """pre = (x - centre) W_enc + b_enc,   x_hat = z W_dec + b_dec + x W_skip.

    `tied`: the centre is b_dec. A transcoder's x_hat stands for something other than x.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    rule: Rule
    tied: bool = True
    centre: Float[Tensor, " d_in"] | None = None
    """The centre, if it is not tied; None: 0."""
    transcodes: bool = False
    W_skip: Float[Tensor, "d_in d_out"] | None = None

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    def bias(self, subtracts_b_dec: bool) -> Float[Tensor, " d_sae"]:
        """b_enc of the same SAE for a library that subtracts b_dec from x first, or nothing."""
        moved = self.b_enc.new_zeros(self.d_in)
        if self.tied:
            moved = moved - self.b_dec
        elif self.centre is not None:
            moved = moved - self.centre
        if subtracts_b_dec:
            moved = moved + self.b_dec
        return self.b_enc + moved @ self.W_enc if bool(moved.any()) else self.b_enc


@torch.no_grad()
def portable(sae: SAE) -> Portable:
    """The portable form of an SAE of ours.

    Raises:
        UsageError: its sparsifier is a user's own, or selects twice.
    """
    if sae.sparsifier.refine:
        raise UsageError("this SAE selects twice (sae.refine), which no other library's does; train one without")
    shift = _shift(sae.sparsifier)
    centre, b_dec = sae.centre, sae.b_dec.detach().clone()
    if sae.W_skip is not None and centre is not None:
        b_dec -= centre @ sae.W_skip
    return Portable(
        W_enc=sae.W_enc.detach().clone(memory_format=torch.contiguous_format),
        b_enc=sae.b_enc.detach() - shift,
        W_dec=sae.W_dec.detach().clone(),
        b_dec=b_dec,
        rule=_rule(sae, shift),
        tied=centre is None,
        centre=centre,
        transcodes=sae.config.transcodes,
        W_skip=None if sae.W_skip is None else sae.W_skip.detach().clone(),
    )


def _shift(sparsifier: Any) -> Tensor:
    """What is subtracted from the pre-latents so that a gate is at 0, and so is a cut below 0, which raises them."""
    threshold: Tensor | None = sparsifier.threshold if isinstance(sparsifier, Penalised) else None
    if threshold is None:
        return torch.zeros(())
    return threshold if isinstance(sparsifier, Gated) else threshold.clamp_max(0)


def _rule(sae: SAE, shift: Tensor) -> Rule:
    sparsifier: Any = sae.sparsifier
    rule: Rule | None = None
    if type(sparsifier).__module__.startswith("sae.sparsifiers."):  # a user's own may be a subclass of one of these
        match sparsifier:
            case Gated():
                r = sparsifier.r_mag.detach().clone()
                rule = Gate(r, sparsifier.c_mag.detach() + shift * r.exp())
            case Penalised():
                cut = sparsifier.threshold
                rule = Positive() if cut is None or cut <= 0 else Above(cut.expand(sae.d_sae).clone())
            case TopK():
                rule = Largest(int(sparsifier.k))
            case BatchTopK():
                cut = sparsifier.edge(torch.zeros(1, sae.d_sae))[0]
                rule = Above(cut.clamp_min(0).expand(sae.d_sae).clone(), float(sparsifier.k))
            case JumpReLU():
                rule = Above(sparsifier.threshold.detach().clone())
            case MatchingPursuit():
                rule = Pursuit(sparsifier.pursuit_steps)
    if rule is None:
        raise UsageError(
            f"kind {sae.config.kind!r} selects in its own way ({type(sparsifier).__name__}), which no other "
            "library knows; save it with model.save"
        )
    return rule


@torch.no_grad()
def built(given: Portable) -> SAE:
    """An SAE of ours that computes the same, ready for inference."""
    options: dict[str, Any] = {"d_sae": given.d_sae, "unit_norm_decoder": has_unit_rows(given.W_dec)}
    own = _options(given.rule)
    if isinstance(given.rule, Pursuit) and (given.transcodes or not given.tied or not has_unit_rows(given.W_dec)):
        raise UsageError(
            "a matching pursuit must reconstruct its input less b_dec, with decoder rows of norm 1; save one that does"
        )
    if isinstance(given.rule, Largest | Pursuit) and not 1 <= given.rule.k <= given.d_sae:
        raise UsageError(f"k must lie in 1..d_sae={given.d_sae}, got {given.rule.k}; write the file again")
    if given.transcodes:
        options |= {"kind": "transcoder" if given.W_skip is None else "skip_transcoder", "base": own}
    else:
        options |= own | {"tied_bias": given.tied}
    sae = SAE(given.d_in, SAEConfig.of_kind(options), given.d_out)
    sae.encoder.copy_(given.W_enc.T)
    sae.W_dec.copy_(given.W_dec)
    sae.b_enc.copy_(given.bias(subtracts_b_dec=given.tied))
    sae.b_dec.copy_(given.b_dec)
    if sae.W_skip is not None and given.W_skip is not None:
        sae.W_skip.copy_(given.W_skip)
    _set_(sae.sparsifier, given.rule)
    return sae.eval().requires_grad_(False)


def _options(rule: Rule) -> dict[str, Any]:
    """The kind, with its options."""
    match rule:
        case Positive():
            return {"kind": "relu", "l1_coefficient": 0.0}
        case Largest(k=k):
            return {"kind": "topk", "k": k}
        case Above(k=k) if k is not None and rule.is_one:
            return {"kind": "batchtopk", "k": k}
        case Above():
            return {"kind": "jumprelu", "l0_coefficient": 0.0}
        case Gate():
            return {"kind": "gated", "l1_coefficient": 0.0}
        case Pursuit(k=k):
            return {"kind": "matching_pursuit", "k": k}


def _set_(sparsifier: Any, rule: Rule) -> None:
    match rule:
        case Above():
            same = isinstance(sparsifier, BatchTopK)
            sparsifier.threshold.copy_(rule.threshold[0] if same else rule.threshold)
        case Gate():
            sparsifier.r_mag.copy_(rule.r)
            sparsifier.c_mag.copy_(rule.c)


def has_unit_rows(W_dec: Float[Tensor, "d_sae d"]) -> bool:
    """Whether all decoder rows have norm 1, to the accuracy of 16 bits."""
    return bool((W_dec.norm(dim=1) - 1).abs().max() < UNIT)
