"""What every teacher offers, whatever runs behind it; no library is needed to say so."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Protocol

from pipeline.records import Completion, Request

Task = Generator[Request, Completion, None]
"""A dialogue: yields requests, receives completions, keeps its own results."""


class Teacher(Protocol):
    """A model that answers many dialogues side by side; a context manager, which gives its resources back at the end."""

    def run(self, tasks: Iterable[Task]) -> None:
        """Drive all `tasks` to their end."""

    def __enter__(self) -> Teacher: ...

    def __exit__(self, *_: object) -> None: ...
