"""Encoder and selection on a CPU in C, from `native.c`: which codes a batch has. Large products are the BLAS's, except
where they are selected from as they are made: in whole numbers, and on AMX units.

Buffers are made once and reused: at these sizes, asking the system for fresh pages costs as much as the work on them.
What a method returns is therefore good until the same method is called again.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import base
from sae.kernels.base import Buffers, Codes, Scores, State, blocks
from sae.kernels.build import library
from sae.kernels.precision import Precision, slack
from sae.kernels.small import is_small, panels_of

REALS: dict[torch.dtype, str] = {torch.float32: "float", torch.float64: "double"}
# A batch's cut is close to the last one's: nearly all that reaches this share of it belongs to the n largest.
GUESS = 0.92
MAX_GUESSES = 40
# Where a TopK begins to look in a row, as a share of |x|: nearly all rows of the last batch had their k-th code above
# it, if they had one. One in so many is computed twice, and those without; if these are too many, it begins at 0.
ROW_GUESS, FEW_ROWS, MANY_ROWS = 0.95, 1024, 0.4
# GUESS, ROW_GUESS and FEW_ROWS where bytes screen: what a low guess lets in is multiplied again.
SCREENED_GUESS, SCREENED_ROW_GUESS, FEW_SCREENED_ROWS = 0.96, 0.98, 256
# Where the search begins when some rows tell nothing of the cut.
SMALLEST = 1e-37
# As in native.c: latents of a panel of whole numbers, and what is known of all of them.
SCREEN_COLUMNS, N_LIMITS = 16, 3
# Bytes screen batches of so many rows, since the encoder is rounded for each; rows of so many entries, as in
# native_screen.h; and bounds tighter than this (`looseness` there): others let too much pass.
FEWEST_SCREENED, LONGEST_SCREENED, LOOSE = 64, 2**16, 1.5
# As in native_amx.h: latents whose tiles are multiplied together, and entries of a row in one tile.
TILE_COLUMNS, TILE_DEPTH = 32, 32
# Slots for each code that is asked for: room for what a guess lets in.
SCREENED = 4


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
    """Some rows of a batch's scores; where product is None, native.c computes them while it selects."""

    scores: Scores
    rows: slice
    product: Float[Tensor, "rows d_sae"] | None

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, d_sae]."""
        return self.rows.stop - self.rows.start, self.scores.shape[1]

    @property
    def size(self) -> int:
        """Entries."""
        return self.shape[0] * self.shape[1]


class Selection:
    """The stages up to the codes.

    Raises:
        CannotBuild: there is no compiler, or it failed.
    """

    def __init__(self, dtype: torch.dtype, precision: Precision) -> None:
        self.dtype, self.precision = dtype, precision
        self._library = library(REALS[dtype])
        self._buffer = Buffers(dtype, torch.device("cpu"))
        self._screen_bits: int = self._call("screens") if precision == "fp32" else 0
        self._screened = False
        self._tiles = precision == "bf16" and bool(self._call("multiplies_tiles"))
        self._at_once = self._tiles or (precision == "fp32" and bool(self._call("selects_at_once")))
        self.cut = self.row_cut = 0.0

    # ------------------------------------------------------------------------------------------------ encoder

    def refresh(self, state: State) -> None:
        if not state.unit_norm:
            state.norms.copy_(state.W_dec.norm(dim=1))
        self._buffer.kept.pop("encoder_rounded", None)
        self._buffer.kept.pop("encoder_tiles", None)
        if self.precision == "exact":
            self._buffer("encoder_norms", state.b_enc.shape).copy_(state.encoder.norm(dim=1))

    def centre(self, x: Tensor, unit: float, b_dec: Tensor) -> Tensor:
        x = x.to(self.dtype).contiguous()
        out = self._buffer("x", x.shape)
        plain = self.precision == "fp32" or self._tiles
        rounded = None if plain else self._buffer("x_rounded", x.shape, torch.bfloat16)
        self._call("centre", x, 1 / unit, b_dec, out, rounded, *x.shape)
        return out

    def scores(self, x: Tensor, state: State) -> Scores:
        if self.precision == "exact":
            norms = torch.linalg.vector_norm(x, dim=1, out=self._buffer("x_slack", (len(x),)))
            norms.mul_(slack(x.shape[1]))
        self._screened = self._screens(x, state)
        if self._tiles:
            return self._tiled(x, state)
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

    def _encoder_tiles(self, state: State) -> Tensor:
        """Made once; from then on, updates keep them."""
        if "encoder_tiles" not in self._buffer.kept:
            d_sae, d_in = state.encoder.shape
            size = -(-d_sae // TILE_COLUMNS) * TILE_COLUMNS * -(-d_in // TILE_DEPTH) * TILE_DEPTH
            tiles = self._buffer("encoder_tiles", (size,), torch.bfloat16)
            self._call("tile_encoder", state.encoder, d_sae, d_in, tiles)
        return self._buffer.kept["encoder_tiles"]

    def _tiled(self, x: Tensor, state: State) -> Scores:
        """Scores that are selected from as they are made; as a matrix they are asked for by autograd alone."""
        self._encoder_tiles(state)

        def product(rows: slice) -> Tensor:
            return (x[rows].bfloat16() @ state.encoder.bfloat16().T).float()

        return Scores(x, state.encoder, state.b_enc, product)

    def _rounded_x(self, x: Tensor) -> Tensor:
        """`centre` has rounded what it gave; anything else is rounded here."""
        kept = self._buffer.kept
        known = "x" in kept and kept["x"].data_ptr() == x.data_ptr() and kept["x"].shape == x.shape
        return kept["x_rounded"] if known else x.bfloat16()

    # -------------------------------------------------------------------------------------------------- codes

    def top_k(self, scores: Scores, k: int) -> Codes:
        batch, d_sae = scores.shape
        latents, values = self._slots("codes", batch * k)
        own_blocks = self._screen_bits > 0 or self._at_once
        at_once = batch * d_sae if own_blocks else base.BLOCK_ENTRIES
        for rows in blocks(batch, d_sae, at_once):
            block, slots = self._block(scores, rows), slice(rows.start * k, rows.stop * k)
            own = (latents, values) if block.shape[0] == batch else (latents[slots], values[slots])
            if self.precision == "exact":
                self._exact_top_k(block, k, *own)
            else:
                guessed = self._tiles or (self._at_once and not is_small(scores.encoder))
                cuts = self._buffer("cuts", (batch,)) if guessed else None
                self._call("top_k", *self._parts(block), *block.shape, k, self.row_cut, *own, cuts)
                if cuts is not None:
                    self.row_cut = self._row_guess(cuts)
        return Codes(_every(batch, k), latents, values)

    def _row_guess(self, cuts: Float[Tensor, " batch"]) -> float:
        """Where the next batch's rows begin to look, from this one's k-th codes (0 where fewer than k are positive)."""
        share, few = (SCREENED_ROW_GUESS, FEW_SCREENED_ROWS) if self._screened else (ROW_GUESS, FEW_ROWS)
        batch = len(cuts)
        short = batch - int(cuts.count_nonzero())
        if short >= MANY_ROWS * batch:
            return 0.0
        return share * float(cuts.kthvalue(short + 1 + (batch - short) // few).values)

    def _exact_top_k(self, block: Block, k: int, latents: Tensor, values: Tensor) -> None:
        n_rows, d_sae = block.shape
        least = self._buffer("least", (n_rows,))
        self._call("top_k", *self._parts(block, -1), n_rows, d_sae, k, 0.0, None, None, least)
        found = self._at_least(block, least, n_rows * d_sae, +1)
        self._rescore(block, found)
        self._call("keep_top_k", *found[:-1], n_rows, k, latents, values)

    def batch_top_k(self, scores: Scores, n: int) -> Codes | None:
        block = self._block(scores, slice(0, scores.x.shape[0]))
        n = min(n, block.size)
        room = min(SCREENED * n, block.size)
        if self.precision != "exact":
            found = self._candidates(block, n, 0)
            if found is not None and self.precision == "bf16" and not self._tiles:
                self._rescore(block, found)  # bf16 ties by the dozen at the cut; sums in float32 hardly ever
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
        exact, block = self.precision == "exact", self._block(scores, slice(0, scores.x.shape[0]))
        found = self._at_least(block, 0.0, capacity, int(exact))
        if found.total > capacity:
            return None
        if exact:
            self._rescore(block, found)
        return self._compact(found, 0.0)

    def _candidates(self, block: Block, n: int, sign: int) -> Found | None:
        """The n largest pre-latents and few others (all that are positive, where these are fewer than n).

        The last batch's cut makes the first guess. What is found depends on it; what is kept of that does not, but for
        bf16, where a score may be rounded below the guess and be missed. The cut is therefore part of a checkpoint.
        """
        room = min(SCREENED * n, block.size)
        low, high, share = 0.0, math.inf, SCREENED_GUESS if self._screened else GUESS
        guess = share * (self.cut or self._cut_of_some_rows(block, n, sign))
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
        batch, d_sae = block.shape
        stride = max(batch // 64, 1)
        n_rows = -(-batch // stride)
        found = self._at_least(block, 0.0, n_rows * d_sae, sign, stride)
        return self._nth_largest(found, max(n * n_rows // batch, 1))

    def _at_least(self, block: Block, least: float | Tensor, capacity: int, sign: int, stride: int = 1) -> Found:
        batch, d_sae = block.shape
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
        largest: float = self._library.nth_largest(found.values.data_ptr(), found.total, n)
        return largest

    def _compact(self, found: Found, least: float) -> Codes:
        self.cut = least
        offsets = self._buffer("offsets", (found.starts.shape[0] + 1,), torch.int64)
        latents, values = self._slots("codes", found.total)
        least = max(least, torch.finfo(self.dtype).tiny)
        n = self._call("compact", *found[:-1], least, found.starts.shape[0], offsets, latents, values)
        return Codes(offsets, latents[:n], values[:n])

    def _rescore(self, block: Block, found: Found) -> None:
        x = block.scores.x[block.rows]
        self._call("rescore", *found[:3], x, block.scores.encoder, block.scores.bias, *x.shape, found.values)

    # ------------------------------------------------------------------------------------------------- plumbing

    def _block(self, scores: Scores, rows: slice) -> Block:
        within = self._screen_bits > 0 or self._at_once or (self.precision == "fp32" and is_small(scores.encoder))
        return Block(scores, rows, None if within else scores.product(rows))

    def _parts(self, block: Block, sign: int = 0) -> tuple[Any, ...]:
        """The struct Scores of native.c; sign says where what bf16 may have changed is added (+1) or taken (-1)."""
        kept, scores, product = self._buffer.kept, block.scores, block.product
        slacks = (kept["x_slack"][block.rows], kept["encoder_norms"]) if sign else (None, None)
        rounded, d = int(product is not None and product.dtype == torch.bfloat16), scores.x.shape[1]
        within: tuple[Any, ...] = (None,) * 6
        if product is None:
            x = scores.x if block.shape[0] == scores.x.shape[0] else scores.x[block.rows]
            d_sae = block.shape[1]
            packs = is_small(scores.encoder) and not self._tiles
            panels = panels_of(self._buffer, "encoder", d_sae, d) if packs else None
            whole = (kept["screen"], kept["screen_scales"]) if self._screened else (None, None)
            within = (x, scores.encoder, panels, *whole, kept["encoder_tiles"] if self._tiles else None)
        return product, rounded, scores.bias, *slacks, sign, *within, d

    def _screens(self, x: Tensor, state: State) -> bool:
        """Whether whole numbers screen these scores; if so, they are there from now on."""
        (batch, d), d_sae, encoder = x.shape, len(state.encoder), state.encoder
        if not self._screen_bits or is_small(encoder):  # small products cost less than rounding and deciding
            return False
        if self._screen_bits == 16:
            n_latents = -(-d_sae // SCREEN_COLUMNS) * SCREEN_COLUMNS
            panels = self._buffer("screen", (n_latents * (d + d % 2),), torch.int16)
            self._call("screen", encoder, d_sae, d, panels, self._buffer("screen_scales", (n_latents + N_LIMITS,)))
            return True
        if batch < FEWEST_SCREENED or d > LONGEST_SCREENED:
            return False
        sizes = (batch, d_sae, d)
        whole = self._buffer("screen", (self._call("screen_room", *sizes, 0),), torch.uint8)
        scales = self._buffer("screen_scales", (self._call("screen_room", *sizes, 1) // 4,))
        looseness: float = self._call("screen_batch", x, encoder, *sizes, whole, scales)
        return looseness < LOOSE

    def _slots(self, name: str, n: int) -> tuple[Tensor, Tensor]:
        return self._buffer(f"{name}_integers", (n,), torch.int32), self._buffer(f"{name}_values", (n,))

    def _call(self, function: str, *arguments: Any) -> Any:
        """A tensor goes in as its address, a number as the function's head has it. Anything else is refused by ctypes,
        a tensor that is not contiguous among it."""
        given = [one.data_ptr() if type(one) is Tensor and one.is_contiguous() else one for one in arguments]
        return getattr(self._library, function)(*given, torch.get_num_threads())


@lru_cache(maxsize=4)
def _every(batch: int, k: int) -> Int[Tensor, " batch_plus_1"]:
    """0, k, 2 k, ...: k slots a row. Asked for in every step, and only read."""
    return torch.arange(0, batch * k + 1, k)
