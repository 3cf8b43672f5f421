"""BatchTopK that selects twice, and starts with many codes."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from sae.sparsifiers.batchtopk import BatchTopK, BatchTopKConfig

# k at the beginning, in units of k. More finds more features in small worlds and leaves more of a language model's
# activations unexplained (docs/architectures.md).
START = 2


class RefinedConfig(BatchTopKConfig):
    """BatchTopK whose codes are selected a second time, with the residual of the first (after Gregor & LeCun 2010,
    "Learning Fast Approximations of Sparse Coding")."""

    serves_as_base: ClassVar[bool] = False

    kind: Literal["refined"] = "refined"  # type: ignore[assignment]
    refine: float = Field(default=0.3, gt=0, le=1)
    """Fraction of the first codes' residual that is added to the activation."""
    k_start: float | None = Field(default=None, gt=0)
    """Initial k, annealed linearly to k. Default min(2 k, d_sae); set it to k to disable annealing."""
    k_anneal_fraction: float = Field(default=0.5, gt=0, le=1)
    """Fraction of the run, from its start, over which k is annealed."""

    @field_validator("refine", mode="before")
    @classmethod
    def _selects_twice(cls, refine: object) -> object:
        if isinstance(refine, int | float) and refine <= 0:
            raise ValueError(f"must lie above 0, got {refine:g}; kind batchtopk selects once")
        return refine

    def build(self) -> BatchTopK:
        start = min(START * self.k, float(self.d_sae)) if self.k_start is None else self.k_start
        return BatchTopK(self.k, start, self.k_anneal_fraction, self.refine)
