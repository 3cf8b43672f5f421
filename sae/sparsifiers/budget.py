"""How many latents may fire, and how that number is annealed at the start of training."""

from __future__ import annotations

from pydantic import Field, model_validator

from sae.config import SAEConfig
from sae.kernels import Scalar
from sae.sparsifiers.base import Sparsifier


class BudgetConfig(SAEConfig):
    """An SAE with a given number of latents that fire."""

    k: float = Field(gt=0)
    """Latents that fire for one activation."""
    unit_norm_decoder: bool = False
    """Keep decoder rows at norm 1. Off: each latent learns how large its pre-latents are relative to the others'."""
    k_start: float | None = Field(default=None, gt=0)
    """Initial k, annealed linearly to k; default no annealing."""
    k_anneal_fraction: float = Field(default=0.1, gt=0, le=1)
    """Fraction of the run, from its start, over which k is annealed, if k_start is given."""
    refine: float = Field(default=0.0, ge=0, le=1)
    """Codes are selected twice, the second time from the activation plus this fraction of the first residual. 0:
    once."""
    # Not the paper's 1/32: on the toy model BatchTopK's FVU .070 -> .053 and MCC .958 -> .991, TopK's .069 -> .068 and
    # .996 -> .998; on the Zipf set FVU stays, MCC rises by .005 to .015; synth1k stays.
    aux_coefficient: float = Field(default=1.0, ge=0)
    """Weight of AuxK, the loss that revives dead latents (0 turns it off)."""

    @model_validator(mode="after")
    def _k_fits(self) -> BudgetConfig:
        require_k_fits(self.k, self.d_sae)
        if self.k_start is not None and not self.k <= self.k_start <= self.d_sae:
            raise ValueError(
                f"k_start must lie in k={self.k:g}..d_sae={self.d_sae}, got {self.k_start:g}; give a number in "
                "between, from which k falls, or leave it out"
            )
        return self


class Budget(Sparsifier):
    """A sparsifier with a `k`, which may be annealed from `k_start` over the first part of a run.

    k(t) = k_start + (k - k_start) min(1, t / k_anneal_fraction) after a fraction t of training: many latents learn
    before only a few may fire (He et al. 2024, "Llama Scope", K-annealing). With `refine` there are two selections,
    both of k.
    """

    k: int | float

    def __init__(
        self, k: int | float, k_start: float | None = None, k_anneal_fraction: float = 0.1, refine: float = 0.0
    ) -> None:
        super().__init__()
        self.k = self.k_end = k
        self.k_start, self.k_anneal_fraction, self.refine = k_start, k_anneal_fraction, refine
        self.first = type(self)(k, k_start, k_anneal_fraction) if refine else None

    def anneal_(self, done: float) -> None:
        if self.first is not None:
            self.first.anneal_(done)
        if self.k_start is not None:
            left = max(1 - done / self.k_anneal_fraction, 0.0)
            self.k = self.allowed(self.k_end + left * (self.k_start - self.k_end))

    def details(self) -> dict[str, Scalar]:
        return {} if self.k_start in (None, self.k_end) else {"k": float(self.k)}

    def allowed(self, k: float) -> float:
        """The nearest k that can be asked for."""
        return k


def require_k_fits(k: int | float, d_sae: int) -> None:
    """Refuses to select more latents than there are."""
    if k > d_sae:
        raise ValueError(f"k must lie in 1..d_sae={d_sae}, got {k}; lower k or raise d_sae")
