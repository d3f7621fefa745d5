"""The one exception that a user is meant to read; any other that reaches the top is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GattError(Exception):
    """A mistake or a limit that the user can act on.

    The message says what was found, what was expected and what to do next. The command line prints
    it as one line and exits with status 1.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "Did you mean 'NEAREST'?", or "" if no known name is near; an abbreviation is."""
    names = list(known)
    nearest = [known_name for known_name in names if name and known_name.startswith(name)]
    nearest = nearest or difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {nearest[0]!r}?" if nearest else ""
