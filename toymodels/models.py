"""Small networks that store more features than they have dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from toymodels.features import FeatureBatch

Activation = Literal["relu", "linear"]


class ToyModel(nn.Module):
    """Features squeezed through a bottleneck and read back with the same weights.

        h = x W
        y = relu(h Wᵀ + b)        activation "relu": the ReLU-output model
        y = h Wᵀ + b              activation "linear"

    The leading axis holds independent models that are trained together: one per seed or condition.
    W starts normal with standard deviation `init_sd` (0.45 up to 12 features, 1/√n_features beyond), b at 0.
    Source: Elhage et al. 2022, Toy Models of Superposition, section 2.

    Raises:
        ValueError: a size below 1, or an unknown activation.
    """

    W: Float[Tensor, "n_instances n_features d_hidden"]
    b: Float[Tensor, "n_instances n_features"]

    def __init__(
        self,
        n_features: int,
        d_hidden: int,
        n_instances: int = 1,
        activation: Activation = "relu",
        *,
        init_sd: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        shape = (n_instances, n_features, d_hidden)
        if min(shape) < 1:
            raise ValueError(f"n_instances, n_features and d_hidden must be at least 1, got {list(shape)}")
        if activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {get_args(Activation)}, got {activation!r}")
        if init_sd is None:
            init_sd = 0.45 if n_features <= 12 else n_features**-0.5
        self.activation = activation
        device = "cpu" if generator is None else generator.device
        W = torch.randn(shape, generator=generator, device=device)
        self.W = nn.Parameter(init_sd * W)
        self.b = nn.Parameter(torch.zeros(shape[:2], device=device))

    @property
    def n_instances(self) -> int:
        return self.W.shape[0]

    @property
    def n_features(self) -> int:
        return self.W.shape[1]

    @property
    def d_hidden(self) -> int:
        return self.W.shape[2]

    def hidden(
        self, x: FeatureBatch | Float[Tensor, "n_instances batch n_features"]
    ) -> Float[Tensor, "n_instances batch d_hidden"]:
        """h = x W, for sparse or dense x."""
        if (x.shape[0], *x.shape[2:]) != (self.n_instances, self.n_features):
            raise ValueError(
                f"x must have shape [n_instances={self.n_instances}, batch, n_features={self.n_features}], "
                f"got {list(x.shape)}; draw it with features.sample(batch_size, generator, n_instances)"
            )
        if isinstance(x, FeatureBatch):
            return x.embed(self.W)
        return einsum(x, self.W, "i b n, i n d -> i b d")

    def forward(
        self, x: FeatureBatch | Float[Tensor, "n_instances batch n_features"]
    ) -> Float[Tensor, "n_instances batch n_features"]:
        """y, the features as the model reads them back."""
        y = einsum(self.hidden(x), self.W, "i b d, i n d -> i b n") + rearrange(self.b, "i n -> i 1 n")
        return torch.relu(y) if self.activation == "relu" else y

    def instance(self, i: int) -> ToyModel:
        """A copy of the i-th model alone."""
        return self._with_weights(self.W[i][None], self.b[i][None], self.activation)

    def save(self, path: str | Path) -> None:
        """Writes the weights as safetensors, the activation in its metadata."""
        weights = {"W": self.W.detach().contiguous(), "b": self.b.detach().contiguous()}
        save_file(weights, path, metadata={"kind": "ToyModel", "activation": self.activation})

    @classmethod
    def load(cls, path: str | Path) -> ToyModel:
        """Reads a saved model, on cpu.

        Raises:
            ValueError: the file holds something else.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != "ToyModel":
                raise ValueError(f"{path} is not a saved ToyModel: its metadata is {metadata}")
            return cls._with_weights(file.get_tensor("W"), file.get_tensor("b"), metadata["activation"])

    @classmethod
    def _with_weights(
        cls,
        W: Float[Tensor, "n_instances n_features d_hidden"],
        b: Float[Tensor, "n_instances n_features"],
        activation: Activation,
    ) -> ToyModel:
        """A model of these weights, copied; the global random state is left alone."""
        n_instances, n_features, d_hidden = W.shape
        model = cls(n_features, d_hidden, n_instances, activation, generator=torch.Generator(W.device))
        model.W.data = W.detach().clone()
        model.b.data = b.detach().clone()
        return model
