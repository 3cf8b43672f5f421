"""What a language model loses when a reconstruction replaces its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae.hooks import module_named, replaced, require_eval
from toymodels.errors import UsageError

Edit = Callable[[Tensor], Tensor]
"""What [n, d_out] replaces activations [n, d_out], given what is read there [n, d_in]."""


class Spliced:
    """The model's loss as it is, with the SAE spliced in, and with zeros in its place; tokens come in batches.

    With p(t | context) the model's prediction, in nats per predicted token:

        ce_clean, ce_spliced, ce_zero = mean −log p(t_{i+1} | t_0 ... t_i)
        ce_recovered = (ce_zero − ce_spliced) / (ce_zero − ce_clean)      1: nothing is lost, 0: no better than zeros
        kl = mean Σ_t p_clean(t) log(p_clean(t) / p_spliced(t))           what predictions lose, right or wrong

    `model` maps tokens [batch, position] to logits [batch, position, vocabulary], or to an object with such `logits`,
    as the models of `transformers` do. `module`, one of its modules or the name of one, puts out the activations
    [batch, position, d], alone or first in a tuple or a mapping; the reconstruction takes their place. `sae` maps rows
    [n, d] to rows [n, d]: an `SAE`, or anything else. A transcoder reads what goes into the module, and replaces what
    comes out.

    Sources: Bricken et al. 2023 (the loss recovered), Rajamanoharan et al. 2024, Gao et al. 2024 (the KL divergence).

    Raises:
        UsageError: the model has no such module.
    """

    def __init__(
        self, model: nn.Module, module: nn.Module | str, sae: Callable[[Tensor], Tensor], *, transcodes: bool = False
    ) -> None:
        self.model, self.module = model, module_named(model, module)
        self.sae, self.transcodes = sae, transcodes
        self.n_tokens = 0
        self._sums = torch.zeros(4, dtype=torch.float64)

    @torch.no_grad()
    def update(self, tokens: Int[Tensor, "batch position"], mask: Bool[Tensor, "batch position"] | None = None) -> None:
        """Adds a batch of texts, in three passes of the model.

        They hold two predictions of each token in float32, n × vocabulary. Where `mask` is false, the activation stays
        as it is and no prediction from it or of its token counts: padding behind a text, and tokens that the SAE was
        not trained on, such as the first.

        Raises:
            UsageError: a model in training mode, texts of fewer than two tokens, a module that is not run once or puts
                out something else, logits of another shape, or a loss that is not finite; nothing is added then.
        """
        require_eval(self.model)
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise UsageError(f"tokens must be [batch, position] with at least 2 positions, got {list(tokens.shape)}")
        chosen = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        if chosen.shape != tokens.shape:
            raise UsageError(
                f"mask must be {list(tokens.shape)} like tokens, got {list(chosen.shape)}; pass one entry per token"
            )
        counts = chosen[:, :-1] & chosen[:, 1:]
        targets = tokens[:, 1:][counts].long()
        if not len(targets):
            return
        clean = self._predictions(tokens, counts)
        with self._replaced(chosen, self.sae):
            spliced = self._predictions(tokens, counts)
        losses = [F.nll_loss(predicted, targets, reduction="sum") for predicted in (clean, spliced)]
        surprise = clean.exp() * (clean - spliced)
        kl = surprise.masked_fill_(clean == -torch.inf, 0).sum()  # 0 log 0 = 0
        del clean, spliced, surprise  # each as large as the vocabulary
        with self._replaced(chosen, None):
            losses.append(F.nll_loss(self._predictions(tokens, counts), targets, reduction="sum"))
        sums = torch.stack([*losses, kl]).cpu().double()
        if not bool(sums.isfinite().all()):
            found = dict(zip(("ce_clean", "ce_spliced", "ce_zero", "kl"), sums.tolist(), strict=True))
            raise UsageError(f"the loss of a batch is not finite: {found}; check that the SAE belongs to this module")
        self._sums += sums
        self.n_tokens += len(targets)

    def compute(self) -> dict[str, float]:
        """ce_clean, ce_spliced, ce_zero, ce_recovered, kl.

        Raises:
            UsageError: no token was predicted.
        """
        if not self.n_tokens:
            raise UsageError("no token was predicted; update() with texts of two or more tokens, not all masked")
        clean, spliced, zero, kl = (self._sums / self.n_tokens).tolist()
        recovered = (zero - spliced) / (zero - clean) if zero != clean else 0.0
        return {"ce_clean": clean, "ce_spliced": spliced, "ce_zero": zero, "ce_recovered": recovered, "kl": kl}

    def _predictions(self, tokens: Tensor, counts: Tensor) -> Float[Tensor, "n vocabulary"]:
        """log p of the next token, where it counts."""
        output: Any = self.model(tokens)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
            raise UsageError(f"the model must give logits [*{list(tokens.shape)}, vocabulary], got {shape}")
        return logits[:, :-1][counts.to(logits.device)].float().log_softmax(dim=-1).to(counts.device)

    @contextmanager
    def _replaced(self, chosen: Tensor, edit: Edit | None) -> Iterator[None]:
        """Within it the module puts out `edit` of its rows where they are chosen; zeros where edit is None."""
        calls = 0

        def rows(one: Tensor | None) -> Tensor:
            if one is None or one.shape[:-1] != chosen.shape:
                got = "no tensor" if one is None else list(one.shape)
                raise UsageError(f"the module's activations must be [*{list(chosen.shape)}, d], got {got}")
            return one[chosen.to(one.device)]

        def new(read: Tensor | None, old: Tensor | None) -> Tensor:
            nonlocal calls
            calls += 1
            given = rows(read)
            if read is not old:
                rows(old)
            assert old is not None
            changed = old.clone()
            changed[chosen.to(old.device)] = 0 if edit is None else _rows_for(edit, given, old)
            return changed

        with replaced(self.module, new, "input" if self.transcodes else "output", "output"):
            yield
        if calls != 1:
            raise UsageError(f"the model must run the module once in each pass, but ran it {calls} times; name another")


def _rows_for(edit: Edit, rows: Float[Tensor, "n d_in"], old: Tensor) -> Float[Tensor, "n d_out"]:
    """The SAE's, in the type of the activations whose place they take, and where these are."""
    new = edit(rows)
    if new.shape != (len(rows), old.shape[-1]):
        raise UsageError(f"the SAE gives {list(new.shape)} for activations [{len(rows)}, {old.shape[-1]}]")
    return new.to(old)
