"""The toy model against its equation, and its files."""

from inspect import unwrap

import pytest
import torch
from safetensors.torch import save_file

from toymodels.features import Features
from toymodels.models import ToyModel
from toymodels.streams import generator


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_forward_is_the_equation_for_sparse_and_dense_features(activation):
    model = ToyModel(7, 3, n_instances=4, activation=activation, generator=generator(0))
    torch.nn.init.normal_(model.b, generator=generator(1))
    batch = Features(7, 0.3).sample(11, generator(2), n_instances=4)
    x = batch.dense()
    for i in range(4):
        h = x[i] @ model.W[i]
        y = h @ model.W[i].T + model.b[i]
        expected = y.clamp(min=0) if activation == "relu" else y
        torch.testing.assert_close(model.hidden(batch)[i], h)
        torch.testing.assert_close(model.hidden(x)[i], h)
        torch.testing.assert_close(model(batch)[i], expected)
        torch.testing.assert_close(model(x)[i], expected)
        torch.testing.assert_close(model.instance(i)(x[i : i + 1])[0], expected)


def test_initial_scale():
    assert ToyModel(12, 50, 50, generator=generator(0)).W.std().item() == pytest.approx(0.45, rel=0.02)
    assert ToyModel(100, 50, 10, generator=generator(0)).W.std().item() == pytest.approx(0.1, rel=0.02)
    assert ToyModel(5, 50, 50, init_sd=0.05, generator=generator(0)).W.std().item() == pytest.approx(0.05, rel=0.02)
    assert not ToyModel(5, 2).b.any()


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_saving_and_loading_is_bitwise(tmp_path, activation):
    model = ToyModel(7, 3, n_instances=4, activation=activation, generator=generator(0))
    torch.nn.init.normal_(model.b, generator=generator(1))
    model.save(tmp_path / "toy.safetensors")
    state = torch.random.get_rng_state()
    loaded = ToyModel.load(tmp_path / "toy.safetensors")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.activation == activation
    assert (loaded.n_instances, loaded.n_features, loaded.d_hidden) == (4, 7, 3)
    assert torch.equal(loaded.W, model.W)
    assert torch.equal(loaded.b, model.b)


def test_an_instance_is_a_copy():
    model = ToyModel(7, 3, n_instances=4, activation="linear", generator=generator(0))
    alone = model.instance(2)
    kept = model.W.detach().clone()
    with torch.no_grad():
        alone.W += 1
        alone.b += 1
    assert alone.n_instances == 1
    assert alone.activation == "linear"
    assert torch.equal(model.W, kept)
    assert not model.b.any()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="must be at least 1"):
        ToyModel(3, 0)
    with pytest.raises(ValueError, match="activation must be one of"):
        unwrap(ToyModel.__init__)(ToyModel(3, 2), 3, 2, 1, "gelu")  # past the type checks of the tests
    model = ToyModel(3, 2, n_instances=2)
    for shape in ((2, 5, 4), (1, 5, 3), (2, 3)):
        with pytest.raises(ValueError, match="x must have shape"):
            model.hidden(Features(shape[-1], 0.5).sample(*shape[-2:-1], generator(0), *shape[:-2]))
    save_file({"W": torch.ones(1, 3, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a saved ToyModel"):
        ToyModel.load(tmp_path / "other.safetensors")


# Hidden activations, and weights of its own to read them


@pytest.mark.parametrize("hidden_activation", ["linear", "relu", "solu", "topk"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_form_is_its_equation_and_survives_saving(tmp_path, hidden_activation, tied):
    k = 2 if hidden_activation == "topk" else None
    model = ToyModel(7, 4, 3, hidden_activation=hidden_activation, k=k, tied=tied, generator=generator(0))
    torch.nn.init.normal_(model.b, generator=generator(1))
    x = Features(7, 0.5, signed=True).sample(11, generator(2), 3).dense()
    for i in range(3):
        a = x[i] @ model.W[i]
        h = {
            "linear": a,
            "relu": a.clamp(min=0),
            "solu": a * a.exp() / a.exp().sum(1, keepdim=True),
            "topk": torch.where(a >= a.sort(1).values[:, [-2]], a.clamp(min=0), 0),
        }[hidden_activation]
        W_out = model.W[i].T if tied else model.W_out[i]
        torch.testing.assert_close(model.hidden(x)[i], h)
        torch.testing.assert_close(model(x)[i], (h @ W_out + model.b[i]).clamp(min=0))
    assert model.tied == tied
    assert model.W_out.shape == (3, 4, 7)
    model.save(tmp_path / "toy.safetensors")
    assert torch.equal(ToyModel.load(tmp_path / "toy.safetensors")(x), model(x))
    assert torch.equal(model.instance(1)(x[1:2]), model(x)[1:2])


def test_directions_are_the_answers_to_single_features():
    model = ToyModel(5, 3, 2, hidden_activation="relu", tied=False, generator=generator(0))
    one_hot = torch.eye(5).expand(2, 5, 5)
    both = torch.cat([model.hidden(one_hot), model.hidden(-one_hot)], dim=1)
    assert torch.equal(model.directions(signed=True), both)
    assert torch.equal(model.directions(), both[:, :5])


def test_a_k_that_does_not_fit_is_named():
    for activation, k in (("topk", None), ("topk", 0), ("topk", 3), ("relu", 1)):
        with pytest.raises(ValueError, match=r"needs a k in 1\.\.d_hidden=2"):
            ToyModel(3, 2, hidden_activation=activation, k=k)
