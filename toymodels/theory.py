"""What a toy model should do, without training one: its expected loss, and the weights that minimise it.

The features x_i ~ Bernoulli(p_i) · U[0, 1] are independent, so the expected loss of an output is a sum over the sets
of features that fire of integrals over a cube. The output's own feature is integrated in closed form, the others by
Gauss–Legendre points. That also takes the edge off the ReLU: what is left is smooth enough for few points.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

Numbers = float | Float[Tensor, "*stack n_features"]
"""One number for all the features, or one for each."""

POINTS = (24, 12, 8, 6)
"""Points per axis when 1, 2, 3, 4 other features fire: the more fire together, the rarer and the smoother it is.

Relative error of the loss, against four times as many points: below 2e-5 at the optima of this package's
experiments and 2e-4 at random weights, p up to .5 (tests/test_toy_theory.py)."""


def variance(p: Numbers) -> Float[Tensor, "*stack"]:
    """Var x = p/3 − p²/4 of x ~ Bernoulli(p) · U[0, 1]: what it costs to drop a feature."""
    p = torch.as_tensor(p, dtype=torch.float64)
    return p / 3 - p.square() / 4


def linear_loss(importance: Float[Tensor, "*stack n_features"], p: Numbers, d_hidden: int) -> Float[Tensor, "*stack"]:
    """The least loss of y = x W Wᵀ + b: Σ_{i>m} I_i (p/3 − p²/4), with features in order of I_i (p/3 − p²/4).

    No matrix of rank m does better (Eckart & Young 1936), and keeping the first m features does as well.
    """
    cost = torch.as_tensor(importance, dtype=torch.float64) * variance(p)
    return cost.sort(dim=-1, descending=True).values[..., d_hidden:].sum(-1)


def antipodal_loss(importance: Float[Tensor, "*stack 2"], p: Numbers) -> Float[Tensor, "*stack"]:
    """Two features at W = [1, −1], b = 0: (I_1 + I_2) p²/6.

    They disturb each other only when both fire: x_1 is read as relu(x_1 − x_2), and E min(x_1, x_2)² = 1/6.
    """
    importance = torch.as_tensor(importance, dtype=torch.float64)
    return importance.sum(-1) * torch.as_tensor(p, dtype=torch.float64).expand_as(importance).prod(-1) / 6


class Nodes(NamedTuple):
    """E f(x) = Σ_node P(set) · volume · f(x), where the set of a node is the set of features that fire."""

    x: Float[Tensor, "nodes n_features"]
    volume: Float[Tensor, " nodes"]
    set: Int[Tensor, " nodes"]
    fires: Bool[Tensor, "sets n_features"]


@cache
def nodes(n_features: int, points: tuple[int, ...] = POINTS) -> Nodes:
    """Gauss–Legendre points in the cube of each set of features; points[k − 1] per axis when k fire.

    Raises:
        ValueError: points are not given for as many features.
    """
    if len(points) < n_features:
        raise ValueError(f"points are given for up to {len(points)} features at once, got {n_features}; give more")
    fires = list(product((False, True), repeat=n_features))
    x, volume = [], []
    for firing in fires:
        at, weight = np.polynomial.legendre.leggauss(points[sum(firing) - 1]) if any(firing) else ([], [])
        axes = [(np.asarray(at) + 1) / 2 if on else [0.0] for on in firing]
        weights = [np.asarray(weight) / 2 if on else [1.0] for on in firing]
        x += list(product(*axes))
        volume.append(torch.tensor([prod(choice) for choice in product(*weights)], dtype=torch.float64))
    sets = torch.arange(len(fires)).repeat_interleave(torch.tensor([len(v) for v in volume]))
    return Nodes(torch.tensor(x, dtype=torch.float64).view(-1, n_features), torch.cat(volume), sets, torch.tensor(fires))


def expected_loss(
    W: Float[Tensor, "*stack n_features d_hidden"],
    b: Float[Tensor, "*stack n_features"],
    p: Numbers,
    importance: Numbers = 1.0,
    points: tuple[int, ...] = POINTS,
) -> Float[Tensor, "*stack"]:
    """L = E Σ_i I_i (x_i − relu(W W_i · x + b_i))², in float64, differentiable once.

    With a = ‖W_i‖² and c = b_i + Σ_{j≠i} W_i·W_j x_j, output i is relu(a x_i + c), so that

        L = Σ_i I_i E_{x_j, j≠i} [ (1 − p_i) relu(c)² + p_i A(a, c) ],    A = ∫₀¹ (t − relu(a t + c))² dt.

    The expectation costs 2^(n − 1) sets of features: for few features.
    """
    W, b = W.double(), b.double()
    n = W.shape[-2]
    p, importance = (torch.as_tensor(numbers, dtype=torch.float64).expand_as(b) for numbers in (p, importance))
    others = torch.tensor([[j for j in range(n) if j != i] for i in range(n)])
    x, volume, of_set, fires = nodes(n - 1, points)
    p_others = rearrange(p[..., others], "... n j -> ... n 1 j")
    p_set = torch.where(fires, p_others, 1 - p_others).prod(-1)
    gram = W @ W.mT
    c = einsum(gram.gather(-1, others.expand(*b.shape, n - 1)), x, "... n j, node j -> ... n node") + b[..., None]
    a = gram.diagonal(dim1=-2, dim2=-1)[..., None]
    own = p[..., None]
    error = (1 - own) * c.relu().square() + own * _error_when_firing(a, c)
    return einsum(error, p_set[..., of_set], volume, importance, "... n node, ... n node, node, ... n -> ...")


def _error_when_firing(a: Float[Tensor, "*stack"], c: Float[Tensor, "*stack"]) -> Float[Tensor, "*stack"]:
    """A(a, c) = ∫₀¹ (t − relu(a t + c))² dt for a ≥ 0: silent below t = s, then ((1 − a) t − c)².

    The integrand is continuous at s, so that the gradient does not see s move.
    """
    s = (-c / a.clamp(min=1e-300)).clamp(0, 1).detach()
    slope = 1 - a
    return (s**3 + slope**2 * (1 - s**3)) / 3 - slope * c * (1 - s**2) + c**2 * (1 - s)


class Minimum(NamedTuple):
    """Weights at a local minimum of the expected loss, one for each start of a stack."""

    W: Float[Tensor, "*stack n_features d_hidden"]
    b: Float[Tensor, "*stack n_features"]
    loss: Float[Tensor, "*stack"]


def minimise(
    W: Float[Tensor, "*stack n_features d_hidden"],
    b: Float[Tensor, "*stack n_features"],
    p: Numbers,
    importance: Numbers = 1.0,
    *,
    points: tuple[int, ...] = POINTS,
    tolerance: float = 1e-9,
    max_evaluations: int = 500,
) -> Minimum:
    """Follows the expected loss downhill from each start to the minimum of its basin, by BFGS.

    Exact symmetries of a start are kept, also where breaking them would pay: a row W_i = 0 stays 0. Each start
    is on its own: it stops when no entry of its gradient exceeds `tolerance`, or when no step helps any more.
    """
    stack, n, m = b.shape[:-1], *W.shape[-2:]
    table = [torch.as_tensor(given, dtype=torch.float64).expand(b.shape).reshape(-1, n) for given in (p, importance)]
    at = torch.cat([W.flatten(-2), b], dim=-1).double().reshape(-1, n * m + n)

    def split(at: Tensor) -> tuple[Tensor, Tensor]:
        return at[:, : n * m].unflatten(1, (n, m)), at[:, n * m :]

    def evaluate(at: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            loss = expected_loss(*split(at), *(given[rows] for given in table), points)
            return loss.detach(), torch.autograd.grad(loss.sum(), at)[0]

    rows = torch.arange(len(at))  # the starts still on their way
    loss, gradient = evaluate(at, rows)
    eye = torch.eye(at.shape[1], dtype=at.dtype)
    inverse = eye.repeat(len(at), 1, 1)  # of the Hessian
    fresh, size = torch.ones(len(at), dtype=torch.bool), torch.ones(len(at), dtype=at.dtype)
    for _ in range(max_evaluations):
        rows = rows[(gradient[rows].abs().amax(1) > tolerance) & (size[rows] > 1e-10)]
        if not len(rows):
            break
        g, H = gradient[rows], inverse[rows]
        step = -size[rows, None] * einsum(H, g, "i j k, i k -> i j")
        new_loss, new_gradient = evaluate(at[rows] + step, rows)
        good = new_loss <= loss[rows] + 1e-4 * (g * step).sum(1)
        size[rows] = torch.where(good, 1.0, size[rows] / 4)
        step, change, H, moved = step[good], (new_gradient - g)[good], H[good], rows[good]
        at[moved], loss[moved], gradient[moved] = at[moved] + step, new_loss[good], new_gradient[good]
        curvature = (step * change).sum(1)
        # The first step tells the scale of the Hessian (Nocedal & Wright 2006, equations 6.20 and 6.17).
        scale = torch.where(fresh[moved], curvature / change.square().sum(1), 1.0)
        H, fresh[moved] = H * scale[:, None, None], False
        rho = (1 / curvature)[:, None, None]
        reflect = eye - rho * einsum(step, change, "i j, i k -> i j k")
        H = reflect @ H @ reflect.mT + rho * einsum(step, step, "i j, i k -> i j k")
        convex = curvature > 1e-14 * step.norm(dim=1) * change.norm(dim=1)
        inverse[moved] = torch.where(convex[:, None, None], H, eye)
        fresh[moved[~convex]] = True
    W, b = split(at)
    return Minimum(W.reshape(*stack, n, m), b.reshape(*stack, n), loss.reshape(stack))
