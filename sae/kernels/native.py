"""The stages of a training step on a CPU in C, from `native.c`; the encoder's product is the BLAS's.

Buffers are made once and reused: at these sizes, asking the system for fresh pages costs as much as the work on them.
What a method returns is therefore good until the same method is called again.
"""

from __future__ import annotations

import math
from ctypes import c_double, c_float, c_long, c_void_p
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import base, pursuit
from sae.kernels.base import (
    Buffers,
    Codes,
    Decoded,
    DenseCodes,
    Rows,
    Scalar,
    Scores,
    State,
    blocks,
)
from sae.kernels.build import library
from sae.kernels.precision import Precision, slack
from sae.optim import BETA1, BETA2, EPSILON, Now

REALS: dict[torch.dtype, tuple[str, Any]] = {torch.float32: ("float", c_float), torch.float64: ("double", c_double)}
# Latents whose contributions to b_dec one thread sums, in order.
BLOCK = 64
# A batch's cut is close to the last one's: nearly all that reaches this share of it belongs to the n largest.
GUESS = 0.97
MAX_GUESSES = 40
# Where the search begins when some rows tell nothing of the cut.
SMALLEST = 1e-37
# Slots for each code that is asked for: room for what a guess lets in.
SCREENED = 4


class Plan(NamedTuple):
    """The codes in the order of latents: latent j owns the entries from offsets[j] to offsets[j + 1].

    `rows` are those of x, `decoder_rows` those of the gradient in x_hat, which has a block of rows for each level.
    """

    offsets: Int[Tensor, " d_sae_plus_1"]
    rows: Int[Tensor, " slots"]
    decoder_rows: Int[Tensor, " slots"]
    codes: Float[Tensor, " slots"]
    gradients: Float[Tensor, " slots"]
    n_codes: Int[Tensor, ""]


class Found(NamedTuple):
    """Entries of rows that lie in any order: row b's counts[b] entries begin at starts[b]; `total` in all.

    Where total exceeds the capacity, some were left out.
    """

    starts: Int[Tensor, " batch"]
    counts: Int[Tensor, " batch"]
    latents: Int[Tensor, " capacity"]
    values: Float[Tensor, " capacity"]
    total: int


class Block(NamedTuple):
    """Some rows of a batch's scores."""

    scores: Scores
    rows: slice
    product: Float[Tensor, "rows d_sae"]

    @classmethod
    def whole(cls, scores: Scores) -> Block:
        """All rows."""
        rows = slice(0, len(scores.x))
        return cls(scores, rows, scores.product(rows))


