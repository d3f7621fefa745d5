"""Words and sentences of English and related languages. For checks, not a tokenizer of a model."""

from __future__ import annotations

import re

WORD = re.compile(
    r"[^\W_]+(?:(?:['’-]|(?<=\d)[.,:](?=\d)|(?<=\b[^\W\d_])\.(?=[^\W\d_]\b))[^\W_]+)*"
)
"""A word with its apostrophes and hyphens, a number such as 1,299.50 or 4:30, or "U.S", "a.m"."""
SENTENCE_END = re.compile(r"[.!?…][\"'”’)]*$")
_SENTENCE = re.compile(r".+?[.!?…]+[\"'”’)]*(?=\s|$)", re.DOTALL)
_PART = re.compile(r".+?(?:[.!?…]+[\"'”’)\]}*_]*(?=\s|$)|$)")
_LETTER = re.compile(r"[^\W\d_]")
_ABBREVIATION = re.compile(
    r"(?<![\w.])(?:mr|mrs|ms|dr|prof|st|mt|vs|approx|e\.g|i\.e)\.$", re.IGNORECASE
)
_INITIALS = re.compile(r"[\W\d_]*(?:[^\W\d_]\.[\W\d_]*)+")


def words(text: str) -> list[str]:
    """Return the words of a text in lowercase, without punctuation."""
    return [word.lower() for word in WORD.findall(text)]


def finished_sentences(text: str) -> list[str]:
    """Return the finished sentences; a tail without a sentence end is left out."""
    return [s.strip() for s in _SENTENCE.findall(text)]


def closing_marks(sentence: str) -> str:
    """Return what follows the last letter or digit: '!"' of '"Yes!"'."""
    return re.split(r"[^\W_]", sentence)[-1]


def split_sentences(text: str) -> list[str]:
    """Return the sentences of every line, including an unfinished one.

    Marks without a word belong to the sentence next to them. A sentence does not end after a number
    alone (the "1." of a list), nor after "Dr." or initials at its beginning. Nor does it end before
    a lowercase letter if it has a capital ("at 5 p.m. on").
    """
    return [sentence for line in text.splitlines() for sentence in _split_line(line)]


def _split_line(line: str) -> list[str]:
    sentences: list[str] = []
    sentence = ""
    parts = [part.strip() for part in _PART.findall(line)]
    for part, following in zip(parts, [*parts, ""][1:], strict=True):
        sentence = f"{sentence} {part}".strip()
        next_sign = following.lstrip("*_ ")[:1]
        if _LETTER.search(sentence) and not _continues(sentence.replace("*", ""), next_sign):
            sentences.append(sentence)
            sentence = ""
    if WORD.search(sentence):
        sentences.append(sentence)
    elif sentence and sentences:
        sentences[-1] += f" {sentence}"
    return sentences


def _continues(sentence: str, next_sign: str) -> bool:
    """Return whether the sentence continues after its period, where `next_sign` follows."""
    if _ABBREVIATION.search(sentence) or _INITIALS.fullmatch(sentence):
        return True
    if next_sign.isdigit() and sentence.endswith(" No."):
        return True
    return next_sign.islower() and any(map(str.isupper, sentence))


def first_sentences(text: str, count: int) -> str:
    """Return the first `count` finished sentences of the first paragraph, or ""."""
    return " ".join(finished_sentences(text.strip().split("\n")[0])[:count])


def has_sentences(text: str, count: int) -> bool:
    """Return whether `first_sentences(text, count)` is final: no continuation can change it.

    Generation stops there.
    """
    first, *rest = text.lstrip().split("\n", 1)
    # The appended letter: only a period that a space follows is known to end a sentence.
    return bool(first and rest) or len(finished_sentences(f"{first}x")) >= count
