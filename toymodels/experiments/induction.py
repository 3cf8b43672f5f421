"""Row 13: in-context learning appears in a phase change, in which induction heads form.

On a block of random tokens that is repeated, the next token is known to whoever looks up what followed the present
token last time. That takes two layers: a head that copies to each position what stood just before it, and a head that
looks for the present token among these copies, the induction head. Neither pays without the other, so that nothing
happens for a while and then both form at once: the loss, the ICL score and prefix matching turn together. One layer
can only learn to expect again whatever has occurred.

Text that quotes itself can also be learned from the corpus, ever more slowly; then the same change makes the loss
fall faster again, in a bump (Olsson et al. 2022). `bump` is by how much: about 1 for a curve that only slows down.
Measured over seeds 0..4, eleven models of each depth: 4.36, sd .26, with two layers and 1.05, sd .03, with one. The
targets, at least 2.5 and at most 1.5, lie more than 6 sd away on the sides of what they claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toymodels import plots
from toymodels.experiments.base import Claims, Context, Experiment, Outcome, Picture
from toymodels.sequences import QuotingText, RepeatedBlocks, Sequences
from toymodels.transformer import Transformer, TransformerRecipe, in_context_score, measure, train_transformer

N_SEEDS, BATCH, LR = 3, 32, 1e-3
N_STEPS = 420  # of 15 models on blocks, seeds 0..4, the slowest reaches prefix matching .85 after 360
MEASURE_EVERY, N_MEASURED, N_HELD_OUT = 10, 64, 512
WINDOW = 100
"""Steps over which the bump looks how far the loss falls."""
N_LAYERS = {"one_layer": 1, "two_layers": 2}
LABELS = {"one_layer": "1 layer", "two_layers": "2 layers"}
BEFORE = 120  # a step before the change
QUANTITIES = {"held_out_losses": "loss (nats)", "icl": "ICL score (nats)", "prefix": "prefix matching"}


def run(context: Context) -> Outcome:
    """Three models of each depth on repeated blocks, and as many (fast: one) on text that quotes itself."""
    text = QuotingText.random(context.stream("language"))
    tasks: tuple[tuple[str, Sequences, int], ...] = (
        ("", RepeatedBlocks(), N_SEEDS),
        ("text_", text, context.pick(fast=1, full=N_SEEDS)),
    )
    context.expect(len(tasks) * len(N_LAYERS) * N_STEPS)
    claims, conditions = Claims("13"), {}
    tensors: dict[str, Tensor] = {"text/successors": text.successors}
    for task, sequences, n_seeds in tasks:
        for depth, n_layers in N_LAYERS.items():
            condition = task + depth
            results, conditions[condition] = learn(context, condition, n_layers, n_seeds, sequences)
            tensors |= {f"{condition}/{name}": tensor for name, tensor in results.items()}

    one, two = conditions["one_layer"], conditions["two_layers"]
    apart = [abs(a - b) for a, b in zip(two["icl_half_risen"], two["prefix_half_risen"], strict=True)]
    claims.at_most("icl_two_layers", "2 layers: ICL score, worst of 3 seeds", max(two["icl"]), -3.8, "RUN")
    claims.at_least("prefix_two_layers", "2 layers: prefix matching, worst of 3 seeds", min(two["prefix"]), 0.85, "RUN")
    claims.at_most("half_risen_apart", "2 layers: steps between both half-risen, worst seed", max(apart), 50, "RUN")
    claims.at_least("icl_one_layer", "1 layer: ICL score, lowest of 3 seeds", min(one["icl"]), -1.5, "RUN")
    claims.at_most("prefix_one_layer", "1 layer: prefix matching, highest of 3 seeds", max(one["prefix"]), 0.15, "RUN")
    bumps = {depth: conditions[f"text_{depth}"]["bump"] for depth in N_LAYERS}
    for depth, claim, worst, target in (
        ("two_layers", claims.at_least, min, 2.5),
        ("one_layer", claims.at_most, max, 1.5),
    ):
        label = f"text, {LABELS[depth]}: the loss falls faster again, by a factor"
        claim(f"bump_{depth}", label, worst(bumps[depth]), target, "PROPOSED")
    return Outcome(claims.made, tensors, conditions, N_SEEDS)


def learn(
    context: Context, condition: str, n_layers: int, n_seeds: int, sequences: Sequences
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trains a stack and measures it on held-out sequences; the tensors and the facts of its condition."""
    model = Transformer(n_layers, n_seeds, generator=context.stream(condition, "weights"))
    held_out = sequences.sample(N_HELD_OUT, context.stream(condition, "held out"))
    training = train_transformer(
        model,
        sequences,
        N_STEPS,
        BATCH,
        LR,
        generator=context.stream(condition, "batches"),
        held_out=held_out[:N_MEASURED],
        measure_every=MEASURE_EVERY,
        progress=context.tick,
    )
    final = measure(model, held_out)
    icl, prefix = in_context_score(final.loss_per_token), final.prefix.amax((1, 2))
    best = int(prefix.argmax())
    history = training.measurements
    heads = [final.previous[best, 0].argmax(), final.prefix[best, -1].argmax()]
    patterns: list[Tensor] = []
    with torch.no_grad():
        model.residual(held_out[:1, :-1].expand(n_seeds, 1, -1), patterns)
    results = {
        "tokens": held_out,
        "losses": training.losses,
        "measured_at": torch.tensor(training.measured_at),
        "held_out_losses": torch.stack([each.loss_per_token.mean(1) for each in history]),
        "icl": torch.stack([in_context_score(each.loss_per_token) for each in history]),
        "prefix": torch.stack([each.prefix.amax((1, 2)) for each in history]),
        "loss_per_token_history": torch.stack([each.loss_per_token for each in history]),
        "loss_per_token": final.loss_per_token,
        "prefix_by_head": final.prefix,
        "previous_by_head": final.previous,
        "patterns": torch.stack([patterns[layer][best, 0, head] for layer, head in zip((0, -1), heads, strict=True)]),
    }
    facts = {
        "n_layers": n_layers,
        "n_steps": N_STEPS,
        "batch_size": BATCH,
        "lr": LR,
        "best": best,
        "heads_shown": [int(head) for head in heads],
        "icl": icl.tolist(),
        "prefix": prefix.tolist(),
        "icl_half_risen": half_risen(results["measured_at"], results["icl"]),
        "prefix_half_risen": half_risen(results["measured_at"], results["prefix"]),
        "bump": bump(results["held_out_losses"]).tolist(),
    }
    return dict(model.state_dict()) | results, facts


