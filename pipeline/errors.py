"""The one exception that a user is meant to read; anything else that reaches the top is a bug."""


class GattError(Exception):
    """A mistake or a limit that the user can act upon.

    The message says what was found, what was expected and what to do next. The command line prints it as one line
    and exits with status 1.
    """
