"""Words, sentences, and what makes a text no answer. English and its neighbors; not a tokenizer."""

from __future__ import annotations

import re

WORD = re.compile(
    r"[^\W_]+(?:(?:['’-]|(?<=\d)[.,:](?=\d)|(?<=\b[^\W\d_])\.(?=[^\W\d_]\b))[^\W_]+)*"
)
"""One with its apostrophes and hyphens; also a number such as 1,299.50 or 4:30, and letters such as U.S or a.m."""
_SENTENCE = re.compile(r".+?[.!?…]+[\"'”’)]*(?=\s|$)", re.DOTALL)
SENTENCE_END = re.compile(r"[.!?…][\"'”’)]*$")
_PART = re.compile(r".+?(?:[.!?…]+[\"'”’)\]}*_]*(?=\s|$)|$)")
_LETTER = re.compile(r"[^\W\d_]")
_ABBREVIATION = re.compile(
    r"(?<![\w.])(?:mr|mrs|ms|dr|prof|st|mt|vs|approx|e\.g|i\.e)\.$", re.IGNORECASE
)
_INITIALS = re.compile(r"[\W\d_]*(?:[^\W\d_]\.[\W\d_]*)+")


def words(text: str) -> list[str]:
    """The words of a text, in lowercase, without punctuation."""
    return [word.lower() for word in WORD.findall(text)]


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
