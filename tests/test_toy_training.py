"""The hand-written gradients against autograd, and the phenomena that training must show."""

from inspect import unwrap
from math import cos, pi

import pytest
import torch

from toymodels import geometry
from toymodels.features import FeatureBatch, Features
from toymodels.models import ToyModel
from toymodels.streams import generator
from toymodels.training import SCHEDULES, Objective, loss_and_gradients, train, weighted_error


def trained(features, d_hidden, n_instances, n_steps, *, activation="relu", seed=0, **options):
    model = ToyModel(features.n_features, d_hidden, n_instances, activation, generator=generator(seed, "test", "init"))
    run = train(model, features, n_steps, 512, generator=generator(seed, "test", "batches"), **options)
    return model.requires_grad_(False), run


def test_weighted_error_is_its_equation():
    x = torch.rand(2, 3, 4, generator=generator(0))
    y = torch.rand(2, 3, 4, generator=generator(1))
    importance = torch.tensor([1.0, 0.5, 0.0, 2.0])
    error = weighted_error(x, y, importance)
    for i in range(2):
        total = sum(importance[f] * (x[i, b, f] - y[i, b, f]) ** 2 for b in range(3) for f in range(4))
        torch.testing.assert_close(error[i], total / 3)


@pytest.mark.parametrize("layout", ["sparse", "dense", "dense by features"])
@pytest.mark.parametrize("activation", ["relu", "linear"])
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("n_instances", [1, 3])
@pytest.mark.parametrize("own_importance", [False, True], ids=["one importance", "own importance"])
def test_gradients_are_those_of_autograd(own_importance, n_instances, probability, activation, layout):
    n, d, batch = 7, 3, 13
    model = ToyModel(n, d, n_instances, activation, generator=generator(0)).double()
    torch.nn.init.normal_(model.b, std=0.3, generator=generator(1))
    importance = torch.rand(n_instances, n, generator=generator(2), dtype=torch.float64)
    importance = importance if own_importance else importance[0]
    x = Features(n, probability).sample(batch, generator(3), n_instances)
    x = FeatureBatch(x.indices, x.values.double(), x.offsets, x.shape)
    expected = weighted_error(x.dense(), model(x.dense()), importance)
    dW, db = torch.autograd.grad(expected.sum(), (model.W, model.b))
    if activation == "relu":  # both sides of the kink are among the inputs, active ones too
        silent = model(x.dense()) == 0
        assert silent.any()
        assert (~silent).any()
        assert probability == 0 or (silent & (x.dense() > 0)).any()
    given = {"sparse": x, "dense": x.dense(), "dense by features": x.dense().mT.contiguous().mT}[layout]
    loss, dW_by_hand, db_by_hand = loss_and_gradients(model, given, importance)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dW_by_hand, dW, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(db_by_hand, db, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["sparse", "dense"])
