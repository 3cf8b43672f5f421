"""What metrics need of a baseline: a dictionary, and a function from activations to codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sae.codes import SparseCodes

Codes: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Baseline:
    """A dictionary and a function from x - b_dec to codes z >= 0; x_hat = z W_dec + b_dec."""

    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    code: Codes

    def encode(self, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """Its codes."""
        z = self.code(x - self.b_dec)
        return SparseCodes.where(z > 0, z)

    def decode(self, codes: SparseCodes, x: Tensor | None = None) -> Float[Tensor, "batch d_in"]:
        """z W_dec + b_dec."""
        return codes.decode(self.W_dec) + self.b_dec

    def pre_latents(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Correlation with each direction: what any selection starts from."""
        return (x - self.b_dec) @ self.W_dec.T


def signed_pairs(rows: Float[Tensor, "n d_in"], b_dec: Float[Tensor, " d_in"], code: Codes) -> Baseline:
    """Rows whose codes have either sign, each as two latents: +w with the codes above 0, -w with those below.

    Cosines with the features are signed and codes are nonnegative, so a row without a sign is entered twice. A latent
    whose sign is never used is dead, and matches nothing.
    """

    def both(x: Tensor) -> Tensor:
        signed = code(x)
        return torch.cat([signed, -signed], dim=1).relu()

    return Baseline(torch.cat([rows, -rows]), b_dec, both)
