"""Token sequences in which something can be learned from the context, and something from the corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from toymodels.errors import UsageError

STRETCH = 16
"""Tokens of QuotingText that hold one quotation."""


@runtime_checkable
class Sequences(Protocol):
    """An endless corpus."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def length(self) -> int: ...

    def sample(self, n: int, generator: torch.Generator) -> Int[Tensor, "n length"]:
        """n fresh sequences, decided by the generator alone."""
        ...


@dataclass(frozen=True)
class RepeatedBlocks:
    """A block of distinct tokens, repeated until the sequence is full: t_i = block[i mod L].

    L ~ U{shortest..longest}, and the block is a random choice of L tokens in random order, both anew for each
    sequence. The first round cannot be predicted; afterwards each token follows the same one as it did before.

    Raises:
        UsageError: not 1 ≤ shortest ≤ longest ≤ vocabulary.
    """

    vocabulary: int = 64
    length: int = 64
    shortest: int = 10
    longest: int = 26

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest <= self.vocabulary:
            raise UsageError(
                f"a block of distinct tokens needs 1 <= shortest <= longest <= vocabulary={self.vocabulary}, got "
                f"{self.shortest}..{self.longest}"
            )

    def sample(self, n: int, generator: torch.Generator) -> Int[Tensor, "n length"]:
        block = torch.rand(n, self.vocabulary, generator=generator).topk(self.longest).indices
        size = torch.randint(self.shortest, self.longest + 1, (n, 1), generator=generator)
        return block.gather(1, torch.arange(self.length) % size)


@dataclass(frozen=True, eq=False)
class QuotingText:
    """Language in miniature: word follows word by a fixed table, and now and then an earlier passage is quoted.

        t_i = successors[t_{i−1}, c_i], c_i uniform        unless i is inside of a quotation
        t_{d} ... t_{d+m−1} = t_{s} ... t_{s+m−1}            one quotation in each stretch of 16 tokens but the first

    m ~ U{8..14}, d is uniform among the places in the stretch that it fits, s uniform in 0..d−m. What the table
    says can be learned from the corpus, what a quotation says only from the context: natural text, in which
    induction heads were found, rewards both (Olsson et al. 2022).
    """

    successors: Int[Tensor, "vocabulary n_choices"]
    """What may follow each token, each entry equally likely; a token may be listed repeatedly."""
    length: int = 64

    @property
    def vocabulary(self) -> int:
        return len(self.successors)

    @classmethod
    def random(cls, generator: torch.Generator, vocabulary: int = 64, n_choices: int = 128) -> QuotingText:
        """Every entry of the table is drawn uniformly."""
        return cls(torch.randint(vocabulary, (vocabulary, n_choices), generator=generator))

    def sample(self, n: int, generator: torch.Generator) -> Int[Tensor, "n length"]:
        is_quoted, source = self._quotations(n, generator)
        n_choices = self.successors.shape[1]
        choice = torch.randint(n_choices, (self.length, n), generator=generator)
        tokens = torch.zeros(self.length, n, dtype=torch.long)
        tokens[0] = torch.randint(self.vocabulary, (n,), generator=generator)
        for i in range(1, self.length):
            tokens[i] = self.successors.take(tokens[i - 1] * n_choices + choice[i])
            if i >= STRETCH:
                tokens[i] = torch.where(is_quoted[i], tokens.take(source[i]), tokens[i])
        return tokens.T

    def _quotations(
        self, n: int, generator: torch.Generator
    ) -> tuple[Bool[Tensor, "length n"], Int[Tensor, "length n"]]:
        """Which tokens are quoted, and where from in the flattened [length, n] tokens."""
        start = torch.arange(0, self.length, STRETCH)[:, None]
        u_length, u_place, u_source = torch.rand(3, len(start), n, generator=generator, dtype=torch.float64)
        length = (8 + u_length * 7).long()
        place = start + (u_place * (STRETCH + 1 - length)).long()
        source = (u_source * (place - length + 1).clamp(min=1)).long()
        position = torch.arange(self.length)[:, None]
        length, place, source = (each.repeat_interleave(STRETCH, 0)[: self.length] for each in (length, place, source))
        into = position - place
        is_quoted = (into >= 0) & (into < length) & (position >= STRETCH)
        return is_quoted, (source + into).clamp(min=0) * n + torch.arange(n)
