"""BatchTopK that selects twice, and begins with many codes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from sae.sparsifiers.batchtopk import BatchTopKConfig

# k at the beginning, in units of k. More finds more features in small worlds and leaves more of a language model's
# activations unexplained (docs/architectures.md).
START = 2


class RefinedConfig(BatchTopKConfig):
    """BatchTopK whose codes are selected a second time, from what the first leave over (after Gregor & LeCun 2010,
    "Learning Fast Approximations of Sparse Coding")."""

    kind: Literal["refined"] = "refined"  # type: ignore[assignment]
    refine: float = Field(default=0.3, gt=0, le=1)
    """The part of what the first codes leave over that is added to the activation."""
    k_start: float | None = Field(default=None, gt=0)
    """k at the beginning, from where it falls linearly to k; default 2 k, null: k throughout."""
    k_anneal_fraction: float = Field(default=0.5, gt=0, le=1)
    """First part of the run over which k falls."""

    @model_validator(mode="before")
    @classmethod
    def _begins_with_many(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "k_start" in given:
            return given
        k, d_sae = given.get("k"), given.get("d_sae")
        if not isinstance(k, int | float) or not isinstance(d_sae, int) or not 0 < k < d_sae:
            return given  # refused elsewhere
        return given | {"k_start": min(START * k, d_sae)}
