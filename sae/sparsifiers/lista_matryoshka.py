"""Nested dictionaries whose prefixes hold the most frequent latents, and whose codes are selected twice."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sae.sparsifiers.matryoshka import MatryoshkaConfig


class ListaMatryoshkaConfig(MatryoshkaConfig):
    """Matryoshka with detached prefixes, sorted by frequency, and codes that are selected twice (after Chanin 2026,
    "Letting Claude do Autonomous Research to Improve SAEs")."""

    kind: Literal["lista_matryoshka"] = "lista_matryoshka"  # type: ignore[assignment]
    refine: float = Field(default=0.3, ge=0, le=1)
    """Fraction of the first codes' residual that is added to the activation."""
    detach_prefixes: bool = True
    """Each prefix but the last trains only the latents it adds, and takes the reconstruction of narrower ones as
    given."""
    sort_prefixes: bool = True
    """Prefixes consist of the latents that fire most often; the trained SAE has its latents in this order."""
