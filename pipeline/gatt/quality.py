"""Is an answer an answer? Loops, repeats, and whether it is about its dialogue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from pipeline.gatt.text import SENTENCE_END, words

_FUNCTION_WORDS = frozenset(
    words(
        "the and but for with from are was were been being does did have has had you she they them your his her its our their "
        "this that these those what which who how why when where can could would should will shall may might must not yes "
        "then than there here some any all more most very just also about into out down over"
    )
)


def find_defect(
    text: str,
    earlier: Sequence[str],
    required_words: str = "",
    finished: bool = False,
    alike: float = 0.8,
) -> str:
    """What makes `text` no answer, or "".

    "empty": no word beside the `demanded` ones; "loop": a phrase again and again; "repeat": shares more than `alike` of its
    pairs of words with an `earlier` answer; "unfinished": does not end a sentence (asked only where `finished`).
    """
    said = words(text)
    asked = set(words(required_words))
    content = [word for word in said if word not in asked]
    if not content:
        return "empty"
    if _loops(said):
        return "loop"
    if any(
        _bigram_jaccard(content, [w for w in words(old) if w not in asked]) > alike
        for old in earlier
    ):
        return "repeat"
    if finished and not SENTENCE_END.search(text.rstrip()):
        return "unfinished"
    return ""


def has_repeated_ngrams(said: Sequence[str]) -> bool:
    """Whether a run of five words comes four times: a loop, whatever may follow. Good lists begin four points with three."""
    runs = Counter(zip(*(said[start:] for start in range(5)), strict=False))
    return max(runs.values(), default=0) >= 4


def _loops(said: list[str]) -> bool:
    """Stuck, or fewer than a third of the words different."""
    return has_repeated_ngrams(said) or len(set(said)) < len(said) / 3


def _bigram_jaccard(one: list[str], other: list[str]) -> float:
    """Jaccard similarity of the two texts' pairs of words."""
    first, second = set(pairwise(one)), set(pairwise(other))
    return len(first & second) / len(first | second) if first and second else 0.0


def is_on_topic(text: str, dialogue: Sequence[str]) -> bool:
    """Whether a content word of `text` stands in the dialogue too, in whatever ending (its first five letters are compared).

    A filter for data, where a good answer lost costs one more draw; too blunt to measure with ("Yes, you can." fails).
    """
    return bool(_content_stems(text) & {stem for said in dialogue for stem in _content_stems(said)})


def _content_stems(text: str) -> set[str]:
    return {word[:5] for word in words(text) if len(word) > 2 and word not in _FUNCTION_WORDS}
