"""The one error that a user can cause."""


class UsageError(ValueError):
    """Something the user can get wrong; its message names the value, the rule and the remedy in one line.

    The command line prints it without a traceback and exits with code 2.
    """
