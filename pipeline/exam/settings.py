"""What a result of the exam depends on, besides the model and the frozen set.

Also which messages a client sends of a chat that no longer fits in the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import GattError
from pipeline.records import Message, SamplerName

WindowPolicy = Literal["drop", "pin", "refuse"]
"""What happens to a chat that no longer fits in the context, as clients do it.

"drop": the older half of the exchanges is left out. "pin": the same, but the first one stays.
"refuse": the dialogue ends there. The system message stays in any case.
"""
FULL_TURNS = 20
"""Turns of the shortest length that counts as a result."""
TURNS_AFTER_FULL = 10
"""Turns that are measured after the context was full, where `turns` is "context"."""
_MAX_TURNS = 1000
_TURN_TOKENS = 30
"""A turn of the shortest answers, with its markers: no context has more turns."""
_CONTEXT, _LONG_CONTEXT = 4096, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamSettings:
    """What decides each reply, with the model, the set, the arm and the dialogue.

    `context` is that of the model that was measured; 0 is a server's own. `system_role` is False
    where the chat template knows no system message: it then precedes the first user message.
    """

    max_tokens: int
    max_thought_tokens: int
    context: int
    window: WindowPolicy
    sampler: SamplerName
    seed: int
    system_role: bool


def parse_turns(text: str) -> int:
    """Return the number of turns, or 0 for "context": until the context is full.

    Raises:
        GattError: neither.
    """
    if text == "context":
        return 0
    if text.isdecimal() and 2 <= int(text) <= _MAX_TURNS:
        return int(text)
    raise GattError(
        f"--turns {text}: expected a number from 2 to {_MAX_TURNS} such as 20 or 50, or "
        '"context", which goes on until the context is full.'
    )


def default_context(turns: int, trained: int) -> int:
    """Return the context in tokens for `turns`, at most the one that the model was trained for."""
    wanted = _LONG_CONTEXT if turns > FULL_TURNS else _CONTEXT
    return min(wanted, trained)


def most_turns(turns: int, context: int) -> int:
    """Return the user turns that a dialogue needs; `turns` 0 is until the context is full.

    That of a server is not known: a larger one than the default may not get full.
    """
    limit = (context or _LONG_CONTEXT) // _TURN_TOKENS + TURNS_AFTER_FULL
    return turns or min(_MAX_TURNS, limit)


def messages_left(
    messages: Sequence[Message], dropped: int, policy: WindowPolicy
) -> list[int] | None:
    """Return the indices of the messages that stay when `dropped` exchanges are left out.

    An exchange is a user message with its answer. None: there are not so many to leave out.
    """
    first, droppable = _first_droppable(messages, policy)
    if dropped > droppable:
        return None
    return [n for n in range(len(messages)) if n < first or n >= first + 2 * dropped]


def drop_older_half(messages: Sequence[Message], dropped: int, policy: WindowPolicy) -> int:
    """Return the exchanges to leave out when too many are left with `dropped`.

    It is half of what is there, as llama.cpp's context shift does, and at least one more. If it
    were the oldest one only, each turn of a full context would read all of the chat again, since
    no prompt would begin as the last one.
    """
    _, droppable = _first_droppable(messages, policy)
    return dropped + max(1, (droppable - dropped) // 2)


def _first_droppable(messages: Sequence[Message], policy: WindowPolicy) -> tuple[int, int]:
    """Return the index of the oldest exchange that may be left out, and how many there are."""
    start = int(bool(messages) and messages[0]["role"] == "system")
    first = start + (2 if policy == "pin" else 0)
    return first, max(0, len(messages) - 1 - first) // 2


def without_system_role(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the chat with its system message before the text of the first user message."""
    if not messages or messages[0]["role"] != "system":
        return tuple(messages)
    system, first, *rest = messages
    joined: Message = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
    return (joined, *rest)
