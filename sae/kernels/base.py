"""What the stages of a training step pass to each other, and the interface that a device's kernels implement.

Everything is in the trainer's units, and activations come centred: x is (activation - centre), the target is (what is
to be reconstructed - b_dec), the same where an autoencoder centres by b_dec. The residual is then z W_dec - target, and
b_dec appears in no product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.config import MomentsName
from sae.kernels.precision import Precision
from sae.optim import Now

Scalar = float | Tensor
"""A number that the host knows, or one on the device."""
WEIGHTS = ("encoder", "W_dec", "b_enc", "b_dec")
# Codes count as sparse when less than this share of them fires: where the sparse step begins to win. With bf16 units
# dense products cost little, so that codes must be sparser.
SPARSE_SHARE: dict[Precision, float] = {"fp32": 1 / 12, "exact": 1 / 12, "bf16": 1 / 40}
# The same for small weights on a CPU without AVX-512: the rows that codes gather lie in its cache. With it dense
# products are twice as fast, and gathering is not.
SPARSE_SHARE_SMALL = 1 / 6
# Entries of a matrix of weights up to which `native.c` computes products itself; beyond, a BLAS does no worse.
SMALL_ENTRIES = 2**16
# Pre-latents that exist together, at most, when codes are selected from them; a dense step has two such matrices beside
# the gradients of the weights. More blocks cost speed: the product packs the encoder anew for each.
BLOCK_ENTRIES = 13 * 2**20
DENSE_BLOCK_ENTRIES = 5 * 2**20
# Slots of sparse codes for each code at that share; a batch that needs more is computed densely.
HEADROOM = 2


class CannotRun(Exception):
    """Kernels cannot work on a device; the message says why, and what helps."""


class Codes(NamedTuple):
    """Codes of a batch, row after row: row b owns the slots from offsets[b] to offsets[b + 1].

    A slot whose value is 0 is empty: TopK gives every row k slots, whether or not k pre-latents are positive. Where
    `pre_latents` are given, no slot is empty: a gradient is wanted in silent codes as well.

    Codes may be read several times: reading l takes the slots with `levels` up to l, and the loss is the mean of all
    readings' errors under `weights`, which sum to 1. The last reading takes all. `reading` is the one that inference
    gives: what the log and AuxK call the reconstruction. Where readings are `detached`, each takes what the earlier
    ones give as it is: a slot learns from the reading of its own level and from the last one only.
    """

    offsets: Int[Tensor, " batch_plus_1"]
    latents: Int[Tensor, " slots"]
    values: Float[Tensor, " slots"]
    pre_latents: Float[Tensor, " slots"] | None = None
    levels: Int[Tensor, " slots"] | None = None
    weights: tuple[float, ...] = (1.0,)
    reading: int = -1
    detached: bool = False


@dataclass(frozen=True)
class Scores:
    """Pre-latents x W_enc + b_enc, a block of rows at a time: a whole batch of them is the largest thing in a step.

    The bias is not in the product yet; selection adds it on the fly.
    """

    x: Float[Tensor, "batch d_in"]
    encoder: Float[Tensor, "d_sae d_in"]
    bias: Float[Tensor, " d_sae"]
    product: Callable[[slice], Tensor]
    """x W_enc of some rows; good until it is called again."""
    screens: bool = False
    """The product only screens: what is decided and passed on is computed again from x."""

    @property
    def shape(self) -> tuple[int, int]:
        """[batch, d_sae]."""
        return self.x.shape[0], self.encoder.shape[0]

    def pre_latents(self) -> Float[Tensor, "batch d_sae"]:
        """All of them, with the bias, in its type."""
        product = self.x @ self.encoder.T if self.screens else self.product(slice(None))
        return product.to(self.bias.dtype) + self.bias


def of_reading(gradient: Tensor, codes: Codes) -> Tensor:
    """2 (x_hat - target) / batch of the reading that inference gives, from what all readings together give levels."""
    own, *later = gradient.view(len(codes.weights), len(codes.offsets) - 1, -1)[codes.reading % len(codes.weights) :]
    return (own - later[0] if later else own) / codes.weights[codes.reading]


def host_sees(tensor: Tensor) -> bool:
    """Whether the host can read it without waiting for a device to finish."""
    return tensor.device.type == "cpu"


def blocks(batch: int, d_sae: int, entries: int) -> Iterator[slice]:
    """Rows whose pre-latents exist together, at most about `entries`, in blocks of about the same size."""
    n = -(-batch * d_sae // entries)
    size = max(-(-batch // max(n, 1)), 1)
    return (slice(start, min(start + size, batch)) for start in range(0, batch, size))


class Buffers:
    """Memory that is asked for once and used in every step: fresh pages cost as much as the work on them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Memory of this name and shape; its contents are whatever was there."""
        kept = self.kept.get(name)
        if kept is not None and kept.shape == shape:
            return kept
        size = math.prod(shape)
        if kept is None or kept.untyped_storage().nbytes() < size * kept.element_size():
            kept = torch.empty(size, dtype=dtype or self.dtype, device=self.device)
        whole = kept.new_empty(0).set_(kept.untyped_storage())
        self.kept[name] = whole[:size].view(shape)
        return self.kept[name]


class Decoded(NamedTuple):
    """What one pass over the decoder gives: the loss of each sample and its gradients.

    squares: |x_hat - target|^2 of the reading that inference gives. losses: the mean of it over readings. code_sums:
    sum_j z_j |W_dec_j|. gradient: of mean(losses) in what the slots of each level add to x_hat, level after level; a
    level's slots add to its own reading and all later ones (where these are detached, to its own and the last), as
    b_dec does from the first on, so that the first `batch` rows are its gradient.
    code_gradients: of mean(losses) + cost * sum(code_sums) in each code, 0 in empty slots.
    """

    squares: Float[Tensor, " batch"]
    losses: Float[Tensor, " batch"]
    code_sums: Float[Tensor, " batch"]
    gradient: Float[Tensor, "levels_x_batch d_out"]
    code_gradients: Float[Tensor, " slots"]


class Rows(NamedTuple):
    """Gradient rows of some latents (of all where `latents` is None), added to what the codes give."""

    latents: Int[Tensor, " n"] | None
    encoder: Float[Tensor, "n d_in"]
    W_dec: Float[Tensor, "n d_out"]
    b_enc: Float[Tensor, " n"]


class Change(NamedTuple):
    """What an update changes the weights by: gradients of the codes in `plan`, plus the `extra` rows."""

    x: Float[Tensor, "batch d_in"]
    gradient: Float[Tensor, "rows d_out"]
    """In x_hat; where codes are read several times, level after level."""
    plan: Any = None
    """The codes, from `invert` or a dense step."""
    extra: Rows | None = None
    firing: Int[Tensor, " d_sae"] | None = None
    """How often each latent fired, where that is not what the plan says."""
    cost: Scalar = 0.0
    """What the penalty charges a unit of z |W_dec_j|, where rows are free."""
    pull: Float[Tensor, " d_sae"] | None = None
    """What any other penalty adds to the gradient in |W_dec_j|, where rows are free."""
    n_samples: int | None = None
    """Of how many activations, where x has more rows than that."""


@runtime_checkable
class Plan(Protocol):
    """The codes of a batch in the order of latents; what else it holds is its kernels' own affair."""

    @property
    def n_codes(self) -> Tensor:
        """How many fire, in all."""


