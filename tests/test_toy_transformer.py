"""The attention-only transformer against its equations, and what is measured of its heads."""

from math import sqrt

import pytest
import torch

from toymodels.errors import UsageError
from toymodels.sequences import QuotingText, RepeatedBlocks
from toymodels.streams import generator
from toymodels.transformer import (
    Transformer,
    TransformerRecipe,
    in_context_score,
    measure,
    next_token_losses,
    prefix_matching,
    previous_token,
    train_transformer,
)


def shaken(n_layers, n_instances, **sizes):
    """A model with no parameter at its start, so that each of them matters."""
    model = Transformer(n_layers, n_instances, generator=generator(0), **sizes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator(1), dtype=torch.float64), alpha=0.3)
    return model


def layer_norm(x, gain, bias):
    deviation = x - x.mean()
    return deviation / sqrt(float(deviation.square().mean()) + 1e-5) * gain + bias


def by_the_equations(model, i, tokens):
    """The docstring of toymodels.transformer, position by position; the logits, x and A of the last layer."""
    x = [model.W_E[i, token] for token in tokens]
    n, d_head = len(tokens), model.W_Q.shape[-1]
    A = torch.zeros(model.n_heads, n, n, dtype=torch.float64)
    for layer in range(model.n_layers):
        u = [layer_norm(row, model.ln_gain[i, layer], model.ln_bias[i, layer]) for row in x]
        x = list(x)
        for head in range(model.n_heads):
            Q, K, V, O = (W[i, layer, head] for W in (model.W_Q, model.W_K, model.W_V, model.W_O))
            for p in range(n):
                q = (u[p] + model.W_pos[i, p]) @ Q
                scores = torch.stack([q @ ((u[j] + model.W_pos[i, j]) @ K) for j in range(p + 1)]) / sqrt(d_head)
                A[head, p, : p + 1] = scores.exp() / scores.exp().sum()
                x[p] = x[p] + sum(A[head, p, j] * (u[j] @ V) for j in range(p + 1)) @ O
    final = [layer_norm(row, model.ln_final_gain[i], model.ln_final_bias[i]) for row in x]
    return torch.stack([row @ model.W_U[i] for row in final]), torch.stack(x), A


@pytest.mark.parametrize("n_layers", [1, 2])
def test_forward_is_the_equations(n_layers):
    model = shaken(n_layers, 2, vocabulary=7, n_positions=9, d_model=12, n_heads=3)
    tokens = torch.randint(7, (2, 3, 8), generator=generator(2))
    with torch.no_grad():
        patterns = []
        logits, residual, seen = model(tokens), model.residual(tokens), model.residual(tokens, patterns)
        assert len(patterns) == n_layers
        for i in range(2):
            for row in range(3):
                expected, x, A = by_the_equations(model, i, tokens[i, row])
                torch.testing.assert_close(logits[i, row], expected)
                torch.testing.assert_close(residual[i, row], x)
                torch.testing.assert_close(seen[i, row], x)
                torch.testing.assert_close(patterns[-1][i, row], A)
                losses = -expected.log_softmax(-1)[torch.arange(7), tokens[i, row, 1:]]
                torch.testing.assert_close(model.losses(tokens)[i, row], losses)


def test_each_instance_learns_by_itself():
    """The gradient of one instance's loss is zero in the others."""
    model = shaken(2, 3, vocabulary=7, n_positions=8, d_model=8, n_heads=2)
    model.losses(torch.randint(7, (3, 2, 8), generator=generator(2)))[1].sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad[1].any(), name
        assert not parameter.grad[[0, 2]].any(), name


def test_sizes_that_do_not_fit():
    with pytest.raises(UsageError, match=r"multiple of n_heads=4, got 30; try 32"):
        Transformer(1, d_model=30)
    with pytest.raises(UsageError, match=r"n_positions=64\], got \[1, 2, 65\]"):
        Transformer(1)(torch.zeros(1, 2, 65, dtype=torch.long))
    with pytest.raises(UsageError, match="at least 1"):
        Transformer(0)
    model = Transformer(1, generator=generator(0))
    with pytest.raises(UsageError, match="60 out of 32"):
        train_transformer(model, RepeatedBlocks(vocabulary=32, length=60), 1, generator=generator(0))


def test_prefix_matching_and_previous_token_of_known_patterns():
    """Block a b c repeated: the token after the earlier a is at 1, for the second a at 3; likewise 4 → 2, 5 → 3."""
    tokens = torch.tensor([[0, 1, 2, 0, 1, 2, 0]])
    perfect, uniform = torch.zeros(7, 7), torch.ones(7, 7).tril() / torch.arange(1, 8)[:, None]
    for i, j in ((0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 3), (6, 4)):
        perfect[i, j] = 1
    patterns = torch.stack([perfect, uniform, torch.eye(7).roll(1, 0)])[None, None]
    prefix = prefix_matching(patterns, tokens)
    # Uniform attention finds one of 4, 5 and 6 places, then two of 7. In the last, 3 → 2, 4 → 3, 5 → 4, 6 → 5.
    torch.testing.assert_close(prefix, torch.tensor([[1, (1 / 4 + 1 / 5 + 1 / 6 + 2 / 7) / 4, 0]]))
    torch.testing.assert_close(previous_token(patterns)[0, 2], torch.tensor(1.0))
    torch.testing.assert_close(previous_token(patterns)[0, 0], torch.tensor(2 / 6))


