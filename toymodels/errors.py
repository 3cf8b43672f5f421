"""What a user can get wrong, reported in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something the user can get wrong; its message names the value, the rule and the remedy in one line.

    The command lines print it without a traceback and exit with code 2.
    """


def nearest(word: object, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: the nearest known one, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f"{f'; did you mean {close[0]!r}?' if close else ';'} known: {', '.join(sorted(known))}"
