"""The sparse autoencoder. There is one class; what differs between architectures is the sparsifier passed in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sae import hub
from sae.codes import SparseCodes
from sae.config import SAEConfig
from sae.config_text import explain
from sae.errors import UsageError
from sae.kernels import for_inference, require_device
from sae.names import MANIFEST, SWEEP, WEIGHTS
from toymodels.files import save_tensors, sha256, write_text
from toymodels.geometry import unit_rows

FORMAT_VERSION = 1


class SAE(nn.Module):
    """A dictionary W_dec of d_sae directions, and an encoder that finds which few of them explain x.

        pre   = (x - b_dec) W_enc + b_enc          [batch, d_sae]
        z     = sparsifier(pre)                    [batch, d_sae], sparse, z >= 0
        x_hat = z W_dec + b_dec                    [batch, d_out]

    W_enc [d_in, d_sae] is a view of `encoder` [d_sae, d_in]: a latent is a row on both sides. Where `tied_bias` is off,
    a fixed `centre` replaces b_dec in `pre`. A transcoder reconstructs something other than x, of width d_out; one that
    skips adds (x - centre) W_skip to x_hat. A sparsifier with `pursuit_steps` reads x - b_dec and W_dec, not `pre`;
    W_enc is then W_dec^T, in the same memory. One with `refine` selects twice: `refined` replaces x the second time.
    """

    centre: Tensor | None
    W_skip: nn.Parameter | None

    def __init__(self, d_in: int, config: SAEConfig, d_out: int | None = None) -> None:
        super().__init__()
        d_out = d_in if d_out is None else d_out
        if d_out != d_in and not config.transcodes:
            raise UsageError(
                f"kind {config.kind!r} reconstructs its input: d_out must be {d_in}, got {d_out}; use a transcoder"
            )
        self.d_in, self.d_sae, self.d_out, self.config = d_in, config.d_sae, d_out, config
        self.sparsifier = config.build()
        self.encoder = nn.Parameter(torch.zeros(config.d_sae, d_in))
        pursues = bool(self.sparsifier.pursuit_steps)
        self.W_dec = self.encoder if pursues else nn.Parameter(torch.zeros(config.d_sae, d_out))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("centre", None if config.tied_bias else torch.zeros(d_in))
        self.W_skip = nn.Parameter(torch.zeros(d_in, d_out)) if config.skips else None

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.encoder.T

    @property
    def input_centre(self) -> Float[Tensor, " d_in"]:
        """What is subtracted from the input: b_dec or, where `tied_bias` is off, the fixed `centre`."""
        return self.b_dec if self.centre is None else self.centre

    def pre_latents(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """What codes are selected from at inference: (x - b_dec) W_enc + b_enc, for `refined(x)`."""
        return self.affine(self.refined(x))

    def refined(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """x; where the sparsifier has `refine`, x + refine (x - x_hat), with x_hat from the codes that x selects."""
        first = self.sparsifier.first if self.sparsifier.refine else None
        return x if first is None else self._beyond(x, self._selected(first, x))

    def _beyond(self, x: Float[Tensor, "batch d_in"], codes: SparseCodes) -> Float[Tensor, "batch d_in"]:
        return x + self.sparsifier.refine * (x - self.decode(codes))

    def affine(
        self, x: Float[Tensor, "batch d_in"], latents: Int[Tensor, " some"] | None = None
    ) -> Float[Tensor, "batch d_sae"] | Float[Tensor, "batch some"]:
        """(x - b_dec) W_enc + b_enc, for all latents or some.

        x is centred first: beside a large mean, what varies would be lost in the rounding of x W_enc.
        """
        encoder: Tensor = self.encoder
        b_enc: Tensor = self.b_enc
        if latents is not None:
            encoder, b_enc = encoder[latents], b_enc[latents]
        centred = x.to(encoder.dtype) - self.input_centre
        # Not addmm: on a CPU it spreads the bias over the output first, which costs as much as the product.
        return (centred @ encoder.T).add_(b_enc)

    def decode(
        self, codes: SparseCodes | Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """z W_dec + b_dec; a skip connection adds (x - centre) W_skip, where x is what was encoded.

        `codes` may be a matrix, as `codes.dense()` with some latents changed.
        """
        if isinstance(codes, Tensor):
            return self._with_skip(codes.to(self.W_dec.dtype) @ self.W_dec + self.b_dec, x)
        values = codes.values
        kernels = None if torch.is_grad_enabled() else for_inference(values.device, values.dtype)
        if kernels is not None and codes.indices is not None:
            x_hat = kernels.reconstruct(values, codes.indices, self.W_dec) + self.b_dec
        else:
            x_hat = codes.decode(self.W_dec) + self.b_dec
        return self._with_skip(x_hat, x)

    def _with_skip(
        self, x_hat: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"] | None
    ) -> Float[Tensor, "*batch d_out"]:
        if self.W_skip is None or self.centre is None:
            return x_hat
        if x is None:
            raise ValueError("a skip transcoder decodes its input along with the codes; call decode(codes, x)")
        return x_hat + (x.to(x_hat.dtype) - self.centre) @ self.W_skip

    def encode(self, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """The latents that fire for each row of x, as inference selects them: rows do not influence each other.

        Raises:
            TypeError: x is not a tensor. ValueError: x is not [batch, d_in].
        """
        if not isinstance(x, Tensor):
            remedy = "torch.from_numpy(x)" if type(x).__module__ == "numpy" else "torch.tensor(x)"
            raise TypeError(f"activations must be a tensor, got {type(x).__name__}; pass {remedy}")
        if x.ndim != 2 or x.shape[1] != self.d_in:
            remedy = "this SAE reads another width"
            if x.shape[-1:] == (self.d_in,):
                remedy = "flatten the leading axes first" if x.ndim > 2 else "pass one row as x[None]"
            raise ValueError(f"activations must be [batch, d_in={self.d_in}], got {list(x.shape)}; {remedy}")
        x = x.to(self.encoder.dtype)
        if self.sparsifier.pursuit_steps:
            return self.training_codes(x)
        return self._selected(self.sparsifier, self.refined(x))

    def _selected(self, sparsifier: Any, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
        kernels = None if torch.is_grad_enabled() else for_inference(x.device, x.dtype)
        if kernels is not None and len(x):
            return sparsifier.infer(kernels, self.affine(x))
        return sparsifier.select(self.affine(x))

    def training_codes(self, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """The latents that fire for each row of x, as training selects them."""
        if self.sparsifier.pursuit_steps:
            return self.sparsifier.pursue(x - self.input_centre, self.W_dec)
        first = self.sparsifier.first if self.sparsifier.refine else None
        x = x if first is None else self._beyond(x, first(self.affine(x)))
        codes: SparseCodes = self.sparsifier(self.affine(x))
        return codes

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """x_hat, as inference gives it; x may have more axes, such as sequence and position."""
        if isinstance(x, Tensor) and x.ndim > 2:
            return self(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return self.decode(self.encode(x), x)

    def extra_repr(self) -> str:
        """Kind and sizes."""
        target = "" if self.d_out == self.d_in else f", d_out={self.d_out}"
        return f"kind={self.config.kind}, d_in={self.d_in}, d_sae={self.d_sae}{target}"

    @torch.no_grad()
    def initialise_(
        self,
        b_dec: Float[Tensor, " d_out"],
        generator: torch.Generator,
        centre: Float[Tensor, " d_in"] | None = None,
    ) -> None:
        """Random unit decoder rows, b_enc = 0, the encoder tied to the decoder (or random as well), and no skip.

        Where `tied_bias` is off, the input is centred by `centre`; by b_dec if there is none.
        """
        if self.config.tied_init and self.d_out != self.d_in:
            raise UsageError(
                f"tied_init needs a target as wide as the input, got d_in={self.d_in}, d_out={self.d_out}; turn it off"
            )
        self.W_dec.copy_(unit_rows(torch.randn(self.d_sae, self.d_out, generator=generator)))
        other = (
            self.W_dec if self.config.tied_init else unit_rows(torch.randn(self.d_sae, self.d_in, generator=generator))
        )
        self.encoder.copy_(other)
        self.b_enc.zero_()
        self.b_dec.copy_(b_dec)
        if self.centre is not None:
            self.centre.copy_(b_dec if centre is None else centre)
        if self.W_skip is not None:
            self.W_skip.zero_()

    @torch.no_grad()
    def reorder_(self, order: Int[Tensor, " d_sae"]) -> None:
        """Moves latent order[i] to place i, with all its parameters."""
        own = [tensor for tensor in self.sparsifier.state_dict().values() if tensor.shape[:1] == (self.d_sae,)]
        for tensor in {tensor.data_ptr(): tensor for tensor in (self.encoder, self.W_dec, self.b_enc, *own)}.values():
            tensor.copy_(tensor[order])

    @torch.no_grad()
    def rescale_(self, scale: float, target_scale: float | None = None) -> None:
        """Turns an SAE of x into the SAE of scale * x that fires alike: z and x_hat grow by `scale`, weights stay.

        Every selection here commutes with a positive factor, so only what has the units of x changes: biases and
        thresholds. Where the target has separate units, z and x_hat grow by `target_scale`, and what reads x (encoder
        and skip) by the quotient; decoder rows keep their norms.
        """
        target_scale = scale if target_scale is None else target_scale
        self.b_enc.mul_(target_scale)
        self.b_dec.mul_(target_scale)
        self.sparsifier.rescale_(target_scale)
        if self.centre is not None:
            self.centre.mul_(scale)
        if target_scale != scale:
            self.encoder.mul_(target_scale / scale)
            if self.W_skip is not None:
                self.W_skip.mul_(target_scale / scale)

    def save(self, folder: str | Path) -> None:
        """Writes, into a folder or to an address on the Hub, `sae.safetensors` (W_enc, W_dec, b_enc, b_dec, centre and
        W_skip if there are any, and the sparsifier's buffers) and `sae.json`."""
        with hub.written(folder, "sae") as place:
            self._write(place)

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        W_enc = self.W_enc.clone(memory_format=torch.contiguous_format)  # a file holds no memory twice
        tensors = {"W_enc": W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}
        tensors |= {} if self.centre is None else {"centre": self.centre}
        tensors |= {} if self.W_skip is None else {"W_skip": self.W_skip}
        tensors |= self.sparsifier.state_dict()
        save_tensors(folder / WEIGHTS, tensors)
        manifest = {
            "format_version": FORMAT_VERSION,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "sae": self.config.model_dump(mode="json"),
            "sha256": sha256(folder / WEIGHTS),
        }
        write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def load(folder: str | Path, device: str | torch.device = "cpu") -> SAE:
    """The SAE saved in a run directory, or at an address on the Hub (hf://OWNER/NAME/FOLDER), ready for inference.

    Loading runs no code and checks the weights' checksum.

    Raises:
        UsageError: nothing is saved there, the files do not belong together, or they are damaged.
    """
    require_device(str(device), "device")
    given, folder = folder, hub.local(folder, (MANIFEST, WEIGHTS), "; sae.formats.load reads those of other libraries")
    for name in (MANIFEST, WEIGHTS):
        if not (folder / name).is_file():
            if (folder / SWEEP).is_file():
                raise UsageError(f"{folder} is a sweep's directory; give one of its members, {folder}/NAME")
            raise UsageError(
                f"{hub.said(given)} holds no SAE: {name} is missing; give a run directory that finished training, or "
                "use sae.load_checkpoint for one that has not, sae.formats.load for the files of another library"
            )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, d_in, options = manifest["format_version"], manifest["d_in"], manifest["sae"]
        d_out = manifest.get("d_out", d_in)  # files from before transcoders have none
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / MANIFEST} is damaged: {error!r}; copy it again") from error
    if version != FORMAT_VERSION:
        raise UsageError(
            f"{folder / MANIFEST} has format {version}, this version reads {FORMAT_VERSION}; install a newer sae"
        )
    if sha256(folder / WEIGHTS) != manifest.get("sha256"):
        raise UsageError(f"{folder / WEIGHTS} does not match its checksum in {MANIFEST}; copy both files again")
    try:
        config = SAEConfig.of_kind(options)
        tensors = load_file(folder / WEIGHTS, device=str(device))
    except (ValueError, SafetensorError) as error:
        reason = explain(error, SAEConfig) if isinstance(error, ValidationError) else str(error)
        raise UsageError(f"{folder} cannot be loaded: {reason}; copy it again") from error
    sae = SAE(d_in, config, d_out).to(device)
    tensors["encoder"] = tensors.pop("W_enc").T
    own = ("encoder", "W_dec", "b_enc", "b_dec", "centre", "W_skip")
    sae.load_state_dict({name if name in own else f"sparsifier.{name}": t for name, t in tensors.items()})
    return sae.eval().requires_grad_(False)