def test_in_context_score_compares_the_last_token_with_token_9():
    loss_of_token = torch.arange(64.0).square()
    assert in_context_score(loss_of_token[1:]) == 63**2 - 9**2


def test_next_token_losses_of_uniform_logits():
    losses = next_token_losses(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4, dtype=torch.long))
    torch.testing.assert_close(losses, torch.full((1, 2, 3), 8.0).log())


def test_blocks_are_distinct_and_repeated():
    tokens = RepeatedBlocks().sample(400, generator(0))
    lengths = [int((row[1:] == row[0]).nonzero()[0]) + 1 for row in tokens]
    assert set(lengths) == set(range(10, 27))
    for row, length in zip(tokens, lengths, strict=True):
        assert len(row[:length].unique()) == length
        assert torch.equal(row[length:], row[:-length])
    assert len(tokens[:, 0].unique()) == 64
    with pytest.raises(UsageError, match=r"vocabulary=20, got 10\.\.26"):
        RepeatedBlocks(vocabulary=20)


def test_text_follows_its_table_and_quotes_itself():
    """When c is always followed by c + 1, no 8 tokens of 64 recur and nothing jumps, but for quotations."""
    text = QuotingText(torch.arange(1, 101)[:, None] % 100)
    tokens = text.sample(300, generator(0))
    jumps = tokens[:, 1:] != (tokens[:, :-1] + 1) % 100
    assert not jumps[:, :15].any()
    assert (jumps[:, 15:31].sum(1) == 1).all()
    assert (jumps[:, 15:24].any(0)).all()
    windows = tokens.unfold(1, 8, 1)
    same = (windows[:, :, None] == windows[:, None, :]).all(-1).tril(-8)
    for start in (16, 32, 48):
        assert same[:, start : start + 9].any(-1).any(-1).all()


def test_text_uses_the_whole_table():
    text = QuotingText.random(generator(0), vocabulary=16, n_choices=32)
    tokens = text.sample(2000, generator(1))[:, :16]
    seen = torch.zeros(16, 16).index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), torch.ones(()), True)
    table = torch.nn.functional.one_hot(text.successors, 16).float().mean(1)
    torch.testing.assert_close(seen / seen.sum(1, keepdim=True), table, atol=0.05, rtol=0)


def test_training_measures_before_during_and_after():
    model = Transformer(1, 2, vocabulary=16, n_positions=20, d_model=8, n_heads=2, generator=generator(0))
    blocks = RepeatedBlocks(vocabulary=16, length=20, shortest=3, longest=5)
    held_out = blocks.sample(8, generator(1))
    told = []
    training = train_transformer(
        model,
        blocks,
        25,
        4,
        lr=1e-2,
        generator=generator(2),
        held_out=held_out,
        progress=lambda step, losses: told.append(step),
    )
    assert told == list(range(25))
    assert training.measured_at == [0, 10, 20, 25]
    assert training.losses.shape == (25, 2)
    after = measure(model, held_out)
    torch.testing.assert_close(training.measurements[-1].prefix, after.prefix)
    expected = model.losses(held_out.expand(2, 8, 20)).mean(1).detach()
    torch.testing.assert_close(after.loss_per_token, expected)
    assert (after.loss_per_token.mean(1) < training.measurements[0].loss_per_token.mean(1)).all()


def test_a_recipe_makes_a_world_without_known_features():
    recipe = TransformerRecipe(n_steps=500).resized(d_hidden=8, n_steps=2)
    steps = []
    world = recipe.build(0, lambda step, losses: steps.append(step))
    assert (world.d_hidden, world.truth, steps) == (8, None, [0, 1])
    sample = world.sample(200, generator(3))
    assert sample.acts is None
    assert sample.hidden.shape == (200, 8)
    assert len(sample.hidden.unique(dim=0)) == 200
    torch.testing.assert_close(world.sample(200, generator(3)).hidden, sample.hidden, rtol=0, atol=0)
    residual = world.model.residual(RepeatedBlocks().sample(4, generator(3))[None, :, :-1])[0].detach().flatten(0, 1)
    assert (torch.cdist(sample.hidden, residual).amin(1) < 1e-3).all()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"n_features": 10}, "no n_features, got 10: nobody knows its true features"),
        ({"feature_prob": 0.1}, r"no feature_prob, got 0\.1: nobody knows its true features"),
        ({"d_hidden": 30}, "multiple of its 4 heads, got 30; try 32"),
    ],
)
def test_sizes_that_a_transformer_lacks(size, message):
    with pytest.raises(UsageError, match=message):
        TransformerRecipe(n_steps=1).resized(**size)


def test_the_width_of_a_recipe_is_a_multiple_of_its_heads():
    with pytest.raises(UsageError, match="multiple of its 4 heads, got 2; try 4"):
        TransformerRecipe(n_steps=1, d_hidden=2)
