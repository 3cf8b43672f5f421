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

Numbers = float | Float[Tensor, "..."]
"""One number for all the features, or a tensor that broadcasts to one for each, [*stack, n_features]."""

POINTS = (24, 12, 6, 4)
"""Points per axis when 1, 2, 3, 4 other features fire: the more fire together, the rarer and the smoother it is.

Relative error of the loss, judged by four times as many: at most 4e-5 at the minima that the experiments compare,
2e-5 at random weights for p ≤ .5, 4e-4 at p = 1 (tests/test_toy_theory.py holds it to 1e-4, 1e-4 and 1e-3)."""


def variance(p: Numbers) -> Float[Tensor, "..."]:
    """Var x = p/3 − p²/4 of x ~ Bernoulli(p) · U[0, 1]: what it costs to drop a feature."""
    p = torch.as_tensor(p, dtype=torch.float64)
    return p / 3 - p.square() / 4


def linear_loss(importance: Float[Tensor, "... n_features"], p: Numbers, d_hidden: int) -> Float[Tensor, "..."]:
    """The least loss of y = x W Wᵀ + b: Σ_{i>m} I_i (p/3 − p²/4), with features in order of I_i (p/3 − p²/4).

    No matrix of rank m does better (Eckart & Young 1936), and keeping the first m features does as well.
    """
    cost = torch.as_tensor(importance, dtype=torch.float64) * variance(p)
    return cost.sort(dim=-1, descending=True).values[..., d_hidden:].sum(-1)


def antipodal_loss(importance: Float[Tensor, "... 2"], p: Numbers) -> Float[Tensor, "..."]:
    """Two features at W = [1, −1], b = 0: (I_1 + I_2) p²/6.

    They disturb each other only when both fire: x_1 is read as relu(x_1 − x_2), and E min(x_1, x_2)² = 1/6.
    """
    each = torch.ones_like(importance) * torch.as_tensor(p, dtype=torch.float64)
    return importance.sum(-1) * each.prod(-1) / 6


class Nodes(NamedTuple):
    """E f(x) = Σ_node P(set of the node) · volume · f(x), where the set is that of the features that fire."""

    x: Float[Tensor, "nodes n_features"]
    volume: Float[Tensor, " nodes"]
    of_set: Int[Tensor, " nodes"]
    fires: Bool[Tensor, "sets n_features"]


@cache
def nodes(n_features: int, points: tuple[int, ...] = POINTS) -> Nodes:
    """Gauss–Legendre points in the cube of each set of features; points[k − 1] per axis when k fire.

    Raises:
        ValueError: points are not given for as many features.
    """
    if len(points) < n_features:
        raise ValueError(f"points are given for up to {len(points)} features at once, got {n_features}; give more")
    sets = list(product((False, True), repeat=n_features))
    x: list[tuple[float, ...]] = []
    volume: list[float] = []
    of_set: list[int] = []
    for number, firing in enumerate(sets):
        k = sum(firing)
        on, weight = np.polynomial.legendre.leggauss(points[k - 1] if k else 1)  # on [−1, 1]
        x += product(*((on + 1) / 2 if fires else (0.0,) for fires in firing))
        volume += [prod(along_axes) for along_axes in product(weight / 2, repeat=k)]
        of_set += [number] * len(on) ** k
    # From NumPy arrays, because torch.tensor reads lists of NumPy floats one at a time.
    at = torch.from_numpy(np.array(x, dtype=np.float64).reshape(len(x), n_features))
    return Nodes(at, torch.from_numpy(np.array(volume)), torch.tensor(of_set), torch.tensor(sets, dtype=torch.bool))


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
    others = torch.tensor([[j for j in range(n) if j != i] for i in range(n)], dtype=torch.long)
    x, volume, of_set, fires = nodes(n - 1, points)
    p_others = rearrange(p[..., others], "... n j -> ... n 1 j")
    p_set = torch.where(fires, p_others, 1 - p_others).prod(-1)
    gram = W @ W.mT
    c = einsum(gram.gather(-1, others.expand(*b.shape, n - 1)), x, "... n j, node j -> ... n node") + b[..., None]
    a = gram.diagonal(dim1=-2, dim2=-1)[..., None]
    own = p[..., None]
    error = (1 - own) * c.relu().square() + own * _error_when_firing(a, c)
    return einsum(error, p_set[..., of_set], volume, importance, "... n node, ... n node, node, ... n -> ...")


