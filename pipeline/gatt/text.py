"""Words and sentences. For checks, not a tokenizer of a model.

The rules are those of English and related languages. Sentences also end at the marks of Chinese,
Japanese, Hindi, Arabic, Urdu, Burmese and Khmer, and vowel signs belong to their word. In scripts
without spaces, a word is all that stands between two signs.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff]"
)
"""A letter of a script without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""
BULLET = "[-+*•●◦▪‣–·]"
"""A sign before an item of a list."""
_VOWEL_SIGNS = "".join(
    chr(code)
    for code in range(0x0590, 0x1800)  # Hebrew to Khmer
    if unicodedata.category(chr(code)) in ("Mc", "Mn")
)
_LETTERS = rf"[^\W_]+(?:[{_VOWEL_SIGNS}]+[^\W_]*)*"
WORD = re.compile(
    rf"{_LETTERS}(?:(?:['’-]|(?<=\d)[.,:](?=\d)|(?<=\b[^\W\d_])\.(?=[^\W\d_]\b)){_LETTERS})*"
)
"""A word with its apostrophes and hyphens, a number such as 1,299.50 or 4:30, or "U.S", "a.m"."""
_WIDE_ENDS = "。！？"
"""Sentence ends without a space after them."""
_FURTHER_ENDS = f"{_WIDE_ENDS}।؟۔။។"
"""Sentence ends that no number or abbreviation has, so that they need no space after them."""
ENDS = f".!?…{_FURTHER_ENDS}"
"""Signs that end a sentence."""
_CLOSERS = "\"'”’)」』）"
"""Signs that may follow such a mark."""
SENTENCE_END = re.compile(rf"[{ENDS}][{_CLOSERS}]*$")
_WIDE_END = re.compile(rf"[{_WIDE_ENDS}][{ENDS}{_CLOSERS}]*$")
_FURTHER_END = rf"[{_FURTHER_ENDS}][{ENDS}{_CLOSERS}]*"
_SENTENCE = re.compile(rf".+?(?:[.!?…]+[{_CLOSERS}]*(?=\s|$)|{_FURTHER_END})", re.DOTALL)
_PART = re.compile(rf".+?(?:[.!?…]+[{_CLOSERS}\]}}*_]*(?=\s|$)|{_FURTHER_END}|$)")
_LETTER = re.compile(r"[^\W\d_]")
_ABBREVIATION = re.compile(
    r"(?<![\w.])(?:mr|mrs|ms|dr|prof|st|mt|vs|approx|e\.g|i\.e)\.$", re.IGNORECASE
)
_INITIAL = re.compile(r"(?<![^\s.(\"'“‘])[A-Z]\.$")
_NAME = re.compile(r"(?:\b[A-Z][a-z]+|\b[A-Z]\.) [A-Z]\.$")
"""A name up to an initial within it: "John F.", "J. R."."""
_INITIALS = re.compile(r"[\W\d_]*(?:[^\W\d_]\.[\W\d_]*)+")


def words(text: str) -> list[str]:
    """Return the words of a text in lowercase, without punctuation."""
    return [word.lower() for word in WORD.findall(text)]


def finished_sentences(text: str) -> list[str]:
    """Return the finished sentences; a tail without a sentence end is left out.

    The period of an abbreviation or of an initial ends none: what follows is not known yet, and a
    sentence more is better than "Ask Dr.".
    """
    sentences, sentence = [], ""
    for part in _SENTENCE.findall(text):
        sentence += part
        if not (_ABBREVIATION.search(sentence) or _INITIAL.search(sentence)):
            sentences.append(sentence.strip())
            sentence = ""
    return sentences


def closing_marks(sentence: str) -> str:
    """Return what follows the last letter or digit: '!"' of '"Yes!"'."""
    return re.split(r"[^\W_]", sentence)[-1]


def join_sentences(sentences: Iterable[str]) -> str:
    """Return a text of some sentences, with a space where one stands between two of them."""
    text = ""
    for sentence in sentences:
        text += sentence if not text or _WIDE_END.search(text) else f" {sentence}"
    return text


def split_sentences(text: str) -> list[str]:
    """Return the sentences of every line, including an unfinished one.

    Marks without a word belong to the sentence next to them. A sentence does not end after a number
    alone (the "1." of a list), nor after "Dr.", initials at its beginning, or one within a name
    ("John F. Kennedy"). Nor does it end before a lowercase letter if it has a capital ("at 5 p.m.
    on").
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
    if next_sign.isupper() and _NAME.search(sentence):
        return True
    return next_sign.islower() and any(map(str.isupper, sentence))


def first_sentences(text: str, count: int) -> str:
    """Return the first `count` finished sentences of the first paragraph, or ""."""
    return join_sentences(finished_sentences(text.strip().split("\n")[0])[:count])


def has_sentences(text: str, count: int) -> bool:
    """Return whether `first_sentences(text, count)` is final: no continuation can change it.

    Generation stops there.
    """
    first, *rest = text.lstrip().split("\n", 1)
    # The letter: only a period that a space follows is known to end a sentence. It stands in place
    # of other marks at the end, as more of them may follow.
    marked = first.rstrip(ENDS + _CLOSERS) + "x"
    return bool(first and rest) or len(finished_sentences(marked)) >= count
