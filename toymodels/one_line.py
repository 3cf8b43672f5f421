"""Mistakes on a command line, in one line: tyro frames and wraps what it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr
from io import StringIO
from itertools import dropwhile, takewhile
from typing import TypeVar

from toymodels.errors import UsageError, nearest

Command = TypeVar("Command")


def require_command(program: str, words: Sequence[str], commands: Collection[str]) -> None:
    """Refuses words that do not begin with a command, or with a flag.

    Raises:
        UsageError: they do not.
    """
    if not words:
        raise UsageError(f"give a command, one of {', '.join(commands)}; see `{program} --help`")
    if not words[0].startswith("-") and words[0] not in commands:
        raise UsageError(f"unknown command {words[0]!r}{nearest(words[0], commands)}")


def understood(read: Callable[[], Command], program: str, words: Sequence[str], commands: Collection[str]) -> Command:
    """What `read` makes of the words with tyro.

    Raises:
        UsageError: nothing, and why.
        SystemExit: they ask for help, which is printed.
    """
    said = StringIO()
    try:
        with redirect_stderr(said):
            return read()
    except SystemExit as end:
        if not end.code:
            raise
        called = " ".join([program, *(word for word in words[:1] if word in commands)])
        raise UsageError(one_line(said.getvalue(), called)) from None


def one_line(box: str, called: str) -> str:
    """What tyro frames and wraps, without the frame, the title, and the part on help below the first rule; `called` is
    the command whose help says more."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
    below_rule = dropwhile(lambda line: not line.strip("╰╯─-"), lines)
    text = " ".join(takewhile(lambda line: line.strip("╰╯─-"), below_rule)).removeprefix("Error parsing ").rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; see `{called} --help`"
