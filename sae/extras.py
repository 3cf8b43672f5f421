"""Packages that are installed only where they are asked for, each with an extra of this one."""

import importlib.util

from sae.errors import UsageError


def installed(package: str) -> bool:
    """Whether it can be imported; nothing is."""
    return importlib.util.find_spec(package) is not None


def require(package: str, extra: str, why: str, otherwise: str = "") -> None:
    """Names the remedy where a package is missing: the extra, or else another way.

    Raises:
        UsageError: it is.
    """
    if not installed(package):
        remedy = f"pip install 'sae[{extra}]'{', or ' if otherwise else ''}{otherwise}"
        raise UsageError(f"{package} is not installed, and {why} needs it; {remedy}")
