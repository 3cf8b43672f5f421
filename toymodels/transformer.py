"""A stack of small attention-only transformers, trained on sequences from nothing.

The forward pass, for tokens t_0 ... t_{n−1} of one model of the stack; i and j are positions, l layers, h heads:

    x_i  = W_E[t_i]                                             the residual stream; no position is added to it
    for each layer l:
        u_i = LN(x_i; ln_gain[l], ln_bias[l])
        q_i = (u_i + W_pos[i]) W_Q[l, h]                        positions reach queries and keys ...
        k_j = (u_j + W_pos[j]) W_K[l, h]
        v_j =  u_j             W_V[l, h]                        ... but not values (Press et al. 2021, Shortformer)
        A_ij = softmax over j ≤ i of q_i · k_j / √d_head
        x_i ← x_i + Σ_h (Σ_j A_ij v_j) W_O[l, h]
    logits_i = LN(x_i; ln_final_gain, ln_final_bias) W_U        of token t_{i+1}

    LN(x; gain, bias) = (x − mean(x)) / √(var(x) + 1e-5) · gain + bias, var being the mean of the squared deviations

There are no other biases, no MLPs and no dropout. Every parameter has a leading axis of independent models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from toymodels.errors import UsageError
from toymodels.optim import AdamW
from toymodels.sequences import RepeatedBlocks, Sequences
from toymodels.streams import generator
from toymodels.worlds import OnStep, Recipe, Sample, World

LAYER_NORM_EPS = 1e-5
EARLY = 10
"""Tokens at the start of a sequence in which nothing is repeated yet."""
CHUNK = 64
"""Sequences that are measured together: the attention of more does not fit a processor's cache."""


def sinusoids(n_positions: int, d_model: int) -> Float[Tensor, "n_positions d_model"]:
    """sin(p ω_k) and cos(p ω_k) in turns, ω_k = 10000^(−2k/d_model) (Vaswani et al. 2017)."""
    speed = 10_000 ** (-torch.arange(0, d_model, 2) / d_model)
    angle = torch.arange(n_positions)[:, None] * speed
    return rearrange([angle.sin(), angle.cos()], "trig p k -> p (k trig)")


