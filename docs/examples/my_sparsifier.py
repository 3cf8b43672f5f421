"""GroupMax: the latents compete in groups, and the largest of each group fires.

A local winner-take-all (Srivastava et al. 2013, "Compete to Compute") as the activation of an SAE: at most
n_groups latents fire, as in TopK with k = n_groups, but no row has to be ranked as a whole.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sae import SAEConfig, SparseCodes, Sparsifier


class GroupMaxConfig(SAEConfig):
    """SAE whose latents compete in groups (Srivastava et al. 2013)."""

    kind: Literal["groupmax"] = "groupmax"
    n_groups: int = Field(gt=0)
    """Groups of consecutive latents; one latent of each may fire."""
    aux_coefficient: float = Field(default=1.0, ge=0)
    """Weight of AuxK, the loss that revives dead latents (0 turns it off)."""

    @model_validator(mode="after")
    def _groups_divide_the_latents(self) -> GroupMaxConfig:
        if self.d_sae % self.n_groups:
            raise ValueError(f"n_groups must divide d_sae={self.d_sae}, got {self.n_groups}; change one of them")
        return self

    def build(self) -> GroupMax:
        return GroupMax(self.n_groups)


class GroupMax(Sparsifier):
    """z = max(0, pre) on the largest pre-latent of each group, 0 elsewhere."""

    passes_pre_latents = True

    def __init__(self, n_groups: int) -> None:
        super().__init__()
        self.n_groups = n_groups

    def forward(self, pre_latents: Float[Tensor, "batch d_sae"]) -> SparseCodes:
        d_sae = pre_latents.shape[1]
        groups = rearrange(pre_latents, "b (g f) -> b g f", g=self.n_groups)
        scores, winners = groups.max(dim=2)
        first = torch.arange(0, d_sae, d_sae // self.n_groups, device=pre_latents.device)
        return SparseCodes(scores.relu(), first + winners, d_sae)
