"""Trains a whole stack of toy models at once.

The gradients of models with a linear or ReLU hidden layer are written by hand, because the autograd tape costs more
than the arithmetic at these sizes; other architectures, dropout and penalties go through autograd.
Two forms of the same equations share the work: one reads dense batches, the other only the active features,
which wins when few of them are (3× at n = 256, m = 64, p = .01). Tests judge both by autograd in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, prod
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from toymodels.errors import UsageError
from toymodels.features import FeatureBatch, Features
from toymodels.models import ToyModel
from toymodels.optim import AdamW

PerInstance = float | Float[Tensor, " n_instances"]


@dataclass(frozen=True, eq=False)
class ToyTraining:
    """What a training run leaves beside the trained model."""

    losses: Float[Tensor, "n_steps n_instances"]
    snapshots: Float[Tensor, "n_snapshots n_instances n_features d_hidden"]
    """W before step 0, every `snapshot_every` steps after it, and at the end; none unless asked for."""

    @property
    def final_losses(self) -> Float[Tensor, " n_instances"]:
        """Mean loss over the last twentieth of the run, where the cosine has all but stopped the weights."""
        return self.losses[-max(1, len(self.losses) // 20) :].mean(0)

    @property
    def best(self) -> int:
        """The instance with the lowest final loss."""
        return int(self.final_losses.argmin())


def weighted_error(
    x: Float[Tensor, "n_instances batch n_features"],
    y: Float[Tensor, "n_instances batch n_features"],
    importance: Float[Tensor, "*instances n_features"],
) -> Float[Tensor, " n_instances"]:
    """L = mean over the batch of Σ_i I_i (x_i − y_i)² (Elhage et al. 2022, section 2)."""
    return (reduce((x - y).square(), "i b n -> i n", "mean") * importance).sum(1)


@dataclass(frozen=True, eq=False)
class Objective:
    """What a model is trained for, beyond Σ_i I_i (x_i − y_i)². Each number may be one for each instance."""

    target: Callable[[Tensor], Tensor] | None = None
    """What y should be, as a function of x; default x itself. |x| is torch.abs."""
    dropout: PerInstance = 0.0
    """q: hidden units are zeroed with probability q, the others divided by 1 − q."""
    l1_hidden: PerInstance = 0.0
    """Weight of the mean over the batch of Σ_k |h_k|."""
    l1_weights: PerInstance = 0.0
    """Weight of Σ |W|, and of Σ |W_out| when it has weights of its own."""

    def __post_init__(self) -> None:
        for name in ("dropout", "l1_hidden", "l1_weights"):
            values = torch.as_tensor(getattr(self, name))
            if not ((values >= 0) & (values < (1 if name == "dropout" else torch.inf))).all():
                rule = "lie in [0, 1)" if name == "dropout" else "be finite and not negative"
                raise UsageError(f"{name} must {rule}, got {values.tolist()}")

    @property
    def is_error(self) -> bool:
        """Whether there is nothing but the weighted error of the target."""
        return not any(map(_is_on, (self.dropout, self.l1_hidden, self.l1_weights)))

    def loss(
        self,
        model: ToyModel,
        x: Float[Tensor, "n_instances batch n_features"],
        importance: Float[Tensor, "*instances n_features"],
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, " n_instances"], Float[Tensor, " n_instances"]]:
        """The weighted error of each instance, and the same with penalties added."""
        hidden = read = model.hidden(x)
        if _is_on(self.dropout):
            q = torch.as_tensor(self.dropout, device=x.device).expand(model.n_instances)[:, None, None]
            kept = torch.rand(hidden.shape, generator=generator, device=x.device) >= q
            read = hidden * kept / (1 - q)
        error = weighted_error(x if self.target is None else self.target(x), model.read(read), importance)
        total = error
        if _is_on(self.l1_hidden):
            total = total + self.l1_hidden * reduce(hidden.abs(), "i b d -> i", "sum") / x.shape[1]
        if _is_on(self.l1_weights):
            size = model.W.abs().sum((1, 2))
            if not model.tied:
                size = size + model.W_out.abs().sum((1, 2))
            total = total + self.l1_weights * size
        return error, total


def _is_on(cost: PerInstance) -> bool:
    """Whether a cost takes part. Numbers for each instance do, whatever they are: nothing waits for their values."""
    return not isinstance(cost, float | int) or cost > 0


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + cos(pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""The learning rate's factor, of the part of the run that is done."""


