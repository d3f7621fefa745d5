"""A chat that no longer fits in the context: which messages a client leaves out."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.exam.settings import WindowPolicy
from pipeline.records import Message


def messages_left(
    messages: Sequence[Message], dropped: int, policy: WindowPolicy
) -> list[int] | None:
    """Return the indices of the messages that stay when `dropped` exchanges are left out.

    An exchange is a user message with its answer. None: there are not so many to leave out.
    """
    start = int(bool(messages) and messages[0]["role"] == "system")
    pinned = 2 if policy == "pin" else 0
    first = start + pinned
    droppable = max(0, len(messages) - 1 - first) // 2
    if dropped > droppable:
        return None
    return [n for n in range(len(messages)) if n < first or n >= first + 2 * dropped]


def without_system_role(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the chat with its system message before the text of the first user message."""
    if not messages or messages[0]["role"] != "system":
        return tuple(messages)
    system, first, *rest = messages
    joined: Message = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
    return (joined, *rest)
