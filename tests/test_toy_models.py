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
