"""Nested dictionaries: the first latents must reconstruct as well as they can by themselves."""

from __future__ import annotations

from typing import ClassVar, Literal

from sae.sparsifiers.batchtopk import BatchTopKConfig

# Widths of the default, as parts of all latents: each prefix is twice as wide as the one before.
PARTS = (16, 8, 4, 2, 1)


class MatryoshkaConfig(BatchTopKConfig):
    """BatchTopK SAE whose prefixes reconstruct (Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka
    Sparse Autoencoders")."""

    serves_as_base: ClassVar[bool] = False

    kind: Literal["matryoshka"] = "matryoshka"  # type: ignore[assignment]

    @property
    def widths(self) -> tuple[int, ...]:
        """The prefixes; default d_sae / 16, / 8, / 4, / 2 and d_sae, as far as these are different numbers above 0."""
        return self.prefixes or tuple(sorted({self.d_sae // part for part in PARTS} - {0}))
