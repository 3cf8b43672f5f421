"""Signals that ask to stop: recorded on arrival, and checked where saved state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sae.errors import Interrupted

CONTINUE = "continue with --resume, in Python resume=True"
Stop = Callable[[], int]
"""The number of the signal that asked to stop, or 0."""

# What has been noted, by those who look at it; the last began last.
_looking: list[list[int]] = []


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """SIGINT and SIGTERM are recorded, and checked between steps, so that saved state is whole."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    _looking.append(noted)
    try:
        yield lambda: noted[0] if noted else 0
    finally:
        _looking[:] = [one for one in _looking if one is not noted]
        for number, handler in previous.items():
            signal.signal(number, handler)


def asked() -> int:
    """The number of the last recorded signal, or 0."""
    return _looking[-1][0] if _looking and _looking[-1] else 0


def stop_if_asked(doing: str, agreed: Callable[[Stop], Stop] = lambda stop: stop) -> None:
    """For slow work between two steps that changes nothing saved; `agreed` asks other processes as well.

    Raises:
        Interrupted: a signal was recorded.
    """
    number = agreed(asked)()
    if number:
        raise Interrupted(f"stopped while {doing}; {CONTINUE}", number)