def train(
    model: ToyModel,
    features: Features,
    n_steps: int,
    batch_size: int = 1024,
    lr: float | None = None,
    *,
    generator: torch.Generator,
    objective: Objective = Objective(),
    weight_decay: float = 0.01,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    snapshot_every: int | None = None,
    progress: Callable[[int, Float[Tensor, " n_instances"]], None] | None = None,
) -> ToyTraining:
    """Trains every instance of the model, in place, on fresh batches of its own.

    AdamW; the learning rate (1e-2 up to 12 features, 5e-3 beyond) falls along a cosine or a line to 0, or is
    constant. `losses` are the weighted errors, under dropout if there is some, without penalties.
    `progress` is called after each step with its number and the losses before it.

    Raises:
        UsageError: the features do not fit the model, fewer than one step, or an unknown schedule.
    """
    if features.n_features != model.n_features:
        raise UsageError(
            f"the model reads n_features={model.n_features}, the features are {features.n_features}; "
            "build both with the same number"
        )
    if n_steps < 1:
        raise UsageError(f"n_steps must be at least 1, got {n_steps}")
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule must be one of {tuple(SCHEDULES)}, got {schedule!r}")
    if lr is None:
        lr = 1e-2 if model.n_features <= 12 else 5e-3
    importance = features.importances.to(model.W.device)
    by_hand = objective.is_error and model.hidden_activation in ("linear", "relu")
    plain = by_hand and objective.target is None and model.tied and model.hidden_activation == "linear"
    # Where the sparse forms are faster, measured over n = 20 ... 256, m = 5 ... 64, p = .01 ... 1.
    few = features.probs.sum() < model.d_hidden / 10 if plain else (1 - features.probs).prod() > 0.2
    sparse = by_hand and features.probs.ndim == 1 and bool(few)
    parameters = list(model.parameters())
    optimizer = AdamW(parameters, weight_decay)
    losses = torch.empty(n_steps, model.n_instances, device=model.W.device)
    snapshots = []
    # Dense batches reuse their memory: touching fresh memory costs more than the arithmetic.
    scratch = scratch_for(model, batch_size)
    for step in range(n_steps):
        if snapshot_every is not None and step % snapshot_every == 0:
            snapshots.append(model.W.detach().clone())
        x = (
            features.sample(batch_size, generator, model.n_instances)
            if sparse
            else features.sample_dense(batch_size, generator, model.n_instances, out=scratch[0].mT)
        )
        if by_hand:
            losses[step], *gradients = loss_and_gradients(model, x, importance, objective.target, scratch)
        else:
            assert isinstance(x, Tensor)
            error, total = objective.loss(model, x, importance, generator)
            losses[step] = error.detach()
            gradients = list(torch.autograd.grad(total.sum(), parameters))
        optimizer.step(gradients, lr * SCHEDULES[schedule](step / n_steps))
        if progress is not None:
            progress(step, losses[step])
    if snapshot_every is not None:
        snapshots.append(model.W.detach().clone())
    history = torch.stack(snapshots) if snapshots else model.W.new_empty(0, *model.W.shape)
    return ToyTraining(losses, history)


def scratch_for(model: ToyModel, batch_size: int) -> tuple[Tensor, ...]:
    """Memory in which loss_and_gradients computes: three tensors of outputs, of which x may be the first, two of h."""
    outputs = model.b.new_empty(3, *model.b.shape, batch_size)
    return *outputs, *model.b.new_empty(2, model.n_instances, model.d_hidden, batch_size)


