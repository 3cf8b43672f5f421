"""Which tokens a latent makes likelier: its decoder row, seen through the unembedding of the language model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# Latents whose logits exist together.
AT_ONCE = 64


class Logits(NamedTuple):
    """Of some latents, the tokens at both ends of their logits, in standard deviations over the vocabulary."""

    raised: Int[Tensor, "latents n"]
    raised_by: Float[Tensor, "latents n"]
    lowered: Int[Tensor, "latents n"]
    lowered_by: Float[Tensor, "latents n"]


@torch.no_grad()
def logits_of(model: Any, rows: Float[Tensor, "latents d"], n: int) -> Logits | None:
    """The n tokens that each row raises most, and the n that it lowers most, where it is added to the residual stream
    of a causal language model of `transformers`; None where it has another width than that.

        l = W_U (gamma * (w - mean w)),    then (l - mean l) / sd l over the vocabulary

    gamma is the scale of the model's last norm; of an RMSNorm the mean stays. What the norm divides by, and what layers
    in between do, is left out ("logit lens", nostalgebraist 2020).
    """
    head = model.get_output_embeddings()
    if head is None or head.weight.shape[1] != rows.shape[1]:
        return None
    unembedding = head.weight.float()
    rows = rows.to(unembedding.device)
    norm = _last_norm(model.base_model, rows.shape[1])
    if norm is not None:
        scale, centres = _scale_of(norm, unembedding)
        rows = scale * (rows - rows.mean(dim=1, keepdim=True) if centres else rows)
    parts = []
    for part in rows.split(AT_ONCE):
        logits = part @ unembedding.T
        logits = (logits - logits.mean(dim=1, keepdim=True)) / logits.std(dim=1, keepdim=True).clamp_min(1e-30)
        up, down = logits.topk(n), (-logits).topk(n)
        parts.append((up.indices.cpu(), up.values.cpu(), down.indices.cpu(), -down.values.cpu()))
    return Logits(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _last_norm(body: nn.Module, width: int) -> nn.Module | None:
    """The norm behind all layers: the last one that is not in a list of layers."""
    norms = [
        module
        for name, module in body.named_modules()
        if "norm" in type(module).__name__.lower()
        and not any(part.isdigit() for part in name.split("."))
        and getattr(module, "weight", None) is not None
        and module.weight.shape == (width,)
    ]
    return norms[-1] if norms else None


def _scale_of(norm: nn.Module, like: Tensor) -> tuple[Float[Tensor, " d"], bool]:
    """What it multiplies by, and whether it subtracts the mean. The norm itself is asked, as models keep the scale in
    several ways (Gemma keeps it less 1)."""
    x = torch.ones(like.shape[1], device=like.device, dtype=next(norm.parameters()).dtype)
    x[1::2] = -1  # of mean 0 and mean square 1
    out = norm(x)
    scale = (out - norm(-x)).float() / 2 * x.float()
    return scale, bool(torch.allclose(norm(x + 3).float(), out.float(), atol=1e-2, rtol=1e-2))
