"""Words, sentences, and what makes a text no answer. English and its neighbours; not a tokenizer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

WORD = re.compile(
    r"[^\W_]+(?:(?:['’-]|(?<=\d)[.,:](?=\d)|(?<=\b[^\W\d_])\.(?=[^\W\d_]\b))[^\W_]+)*"
)
"""One with its apostrophes and hyphens; also a number such as 1,299.50 or 4:30, and letters such as U.S or a.m."""
_SENTENCE = re.compile(r".+?[.!?…]+[\"'”’)]*(?=\s|$)", re.DOTALL)
_ENDING = re.compile(r"[.!?…][\"'”’)]*$")
_PART = re.compile(r".+?(?:[.!?…]+[\"'”’)\]}*_]*(?=\s|$)|$)")
_LETTER = re.compile(r"[^\W\d_]")
_ABBREVIATION = re.compile(
    r"(?<![\w.])(?:mr|mrs|ms|dr|prof|st|mt|vs|approx|e\.g|i\.e)\.$", re.IGNORECASE
)
_INITIALS = re.compile(r"[\W\d_]*(?:[^\W\d_]\.[\W\d_]*)+")


def words(text: str) -> list[str]:
    """The words of a text, in lowercase, without punctuation."""
    return [word.lower() for word in WORD.findall(text)]


_FUNCTION_WORDS = frozenset(
    words(
        "the and but for with from are was were been being does did have has had you she they them your his her its our their "
        "this that these those what which who how why when where can could would should will shall may might must not yes "
        "then than there here some any all more most very just also about into out down over"
    )
)


def sentences(text: str) -> list[str]:
    """The finished sentences; a tail without a full stop is left out."""
    return [s.strip() for s in _SENTENCE.findall(text)]


def split_sentences(text: str) -> list[str]:
    """The sentences of every line, an unfinished one with them; signs without a word belong to the sentence beside them.

    A line's end ends a sentence. A number alone, such as the "1." of a list, does not, nor do "Dr." and the initials of a name
    at the beginning, nor what a small letter follows in a sentence with a capital ("at 5 p.m. on").
    """
    return [sentence for line in text.splitlines() for sentence in _line_sentences(line)]


def _line_sentences(line: str) -> list[str]:
    found: list[str] = []
    begun = ""
    parts = [part.strip() for part in _PART.findall(line)]
    for part, following in zip(parts, [*parts, ""][1:], strict=True):
        begun = f"{begun} {part}".strip()
        if _LETTER.search(begun) and not _goes_on(
            begun.replace("*", ""), following.lstrip("*_ ")[:1]
        ):
            found.append(begun)
            begun = ""
    if WORD.search(begun):
        found.append(begun)
    elif begun and found:
        found[-1] += f" {begun}"
    return found


def _goes_on(begun: str, sign: str) -> bool:
    """Whether a sentence goes on behind its full stop, where `sign` follows."""
    if _ABBREVIATION.search(begun) or _INITIALS.fullmatch(begun):
        return True
    return (sign.islower() and any(map(str.isupper, begun))) or (
        sign.isdigit() and begun.endswith(" No.")
    )


def first_sentences(text: str, count: int) -> str:
    """The first `count` finished sentences of the first paragraph, or "" where none is finished."""
    return " ".join(sentences(text.strip().split("\n")[0])[:count])


def has_sentences(text: str, count: int) -> bool:
    """Whether nothing that may follow can change `first_sentences(text, count)`: used to stop a generation early."""
    first, *rest = text.lstrip().split("\n", 1)
    # A letter behind the last full stop: it ends a sentence only where a space follows it already.
    return bool(first and rest) or len(sentences(f"{first}x")) >= count


def flaw(
    text: str,
    earlier: Sequence[str],
    demanded: str = "",
    finished: bool = False,
    alike: float = 0.8,
) -> str:
    """What makes `text` no answer, or "".

    "empty": no word beside the `demanded` ones; "loop": a phrase again and again; "repeat": shares more than `alike` of its
    pairs of words with an `earlier` answer; "unfinished": does not end a sentence (asked only where `finished`).
    """
    said = words(text)
    asked = set(words(demanded))
    content = [word for word in said if word not in asked]
    if not content:
        return "empty"
    if _loops(said):
        return "loop"
    if any(_overlap(content, [w for w in words(old) if w not in asked]) > alike for old in earlier):
        return "repeat"
    if finished and not _ENDING.search(text.rstrip()):
        return "unfinished"
    return ""


def stuck(said: Sequence[str]) -> bool:
    """Whether a run of five words comes four times: a loop, whatever may follow. Good lists begin four points with three."""
    runs = Counter(zip(*(said[start:] for start in range(5)), strict=False))
    return max(runs.values(), default=0) >= 4


def _loops(said: list[str]) -> bool:
    """Stuck, or fewer than a third of the words different."""
    return stuck(said) or len(set(said)) < len(said) / 3


def _overlap(one: list[str], other: list[str]) -> float:
    """Jaccard similarity of the two texts' pairs of words."""
    first, second = set(pairwise(one)), set(pairwise(other))
    return len(first & second) / len(first | second) if first and second else 0.0


def touches(text: str, dialogue: Sequence[str]) -> bool:
    """Whether a content word of `text` stands in the dialogue too, in whatever ending (its first five letters are compared).

    A filter for data, where a good answer lost costs one more draw; too blunt to measure with ("Yes, you can." fails).
    """
    return bool(_content(text) & {stem for said in dialogue for stem in _content(said)})


def _content(text: str) -> set[str]:
    return {word[:5] for word in words(text) if len(word) > 2 and word not in _FUNCTION_WORDS}