def _error_when_firing(a: Float[Tensor, "*#stack"], c: Float[Tensor, "*stack"]) -> Float[Tensor, "*stack"]:
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

    Each start is on its own: it stops when no entry of its gradient exceeds `tolerance`, or when no step helps any
    more. A saddle that a symmetry of the start protects is a stop too; try other starts.
    """
    stack, n, m = b.shape[:-1], *W.shape[-2:]
    probs, weights = (torch.as_tensor(g, dtype=torch.float64).expand(b.shape).reshape(-1, n) for g in (p, importance))
    at = torch.cat([W.flatten(-2), b], dim=-1).double().reshape(-1, n * m + n)

    def split(at: Tensor) -> tuple[Tensor, Tensor]:
        return at[:, : n * m].unflatten(1, (n, m)), at[:, n * m :]

    def evaluate(at: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            losses = expected_loss(*split(at), probs[rows], weights[rows], points)
            return losses.detach(), torch.autograd.grad(losses.sum(), at)[0]

    rows = torch.arange(len(at))  # the starts still on their way
    loss, gradient = evaluate(at, rows)
    eye = torch.eye(at.shape[1], dtype=at.dtype)
    inverse = eye.repeat(len(at), 1, 1)  # of the Hessian, as far as it is known
    known, size = torch.zeros(len(at), dtype=torch.bool), torch.ones_like(loss)
    for _ in range(max_evaluations):
        rows = rows[(gradient[rows].abs().amax(1) > tolerance) & (size[rows] > 1e-10)]
        if not len(rows):
            break
        step = -size[rows, None] * einsum(inverse[rows], gradient[rows], "i j k, i k -> i j")
        new_loss, new_gradient = evaluate(at[rows] + step, rows)
        good = new_loss <= loss[rows] + 1e-4 * (gradient[rows] * step).sum(1)
        size[rows] = torch.where(good, 1.0, size[rows] / 4)
        moved, step, change = rows[good], step[good], (new_gradient - gradient[rows])[good]
        at[moved], loss[moved], gradient[moved] = at[moved] + step, new_loss[good], new_gradient[good]
        inverse[moved] = _bfgs(inverse[moved], step, change, known[moved])
        known[moved] = True
    W, b = split(at)
    return Minimum(W.reshape(*stack, n, m), b.reshape(*stack, n), loss.reshape(stack))


def _bfgs(
    inverse: Float[Tensor, "starts n n"],
    step: Float[Tensor, "starts n"],
    change: Float[Tensor, "starts n"],
    known: Bool[Tensor, " starts"],
) -> Float[Tensor, "starts n n"]:
    """H ← (1 − ρ s yᵀ) H (1 − ρ y sᵀ) + ρ s sᵀ with ρ = 1/sᵀy, after a step s that changed the gradient by y.

    The first step also gives the scale of H, sᵀy/yᵀy; a step along which the loss is not convex leaves H alone.
    Source: Nocedal & Wright 2006, equations 6.17 and 6.20.
    """
    curvature = (step * change).sum(1)
    convex = curvature > 1e-12 * step.norm(dim=1) * change.norm(dim=1)
    rho = 1 / curvature.where(convex, 1)
    scale = torch.where(known | ~convex, 1, curvature / change.square().sum(1))
    reflect = torch.eye(step.shape[1], dtype=step.dtype) - einsum(rho, step, change, "i, i j, i k -> i j k")
    updated = scale[:, None, None] * (reflect @ inverse @ reflect.mT)
    updated += einsum(rho, step, step, "i, i j, i k -> i j k")
    return torch.where(convex[:, None, None], updated, inverse)
