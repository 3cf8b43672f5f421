"""A batch in parts, each of which gives its share of the whole batch's gradients: one after the other, to save memory
(`train.accumulate`), and in several processes (`sae.ranks`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from sae.gradients import Gradients
from sae.kernels import Change, Kernels, State
from sae.ranks import ALONE, Ranks
from sae.sparsifiers import Sparsifier

Measure = Callable[[slice], tuple[Sequence[Tensor], Change]]
"""The terms of some rows, and what the weights would change by."""


def whole_batch(
    measure: Measure,
    n_samples: int,
    n_parts: int,
    kernels: Kernels,
    state: State,
    own: Sequence[Tensor],
    sparsifier: Sparsifier,
    ranks: Ranks = ALONE,
) -> tuple[Float[Tensor, " n_terms"], Gradients]:
    """What `measure` gives for parts of a batch, as if it had been asked for the whole: means of its terms, gradients
    of the mean loss, and the `grad` of further parameters `own`.

    Each of `ranks` takes n_parts of them. Rows that are fewer than processes are computed whole by every one.
    """
    ranks = ranks if n_samples >= ranks.n else ALONE
    n_here = min(n_parts, n_samples // ranks.n)
    parts = parts_of(n_samples, n_here * ranks.n)[n_here * ranks.rank :][:n_here]
    with _same_buffers(sparsifier, ranks):
        terms, share = _summed(measure, parts, n_samples, kernels, state, own)
        if ranks.n > 1:
            for weight in own:  # every process adds up the same
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            grads = [weight.grad for weight in own if weight.grad is not None]
            ranks.add_up_([terms, *share.rows[1:], share.through_x_hat, share.firing, *grads])
    return terms, share._replace(n_samples=n_samples)


def parts_of(n_samples: int, n_parts: int) -> list[slice]:
    """Consecutive parts of about equal size."""
    return [slice(*ends) for ends in pairwise(n_samples * number // n_parts for number in range(n_parts + 1))]


def _summed(
    measure: Measure, parts: Sequence[slice], n_samples: int, kernels: Kernels, state: State, own: Sequence[Tensor]
) -> tuple[Float[Tensor, " n_terms"], Gradients]:
    """The share of these parts in the whole batch. The intermediate results of one exist at a time."""
    totals: list[Gradients] = []
    means: list[Tensor] = []
    grads: list[Tensor | None] = [None] * len(own)
    for rows in parts:
        share = (rows.stop - rows.start) / n_samples
        terms, change = measure(rows)
        means.append(share * torch.stack([term.double() for term in terms]))
        part = Gradients.of(kernels, state, change).times(share)
        totals = [totals[0].plus(part) if totals else part]
        for number, weight in enumerate(own):
            before, now = grads[number], weight.grad
            if now is not None:
                grads[number] = share * now if before is None else before + share * now
            weight.grad = None  # autograd would add to it
    for weight, grad in zip(own, grads, strict=True):
        weight.grad = grad
    return torch.stack(means).sum(dim=0), totals[0]


@contextmanager
def _same_buffers(sparsifier: Sparsifier, ranks: Ranks) -> Iterator[None]:
    """A sparsifier's buffers stay the same in all processes: what the block adds to sums is added up, and of any other
    buffer the value of rank 0 counts. Nothing changes if the block fails."""
    if ranks.n == 1:
        yield
        return
    named = dict(sparsifier.named_buffers())
    before = {name: buffer.clone() for name, buffer in named.items()}
    try:
        yield
        sums = {name: named[name] - before[name] for name in sparsifier.added_up}
        ranks.add_up_(list(sums.values()))
        ranks.take_of_lead_([buffer for name, buffer in named.items() if name not in sums])
        for name, added in sums.items():
            named[name].copy_(before[name] + added)
    except BaseException:
        for name, buffer in named.items():
            buffer.copy_(before[name])
        raise
