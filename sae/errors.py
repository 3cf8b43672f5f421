"""What a user can cause: a mistake, or a stop."""

from toymodels.errors import UsageError

__all__ = ["Interrupted", "OtherProcess", "UsageError"]


class OtherProcess(UsageError):
    """A mistake that another process of the run found, and tells."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after its state was saved. As Ctrl-C does, it passes `except Exception`."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)  # both, so that it can be pickled
        self.message, self.signal_number = message, signal_number

    def __str__(self) -> str:
        return self.message
