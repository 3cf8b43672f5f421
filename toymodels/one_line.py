"""What tyro says of a mistake, in one line."""

from __future__ import annotations

import re
from itertools import dropwhile, takewhile


def one_line(box: str, called: str) -> str:
    """What tyro frames and wraps, without the frame, the title, and the part on help below the first rule; `called` is
    the command whose help says more."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
    below_rule = dropwhile(lambda line: not line.strip("╰╯─-"), lines)
    text = " ".join(takewhile(lambda line: line.strip("╰╯─-"), below_rule)).removeprefix("Error parsing ").rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; see `{called} --help`"