@torch.no_grad()
def loss_and_gradients(
    model: ToyModel,
    x: FeatureBatch | Float[Tensor, "n_instances batch n_features"],
    importance: Float[Tensor, "*instances n_features"],
    target: Callable[[Tensor], Tensor] | None = None,
    scratch: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """L of each instance, and its gradients in the order of model.parameters(): dL/dW, dL/db and, where the model
    is not tied, dL/dW_out.

    With the error e = y − target(x), r = I e where the output is active (everywhere if it is linear), and
    g = r W_outᵀ where the hidden layer is active (everywhere if it is linear):

        dL/dW = 2/B xᵀ g        dL/dW_out = 2/B hᵀ r        dL/db = 2/B Σ_batch r

    The two products add up in a tied W, and in the plain model, whose h = xW and target is x, only xᵀ r is needed:
    dL/dW = 2/B (M + Mᵀ) W, M = xᵀ r. Sparse batches take this way; other models pass over their silent rows.
    A dense x is best laid out as by `sample_dense`; `scratch`, from scratch_for, is overwritten.
    """
    assert model.hidden_activation in ("linear", "relu")
    plain = model.tied and model.hidden_activation == "linear" and target is None
    if isinstance(x, FeatureBatch) and plain:
        return _sparse(model, x, importance)
    batch = x.shape[1]
    scratch = scratch or scratch_for(model, batch)
    inputs = _firing_rows(x, scratch[0]) if isinstance(x, FeatureBatch) else x.mT
    return _dense(model, inputs, importance, target, batch, scratch[1:])


def _firing_rows(x: FeatureBatch, memory: Tensor) -> Float[Tensor, "n_instances n_features n_rows"]:
    """The dense batch, laid out by features, without rows in which nothing fires: as many of them as every instance
    can spare, for they are all alike."""
    n_instances, batch, n = x.shape
    fires = (x.offsets.diff() > 0).view(n_instances, batch)
    place = fires.cumsum(1).sub_(1)
    n_rows = min(batch, -(-int(place[:, -1].max() + 1) // 64) * 64)  # matrices of odd sizes multiply more slowly
    row = x.positions // n
    places = (x.indices + row // batch * n) * n_rows + place.view(-1)[row]
    return _shaped(memory, n_instances, n, n_rows).zero_().put_(places, x.values)


def _shaped(memory: Tensor, *shape: int) -> Tensor:
    """The beginning of contiguous memory as a tensor of this shape."""
    return memory.view(-1)[: prod(shape)].view(shape)


def _dense(
    model: ToyModel,
    x: Float[Tensor, "n_instances n_features n_rows"],
    importance: Float[Tensor, "*instances n_features"],
    target: Callable[[Tensor], Tensor] | None,
    batch: int,
    scratch: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Through the hidden layer, with r and g as above but for I, which scales smaller things later.

    The batch has more rows than x when silent ones were left out: there h = 0, and y is what b alone makes it.
    """
    W_read, d = model.W_out.mT, model.d_hidden
    y, error = (_shaped(memory, *x.shape) for memory in scratch[:2])
    h, g = (_shaped(memory, x.shape[0], d, x.shape[2]) for memory in scratch[2:])
    scale = rearrange(importance * (2 / batch), "... n -> ... n 1")
    torch.bmm(model.W.mT.contiguous(), x, out=h)
    if model.hidden_activation == "relu":
        h.relu_()
    torch.baddbmm(rearrange(model.b, "i n -> i n 1"), W_read, h, out=y)
    if model.activation == "relu":
        y.relu_()
    r = torch.sub(y, x if target is None else target(x), out=error)
    if model.activation == "relu":
        r = torch.ops.aten.threshold_backward.grad_input(error, y, 0, grad_input=y)  # error where y > 0
    torch.bmm((scale * W_read).mT.contiguous(), r, out=g)
    if model.hidden_activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(g, h, 0, grad_input=g)
    dW, dW_read = x @ g.mT, scale * (r @ h.mT)
    r_sum, errors = reduce(r, "i n b -> i n", "sum"), reduce(error.square_(), "i n b -> i n", "sum")
    if n_silent := batch - x.shape[2]:
        y_silent = model.b.relu() if model.activation == "relu" else model.b
        silent = y_silent if target is None else y_silent - target(torch.zeros_like(y_silent))
        errors += n_silent * silent.square()
        r_sum += n_silent * (silent * (y_silent > 0) if model.activation == "relu" else silent)
    loss, db = (errors * importance).sum(1) / batch, r_sum * scale.squeeze(-1)
    return (loss, dW_read.add_(dW), db) if model.tied else (loss, dW, db, dW_read.mT)


def _sparse(
    model: ToyModel, x: FeatureBatch, importance: Float[Tensor, "*instances n_features"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Around the hidden layer: y = relu(x K + b) with K = WWᵀ costs n_features for each active entry.

    So does M, once the entries are grouped by feature. Away from the active entries x = 0 and e = y.
    """
    n_instances, batch, n = x.shape
    W, scale = model.W, importance * (2 / batch)
    row = x.positions // n
    feature = x.indices + row // batch * n  # of the whole stack
    y = _weighted_sums(rearrange(W @ W.mT, "i n k -> (i n) k"), feature, x.offsets, x.values)
    y = rearrange(y, "(i b) n -> i b n", i=n_instances).add_(rearrange(model.b, "i n -> i 1 n"))
    if model.activation == "relu":
        y.relu_()
    active = y.take(x.positions)
    error = active - x.values
    r = y.put_(x.positions, error * (active > 0) if model.activation == "relu" else error)
    by_feature = feature.argsort()
    offsets = F.pad(torch.bincount(feature, minlength=n_instances * n).cumsum(0), (1, 0))
    rows = rearrange(r, "i b n -> (i b) n")
    M = _weighted_sums(rows, row[by_feature], offsets, x.values[by_feature])
    M = rearrange(M, "(i n) k -> i n k", i=n_instances) * rearrange(scale, "... k -> ... 1 k")
    db = reduce(r, "i b n -> i n", "sum") * scale
    errors = r.put_(x.positions, error).square_()
    return (reduce(errors, "i b n -> i n", "sum") * importance).sum(1) / batch, (M + M.mT) @ W, db


def _weighted_sums(rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Σ_e weight_e · rows[index_e] over the entries between two offsets."""
    return F.embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