class DenseCodes(NamedTuple):
    """Codes as a matrix, how often each latent fires, and each sample's sum_j z_j |W_dec_j|."""

    values: Float[Tensor, "batch d_sae"]
    firing: Int[Tensor, " d_sae"]
    code_sums: Float[Tensor, " batch"]


class DenseStep(NamedTuple):
    """What a ReLU's dense step computes, up to the update: gradient rows of all latents, the reconstruction's gradient,
    how often each latent fires, sum |x_hat - target|^2 and sum_j z_j |W_dec_j|.

    Where the update makes the rows itself, `rows` is None and `plan` is what it needs; it charges the penalty, too.
    """

    rows: Rows | None
    gradient: Float[Tensor, "batch d_out"]
    firing: Int[Tensor, " d_sae"]
    squares: Float[Tensor, ""]
    code_sum: Float[Tensor, ""]
    plan: Plan | None = None


@dataclass
class State:
    """Weights, Adam's moments of each, and counters: all that a step changes.

    `encoder` may be W_dec, the same memory; it has no moments then.
    """

    encoder: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_out"]
    unit_norm: bool
    tied: bool
    """b_dec is also what x is centred by, and gets a gradient from there."""
    weighted: bool
    """A penalty charges z |W_dec_j|, not z."""
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    scales: dict[str, Float[Tensor, "d_sae 2"]]
    """Of the matrices whose moments are kept in eight bits (`moments.py`)."""
    norms: Float[Tensor, " d_sae"]
    """|W_dec_j|, kept only where rows are free (unit_norm is off)."""
    silent_samples: Int[Tensor, " d_sae"]
    window_firing: Int[Tensor, " d_sae"]

    @classmethod
    def of(
        cls,
        weights: dict[str, Tensor],
        unit_norm: bool,
        tied: bool = True,
        weighted: bool = True,
        moments: MomentsName = "float32",
    ) -> State:
        """The state before the first step."""
        own = {name: weights[name].detach() for name in WEIGHTS}
        trained = WEIGHTS[1:] if weights["encoder"] is weights["W_dec"] else WEIGHTS
        small = [name for name in trained if moments == "int8" and own[name].ndim == 2]
        kept = {name: (torch.int8, torch.uint8) if name in small else (own[name].dtype,) * 2 for name in trained}
        d_sae, device = len(own["W_dec"]), own["W_dec"].device
        counter = torch.zeros(d_sae, dtype=torch.int64, device=device)
        return cls(
            **own,
            unit_norm=unit_norm,
            tied=tied,
            weighted=weighted,
            first={name: torch.zeros_like(own[name], dtype=dtype) for name, (dtype, _) in kept.items()},
            second={name: torch.zeros_like(own[name], dtype=dtype) for name, (_, dtype) in kept.items()},
            scales={name: own[name].new_zeros(d_sae, 2) for name in small},
            norms=own["W_dec"].norm(dim=1),
            silent_samples=counter,
            window_firing=counter.clone(),
        )

    @property
    def charged_norms(self) -> Float[Tensor, " d_sae"] | None:
        """What a penalty multiplies codes by; None: 1."""
        return self.norms if self.weighted and not self.unit_norm else None

    def moments(self) -> dict[str, Tensor]:
        """All of them as they are kept, by the names of a checkpoint."""
        first = {f"adam.{name}.exp_avg": moment for name, moment in self.first.items()}
        second = {f"adam.{name}.exp_avg_sq": moment for name, moment in self.second.items()}
        return first | second | {f"adam.{name}.scales": scales for name, scales in self.scales.items()}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that Adam moves, with their names."""
        return ((name, getattr(self, name)) for name in self.first)


def sparse_share(encoder: Float[Tensor, "d_sae d_in"], precision: Precision) -> float:
    """Codes count as sparse when less than this share of them fires."""
    small = precision == "fp32" and _is_small(encoder) and torch.backends.cpu.get_cpu_capability() != "AVX512"
    return SPARSE_SHARE_SMALL if small else SPARSE_SHARE[precision]


def capacity(scores: Scores) -> int:
    """Slots for the codes of a batch that counts as sparse, however many latents may fire in each row.

    As many in every precision: what does not fit is computed by autograd where a sparsifier has no dense products.
    """
    batch, d_sae = scores.shape
    share = SPARSE_SHARE_SMALL if _is_small(scores.encoder) else max(SPARSE_SHARE.values())
    return max(int(HEADROOM * share * batch * d_sae), 1)


def _is_small(encoder: Tensor) -> bool:
    return host_sees(encoder) and encoder.numel() <= SMALL_ENTRIES


@runtime_checkable
class Kernels(Protocol):
    """The stages of a step on one kind of device. `reference.Reference` says in plain products what each computes."""

    name: str
    precision: Precision
    cut: float
    """The last batch's smallest code, from which the next search for one may begin."""

    def refresh(self, state: State) -> None:
        """Makes what is derived from the weights anew, after they were set from outside."""

    def centre(self, x: Tensor, unit: float, b_dec: Tensor) -> Tensor:
        """x / unit - b_dec."""

    def scores(self, x: Tensor, state: State) -> Scores:
        """The encoder's product."""

    def top_k(self, scores: Scores, k: int) -> Codes:
        """Each row's k largest pre-latents, those that are positive."""

    def batch_top_k(self, scores: Scores, n: int) -> Codes | None:
        """The batch's n largest pre-latents, those that are positive; None where they do not fit their slots."""

    def positive(self, scores: Scores, capacity: int) -> Codes | None:
        """All positive pre-latents; None where there are more than `capacity`."""

    def pursue(self, x: Tensor, W_dec: Tensor, k: int) -> Codes:
        """k steps of matching pursuit on each row of x, k slots a row in their order (`pursuit` has the equations)."""

    def unroll(self, codes: Codes, decoded: Decoded, x: Tensor, state: State) -> Any:
        """The way back through these steps, as `pursuit.Unrolled`."""

    def decode(self, codes: Codes, state: State, target: Tensor, cost: Scalar) -> Decoded:
        """Reconstruction, loss and the gradients in it and in the codes."""

    def invert(self, codes: Codes, code_gradients: Tensor, d_sae: int) -> Plan:
        """The codes and their gradients in the order of latents: which samples fired each."""

    def by_latent(self, latents: Tensor, values: Tensor, d_sae: int) -> Tensor:
        """The sum of each latent's values, a value a slot: the same bits each time, save of torch on CUDA."""

    def relu(self, x: Tensor, state: State) -> DenseCodes:
        """max(0, pre), as a matrix."""

    def relu_backward(self, gradient: Tensor, codes: DenseCodes, state: State, cost: Scalar) -> tuple[Tensor, Tensor]:
        """(gradient + cost |W_dec_j|) where codes fire, else 0; and its sum over samples. `gradient` may be reused."""

    def dense_step(self, x: Tensor, state: State, target: Tensor, cost: Scalar) -> DenseStep | None:
        """`relu`, `relu_backward` and the five products of a dense step at once; None where they are better done one
        by one."""

    def aux_k(
        self, gradient: Tensor, x: Tensor, encoder: Tensor, b_enc: Tensor, W_dec: Tensor, k: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """`losses.aux_k`."""

    def gradient_rows(
        self, state: State, x: Tensor, gradient: Tensor, plan: Any
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        """As matrices, what the update makes of the codes in a plan: gradients of encoder, decoder and bias, the sum of
        each latent's codes, and how often it fired."""

    def update_(self, state: State, now: Now, change: Change) -> None:
        """Weight gradients, projection, Adam, renormalisation and counters: all that changes the state."""
