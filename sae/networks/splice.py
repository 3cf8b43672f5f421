"""An SAE in place of a network's activations: its codes read, edited, and differentiated through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.codes import SparseCodes
from sae.errors import UsageError
from sae.hooks import Reads, module_named, replaced
from sae.model import SAE

Edit = Mapping[int, float] | Callable[[SparseCodes], SparseCodes | Tensor]
"""Values to which latents are set, or a function of codes [n, d_sae] that returns other codes, or a matrix of them."""


class Splice:
    """What the SAE computed in the last pass of the network."""

    def __init__(self, sae: SAE, edit: Edit | None, keep_error: bool) -> None:
        self.sae, self.edit, self.keep_error = sae, edit, keep_error
        self._codes: SparseCodes | None = None

    @property
    def never_ran(self) -> bool:
        """Whether the network has not run the module since the SAE was spliced in."""
        return self._codes is None

    @property
    def codes(self) -> SparseCodes:
        """z of all rows, before editing: batch and position in one axis, in which the position varies fastest.

        After `backward()`, `codes.values.grad` is the gradient in each of them.

        Raises:
            UsageError: the network has not run.
        """
        if self._codes is None:
            raise UsageError("the network has not run the module since the SAE was spliced in; call it within `with`")
        return self._codes

    def replace(self, read: Tensor | None, old: Tensor | None) -> Tensor:
        """What replaces `old` [..., d_out] where `read` [..., d_in] was read."""
        if read is None or old is None:
            raise UsageError("the module has no tensor there; name another module")
        x = read.reshape(-1, read.shape[-1]).to(self.sae.W_dec)
        codes = self._encoded(x)
        if old.numel() != len(x) * self.sae.d_out:
            given = [len(x), self.sae.d_out]
            raise UsageError(
                f"the SAE gives {given} in place of activations {list(old.shape)}; splice the SAE of this module"
            )
        change = self._change(codes)
        if not self.keep_error:
            x_hat = self.sae.decode(codes, x)
            return (x_hat if change is None else x_hat + change).to(old).view_as(old)
        if torch.is_grad_enabled():  # 0, whose gradient is what codes are asked for
            written = codes.decode(self.sae.W_dec)
            still = written - written.detach()
            change = still if change is None else change + still
        return old if change is None else old + change.to(old).view_as(old)

    def _encoded(self, x: Float[Tensor, "n d_in"]) -> SparseCodes:
        """Codes whose gradient is available, where gradients are computed at all."""
        codes = self.sae.encode(x.detach() if self.keep_error else x)
        if torch.is_grad_enabled():
            values = codes.values if codes.values.requires_grad else codes.values.detach().requires_grad_()
            values.retain_grad()
            codes = SparseCodes(values, codes.indices, codes.d_sae)
        self._codes = codes
        return codes

    def _change(self, codes: SparseCodes) -> Float[Tensor, "n d_out"] | None:
        """decode(z') - decode(z), in which b_dec and a skip connection cancel; None without an edit."""
        W_dec = self.sae.W_dec
        if self.edit is None:
            return None
        if isinstance(self.edit, Mapping):  # in float32: what is small beside x_hat must not be lost
            rows = W_dec[torch.tensor(list(self.edit), device=W_dec.device)].float()
            wanted = torch.tensor(list(self.edit.values()), device=rows.device, dtype=rows.dtype)
            had = torch.stack([_of_latent(codes, latent) for latent in self.edit], dim=1)
            return (wanted - had.float()) @ rows
        edited: object = self.edit(
            SparseCodes(codes.values.clone(), codes.indices, codes.d_sae)
        )  # it may work in place
        if not isinstance(edited, SparseCodes | Tensor):
            raise UsageError(
                f"the edit must return codes or a matrix of them, got {type(edited).__name__}; return codes.scaled(...)"
            )
        if tuple(edited.shape) != codes.shape:
            raise UsageError(f"the edit gives {list(edited.shape)} for codes {list(codes.shape)}; keep their shape")
        written = edited.to(W_dec.dtype) @ W_dec if isinstance(edited, Tensor) else edited.decode(W_dec)
        return written - codes.decode(W_dec)


@contextmanager
def splice(
    network: nn.Module,
    module: nn.Module | str,
    sae: SAE,
    edit: Edit | None = None,
    *,
    reads: Reads = "output",
    keep_error: bool = True,
) -> Iterator[Splice]:
    """Within it, the SAE's edited reconstruction replaces a module's output.

    With x the activations, z = encode(x) and z' the result of `edit`, the network continues with

        x + decode(z') − decode(z)      keep_error, the default: what the SAE does not explain stays as it is
        decode(z')                      not keep_error: the network runs on what the SAE explains

    `edit` is a mapping from latents to the values to which they are set in each row, as {512: 8.0, 17: 0.0}, or a
    function of the codes. Without one the codes can be read, and with keep_error the network computes what it always
    does.

    `module` is one of the network's modules or its name, and outputs activations [..., d], by themselves or first in a
    tuple or a mapping. With `reads` "input" its input is replaced instead. A transcoder reads the module's input and
    replaces its output, whatever `reads` says.

    Gradients: `spliced.codes.values.grad` is the gradient of the loss in each code; a small change dz changes the loss
    by grad · dz (attribution patching). With keep_error the gradient in x is the network's own, past the SAE; without
    it, it goes through the SAE. Where a network recomputes activations in the backward pass (non-reentrant
    checkpointing) there is none.

    Sources: Marks et al. 2024, "Sparse Feature Circuits" (the error kept, attributions); Templeton et al. 2024,
    "Scaling Monosemanticity" (latents set to values).

    Raises:
        UsageError: the network has no such module or does not run it, or the SAE has no such latent.
    """
    _require(sae, edit, reads)
    spliced = Splice(sae, edit or None, keep_error)
    transcodes = sae.config.transcodes
    places: tuple[Reads, Reads] = ("input", "output") if transcodes else (reads, reads)
    with replaced(module_named(network, module), spliced.replace, *places):
        yield spliced
    if spliced.never_ran:
        raise UsageError(
            "the network did not run the module while the SAE was spliced in; call it within `with`, and compile it "
            "there or not at all: what was compiled before ignores it"
        )


def _require(sae: object, edit: object, reads: object) -> None:
    """Refuses what cannot be spliced in."""
    if not isinstance(sae, SAE):
        raise UsageError(f"an SAE is spliced in, got {type(sae).__name__}; sae.load or sae.formats.load gives one")
    if reads not in ("output", "input"):
        raise UsageError(f"reads must be output or input, got {reads!r}; give one of them")
    if isinstance(edit, Mapping):
        wrong = [repr(latent) for latent in edit if type(latent) is not int or not 0 <= latent < sae.d_sae]
        if wrong:
            raise UsageError(
                f"latents are numbered 0 to {sae.d_sae - 1}, got {', '.join(wrong)}; give numbers in that range"
            )
        strange = [repr(value) for value in edit.values() if not isinstance(value, int | float)]
        if strange:
            raise UsageError(
                f"latents are set to numbers, got {', '.join(strange)}; a function of the codes can do more"
            )
    elif edit is not None and not callable(edit):
        raise UsageError(f"edit must be {{latent: value}} or a function of the codes, got {edit!r}; give one of these")


def _of_latent(codes: SparseCodes, latent: int) -> Float[Tensor, " n"]:
    """z of one latent in every row."""
    if codes.indices is None:
        return codes.values[:, latent]
    return (codes.values * (codes.indices == latent)).sum(dim=1)