def half_risen(steps: Int[Tensor, " n_measured"], scores: Float[Tensor, "n_measured n_seeds"]) -> list[int]:
    """The first measured step at which a score has come half the way from 0 to where it ends, for each seed."""
    return steps[(scores / scores[-1] >= 0.5).int().argmax(0)].tolist()


def bump(held_out_losses: Float[Tensor, "n_measured n_seeds"]) -> Float[Tensor, " n_seeds"]:
    """max over s < t of r(t) / r(s), r(t) being how far the loss falls in the WINDOW steps from t.

    The first WINDOW steps, when the learning has only begun, do not count.
    """
    width = WINDOW // MEASURE_EVERY
    loss = held_out_losses[width:]
    falls = loss[:-width] - loss[width:]
    # A loss that stands still, or rises, falls by as good as nothing: no ratio is negative, and none 0 / 0.
    falls = falls.clamp(min=1e-3)
    return (falls / falls.cummin(0).values).amax(0)


def draw(outcome: Outcome) -> Sequence[Picture]:
    """The change through training, the loss of each token, the two heads, and the bump on text."""
    return [_training(outcome), _per_token(outcome), _heads(outcome), _text(outcome)]


def _training(outcome: Outcome) -> Picture:
    figure, axes = plots.figure(1, 3, width=10, height=3.1)
    for ax, quantity in zip(axes[0], QUANTITIES, strict=True):
        curves(ax, outcome, "", quantity)
    axes[0, 0].set(ylim=(1, 4.4))
    axes[0, 1].set(ylim=(-5, 0.3))
    axes[0, 2].set(ylim=(0, 1))
    axes[0, 0].legend(loc="lower left")
    caption = (
        "A block of random tokens, repeated: three models of each depth. In the shaded steps heads form that attend "
        "to what followed the present token before (prefix matching), the loss falls, and what it owes to the "
        "context (ICL score: loss of the last token − loss of token 9) appears. One layer never gets there."
    )
    return Picture("phase_change", figure, caption)


def curves(ax: plots.Axes, outcome: Outcome, task: str, quantity: str) -> None:
    """A quantity through training, one line for each model. The shade covers the steps at which prefix matching of
    two layers comes half-way, and 40 to either side."""
    steps: list[int] = outcome.conditions[f"{task}two_layers"]["prefix_half_risen"]
    ax.axvspan(min(steps) - 40, max(steps) + 40, color=plots.RULE, alpha=0.6, linewidth=0)
    for depth in N_LAYERS:
        measured_at, measured = (outcome.tensors[f"{task}{depth}/{name}"] for name in ("measured_at", quantity))
        lines(ax, depth, measured_at, measured.T)
    ax.set(xlabel="training steps", ylabel=QUANTITIES[quantity], xlim=(0, N_STEPS), xticks=range(0, N_STEPS, 100))


