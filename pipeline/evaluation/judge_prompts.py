"""A model as the judge of what no program can check: what it is asked, what it said, and whether it can be trusted.

It is tried on replies whose exact check is known first: below an agreement of 0.8 its verdicts are marked as not reliable.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from pipeline.gatt.text import words
from pipeline.records import Message

T = TypeVar("T")

RELIABLE = 0.8
"""The least agreement with the exact checks."""
_RUBRIC = """A user gave an assistant this instruction at the beginning of a chat:
{instruction}

Later in the chat the user wrote:
{user}

The assistant replied:
{reply}

Judge only whether this reply keeps the instruction, not whether it is right or good. A reply that keeps it in part does not
keep it. Answer with one word, yes or no."""


def question(instruction: str, user: str, reply: str) -> tuple[Message, ...]:
    """What the judge is asked about one reply."""
    return (
        {
            "role": "user",
            "content": _RUBRIC.format(instruction=instruction, user=user, reply=reply),
        },
    )


def verdict(text: str) -> bool | None:
    """Yes, no, or None where the judge said neither first."""
    first = words(text)[:1]
    return {"yes": True, "no": False}.get(first[0]) if first else None


def balanced(good: Sequence[T], bad: Sequence[T], most: int) -> list[T]:
    """Up to `most` of them, half of each kind where there are enough: a judge that always says yes must not look good."""
    draw = random.Random("calibration")
    size = min(len(good), len(bad), most // 2)
    return [*draw.sample(list(good), size), *draw.sample(list(bad), size)]
