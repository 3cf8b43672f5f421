"""What a user can cause: a mistake, or a stop."""

from toymodels.errors import UsageError

__all__ = ["Interrupted", "UsageError"]


class Interrupted(Exception):
    """A signal stopped the run after its state was saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.message, self.signal_number = message, signal_number
