"""The stages of a training step on a CUDA device: Triton, and torch's products and sort."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.kernels.base import Buffers, Change, Codes, Decoded, DenseCodes, DenseStep, Rows, Scalar, Scores, State
from sae.kernels.plain import Plain
from sae.kernels.precision import Precision
from sae.kernels.triton import batch as shared
from sae.kernels.triton import dead, decode, index, inference, launch, positive, top_k, update
from sae.optim import Now, adam_


class Triton(Plain):
    """The fast version for CUDA. Matching pursuit's own stages are those in torch operations.

    What a method returns is good until the same method is called again. `rounded` is what `bf16` rounds to.

    Raises:
        CannotRun: the device or the type of the weights will not do.
    """

    name = "triton"

    def __init__(
        self, device: torch.device, dtype: torch.dtype, precision: Precision, rounded: torch.dtype = torch.bfloat16
    ) -> None:
        launch.require(device, dtype)
        super().__init__(precision)
        self._rounded = rounded
        self.buffer = Buffers(dtype, device)
        self._encoder: Tensor | None = None
        self._kept: dict[tuple[float, ...], Tensor] = {}
        self.recording = False
        self.n_slots = 1
        self.n_positive: Tensor | None = None

    # ------------------------------------------------------------------------------------------ encoder, codes

    def refresh(self, state: State) -> None:
        super().refresh(state)
        if self.precision == "bf16":
            self._encoder = self.buffer("encoder_rounded", tuple(state.encoder.shape), self._rounded)
            self._encoder.copy_(state.encoder)

    def scores(self, x: Tensor, state: State) -> Scores:
        left, right = x, state.encoder
        if self._encoder is not None:
            left, right = x.to(self._rounded), self._encoder
        out = self.buffer("scores", (len(left), len(right)), right.dtype)

        def product(rows: slice) -> Tensor:
            return torch.mm(left[rows], right.T, out=out[rows])

        return Scores(x, state.encoder, state.b_enc, product)

    def top_k(self, scores: Scores, k: int) -> Codes:
        if top_k.tile_of(k) is None:  # so many that no tile can be left out
            return super().top_k(scores, k)
        return self._top_k(scores.product(slice(None)), scores.bias, k)

    def _top_k(self, product: Tensor, bias: Tensor, k: int) -> Codes:
        tile, (batch, d_sae) = top_k.tile_of(k), product.shape
        assert tile is not None
        n_tiles = -(-d_sae // tile)
        latents, values = self._slots(batch * k)
        maxima = self.buffer("maxima", (batch, n_tiles), torch.int32)
        winners = self.buffer("winners", (batch, min(k, n_tiles)), torch.int32)
        top_k.largest_of_rows(product, bias, maxima, tile, k, winners, latents, values)
        return Codes(top_k.rows_slots(batch, k, product.device), latents, values)

    def batch_top_k(self, scores: Scores, n: int) -> Codes | None:
        """Rounded products only find candidates, as they tie at the cut by the dozen: these are scored again."""
        batch, d_sae = scores.shape
        n, rounded = min(n, batch * d_sae), self.precision == "bf16"
        # A multiple of 16, so that they are read many at a time.
        n_candidates = min((int(shared.CANDIDATES * n) // 16 + 1) * 16, batch * d_sae) if rounded else n
        kept = shared.batch_largest(scores.product(slice(None)), scores.bias, n_candidates, self.buffer)
        if rounded:
            kept = shared.rescored(kept, scores.x, scores.encoder, scores.bias, n, self.buffer)
        return Codes(kept.offsets, kept.columns, kept.values)

    def positive(self, scores: Scores, capacity: int) -> Codes | None:
        """In as many slots as the last batches needed, or more; the host waits for the number of codes, unless
        `recording`: `n_positive` then tells whether they fitted."""
        product = scores.product(slice(None))
        counts = self.buffer("counts_of_rows", (len(product),), torch.int32)
        positive.count(product, scores.bias, counts)
        offsets = F.pad(counts.cumsum(0), (1, 0))
        self.n_positive = offsets[-1]
        if not self.recording:
            n = int(offsets[-1])
            if n > capacity:
                return None
            if not n <= self.n_slots <= 4 * n:
                self.n_slots = launch.power(n + n // 4)
        latents, values = self._slots(self.n_slots)
        latents.zero_()
        values.zero_()
        positive.write(product, scores.bias, offsets, latents, values)
        return Codes(offsets, latents, values)

    # ----------------------------------------------------------------------------------------- decoder, update

    def decode(self, codes: Codes, state: State, target: Tensor, cost: Scalar) -> Decoded:
        (batch, d_out), n_levels = target.shape, len(codes.weights)
        out = Decoded(
            squares=self.buffer("squares", (batch,)),
            losses=self.buffer("losses", (batch,)),
            code_sums=self.buffer("sums", (batch,)),
            gradient=self.buffer("gradient", (n_levels * batch, d_out)),
            code_gradients=self.buffer("code_gradients", codes.values.shape).zero_(),
        )
        weights = self._constants(codes.weights)
        decode.decode(codes, state.W_dec, state.charged_norms, target.contiguous(), self._scalar(cost), weights, out)
        return out

    def by_latent(self, latents: Tensor, values: Tensor, d_sae: int) -> Tensor:
        return index.by_latent(latents, values, d_sae)

    def invert(self, codes: Codes, code_gradients: Tensor, d_sae: int) -> Any:
        return index.invert(codes, code_gradients, d_sae)

    def update_(self, state: State, now: Now, change: Change) -> None:
        moment = torch.stack([*now[:3], now.step]).to(change.x)
        change = change._replace(cost=self._scalar(change.cost), n_samples=change.n_samples or len(change.x))
        through_encoder = update.update_rows(state, moment, change, self._encoder, self.buffer)
        g_b_dec = change.gradient[: len(change.x)].sum(dim=0)
        if through_encoder is not None:
            g_b_dec -= through_encoder
        adam_(state.b_dec, g_b_dec, state.first["b_dec"], state.second["b_dec"], now)

    def gradient_rows(
        self, state: State, x: Tensor, gradient: Tensor, plan: Any
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        if plan is None:
            return super().gradient_rows(state, x, gradient, None)
        rows, sums = update.gradient_rows(plan, x, gradient, len(state.b_enc), self.buffer)
        return rows, sums, plan.firing

    # -------------------------------------------------------------------------------------------- dense products

    def relu(self, x: Tensor, state: State) -> DenseCodes:
        z = self.scores(x, state).pre_latents().relu_()
        norms = state.charged_norms
        sums = z.sum(dim=1) if norms is None else z @ norms
        return DenseCodes(z, (z > 0).sum(dim=0), sums)

    def dense_step(self, x: Tensor, state: State, target: Tensor, cost: Scalar) -> DenseStep | None:
        """In bf16, which products outside of the kernels are not computed in."""
        if self.precision != "bf16":
            return None
        z, product = self.relu(x, state), self._product
        residual = product(z.values, state.W_dec).sub_(target)
        gradient = residual * (2 / len(x))
        through, g_bias = self.relu_backward(product(gradient, state.W_dec.T), z, state, cost)
        g_decoder = product(z.values.T, gradient)
        if state.charged_norms is not None:
            along = cost * z.values.sum(dim=0) / state.norms.clamp_min(1e-12)
            g_decoder.addcmul_(along[:, None], state.W_dec)
        rows = Rows(None, product(through.T, x), g_decoder, g_bias)
        return DenseStep(rows, gradient, z.firing, residual.square().sum(), z.code_sums.sum())

    def aux_k(
        self, gradient: Tensor, x: Tensor, encoder: Tensor, b_enc: Tensor, W_dec: Tensor, k: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        return dead.aux_k(gradient, x, encoder, b_enc, W_dec, k, self._product)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right in the kernels' precision, as float32."""
        if self.precision == "fp32":
            return left @ right
        return (left.to(self._rounded) @ right.to(self._rounded)).to(left.dtype)

    # ----------------------------------------------------------------------------------------------- inference

    def encode_top_k(self, pre_latents: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Each row's k largest max(0, pre), and their latents; in memory of their own."""
        if top_k.tile_of(k) is None:
            values, found = pre_latents.topk(k, dim=1, sorted=False)
            return values.relu(), found
        with torch.cuda.device_of(pre_latents):
            codes = self._top_k(pre_latents, torch.zeros_like(pre_latents[0]), k)
        return codes.values.view(-1, k).clone(), codes.latents.view(-1, k).long()

    def encode_above(self, pre_latents: Tensor, least: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`values` where a pre-latent exceeds `least` (one number, or one for each latent), and their latents; padded
        to the row with the most of them, which the host waits for."""
        batch, d_sae = pre_latents.shape
        with torch.cuda.device_of(pre_latents):
            below, pre_latents = (-least).expand(d_sae).contiguous(), pre_latents.contiguous()
            counts = torch.empty(batch, dtype=torch.int32, device=pre_latents.device)
            positive.count(pre_latents, below, counts)
            k_cap = max(int(counts.max()), 1)
            found, latents = pre_latents.new_zeros(batch * k_cap), torch.zeros_like(counts).repeat(k_cap)
            starts = torch.arange(0, batch * k_cap, k_cap, device=counts.device)
            positive.write(pre_latents, below, starts, latents, found, values.contiguous())
        return found.view(batch, k_cap), latents.view(batch, k_cap).long()

    def reconstruct(self, values: Tensor, latents: Tensor, W_dec: Tensor) -> Tensor:
        """z W_dec of padded codes."""
        with torch.cuda.device_of(values):
            return inference.reconstruct(values, latents, W_dec)

    # ------------------------------------------------------------------------------------------------ plumbing

    def _slots(self, n: int) -> tuple[Tensor, Tensor]:
        return self.buffer("latents", (n,), torch.int32), self.buffer("values", (n,))

    def _scalar(self, value: Scalar) -> Tensor:
        """On the device; a number of the host becomes one without a copy, so that it can be recorded."""
        if isinstance(value, Tensor):
            return value.to(self.buffer.dtype)
        return torch.full((), value, dtype=self.buffer.dtype, device=self.buffer.device)

    def _constants(self, values: tuple[float, ...]) -> Tensor:
        """On the device, copied there once."""
        if values not in self._kept:
            self._kept[values] = torch.tensor(values, dtype=self.buffer.dtype, device=self.buffer.device)
        return self._kept[values]
