"""One process at a time works in a directory."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sae.errors import UsageError
from sae.hub import address_of

logger = logging.getLogger("sae")

LOCK = ".lock"
"""Held by the process that works there; the file stays."""
DEMO_LOCK = ".demo.lock"
"""A demo's lock; it has several runs in one directory."""
# Somebody may only be asking, for a moment.
PATIENCE_SECONDS = 0.2
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def hold(out: Path, name: str = LOCK) -> FileLock:
    """Creates the directory if needed, and keeps every other process out until released.

    Raises:
        UsageError: another process works there, or it cannot be written to.
    """
    require_here(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return _acquired(out, name)
    except OSError as error:
        raise cannot_write(out, error) from error


@contextmanager
def held(out: Path, name: str = LOCK) -> Iterator[None]:
    """`hold` for as long as the block lasts."""
    lock = hold(out, name)
    try:
        yield
    finally:
        lock.release()


def require_here(out: Path) -> None:
    """Refuses an address on the Hub, where no run can work.

    Raises:
        UsageError: it is one.
    """
    address = address_of(out)
    if address is not None:
        raise UsageError(
            f"{address} is on the Hub; give a directory as --out, and upload the SAE with `sae convert` afterwards"
        )


def require_free(out: Path) -> None:
    """Refuses a directory in which another process works: better to report it before data are opened than after."""
    require_here(out)
    if (out / LOCK).exists():
        with suppress(OSError):  # whether it can be written to is seen when it must be
            _acquired(out, LOCK).release()


def cannot_write(out: Path, error: OSError) -> UsageError:
    """The error for a directory that the machine will not let us write to."""
    return UsageError(f"cannot write to {out}: {error.strerror}; give another --out")


def _acquired(out: Path, name: str) -> FileLock:
    lock = FileLock(out / name, timeout=PATIENCE_SECONDS, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"another process is at work in {out}; wait until it ends, or give another --out") from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        logger.warning("%s is on a file system without locks; make sure only one process writes there", out)
    return lock
