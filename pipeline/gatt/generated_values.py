"""Values of constraints that the teacher lists itself (paper, section 3.3).

Only values that the teacher knows are used. It knows a person or a hobby that several of its lists
have, because what it makes up differs from list to list, or that it can name from its own
description. It knows a language if it can write a sentence in it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from pipeline.gatt.constraints.language import LANGUAGES, language_of
from pipeline.gatt.text import words
from pipeline.records import Request, RunTasks, Task


@dataclass(frozen=True, slots=True)
class ListPrompts:
    """Prompts that obtain the values of a kind and test whether the teacher knows them.

    `{v}` is the value, `{text}` its description. Without `identify`, the answer to `describe`
    is the test.
    """

    list_values: str
    describe: str
    identify: str = ""


LIST_PROMPTS = {
    "persona": ListPrompts(
        "Name ten famous historical figures: rulers, scientists and artists. One full name on each "
        "line, nothing else.",
        "Who was {v}? Answer in one sentence.",
        "Who is this? {text} Answer with the name only.",
    ),
    "hobby": ListPrompts(
        "List ten hobbies that people love. One on each line, one or two words, nothing else.",
        "What do people do whose hobby is {v}? Answer in one sentence.",
        "Which hobby is this? {text} Name it in one or two words.",
    ),
    "language": ListPrompts(
        "List ten languages of Europe. One name on each line, nothing else.",
        "Write one sentence about the weather in {v}, and nothing else.",
    ),
}
"""The prompts of each kind whose values can be generated."""

LISTS = 8
"""Lists that the teacher writes of each kind."""
_KNOWN_LISTS = 2
"""Lists with the same person or hobby that show that the teacher knows it."""
_MAX_TOKENS = 120
"""Of a list, and of an answer about one of its items."""
_BULLET = re.compile(r"^\s*(?:[-*•](?!\*)|\(?\d+[.):])\s*")
_HEADING = re.compile(r"^\s*#|:[\s*_]*$")
_SEPARATOR = re.compile(r",\s*(?:and\s+)?|\s+and\s+")
_ITEM_END = re.compile(r"\s[-–—(]|[:,;]|(?<=[^\W\d_]{4})\.+(?=[*_\"']*\s)|\.+[\s*_\"']*$")
"""Where a remark begins: a period in "J. S. Bach" or "St. Francis" does not end the name."""
_MIN_LETTERS = 3
"""Of the longest word of an item; a shorter one stands in any description."""


class ListedValues(NamedTuple):
    """The number of different values that the teacher listed, and those that it knows."""

    candidates: int
    known: list[str]


def list_values(kind: str, run_tasks: RunTasks, seed: int) -> ListedValues:
    """Let the teacher list values and test which ones it knows; they keep the order of its lists.

    `run_tasks` is `GenerationEngine.run` of the teacher.
    """
    prompts = LIST_PROMPTS[kind]
    lists: dict[int, str] = {}
    answers: dict[str, str] = {}

    def write_list(n: int) -> Task:
        lists[n] = (yield _request(prompts.list_values, seed + n)).text

    def test_knowledge(item: str) -> Task:
        answer = (yield _request(prompts.describe.format(v=item), seed)).text
        if prompts.identify:
            description = mask_item(item, answer)
            answer = (yield _request(prompts.identify.format(text=description), seed)).text
        answers[item] = answer

    run_tasks(map(write_list, range(LISTS)))
    items = [distinct_items(parse_items(lists[n])) for n in range(LISTS)]
    candidates = distinct_items(chain.from_iterable(items))
    listings = Counter(_same(item) for in_list in items for item in in_list)
    repeated = {i for i in candidates if prompts.identify and listings[_same(i)] >= _KNOWN_LISTS}
    run_tasks(test_knowledge(item) for item in candidates if item not in repeated)
    known = [i for i in candidates if i in repeated or is_known(kind, i, answers[i])]
    return ListedValues(len(candidates), known)


def _request(text: str, seed: int) -> Request:
    return Request(messages=({"role": "user", "content": text},), seed=seed, max_tokens=_MAX_TOKENS)


def parse_items(text: str) -> list[str]:
    """Return the items of a list with one on each line, or with commas on a single line.

    Bullets, numbers and remarks after a dash, a colon or a sentence are removed: "1. **Ada
    Lovelace** - a writer" is "Ada Lovelace". Items of over 30 characters or three words are left
    out, and those of one or two letters; so are headings, and what stands around a list with
    bullets or numbers.
    """
    items = []
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if len(lines) == 1 and text.count(",") > 1:
        lines = _SEPARATOR.split(text.rpartition(":")[2])
    elif len(marked := [line for line in lines if _BULLET.match(line)]) >= max(2, len(lines) / 2):
        lines = marked
    for line in lines:
        if _HEADING.search(line):
            continue
        item = _ITEM_END.split(_BULLET.sub("", line), maxsplit=1)[0].strip(" *_\"'")
        longest = max(map(len, words(item)), default=0)
        is_short = len(item) <= 30 and len(item.split()) <= 3
        if longest >= _MIN_LETTERS and item[0].isalpha() and is_short:
            items.append(item)
    return items


def distinct_items(items: Iterable[str]) -> list[str]:
    """Return the first of all items with the same words, ignoring case."""
    first: dict[str, str] = {}
    for item in items:
        first.setdefault(_same(item), item)
    return list(first.values())


def _same(item: str) -> str:
    """Return what all spellings of an item have in common: its words."""
    return " ".join(words(item))


def mask_item(item: str, text: str) -> str:
    """Return a description with every word of the item of over three letters replaced by "___"."""
    for word in [w for w in item.split() if len(w) > 3] or [item]:
        text = re.sub(rf"\b{re.escape(word)}\w*", "___", text, flags=re.IGNORECASE)
    return text


def is_known(kind: str, item: str, answer: str) -> bool:
    """Return whether the answer to the last prompt shows that the teacher knows the item.

    The answer has the longest word of the item; or it is written in the language `item`, which
    has to be one of `LANGUAGES`.
    """
    if kind == "language":
        return item in LANGUAGES and language_of(answer) == item
    return max(item.split(), key=len).lower() in words(answer)
