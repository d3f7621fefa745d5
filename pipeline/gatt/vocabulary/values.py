"""Values from an open vocabulary: a new one for nearly every dialogue.

A model that is trained on a few phrases memorizes them; one that is trained on hundreds learns to
bind whatever the instruction names. The words are in `vocabulary.txt`. A third of them is held out
for evaluation: its values share no word with those of training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection
from functools import cache
from importlib.resources import files
from typing import Literal

from pipeline.gatt.seeds import derive_seed
from pipeline.gatt.text import words

VocabularySplit = Literal["train", "evaluation"]

_HELD_OUT = 3
"""One of so many entries is held out for evaluation."""
_MAX_DRAWS = 100
_PLACEHOLDER = re.compile(r"\{([\w ]+)\}")

_NAMES = ("{first name}", "{first name} {last name}", "{title} {last name}")
_PATTERNS: dict[VocabularySplit, dict[str, tuple[str, ...]]] = {
    "train": {
        "opening": (
            *("{Exclamation}!", "{Exclamation}, {noun}!", "{Exclamation} from the {noun}!"),
            *("{Adjective} {noun}!", "{Adjective} news:", "The {adjective} answer:", "{Verb}!"),
            *("{Noun} first:", "{Noun} {noun}:", "By the {noun}!", "{Verb} with me:"),
            *("{Adjective} and {adjective}:", "Oh, {adjective} {noun}!", "{Noun}, {noun}:"),
        ),
        "closing": (
            *("{Farewell}.", "{Farewell}, {noun}!", "{Adjective} {noun}.", "Stay {adjective}!"),
            *("{Verb} and {verb}.", "Long live the {noun}!", "The {noun} has spoken."),
            *("Keep it {adjective}.", "May your {noun} {verb}.", "So says the {noun}."),
        ),
        "persona": _NAMES,
        "signature": (*_NAMES, "Your {adjective} {noun}", "The {noun}"),
        "hashtag": ("{Noun}{Noun}", "{adjective}{noun}", "{Verb}{Noun}", "{noun}"),
        "address": (*_NAMES, "my {adjective} {noun}", "dear {noun}", "my {noun}"),
        "heading": ("{Noun}", "{Adjective} {Noun}", "The {Noun}"),
        "json": ("{noun}", "{adjective}", "{adjective}_{noun}"),
    },
    "evaluation": {
        "opening": (
            *("{Exclamation}!", "{Exclamation}, {noun}!", "{Adjective} {noun}!", "{Verb}!"),
            *("{Noun} {noun}:", "Upon our {noun}!", "{Noun}, {noun}:", "{Adjective} tidings:"),
        ),
        "closing": (
            *("{Farewell}.", "{Farewell}, {noun}!", "{Adjective} {noun}.", "{Verb} {adjective}!"),
            *("Remember this {noun}.", "Always {verb}."),
        ),
        "persona": _NAMES,
        "signature": (*_NAMES, "{Adjective} {noun}"),
        "hashtag": ("{Noun}{Noun}", "{adjective}{noun}", "{noun}"),
        "address": (*_NAMES, "{adjective} {noun}"),
        "heading": ("{Noun}", "{Adjective} {Noun}"),
        "json": ("{noun}", "{adjective}"),
    },
}


def without_words(draw: Callable[[], str], avoided: Collection[str]) -> str:
    """Return the first drawn value that has none of the words `avoided`, or else the last one."""
    for _ in range(_MAX_DRAWS):
        value = draw()
        if not set(words(value)) & set(avoided):
            break
    return value


def draw_value(kind: str, split: VocabularySplit, rng: random.Random) -> str:
    """Return a value for a constraint of a kind that `recipe.VocabularyKind` names."""
    return fill(rng.choice(_PATTERNS[split][kind]), split, rng)


def fill(pattern: str, split: VocabularySplit, rng: random.Random) -> str:
    """Replace every "{category}" of `pattern` by an entry; "{Category}" begins with a capital."""

    def draw(placeholder: re.Match[str]) -> str:
        category = placeholder[1]
        entry = rng.choice(entries(category.lower(), split))
        return entry[0].upper() + entry[1:] if category[0].isupper() else entry

    return _PLACEHOLDER.sub(draw, pattern)


def entries(category: str, split: VocabularySplit) -> tuple[str, ...]:
    """Return the entries of a category in one split."""
    return _vocabulary()[split][category]


@cache
def _vocabulary() -> dict[VocabularySplit, dict[str, tuple[str, ...]]]:
    """Return the entries by split and category.

    The longest word of an entry decides about its split, so that a word of several categories is
    on the same side in all of them. Training leaves out what shares another word with evaluation.
    """
    text = files("pipeline.gatt.vocabulary").joinpath("vocabulary.txt").read_text(encoding="utf-8")
    lines = [line.partition(": ") for line in text.splitlines()]
    categories = {category: listed.split(", ") for category, _, listed in lines}
    held_out = {
        category: tuple(filter(_is_held_out, listed)) for category, listed in categories.items()
    }
    held_out_words = {
        word for listed in held_out.values() for entry in listed for word in words(entry)
    }
    train = {
        category: tuple(entry for entry in listed if held_out_words.isdisjoint(words(entry)))
        for category, listed in categories.items()
    }
    return {"train": train, "evaluation": held_out}


def _is_held_out(entry: str) -> bool:
    return derive_seed("vocabulary", max(words(entry), key=len)) % _HELD_OUT == 0
