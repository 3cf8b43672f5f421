"""Worlds as SAEs read them: hidden activations, and the features behind them."""

from dataclasses import dataclass

import pytest
import torch

from sae import UsageError
from sae.config import parse_config
from sae.world_source import ToySourceConfig, WorldSource
from toymodels.co_firing import Together
from toymodels.experiments import NAMES, experiment
from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.streams import generator
from toymodels.worlds import WHY_ABSENT, Recipe, ToyRecipe, ToyWorld, falling_importance


@pytest.mark.parametrize("hidden_activation", ["linear", "relu"])
def test_a_world_pairs_hidden_activations_with_what_fired(hidden_activation):
    model = ToyModel(6, 3, hidden_activation=hidden_activation, generator=generator(0))
    world = ToyWorld(model, Features(6, 0.3))
    hidden, acts = world.sample(50, generator(1))
    assert hidden.shape == (50, 3)
    assert not hidden.requires_grad
    torch.testing.assert_close(hidden, model.hidden(acts.dense()[None])[0])
    assert torch.equal(world.sample(50, generator(1)).hidden, hidden)


def test_signed_features_are_two_each():
    model = ToyModel(4, 9, hidden_activation="relu", tied=False, generator=generator(0))
    world = ToyWorld(model, Features(4, 0.2, signed=True))
    hidden, acts = world.sample(400, generator(1))
    x = acts.dense()
    assert world.truth.shape == (8, 9)
    assert (x >= 0).all()
    assert not ((x[:, :4] > 0) & (x[:, 4:] > 0)).any()
    alone = (x > 0).sum(1) == 1  # one feature by itself: the hidden layer answers along its direction
    assert alone.any()
    torch.testing.assert_close(hidden[alone], (x @ world.truth)[alone])


def test_a_recipe_takes_sizes_and_what_the_model_needs():
    recipe = ToyRecipe(
        make_features=lambda n, p: Features(n, p, co_firing=Together(2)),
        model={"hidden_activation": "relu"},
        training={"lr": 1e-3},
    )
    world = recipe.resized(n_features=8, d_hidden=3, feature_prob=0.25, n_steps=2).build(seed=0)
    assert world.truth.shape == (8, 3)
    assert world.model.hidden_activation == "relu"
    assert world.features.co_firing == Together(2)
    with pytest.raises(UsageError, match="n_features=7 must be a multiple of the group size"):
        recipe.resized(n_features=7).build(seed=0)


@dataclass(frozen=True)
class OneSize(Recipe):
    n_features: int = 5

    def build(self, seed, on_step=None):
        raise AssertionError("it is only resized")


def test_a_recipe_has_the_sizes_that_are_its_fields():
    assert OneSize().resized(n_features=7) == OneSize(7)
    assert OneSize(3).resized() == OneSize(3)
    for name, size in {"d_hidden": 4, "feature_prob": 0.5, "n_steps": 4}.items():
        with pytest.raises(UsageError, match=f"OneSize has no {name}, got {size}: {WHY_ABSENT[name]}; leave it out"):
            OneSize().resized(n_features=7, **{name: size})


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_a_source_where_it_has_hidden_activations(name):
    if experiment(name).recipe is None:
        with pytest.raises(UsageError, match=f"{name!r} has no hidden activations; use one of antipodal"):
            ToySourceConfig(experiment=name).open()
        return
    mapping = {"kind": "toy", "experiment": name} | ({"n_steps": 2} if name != "residual_interference" else {})
    source = ToySourceConfig.model_validate(mapping).open()
    x = next(source.batches(64, seed=0))
    assert x.shape == (64, source.d_in)
    assert torch.isfinite(x).all()
    held = source.held_out("evaluation", 10)
    if source.truth is not None:
        assert held.acts.dense().shape == (10, len(source.truth))
        assert source.truth.shape[1] == source.d_in


def test_unknown_experiments_are_told_the_nearest():
    with pytest.raises(
        UsageError, match=r"source.experiment: unknown experiment 'corelated'; did you mean 'correlated'"
    ):
        parse_config(
            {"source": {"kind": "toy", "experiment": "corelated"}, "sae": {"kind": "topk", "d_sae": 4, "k": 1}}
        )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"d_hidden": 0}, "d_hidden"), ({"feature_prob": 1.5}, "feature_prob"), ({"n_features": -1}, "n_features")],
)
def test_impossible_sizes_are_named(sizes, message):
    with pytest.raises(UsageError, match=message):
        parse_config({"source": {"kind": "toy", **sizes}, "sae": {"kind": "topk", "d_sae": 4, "k": 1}})


def test_a_saved_model_of_another_form_is_refused(tmp_path):
    recipe = ToyRecipe(6, 3, model={"hidden_activation": "relu"})
    right = ToyModel(6, 3, hidden_activation="relu", generator=generator(0))
    right.save(tmp_path / "toy.safetensors")
    assert torch.equal(recipe.load(tmp_path / "toy.safetensors").model.W, right.W)
    for wrong in (
        ToyModel(6, 3),
        ToyModel(6, 3, 2, hidden_activation="relu"),
        ToyModel(6, 3, hidden_activation="relu", tied=False),
        ToyModel(5, 3, hidden_activation="relu"),
    ):
        wrong.save(tmp_path / "toy.safetensors")
        with pytest.raises(UsageError, match=r"(was|were) asked for"):
            recipe.load(tmp_path / "toy.safetensors")


def test_importance_falls_alike_at_every_size():
    make = falling_importance(0.7, 20)
    assert make(20, 0.1).importances.tolist() == pytest.approx([0.7**i for i in range(20)])
    assert make(80, 0.1).importances[::4].tolist() == pytest.approx([0.7**i for i in range(20)])


def test_held_out_rows_come_in_pieces_and_the_first_stay_the_same(monkeypatch):
    monkeypatch.setattr("sae.world_source.ROWS_AT_ONCE", 64)
    source = WorldSource(ToyRecipe(n_features=12, d_hidden=5, n_steps=2).build(0))
    whole = source.held_out("evaluation", 300)
    assert len(whole.x) == len(whole.acts) == 300
    for n, rows in ((300, 100), (300, 7), (300, 64), (300, 1000), (64, 64), (10, 3), (1, 1)):
        pieces = list(source.held_out_stream("evaluation", n).pieces(rows))
        assert [len(piece.x) for piece in pieces] == [min(rows, n - start) for start in range(0, n, rows)]
        assert torch.cat([piece.x for piece in pieces]).equal(whole.x[:n])
        assert torch.cat([piece.acts.dense() for piece in pieces]).equal(whole.acts[:n].dense())
    assert source.held_out("evaluation", 20).x.equal(whole.x[:20])
    assert not source.held_out("calibration", 20).x.equal(whole.x[:20])
