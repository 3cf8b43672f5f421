"""Small networks that store more features than they have dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from toymodels.errors import UsageError
from toymodels.features import FeatureBatch
from toymodels.files import save_tensors

Activation = Literal["relu", "linear"]
HiddenActivation = Literal["linear", "relu", "solu", "topk"]


class ToyModel(nn.Module):
    """Features squeezed through a hidden layer and read back.

        h = φ(x W)
        y = relu(h W_out + b)     activation "relu"
        y = h W_out + b           activation "linear"

    φ is the `hidden_activation`: linear (Elhage et al. 2022, section 2); relu, which gives h a privileged basis
    (their section "Superposition in a Privileged Basis", and, with W_out of its own, "Computation in
    Superposition"); solu, a · softmax(a) (Elhage et al. 2022, Softmax Linear Units); topk, relu on the `k`
    largest and 0 elsewhere. W_out is Wᵀ, unless the model is not `tied`.
    The leading axis holds independent models that are trained together: one per seed or condition.
    Weights start normal with standard deviation `init_sd` (0.45 up to 12 features, 1/√n_features beyond), b at 0.

    Raises:
        UsageError: a size below 1, k outside 1..d_hidden, or an unknown activation.
    """

    W: Float[Tensor, "n_instances n_features d_hidden"]
    b: Float[Tensor, "n_instances n_features"]
    own_W_out: Float[Tensor, "n_instances d_hidden n_features"] | None

    def __init__(
        self,
        n_features: int,
        d_hidden: int,
        n_instances: int = 1,
        activation: Activation = "relu",
        *,
        hidden_activation: HiddenActivation = "linear",
        k: int | None = None,
        tied: bool = True,
        init_sd: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        shape = (n_instances, n_features, d_hidden)
        if min(shape) < 1:
            raise UsageError(f"n_instances, n_features and d_hidden must be at least 1, got {list(shape)}")
        for name, value, known in (
            ("activation", activation, get_args(Activation)),
            ("hidden_activation", hidden_activation, get_args(HiddenActivation)),
        ):
            if value not in known:
                raise UsageError(f"{name} must be one of {known}, got {value!r}")
        if (hidden_activation == "topk") != (k is not None) or (k is not None and not 1 <= k <= d_hidden):
            raise UsageError(f"hidden_activation 'topk', and no other, needs a k in 1..d_hidden={d_hidden}, got {k}")
        if init_sd is None:
            init_sd = 0.45 if n_features <= 12 else n_features**-0.5
        self.activation, self.hidden_activation, self.k = activation, hidden_activation, k
        device = "cpu" if generator is None else generator.device
        self.W = nn.Parameter(init_sd * torch.randn(shape, generator=generator, device=device))
        self.b = nn.Parameter(torch.zeros(shape[:2], device=device))
        out = None if tied else init_sd * torch.randn(*shape[:1], *shape[:0:-1], generator=generator, device=device)
        self.register_parameter("own_W_out", None if out is None else nn.Parameter(out))

    @property
    def W_out(self) -> Float[Tensor, "n_instances d_hidden n_features"]:
        """What reads the hidden layer: Wᵀ, or weights of its own."""
        return self.W.mT if self.own_W_out is None else self.own_W_out

    @property
    def tied(self) -> bool:
        return self.own_W_out is None

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
        """h = φ(x W), for sparse or dense x."""
        if (x.shape[0], *x.shape[2:]) != (self.n_instances, self.n_features):
            raise UsageError(
                f"x must have shape [n_instances={self.n_instances}, batch, n_features={self.n_features}], "
                f"got {list(x.shape)}; draw it with features.sample(batch_size, generator, n_instances)"
            )
        return self.activate(x.embed(self.W) if isinstance(x, FeatureBatch) else x @ self.W)

    def activate(self, pre_hidden: Float[Tensor, "*rows d_hidden"]) -> Float[Tensor, "*rows d_hidden"]:
        """φ."""
        match self.hidden_activation:
            case "relu":
                return torch.relu(pre_hidden)
            case "solu":
                return pre_hidden * torch.softmax(pre_hidden, dim=-1)
            case "topk":
                assert self.k is not None
                largest = pre_hidden.topk(self.k, dim=-1)
                return torch.zeros_like(pre_hidden).scatter(-1, largest.indices, largest.values.relu())
            case _:
                return pre_hidden

    def read(
        self, hidden: Float[Tensor, "n_instances batch d_hidden"]
    ) -> Float[Tensor, "n_instances batch n_features"]:
        """y, from h."""
        y = torch.baddbmm(rearrange(self.b, "i n -> i 1 n"), hidden, self.W_out)
        return torch.relu(y) if self.activation == "relu" else y

    def forward(
        self, x: FeatureBatch | Float[Tensor, "n_instances batch n_features"]
    ) -> Float[Tensor, "n_instances batch n_features"]:
        """y, the features as the model reads them back."""
        return self.read(self.hidden(x))

    def directions(self, signed: bool = False) -> Float[Tensor, "n_instances n_directions d_hidden"]:
        """What the hidden layer answers to each feature alone at strength 1; signed features have two answers,
        first all those to +1, then those to −1."""
        W = self.W.detach()
        return self.activate(torch.cat([W, -W], dim=1) if signed else W)

    def instance(self, i: int) -> ToyModel:
        """A copy of the i-th model alone."""
        return self._with_weights({name: weight[i][None] for name, weight in self.state_dict().items()}, self.form)

    @property
    def form(self) -> dict[str, str]:
        """The activations, as a saved model's metadata says them."""
        kind = {"activation": self.activation, "hidden_activation": self.hidden_activation}
        return kind | ({} if self.k is None else {"k": str(self.k)})

    def save(self, path: str | Path) -> None:
        """Writes the weights as safetensors, the activations in its metadata."""
        save_tensors(Path(path), self.state_dict(), {"kind": "ToyModel", **self.form})

    @classmethod
    def load(cls, path: str | Path) -> ToyModel:
        """Reads a saved model, on cpu.

        Raises:
            UsageError: the file holds something else.
        """
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.pop("kind", None) != "ToyModel":
                raise UsageError(f"{path} is not a saved ToyModel: its metadata is {metadata}")
            return cls._with_weights({name: file.get_tensor(name) for name in file.keys()}, metadata)  # noqa: SIM118

    @classmethod
    def _with_weights(cls, weights: Mapping[str, Tensor], kind: Mapping[str, str]) -> ToyModel:
        """A model of these weights, copied; the global random state is left alone."""
        n_instances, n_features, d_hidden = weights["W"].shape
        options = {name: int(value) if name == "k" else value for name, value in kind.items()}
        model = cls(
            n_features,
            d_hidden,
            n_instances,
            tied="own_W_out" not in weights,
            generator=torch.Generator(weights["W"].device),
            **options,  # type: ignore[arg-type]
        )
        model.load_state_dict(weights)
        return model.to(weights["W"].dtype)
