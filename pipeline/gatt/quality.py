"""Defects of an answer, whatever its instruction: empty, loop, repeat, unfinished, off topic."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

from pipeline.gatt.text import BULLET, SENTENCE_END, UNSPACED, WORD, words

_FUNCTION_WORDS = frozenset(
    words(
        "the and but for with from are was were been being does did have has had you she they them "
        "your his her its our their this that these those what which who how why when where can "
        "could would should will shall may might must not yes than then there here some any all "
        "more most very just also about into out down over"
    )
)
_ITEM = re.compile(rf"\s*(?:{BULLET}|[*_]*\d+[.)][*_]*)\s+(.+)")
_HIRAGANA = re.compile(r"[\u3040-\u309f]+")
_NGRAM, _MAX_NGRAM_COUNT = 5, 3
"""Five words in a row may occur three times; good lists begin four items with three words."""
_TAIL = 12
"""Characters, fewer than most five words have."""


def find_defect(
    text: str,
    earlier: Sequence[str],
    required_words: str = "",
    *,
    require_ending: bool = False,
    max_similarity: float = 0.8,
) -> str:
    """Return the first defect of an answer, or "".

    "empty": no word except `required_words`. "loop": it repeats itself. "repeat": its word
    bigrams have a Jaccard similarity of over `max_similarity` to those of an `earlier` answer.
    "unfinished": its last sentence has no end (checked only with `require_ending`).
    """
    answer_words, required = words(text), set(words(required_words))
    content = [word for word in answer_words if word not in required]
    if not content:
        return "empty"
    if has_repeated_ngrams(answer_words) or len(set(answer_words)) < len(answer_words) / 3:
        return "loop"
    for answer in earlier:
        earlier_content = [word for word in words(answer) if word not in required]
        if _bigram_jaccard(content, earlier_content) > max_similarity:
            return "repeat"
    if require_ending and not SENTENCE_END.search(text.rstrip()):
        return "unfinished"
    return ""


def has_repeated_ngrams(text_words: Sequence[str]) -> bool:
    """Return whether five words in a row occur four times: a loop, whatever follows."""
    return _words_up_to_loop(text_words) is not None


def up_to_loop(text: str) -> str:
    """Return a text up to the word with which five words in a row occur for the fourth time.

    A text without such a loop is returned as it is.
    """
    matches = list(WORD.finditer(text))
    count = _words_up_to_loop([match[0].lower() for match in matches])
    return text if count is None else text[: matches[count - 1].end()]


def is_in_loop(unfinished: str) -> bool:
    """Return whether an unfinished text has gone on after such a loop, and is still in it.

    That its end occurs four times is quickly seen, so this may be asked after each token.
    """
    if unfinished.count(unfinished[-_TAIL:]) <= _MAX_NGRAM_COUNT:
        return False
    return bool(WORD.search(unfinished, len(up_to_loop(unfinished))))


def _words_up_to_loop(text_words: Sequence[str]) -> int | None:
    """Return how many words there are up to the end of the first loop; None if there is none."""
    counts: Counter[tuple[str, ...]] = Counter()
    ngrams = zip(*(text_words[start:] for start in range(_NGRAM)), strict=False)
    for end, ngram in enumerate(ngrams, _NGRAM):
        counts[ngram] += 1
        if counts[ngram] > _MAX_NGRAM_COUNT:
            return end
    return None


def has_repeated_items(lines: Sequence[str]) -> bool:
    """Return whether two items of a list have the same words, whatever their numbers."""
    matches = (_ITEM.match(line) for line in lines)
    items = (tuple(words(match[1])) for match in matches if match)
    return max(Counter(filter(None, items)).values(), default=0) > 1


def _bigram_jaccard(content: list[str], earlier_content: list[str]) -> float:
    """Return the Jaccard similarity of the word bigrams of two texts; 0 if one has none.

    In a script without spaces, they are those of characters.
    """
    bigrams, earlier_bigrams = set(_bigrams(content)), set(_bigrams(earlier_content))
    if not bigrams or not earlier_bigrams:
        return 0.0
    return len(bigrams & earlier_bigrams) / len(bigrams | earlier_bigrams)


def _bigrams(content: list[str]) -> Iterator[tuple[str, str]]:
    pieces = (word if UNSPACED.search(word) else (word,) for word in content)
    return pairwise(chain.from_iterable(pieces))


def is_on_topic(text: str, dialogue: Sequence[str]) -> bool:
    """Return whether a content word of `text` occurs in the dialogue, by its first five letters.

    In a script without spaces, two adjacent characters count as a content word. This is a filter
    for training data, where a lost good answer costs one more sample. It is not exact enough to
    measure with: "Yes, you can." fails.
    """
    dialogue_stems = {stem for message in dialogue for stem in _content_stems(message)}
    return bool(_content_stems(text) & dialogue_stems)


def _content_stems(text: str) -> set[str]:
    stems: set[str] = set()
    for word in words(text):
        if UNSPACED.search(word):
            pairs = map("".join, pairwise(word))
            # Endings such as "desu" are in every Japanese answer.
            stems.update(pair for pair in pairs if not _HIRAGANA.fullmatch(pair))
        elif len(word) > 2 and word not in _FUNCTION_WORDS:
            stems.add(word[:5])
    return stems
