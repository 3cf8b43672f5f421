"""A dense step in torch as one would tune it: autograd, compiled, products in bf16, fused Adam, unit decoder rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae.bench.shapes import Shape


class Dense(nn.Module):
    """|x - (z W_dec + b_dec)|^2, z = selection((x - b_dec) W_enc + b_enc), with an L1 penalty for `relu`."""

    def __init__(self, kind: str, shape: Shape, l1: float) -> None:
        super().__init__()
        self.kind, self.k, self.l1 = kind, shape.k, l1
        rows = nn.functional.normalize(torch.randn(shape.d_sae, shape.d_in))
        self.W_enc, self.W_dec = nn.Parameter(rows.T.contiguous()), nn.Parameter(rows)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(shape.d_sae)), nn.Parameter(torch.zeros(shape.d_in))

    def codes(self, x: Tensor) -> Tensor:
        """z [batch, d_sae]."""
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc.to(torch.bfloat16)
        z = pre.relu()
        if self.kind == "topk":
            values, latents = z.topk(self.k, dim=1, sorted=False)
            z = torch.zeros_like(z).scatter(1, latents, values)
        elif self.kind == "batchtopk":
            cut = z.detach().flatten().topk(self.k * len(x), sorted=False).values.min()
            z = z * (z >= cut)
        return z

    def forward(self, x: Tensor) -> Tensor:
        z = self.codes(x)
        loss = (x - z @ self.W_dec - self.b_dec).float().square().sum(dim=1).mean()
        return loss + self.l1 * z.float().sum(dim=1).mean() if self.kind == "relu" else loss

    @torch.no_grad()
    def project(self) -> None:
        """Takes what changes a row's norm out of the gradient."""
        g = self.W_dec.grad
        assert g is not None
        g -= (g * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def renormalise(self) -> None:
        """Puts rows back to norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


class DenseStep:
    """One training step; on CUDA its parts are compiled."""

    def __init__(self, kind: str, shape: Shape, lr: float, device: str, l1: float) -> None:
        self.device = torch.device(device).type
        self.model = model = Dense(kind, shape, l1).to(device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        self.loss: Any = model
        self.project, self.renormalise = model.project, model.renormalise
        if self.device == "cuda":
            self.loss = torch.compile(model)
            self.project, self.renormalise = torch.compile(model.project), torch.compile(model.renormalise)

    def __call__(self, x: Tensor) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.loss(x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.project()
        self.optimizer.step()
        self.renormalise()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and x_hat."""
        with torch.autocast(self.device, torch.bfloat16):
            z = self.model.codes(x)
            return z, z @ self.model.W_dec + self.model.b_dec