def lines(ax: plots.Axes, depth: str, x: Int[Tensor, " n_points"], measured: Float[Tensor, "n_seeds n_points"]) -> None:
    """One line for each model of a depth, in the colour of the depth; the legend names it once."""
    colour = plots.SERIES[list(N_LAYERS).index(depth)]
    for seed, curve in enumerate(measured):
        name = LABELS[depth] if seed == 0 else None
        ax.plot(x, curve, color=colour, alpha=0.8, linewidth=1.4, label=name)


def _per_token(outcome: Outcome) -> Picture:
    figure, axes = plots.figure(width=6.4, height=3.3)
    ax = axes[0, 0]
    ax.axhline(log(64), color=plots.MUTED, linewidth=1, linestyle=(0, (4, 3)))
    ax.text(63, log(64) + 0.08, "chance, log 64", color=plots.MUTED, ha="right", fontsize=9.5)
    ax.axvspan(10, 26, color=plots.RULE, alpha=0.6, linewidth=0)
    ax.text(18, 0.15, "repetition begins", color=plots.MUTED, ha="center", fontsize=9.5)
    index = torch.arange(1, 64)
    for depth in N_LAYERS:
        lines(ax, depth, index, outcome.tensors[f"{depth}/loss_per_token"])
    before = outcome.tensors["two_layers/loss_per_token_history"][BEFORE // MEASURE_EVERY].mean(0)
    ax.plot(index, before, ":", color=plots.SERIES[1], linewidth=1.4, label=f"2 layers, step {BEFORE}")
    ax.set(xlabel="token index", ylabel="loss (nats)", xlim=(1, 63), ylim=(0, 5.6))
    ax.legend(loc="center right")
    caption = (
        "Loss of each token after training, 512 held-out sequences. Once the block comes round again, which is "
        "between tokens 10 and 26, two layers know what is next; one layer knows only which tokens occur. The hump "
        "near token 50: the heads of layer 0 look back one token only up to about token 22, so that the ends of the "
        "longest blocks are not found again."
    )
    return Picture("loss_per_token", figure, caption)


def _heads(outcome: Outcome) -> Picture:
    facts, tokens = outcome.conditions["two_layers"], outcome.tensors["two_layers/tokens"][0]
    length = int((tokens[1:] == tokens[0]).nonzero()[0]) + 1
    figure, axes = plots.figure(1, 2, width=9.4, height=4.7)
    titles = ("layer 0, head {}: the token before", "layer 1, head {}: what came next last time")
    patterns = outcome.tensors["two_layers/patterns"]
    for ax, pattern, title, head in zip(axes[0], patterns, titles, facts["heads_shown"], strict=True):
        image = ax.imshow(pattern, cmap=plots.sequential(), vmin=0, vmax=1, interpolation="nearest")
        for start in range(length, len(pattern), length):
            for line in (ax.axhline, ax.axvline):
                line(start - 0.5, color=plots.RULE, linewidth=0.8)
        ax.set(title=title.format(head), xlabel="attended token")
    axes[0, 0].set(ylabel="attending token")
    figure.colorbar(image, ax=axes, label="attention", shrink=0.75)
    caption = (
        f"Two heads of one model on one sequence, a block of {length} tokens that is repeated (lines). In the first "
        "round a head of layer 0 looks at the token before; what it copies lets the induction head of layer 1 find "
        "the token that followed the present one in an earlier round."
    )
    return Picture("heads", figure, caption)


def _text(outcome: Outcome) -> Picture:
    figure, axes = plots.figure(1, 2, width=9.4, height=3.3)
    for ax, quantity in zip(axes[0], ("held_out_losses", "prefix"), strict=True):
        curves(ax, outcome, "text_", quantity)
    axes[0, 1].set(ylim=(0, 1))
    axes[0, 0].legend(loc="lower left")
    caption = (
        "Text that follows a table of successors and quotes itself. What the table says is learned first and ever "
        "more slowly; then induction heads form and the loss of two layers drops once more, in a bump that one "
        "layer does not have."
    )
    return Picture("bump", figure, caption)


EXPERIMENT = Experiment(
    name="induction",
    row="13",
    title="Induction heads",
    claim="In-context learning appears in a sudden change, in which induction heads form; it takes two layers.",
    reference="Olsson et al. 2022",
    seconds=81,
    run=run,
    draw=draw,
    recipe=TransformerRecipe(n_steps=N_STEPS),
)
