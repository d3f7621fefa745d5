"""Values of constraints that the teacher lists itself (paper, section 3.3).

Only values that the teacher knows are used. It knows a person or a hobby if it can name the item
from its own description of it. It knows a language if it can write a sentence in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
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
        "List ten famous people of history. One name on each line, nothing else.",
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
_MAX_TOKENS = 120
"""Of a list, and of an answer about one of its items."""
_BULLET = re.compile(r"^\s*(?:[-*•]|\(?\d+[.):])?\s*")
_ITEM_END = re.compile(r"\s[-–—(]|[:,.;]")


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
    candidates = distinct_items(item for n in range(LISTS) for item in parse_items(lists[n]))
    run_tasks(map(test_knowledge, candidates))
    known = [item for item in candidates if is_known(kind, item, answers[item])]
    return ListedValues(len(candidates), known)


def _request(text: str, seed: int) -> Request:
    return Request(messages=({"role": "user", "content": text},), seed=seed, max_tokens=_MAX_TOKENS)


def parse_items(text: str) -> list[str]:
    """Return the items of a list with one on each line.

    Bullets, numbers and remarks after a dash or a colon are removed. Items of over 30 characters
    or three words are left out: "1. **Ada Lovelace** - a writer" is "Ada Lovelace".
    """
    items = []
    for line in text.splitlines():
        item = _ITEM_END.split(_BULLET.sub("", line), maxsplit=1)[0].strip(" *_\"'")
        if item and item[0].isalpha() and len(item) <= 30 and len(item.split()) <= 3:
            items.append(item)
    return items


def distinct_items(items: Iterable[str]) -> list[str]:
    """Return the first of all items with the same words, ignoring case."""
    first: dict[str, str] = {}
    for item in items:
        first.setdefault(" ".join(words(item)), item)
    return list(first.values())


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