@pytest.mark.parametrize("target", [None, torch.abs, torch.cos])
@pytest.mark.parametrize("activation", ["relu", "linear"])
@pytest.mark.parametrize("hidden_activation", ["relu", "linear"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_other_architectures_are_those_of_autograd(tied, hidden_activation, activation, target, layout):
    n, d, batch = 7, 3, 201
    model = ToyModel(n, d, 2, activation, hidden_activation=hidden_activation, tied=tied, generator=generator(0))
    model.double()
    torch.nn.init.normal_(model.b, std=0.3, generator=generator(1))
    importance = torch.rand(n, generator=generator(2), dtype=torch.float64)
    x = Features(n, 0.05, signed=True).sample_dense(batch, generator(3), 2).double()
    assert (x != 0).any(2).sum(1).max() <= 128  # silent rows are left out until 64, 128, ... remain
    assert (x @ model.W < 0).any()
    assert (model(x) <= 0).any()
    error, total = Objective(target).loss(model, x, importance, generator(4))
    expected = torch.autograd.grad(total.sum(), list(model.parameters()))
    given = FeatureBatch.from_dense(x) if layout == "sparse" else x
    loss, *gradients = loss_and_gradients(model, given, importance, target)
    torch.testing.assert_close(loss, error, rtol=1e-12, atol=1e-12)
    for by_hand, by_autograd in zip(gradients, expected, strict=True):
        torch.testing.assert_close(by_hand, by_autograd, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("hidden_activation", ["relu", "solu"])  # by hand, by autograd
def test_each_gradient_reaches_its_own_weight(tied, hidden_activation):
    features, objective = Features(5, 0.6, signed=True), Objective(torch.abs)
    options = {"hidden_activation": hidden_activation, "tied": tied}
    start = ToyModel(5, 3, 2, generator=generator(0), **options)
    reference = ToyModel(5, 3, 2, generator=generator(0), **options)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.01, foreach=False)
    batches = generator(1)
    for _ in range(5):
        optimizer.zero_grad()
        x = features.sample_dense(32, batches, 2)
        objective.loss(reference, x, features.importances, batches)[1].sum().backward()
        optimizer.step()
    train(start, features, 5, 32, generator=generator(1), objective=objective, schedule="constant")
    for trained_weight, weight in zip(start.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(trained_weight, weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("probability", [0.02, 0.1, 0.7])  # sparse, drawn sparsely but dense, dense
def test_training_is_adamw_on_the_loss(probability, schedule):
    n_steps, lr = 30, 5e-3  # the default beyond 12 features
    features = Features(14, probability, [0.9**i for i in range(14)])
    start = ToyModel(14, 4, 3, generator=generator(0))
    reference = ToyModel(14, 4, 3, generator=generator(0))
    optimizer = torch.optim.AdamW(reference.parameters(), lr=lr, weight_decay=0.1)
    batches, expected = generator(1), []
    draw = features.sample if probability == 0.02 else features.sample_dense
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + cos(pi * step / n_steps)) / 2 if schedule == "cosine" else lr
        x = draw(64, batches, 3)
        dense = x if isinstance(x, torch.Tensor) else x.dense()
        losses = weighted_error(dense, reference(x), features.importances)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        expected.append(losses.detach())
    seen = []
    run = train(
        start,
        features,
        n_steps,
        64,
        generator=generator(1),
        weight_decay=0.1,
        schedule=schedule,
        progress=lambda step, losses: seen.append((step, losses.clone())),
    )
    torch.testing.assert_close(run.losses, torch.stack(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(start.W, reference.W, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(start.b, reference.b, rtol=1e-3, atol=1e-5)
    assert [step for step, _ in seen] == list(range(n_steps))
    assert torch.equal(torch.stack([losses for _, losses in seen]), run.losses)
    assert start.W.grad is None


def test_the_same_seed_trains_the_same_and_the_best_instance_is_the_lowest():
    features = Features(6, 0.1)
    model, run = trained(features, 2, 4, 60)
    again, rerun = trained(features, 2, 4, 60)
    assert torch.equal(model.W, again.W)
    assert torch.equal(run.losses, rerun.losses)
    assert run.losses.shape == (60, 4)
    torch.testing.assert_close(run.final_losses, run.losses[-3:].mean(0))
    assert run.best == int(run.final_losses.argmin())


def test_two_features_share_one_dimension_as_an_antipodal_pair():
    model, run = trained(Features(2, 0.1), 1, 20, 500)  # TOYMODELS.md, row 1
    signed = model.W[:, :, 0]
    assert signed[run.best].prod() < 0
    assert (signed[run.best].abs() - 1).abs().max() < 0.1
    succeeded = (signed.prod(1) < 0) & ((signed.abs() - 1).abs() < 0.1).all(1)
    assert 0.2 < succeeded.float().mean() < 0.9


def test_five_features_in_two_dimensions_make_a_pentagon():
    model, _ = trained(Features(5, 0.05), 2, 16, 1000)  # row 2a
    angles = torch.atan2(model.W[..., 1], model.W[..., 0]).sort(dim=1).values
    gaps = torch.cat([angles.diff(dim=1), angles[:, :1] + 2 * pi - angles[:, -1:]], dim=1).rad2deg()
    assert (gaps - 72).abs().max() < 6
    assert (geometry.norms(model.W) - 1.13).abs().max() < 0.05
    assert (geometry.feature_dimensionality(model.W) - 0.4).abs().max() < 0.01
    assert (model.b + 0.245).abs().max() < 0.03
    for W in model.W:
        assert [shape.kind for shape in geometry.polytopes(W)] == ["pentagon"]


def test_a_linear_model_keeps_the_most_important_features():
    p, importance = 0.3, [0.7**i for i in range(5)]
    features = Features(5, p, importance)
    model, run = trained(features, 2, 4, 800, activation="linear")  # row 2c
    assert (geometry.norms(model.W[run.best]) - torch.tensor([1.0, 1, 0, 0, 0])).abs().max() < 0.05
    x = features.sample(100_000, generator(1, "test"), 4)
    loss = weighted_error(x.dense(), model(x), features.importances)[run.best].item()
    assert loss == pytest.approx(sum(importance[2:]) * (p / 3 - p**2 / 4), rel=0.02)


def test_mistakes_are_named():
    model = ToyModel(3, 2)
    with pytest.raises(ValueError, match="the model reads n_features=3, the features are 4"):
        train(model, Features(4, 0.1), 1, generator=generator(0))
    with pytest.raises(ValueError, match="n_steps must be at least 1, got 0"):
        train(model, Features(3, 0.1), 0, generator=generator(0))
    with pytest.raises(ValueError, match=r"schedule must be one of .*, got 'sawtooth'"):
        unwrap(train)(model, Features(3, 0.1), 1, generator=generator(0), schedule="sawtooth")


# Other objectives, schedules and records


def loss_of(objective, model, features, seed=3):
    """What training would minimise, and on which batch."""
    x = features.sample_dense(64, generator(seed), model.n_instances)
    return objective.loss(model, x, features.importances, generator(seed)), x


def test_an_objective_is_its_equation():
    features = Features(5, 0.4, [0.9**i for i in range(5)], signed=True)
    model = ToyModel(5, 3, 2, hidden_activation="relu", tied=False, generator=generator(0))
    cost = torch.tensor([0.0, 0.3])
    (error, total), x = loss_of(Objective(torch.abs, l1_hidden=cost, l1_weights=0.1), model, features)
    torch.testing.assert_close(error, weighted_error(x.abs(), model(x), features.importances))
    for i in range(2):
        size = model.W[i].abs().sum() + model.W_out[i].abs().sum()
        expected = error[i] + cost[i] * model.hidden(x)[i].abs().sum(1).mean() + 0.1 * size
        torch.testing.assert_close(total[i], expected)


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    features = Features(4, 1.0)
    model = ToyModel(4, 50, 3, "linear", generator=generator(0))
    q = torch.tensor([0.0, 0.2, 0.7])
    read = []
    model.read = lambda hidden: read.append(hidden) or ToyModel.read(model, hidden)
    x = features.sample_dense(2000, generator(1), 3)
    error, _ = Objective(dropout=q).loss(model, x, features.importances, generator(2))
    hidden = model.hidden(x)
    torch.testing.assert_close(error[0], weighted_error(x, model(x), features.importances)[0])
    kept = read[0] != 0
    assert (kept.double().mean((1, 2)) - (1 - q)).abs().max() < 0.01
    torch.testing.assert_close(read[0], torch.where(kept, hidden / (1 - q)[:, None, None], 0))


@pytest.mark.parametrize("hidden_activation", ["relu", "solu"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_any_form_and_objective_trains(hidden_activation, dropout):
    features = Features(6, 0.3, signed=True)
    model = ToyModel(6, 12, 2, hidden_activation=hidden_activation, tied=False, generator=generator(0))
    objective = Objective(torch.abs, dropout=dropout)
    run = train(model, features, 400, 256, generator=generator(1), objective=objective, schedule="linear")
    assert (run.final_losses < 0.6 * run.losses[0]).all()


def test_plain_objectives_agree_with_autograd_step_for_step():
    """The hand-written path, and autograd on the same model with a penalty of nothing."""
    features = Features(6, 0.3)
    runs = []
    for objective in (Objective(), Objective(l1_weights=torch.zeros(2))):
        model = ToyModel(6, 2, 2, generator=generator(0))
        train(model, features, 50, 64, generator=generator(1), objective=objective)
        runs.append(model)
    torch.testing.assert_close(runs[0].W, runs[1].W, rtol=1e-4, atol=1e-5)


def test_snapshots_are_the_weights_on_the_way():
    model = ToyModel(4, 2, 3, generator=generator(0))
    first, seen = model.W.detach().clone(), []
    run = train(
        model,
        Features(4, 0.5),
        25,
        32,
        generator=generator(1),
        snapshot_every=10,
        progress=lambda step, losses: seen.append(model.W.detach().clone()),
    )
    assert torch.equal(run.snapshots, torch.stack([first, seen[9], seen[19], seen[24]]))
    assert len(train(model, Features(4, 0.5), 2, 32, generator=generator(1)).snapshots) == 0


def test_schedules_fall_from_one_to_nothing_or_stay():
    for name, last in (("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)):
        assert SCHEDULES[name](0.0) == 1
        assert SCHEDULES[name](1.0) == pytest.approx(last)
    assert SCHEDULES["linear"](0.25) == 0.75


@pytest.mark.parametrize(
    "costs", [{"dropout": 1.0}, {"dropout": -0.1}, {"l1_hidden": -1.0}, {"l1_weights": float("nan")}]
)
def test_impossible_costs_are_named(costs):
    with pytest.raises(ValueError, match=f"{next(iter(costs))} must"):
        Objective(**costs)
