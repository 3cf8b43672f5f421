"""What a user can cause: a mistake, or a stop."""


class UsageError(ValueError):
    """Something the user can get wrong; its message names the value, the rule and the remedy in one line.

    The command line prints it without a traceback and exits with code 2.
    """


class Interrupted(Exception):
    """A signal stopped the run after its state was saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.message, self.signal_number = message, signal_number
