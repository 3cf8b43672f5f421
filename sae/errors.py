"""What a user can cause: an error, or a stop."""

from toymodels.errors import UsageError

__all__ = ["Interrupted", "OtherProcess", "UsageError"]


class OtherProcess(UsageError):
    """An error that another process of the run found and reports."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after its state was saved. Like Ctrl-C, it passes `except Exception`."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)  # both, so that it can be pickled
        self.message, self.signal_number = message, signal_number

    def __str__(self) -> str:
        return self.message