class Transformer(nn.Module):
    """The equations above.

    Weights start normal: W_E with standard deviation 0.1, W_Q, W_K and W_V 0.05, W_O and W_U 0.02; gains at 1,
    biases at 0, W_pos at sinusoids, and all are trained. (Starts of size 1/√d_model learn the same, in three times
    the steps: Adam moves a weight by about lr a step, so that small ones turn sooner.)

    Raises:
        UsageError: a size below 1, or heads that do not divide d_model.
    """

    W_E: Float[Tensor, "i vocabulary d_model"]
    W_pos: Float[Tensor, "i n_positions d_model"]
    W_Q: Float[Tensor, "i layer head d_model d_head"]
    W_K: Float[Tensor, "i layer head d_model d_head"]
    W_V: Float[Tensor, "i layer head d_model d_head"]
    W_O: Float[Tensor, "i layer head d_head d_model"]
    ln_gain: Float[Tensor, "i layer d_model"]
    ln_bias: Float[Tensor, "i layer d_model"]
    ln_final_gain: Float[Tensor, "i d_model"]
    ln_final_bias: Float[Tensor, "i d_model"]
    W_U: Float[Tensor, "i d_model vocabulary"]

    def __init__(
        self,
        n_layers: int,
        n_instances: int = 1,
        *,
        vocabulary: int = 64,
        n_positions: int = 64,
        d_model: int = 64,
        n_heads: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = (n_instances, n_layers, n_heads, vocabulary, n_positions, d_model)
        if min(sizes) < 1:
            raise UsageError(
                "n_instances, n_layers, n_heads, vocabulary, n_positions and d_model must be at least 1, "
                f"got {list(sizes)}"
            )
        if d_model % n_heads or d_model % 2:
            raise UsageError(
                f"d_model must be even and a multiple of n_heads={n_heads}, got {d_model}; "
                f"try {max(1, round(d_model / (2 * n_heads))) * 2 * n_heads}"
            )

        def normal(sd: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(sd * torch.randn(n_instances, *shape, generator=generator))

        heads, d_head = (n_layers, n_heads), d_model // n_heads
        self.W_E = normal(0.1, vocabulary, d_model)
        self.W_pos = nn.Parameter(sinusoids(n_positions, d_model).repeat(n_instances, 1, 1))
        self.W_Q = normal(0.05, *heads, d_model, d_head)
        self.W_K = normal(0.05, *heads, d_model, d_head)
        self.W_V = normal(0.05, *heads, d_model, d_head)
        self.W_O = normal(0.02, *heads, d_head, d_model)
        self.ln_gain = nn.Parameter(torch.ones(n_instances, n_layers, d_model))
        self.ln_bias = nn.Parameter(torch.zeros(n_instances, n_layers, d_model))
        self.ln_final_gain = nn.Parameter(torch.ones(n_instances, d_model))
        self.ln_final_bias = nn.Parameter(torch.zeros(n_instances, d_model))
        self.W_U = normal(0.02, d_model, vocabulary)

    @property
    def n_instances(self) -> int:
        return self.W_E.shape[0]

    @property
    def n_layers(self) -> int:
        return self.W_Q.shape[1]

    @property
    def n_heads(self) -> int:
        return self.W_Q.shape[2]

    @property
    def n_positions(self) -> int:
        return self.W_pos.shape[1]

    @property
    def d_model(self) -> int:
        return self.W_E.shape[2]

    def forward(self, tokens: Int[Tensor, "i b p"]) -> Float[Tensor, "i b p vocabulary"]:
        """The logits of each next token."""
        return self.unembed(self.residual(tokens))

    def residual(
        self, tokens: Int[Tensor, "i b p"], patterns: list[Float[Tensor, "i b head p p"]] | None = None
    ) -> Float[Tensor, "i b p d_model"]:
        """x after the last layer. A list given as `patterns` receives the attention A of each layer."""
        n_instances, _, length = tokens.shape
        if n_instances != self.n_instances or length > self.n_positions:
            raise UsageError(
                f"tokens must have shape [n_instances={self.n_instances}, batch, at most n_positions="
                f"{self.n_positions}], got {list(tokens.shape)}"
            )
        x = look_up(self.W_E, tokens)
        for layer in range(self.n_layers):
            # Layer 0 reads nothing but the token: its heads answer once for each token of the vocabulary.
            u = normalise(self.W_E[:, None] if layer == 0 else x, self.ln_gain[:, layer], self.ln_bias[:, layer])
            q, k, v = (by_head(u, W[:, layer]) for W in (self.W_Q, self.W_K, self.W_V))
            if layer == 0:
                q, k, v = (look_up(table[:, 0], tokens) for table in (q, k, v))
            positions = self.W_pos[:, None, :length]
            q = q + by_head(positions, self.W_Q[:, layer])
            k = k + by_head(positions, self.W_K[:, layer])
            q, k, v = (rearrange(heads, "i b p head e -> (i b) head p e") for heads in (q, k, v))
            if patterns is None:
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                pattern = attention(q, k)
                patterns.append(rearrange(pattern, "(i b) head p q -> i b head p q", i=n_instances))
                mixed = pattern @ v
            mixed = rearrange(mixed, "(i b) head p e -> i b p head e", i=n_instances)
            x = x + einsum(mixed, self.W_O[:, layer], "i b p head e, i head e d -> i b p d")
        return x

    def unembed(self, x: Float[Tensor, "i b p d_model"]) -> Float[Tensor, "i b p vocabulary"]:
        """The logits, from the residual stream."""
        u = normalise(x, self.ln_final_gain, self.ln_final_bias)
        return einsum(u, self.W_U, "i b p d, i d v -> i b p v")

    def losses(self, tokens: Int[Tensor, "i b p"]) -> Float[Tensor, "i b p_minus_1"]:
        """−log p(t_{i+1} | t_0 ... t_i); column c is the loss of token c + 1."""
        # All the positions are read, though the last one predicts nothing: fused attention is a third faster on 64
        # positions than on 63.
        return next_token_losses(self.unembed(self.residual(tokens)[..., :-1, :]), tokens)


def look_up(table: Float[Tensor, "i vocabulary *rest"], tokens: Int[Tensor, "i b p"]) -> Float[Tensor, "i b p *rest"]:
    """table[i, tokens[i]], with the fast backward pass of an embedding."""
    n_instances, vocabulary, *rest = table.shape
    rows = tokens + vocabulary * torch.arange(n_instances)[:, None, None]
    return F.embedding(rows, table.reshape(n_instances * vocabulary, -1)).unflatten(-1, rest)


def by_head(
    x: Float[Tensor, "i b p d_model"], W: Float[Tensor, "i head d_model d_head"]
) -> Float[Tensor, "i b p head d_head"]:
    """x W for each head."""
    return einsum(x, W, "i b p d, i head d e -> i b p head e")


def normalise(
    x: Float[Tensor, "i b p d_model"], gain: Float[Tensor, "i d_model"], bias: Float[Tensor, "i d_model"]
) -> Float[Tensor, "i b p d_model"]:
    """LN(x; gain, bias)."""
    standard = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    return torch.addcmul(bias[:, None, None], standard, gain[:, None, None])


def attention(
    q: Float[Tensor, "rows head p d_head"], k: Float[Tensor, "rows head p d_head"]
) -> Float[Tensor, "rows head p p"]:
    """A_ij = softmax over j ≤ i of q_i · k_j / √d_head."""
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(dim=-1)


def next_token_losses(
    logits: Float[Tensor, "i b p vocabulary"], tokens: Int[Tensor, "i b p_plus_1"]
) -> Float[Tensor, "i b p"]:
    """−log softmax(logits_i)[t_{i+1}]."""
    losses = F.cross_entropy(logits.flatten(0, 2), tokens[..., 1:].flatten(), reduction="none")
    return losses.view(logits.shape[:-1])


def in_context_score(loss_per_token: Float[Tensor, "*stack length_minus_1"]) -> Float[Tensor, "*stack"]:
    """Loss of the last token − loss of token 9, counted from 0: below 0 when the context helps.

    Source: Olsson et al. 2022, who compare tokens 500 and 50 of 512. Token 9 lies in the first block.
    """
    return loss_per_token[..., -1] - loss_per_token[..., EARLY - 2]


def prefix_matching(patterns: Float[Tensor, "i b head p p"], tokens: Int[Tensor, "b p"]) -> Float[Tensor, "i head"]:
    """Mean over the i that have such a j of Σ_j A_ij over the j ≤ i with t_{j−1} = t_i.

    1 for a perfect induction head: all its attention is on what came after earlier occurrences of the present
    token (Olsson et al. 2022).
    """
    followed = F.pad(tokens[:, None, :-1] == tokens[:, :, None], (1, 0)).tril()
    return _mean_attention(patterns, followed)


def previous_token(patterns: Float[Tensor, "i b head p p"]) -> Float[Tensor, "i head"]:
    """Mean over i ≥ 1 of A_{i,i−1}: 1 for a perfect previous-token head."""
    return reduce(patterns.diagonal(-1, -2, -1), "i b head p -> i head", "mean")


def _mean_attention(patterns: Tensor, chosen: Tensor) -> Tensor:
    """Mean attention on the chosen j [b, i, j], over the i that have some."""
    total = einsum(patterns, chosen.to(patterns.dtype), "i b head p q, b p q -> i head")
    return total / chosen.any(-1).sum().clamp(min=1)


@dataclass(frozen=True, eq=False)
class Measurement:
    """How well a stack predicts, and where its heads look."""

    loss_per_token: Float[Tensor, "i length_minus_1"]
    """Column c is the mean loss of token c + 1."""
    prefix: Float[Tensor, "i layer head"]
    """`prefix_matching` of each head."""
    previous: Float[Tensor, "i layer head"]
    """`previous_token` of each head among the first tokens, up to token 9: only where a block is still new does an
    induction head need it."""


@torch.no_grad()
def measure(model: Transformer, tokens: Int[Tensor, "b length"]) -> Measurement:
    """Every model of the stack on the same sequences, a multiple of CHUNK or fewer than it."""
    parts = []
    for chunk in tokens.split(CHUNK):
        patterns: list[Tensor] = []
        stacked = chunk.expand(model.n_instances, *chunk.shape)
        logits = model.unembed(model.residual(stacked[..., :-1], patterns))
        per_token = reduce(next_token_losses(logits, stacked), "i b c -> i c", "mean")
        prefix = torch.stack([prefix_matching(pattern, chunk[:, :-1]) for pattern in patterns], dim=1)
        previous = torch.stack([previous_token(pattern[..., :EARLY, :EARLY]) for pattern in patterns], dim=1)
        parts.append((per_token, prefix, previous))
    return Measurement(*(torch.stack(values).mean(0) for values in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class TransformerTraining:
    """What a training run leaves beside the trained model."""

    losses: Float[Tensor, "n_steps i"]
    measured_at: Sequence[int]
    """Steps done before each measurement."""
    measurements: Sequence[Measurement]


def train_transformer(
    model: Transformer,
    sequences: Sequences,
    n_steps: int,
    batch_size: int = 32,
    lr: float = 1e-3,
    *,
    generator: torch.Generator,
    held_out: Int[Tensor, "b length"] | None = None,
    measure_every: int = 10,
    progress: OnStep | None = None,
) -> TransformerTraining:
    """Trains every instance of the model, in place, on fresh batches of its own: AdamW, weight decay 0.01.

    Given `held_out` sequences, measures the stack on them before the first step, every `measure_every` and after
    the last. `progress` is called after each step with its number and the losses before it.

    Raises:
        UsageError: fewer than one step, or sequences that do not fit the model.
    """
    if n_steps < 1:
        raise UsageError(f"n_steps must be at least 1, got {n_steps}")
    vocabulary = model.W_E.shape[1]
    if sequences.vocabulary != vocabulary or sequences.length > model.n_positions:
        raise UsageError(
            f"the model reads up to n_positions={model.n_positions} tokens out of vocabulary={vocabulary}, the "
            f"sequences have {sequences.length} out of {sequences.vocabulary}; build both with the same sizes"
        )
    optimizer = AdamW(model.parameters())
    losses = torch.empty(n_steps, model.n_instances)
    measured_at, measurements = [], []
    for step in range(n_steps + 1):
        if held_out is not None and (step % measure_every == 0 or step == n_steps):
            measured_at.append(step)
            measurements.append(measure(model, held_out))
        if step == n_steps:
            break
        drawn = sequences.sample(model.n_instances * batch_size, generator)
        tokens = rearrange(drawn, "(i b) length -> i b length", i=model.n_instances)
        loss = reduce(model.losses(tokens), "i b c -> i", "mean")
        optimizer.step(torch.autograd.grad(loss.sum(), optimizer.parameters), lr)
        losses[step] = loss.detach()
        if progress is not None:
            progress(step, losses[step])
    return TransformerTraining(losses, measured_at, measurements)


class TransformerWorld(World):
    """The residual stream after the last layer, before the final LayerNorm. Its true features are not known."""

    def __init__(self, model: Transformer, sequences: Sequences) -> None:
        self.model, self.sequences = model, sequences
        self.truth = None
        self.d_hidden = model.d_model

    @torch.no_grad()
    def sample(self, n: int, stream: torch.Generator) -> Sample:
        """n activations at random positions of fresh sequences, each at most once."""
        per_sequence = self.sequences.length - 1  # the last position is not trained to predict anything
        tokens = self.sequences.sample(-(-n // per_sequence), stream)[None, :, :-1]
        residual = torch.cat([self.model.residual(chunk) for chunk in tokens.split(512, dim=1)], dim=1)
        chosen = torch.randperm(tokens.numel(), generator=stream)[:n]
        return Sample(rearrange(residual, "1 b p d -> (b p) d")[chosen], None)


@dataclass(frozen=True)
class TransformerRecipe(Recipe):
    """Trains one transformer on repeated blocks."""

    n_steps: int
    d_hidden: int = 64
    """d_model."""
    n_layers: int = 2
    make_sequences: Callable[[], Sequences] = RepeatedBlocks

    def __post_init__(self) -> None:
        d_hidden = self.d_hidden
        if d_hidden < 4 or d_hidden % 4:
            raise UsageError(
                f"d_hidden must be a multiple of its 4 heads, got {d_hidden}; try {max(1, round(d_hidden / 4)) * 4}"
            )

    def build(self, seed: int, on_step: OnStep | None = None) -> TransformerWorld:
        sequences = self.make_sequences()
        model = Transformer(
            self.n_layers,
            vocabulary=sequences.vocabulary,
            n_positions=sequences.length,
            d_model=self.d_hidden,
            generator=generator(seed, "transformer", "weights"),
        )
        stream = generator(seed, "transformer", "training")
        train_transformer(model, sequences, self.n_steps, generator=stream, progress=on_step)
        return TransformerWorld(model, sequences)
