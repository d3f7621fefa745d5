"""Values that the teacher lists itself (paper, section 3.3): hobbies, figures, languages, of which it must know each.

It knows an item if it finds it again: it describes the item, and from the description alone names it. A language it knows
if it can write a sentence in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.gatt.constraints.language import LANGUAGES, language_of
from pipeline.gatt.text import words


@dataclass(frozen=True, slots=True)
class Listing:
    """How a kind's values are asked for, and how each is tried; `guess` is "" where the answer to `probe` decides."""

    ask: str
    probe: str
    guess: str = ""


LISTINGS = {
    "persona": Listing(
        "List ten famous people of history. One name on each line, nothing else.",
        "Who was {v}? Answer in one sentence.",
        "Who is this? {text} Answer with the name only.",
    ),
    "hobby": Listing(
        "List ten hobbies that people love. One on each line, one or two words, nothing else.",
        "What do people do whose hobby is {v}? Answer in one sentence.",
        "Which hobby is this? {text} Name it in one or two words.",
    ),
    "language": Listing(
        "List ten languages of Europe. One name on each line, nothing else.",
        "Write one sentence about the weather in {v}, and nothing else.",
    ),
}
"""The kinds that can be listed."""

_BULLET = re.compile(r"^\s*(?:[-*•]|\(?\d+[.):])?\s*")


def items(text: str) -> list[str]:
    """The items of a list, one a line: without bullets, numbers, remarks after a dash or colon, and long lines."""
    found = []
    for line in text.splitlines():
        item = re.split(r"\s[-–—(]|[:,.;]", _BULLET.sub("", line), maxsplit=1)[0].strip(" *_\"'")
        if item and item[0].isalpha() and len(item) <= 30 and len(item.split()) <= 3:
            found.append(item)
    return found


def distinct(candidates: list[str]) -> list[str]:
    """Without those whose words came before, whatever their case."""
    first: dict[str, str] = {}
    for item in candidates:
        first.setdefault(" ".join(words(item)), item)
    return list(first.values())


def masked(item: str, text: str) -> str:
    """A description without what it describes: every word of the item of over three letters is struck out."""
    for word in [w for w in item.split() if len(w) > 3] or [item]:
        text = re.sub(rf"\b{re.escape(word)}\w*", "___", text, flags=re.IGNORECASE)
    return text


def known(kind: str, item: str, answer: str) -> bool:
    """Whether the teacher's last answer shows that it knows the item: it says the longest word of its name, or is written
    in it, if it is a language that can be told from others.
    """
    if kind == "language":
        return item in LANGUAGES and language_of(answer) == item
    return max(item.split(), key=len).lower() in words(answer)