class Native:
    """The fast version for CPUs.

    Raises:
        CannotBuild: there is no compiler, or it failed.
    """

    name = "native"

    def __init__(self, dtype: torch.dtype, precision: Precision) -> None:
        self.dtype, self.precision = dtype, precision
        real, self._real = REALS[dtype]
        self._library = library(real)
        self._library.at_least.restype = self._library.invert.restype = c_long
        self._library.nth_largest.restype = self._real
        self._buffer = Buffers(dtype, torch.device("cpu"))
        self._cut = 0.0

    # ------------------------------------------------------------------------------------------------ encoder

    def refresh(self, state: State) -> None:
        if not state.unit_norm:
            state.norms.copy_(state.W_dec.norm(dim=1))
        self._buffer.kept.pop("encoder_rounded", None)
        if self.precision == "exact":
            self._buffer("encoder_norms", state.b_enc.shape).copy_(state.encoder.norm(dim=1))

    def centre(self, x: Tensor, unit: float, b_dec: Tensor) -> Tensor:
        x = x.to(self.dtype).contiguous()
        out = self._buffer("x", x.shape)
        rounded = None if self.precision == "fp32" else self._buffer("x_rounded", x.shape, torch.bfloat16)
        self._call("centre", x, 1 / unit, b_dec, out, rounded, *x.shape)
        return out

    def scores(self, x: Tensor, state: State) -> Scores:
        if self.precision == "exact":
            norms = torch.linalg.vector_norm(x, dim=1, out=self._buffer("x_slack", (len(x),)))
            norms.mul_(slack(x.shape[1]))
        fp32 = self.precision == "fp32"
        left = x if fp32 else self._rounded_x(x)
        if not fp32 and "encoder_rounded" not in self._buffer.kept:  # a ReLU's dense steps do without
            self._buffer("encoder_rounded", tuple(state.encoder.shape), torch.bfloat16).copy_(state.encoder)
        right = state.encoder if fp32 else self._buffer.kept["encoder_rounded"]

        def product(rows: slice) -> Tensor:
            part = left[rows]
            out = self._buffer(f"scores_{self.precision}", (len(part), len(right)), right.dtype)
            return torch.mm(part, right.T, out=out)

        return Scores(x, state.encoder, state.b_enc, product, screens=self.precision == "exact")

    def _rounded_x(self, x: Tensor) -> Tensor:
        """`centre` has rounded what it gave; anything else is rounded here."""
        kept = self._buffer.kept
        known = "x" in kept and kept["x"].data_ptr() == x.data_ptr() and kept["x"].shape == x.shape
        return kept["x_rounded"] if known else x.bfloat16()

    # -------------------------------------------------------------------------------------------------- codes

    def top_k(self, scores: Scores, k: int) -> Codes:
        batch, d_sae = scores.shape
        offsets = torch.arange(0, batch * k + 1, k, out=self._buffer("offsets", (batch + 1,), torch.int64))
        latents, values = self._slots("codes", batch * k)
        for rows in blocks(batch, d_sae, base.BLOCK_ENTRIES):
            block, slots = Block(scores, rows, scores.product(rows)), slice(rows.start * k, rows.stop * k)
            if self.precision == "exact":
                self._exact_top_k(block, k, latents[slots], values[slots])
            else:
                self._call("top_k", *self._parts(block), *block.product.shape, k, latents[slots], values[slots], None)
        return Codes(offsets, latents, values)

    def _exact_top_k(self, block: Block, k: int, latents: Tensor, values: Tensor) -> None:
        n_rows, d_sae = block.product.shape
        least = self._buffer("least", (n_rows,))
        self._call("top_k", *self._parts(block, -1), n_rows, d_sae, k, None, None, least)
        found = self._at_least(block, least, n_rows * d_sae, +1)
        self._rescore(block, found)
        self._call("keep_top_k", *found[:-1], n_rows, k, latents, values)

    def batch_top_k(self, scores: Scores, n: int) -> Codes | None:
        block = Block.whole(scores)
        n = min(n, block.product.numel())
        room = min(SCREENED * n, block.product.numel())
        if self.precision != "exact":
            found = self._candidates(block, n, 0)
            if found is not None and self.precision == "bf16":
                self._rescore(block, found)  # bf16 ties by the dozen at the cut; float32 hardly ever
        else:
            surely = self._candidates(block, n, -1)
            if surely is None:
                return None
            found = self._at_least(block, self._nth_largest(surely, n), room, +1)
            if found.total > room:
                return None
            self._rescore(block, found)
        return found and self._compact(found, self._nth_largest(found, n))

    def positive(self, scores: Scores, capacity: int) -> Codes | None:
        exact, block = self.precision == "exact", Block.whole(scores)
        found = self._at_least(block, 0.0, capacity, int(exact))
        if found.total > capacity:
            return None
        if exact:
            self._rescore(block, found)
        return self._compact(found, 0.0)

    def _candidates(self, block: Block, n: int, sign: int) -> Found | None:
        """The n largest pre-latents and few others (all that are positive, where these are fewer than n).

        The last batch's cut makes the first guess; what is found depends on it, what is kept of that does not.
        """
        room = min(SCREENED * n, block.product.numel())
        low, high, guess = 0.0, math.inf, GUESS * (self._cut or self._cut_of_some_rows(block, n, sign))
        for attempt in range(MAX_GUESSES):
            found = self._at_least(block, guess, room, sign)
            if found.total > room:
                low = max(guess, SMALLEST)
            elif found.total < n and guess > 0:
                high = guess
            else:
                return found
            if low > 0 and high < math.inf:
                guess = math.sqrt(low) * math.sqrt(high)
            elif low > 0:  # in steps that grow: this batch may be of another scale
                guess = low * 1.1 ** (2 ** min(attempt, 10))
            else:
                guess = high * 0.8 ** (2**attempt) if attempt < 8 else 0.0
        return None

    def _cut_of_some_rows(self, block: Block, n: int, sign: int) -> float:
        batch, d_sae = block.product.shape
        stride = max(batch // 64, 1)
        n_rows = -(-batch // stride)
        found = self._at_least(block, 0.0, n_rows * d_sae, sign, stride)
        return self._nth_largest(found, max(n * n_rows // batch, 1))

    def _at_least(self, block: Block, least: float | Tensor, capacity: int, sign: int, stride: int = 1) -> Found:
        batch, d_sae = block.product.shape
        starts = self._buffer("starts", (batch,), torch.int64)
        counts = self._buffer("counts", (batch,), torch.int32)
        latents, values = self._slots("found", capacity)
        scalar, per_row = (0.0, least) if isinstance(least, Tensor) else (least, None)
        limits = (scalar, per_row, capacity)
        parts = self._parts(block, sign)
        total = self._call("at_least", *parts, batch, d_sae, stride, *limits, starts, counts, latents, values)
        return Found(starts, counts, latents, values, total)

    def _nth_largest(self, found: Found, n: int) -> float:
        """0 where there are fewer."""
        if found.total < n:
            return 0.0
        return self._library.nth_largest(c_void_p(found.values.data_ptr()), c_long(found.total), c_long(n))

    def _compact(self, found: Found, least: float) -> Codes:
        self._cut = least
        offsets = self._buffer("offsets", (len(found.starts) + 1,), torch.int64)
        latents, values = self._slots("codes", found.total)
        least = max(least, torch.finfo(self.dtype).tiny)
        self._call("compact", *found[:-1], least, len(found.starts), offsets, latents, values)
        n = int(offsets[-1])
        return Codes(offsets, latents[:n], values[:n])

    def _rescore(self, block: Block, found: Found) -> None:
        x = block.scores.x[block.rows]
        self._call("rescore", *found[:3], x, block.scores.encoder, block.scores.bias, *x.shape, found.values)

    # -------------------------------------------------------------------------------------- decoder, gradients

    def decode(self, codes: Codes, state: State, target: Tensor, cost: Scalar) -> Decoded:
        (batch, d_out), n_levels, codes = target.shape, len(codes.weights), _as_c(codes)
        gradient = self._buffer("gradient", (n_levels * batch, d_out))
        code_gradients = self._buffer("code_gradients", codes.values.shape)
        squares, sums = self._buffer("squares", (batch,)), self._buffer("sums", (batch,))
        shared = (
            *(int(codes.pre_latents is not None), state.W_dec, target, state.charged_norms, float(cost), 2 / batch),
            *(batch, d_out, gradient, code_gradients, squares),
        )
        if codes.levels is None:
            losses = squares
            self._call("decode", *codes[:3], *shared, sums)
        else:
            losses, weights = self._buffer("losses", (batch,)), torch.tensor(codes.weights, dtype=self.dtype)
            self._call("decode_levels", *codes[:3], codes.levels, weights, n_levels, *shared, losses, sums)
        return Decoded(squares, losses, sums, gradient, code_gradients)

    def pursue(self, x: Tensor, W_dec: Tensor, k: int) -> Codes:
        batch, d_sae = len(x), len(W_dec)
        if not pursuit.gram_pays(batch, d_sae, k):
            return pursuit.by_products(x, W_dec, k)
        gram = torch.mm(W_dec, W_dec.T, out=self._buffer("gram", (d_sae, d_sae)))
        latents, values = self._slots("codes", batch * k)
        for rows in blocks(batch, d_sae, base.BLOCK_ENTRIES):
            part, slots = x[rows], slice(rows.start * k, rows.stop * k)
            correlations = self._buffer("scores_fp32", (len(part), d_sae))
            torch.mm(part, W_dec.T, out=correlations)
            sizes = (len(part), d_sae, x.shape[1], k)
            self._call("pursue", correlations, gram, part, W_dec, *sizes, latents[slots], values[slots])
        return Codes(torch.arange(0, batch * k + 1, k), latents, values)

    def unroll(self, codes: Codes, decoded: Decoded, x: Tensor, state: State) -> pursuit.Unrolled:
        (batch, d), codes = x.shape, _as_c(codes)
        k = len(codes.values) // batch
        gradient = self._buffer("unrolled", ((k + 1) * batch, d))
        fires = self._buffer("fires", codes.values.shape)
        flows = (codes.levels, decoded.code_gradients, decoded.gradient)
        self._call("unroll", *codes[1:3], *flows, x, state.W_dec, int(state.tied), batch, d, k, gradient, fires)
        return pursuit.Unrolled(gradient, pursuit.stepped(codes, fires, k))

    def invert(self, codes: Codes, code_gradients: Tensor, d_sae: int) -> Plan:
        n, codes = len(codes.values), _as_c(codes)
        offsets = self._buffer("latent_offsets", (d_sae + 1,), torch.int32)
        rows, values = self._slots("plan", n)
        gradients = self._buffer("plan_gradients", (n,))
        decoder_rows = rows if codes.levels is None else self._buffer("plan_decoder_rows", (n,), torch.int32)
        counts = self._buffer("thread_counts", (torch.get_num_threads(), d_sae), torch.int32)
        given = (*codes[:3], code_gradients, codes.levels, len(codes.offsets) - 1, d_sae, counts)
        fired = self._call("invert", *given, offsets, rows, decoder_rows, values, gradients)
        return Plan(offsets, rows, decoder_rows, values, gradients, torch.tensor(fired))

    def relu(self, x: Tensor, state: State) -> DenseCodes:
        batch, d_sae = len(x), len(state.b_enc)
        z = torch.mm(x, state.encoder.T, out=self._buffer("scores_fp32", (batch, d_sae)))
        counts = self._buffer("thread_counts", (torch.get_num_threads(), d_sae), torch.int32)
        firing, sums = self._buffer("firing", (d_sae,), torch.int32), self._buffer("sums", (batch,))
        self._call("relu_", z, state.b_enc, state.charged_norms, batch, d_sae, counts, firing, sums)
        return DenseCodes(z, firing, sums)

    def relu_backward(self, gradient: Tensor, codes: DenseCodes, state: State, cost: Scalar) -> tuple[Tensor, Tensor]:
        batch, d_sae = gradient.shape
        blocks = self._buffer("relu_blocks", (-(-batch // 64), d_sae))
        bias_gradient = self._buffer("bias_gradient", (d_sae,))
        norms = state.charged_norms
        self._call("relu_backward_", gradient, codes.values, norms, float(cost), batch, d_sae, blocks, bias_gradient)
        return gradient, bias_gradient

    # -------------------------------------------------------------------------------------------------- update

    def update_(
        self,
        state: State,
        now: Now,
        x: Tensor,
        gradient: Tensor,
        plan: Plan | None = None,
        extra: Rows | None = None,
        firing: Tensor | None = None,
        cost: Scalar = 0.0,
        pull: Tensor | None = None,
    ) -> None:
        batch, d_in = x.shape
        d_sae, d_out = state.W_dec.shape
        constants = (BETA1, 1 - BETA1, BETA2, 1 - BETA2, EPSILON)
        adam = torch.tensor([*now[:3], *constants], dtype=self.dtype)
        blocks = self._buffer("blocks", (-(-d_sae // BLOCK), d_in)) if state.tied else None
        extra_of = None
        if extra is not None and extra.latents is not None:
            extra_of = self._buffer("extra_of", (d_sae,), torch.int32).fill_(-1)
            extra_of[extra.latents] = torch.arange(len(extra.latents), dtype=torch.int32)
        if firing is not None:
            firing = firing.to(torch.int32)
        first, second, rounded = state.first, state.second, self._buffer.kept.get("encoder_rounded")
        self._call(
            "update",
            *(d_sae, d_in, d_out, BLOCK),
            *(plan[:-1] if plan else [None] * 5),
            *(x, gradient, extra_of),
            *([t.contiguous() for t in extra[1:]] if extra else (None, None, None)),
            *(adam, int(state.unit_norm), float(cost), pull),
            *(state.encoder, first.get("encoder"), second.get("encoder")),
            *(state.W_dec, first["W_dec"], second["W_dec"]),
            *(state.b_enc, first["b_enc"], second["b_enc"]),
            *(rounded, state.norms, self._buffer.kept.get("encoder_norms")),
            *(state.silent_samples, state.window_firing, firing, batch, blocks),
        )
        moments = (first["b_dec"], second["b_dec"])
        n_blocks = 0 if blocks is None else len(blocks)
        self._call("update_b_dec", gradient, blocks, batch, n_blocks, d_out, adam, state.b_dec, *moments)

    # ------------------------------------------------------------------------------------------------- plumbing

    def _parts(self, block: Block, sign: int = 0) -> tuple[Any, ...]:
        """The struct Scores of native.c; sign says where what bf16 may have changed is added (+1) or taken (-1)."""
        kept, rounded = self._buffer.kept, int(block.product.dtype == torch.bfloat16)
        slacks = (kept["x_slack"][block.rows], kept["encoder_norms"]) if sign else (None, None)
        return block.product, rounded, block.scores.bias, *slacks, sign

    def _slots(self, name: str, n: int) -> tuple[Tensor, Tensor]:
        return self._buffer(f"{name}_integers", (n,), torch.int32), self._buffer(f"{name}_values", (n,))

    def _call(self, function: str, *arguments: Any) -> Any:
        return getattr(self._library, function)(*map(self._argument, arguments), c_long(torch.get_num_threads()))

    def _argument(self, value: Tensor | float | int | None) -> Any:
        if isinstance(value, Tensor):
            assert value.is_contiguous(), f"a tensor of shape {list(value.shape)} must be contiguous"
            return c_void_p(value.data_ptr())
        if isinstance(value, float):
            return self._real(value)
        return value if value is None else c_long(value)


def _as_c(codes: Codes) -> Codes:
    """In the types of native.c; its own codes have them already."""
    levels = None if codes.levels is None else codes.levels.to(torch.int32)
    return codes._replace(
        offsets=codes.offsets.to(torch.int64),
        latents=codes.latents.to(torch.int32),
        values=codes.values.contiguous(),
        levels=levels,
    )
