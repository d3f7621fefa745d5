"""The judge's prompt, its verdicts, and the replies that calibrate it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from pipeline.gatt.text import words
from pipeline.records import Message

T = TypeVar("T")

JUDGE_CONTEXT = 2048
"""Tokens of a judge's context."""
RELIABLE_AGREEMENT = 0.8
"""Agreement with the exact checks below which verdicts are marked as not reliable."""
_RUBRIC = """A user gave an assistant this instruction at the beginning of a chat:
{instruction}

Later in the chat the user wrote:
{user}

The assistant replied:
{reply}

Judge only whether this reply keeps the instruction, not whether it is right or good. A reply that \
keeps it in part does not
keep it. Answer with one word, yes or no."""


def question(instruction: str, user: str, reply: str) -> tuple[Message, ...]:
    """Return the chat that asks the judge about one reply."""
    return (
        {
            "role": "user",
            "content": _RUBRIC.format(instruction=instruction, user=user, reply=reply),
        },
    )


def verdict(text: str) -> bool | None:
    """Return whether the judge's first word is yes or no; None if it is neither."""
    first = words(text)[:1]
    return {"yes": True, "no": False}.get(first[0]) if first else None


def balanced(good: Sequence[T], bad: Sequence[T], limit: int) -> list[T]:
    """Return up to `limit` items, as many good as bad ones, drawn by a fixed seed.

    Otherwise a judge that always says yes could look good.
    """
    draw = random.Random("calibration")
    size = min(len(good), len(bad), limit // 2)
    return [*draw.sample(list(good), size), *draw.sample(list(bad), size)]
