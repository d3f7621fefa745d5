"""Checks of what an answer says: how it begins and ends, and which words it has.

All functions take a value and a text; none raises, whatever the text. `X_cannot_pass` is true of
a prefix only if no text that begins with it can pass `X`: it aborts sampling early. Examples in
docstrings are written "passes" / "fails".
"""

from __future__ import annotations

import re

from pipeline.gatt.text import UNSPACED, WORD, closing_marks, words

_POSTSCRIPT = re.compile(r"(?:\S\s*\n|[^\w\s,;]\s)\s*[*_]*P\.\s?S\.\W*\w.*\s*\Z")
_QUESTION = re.compile(r"[?？؟][^.。۔]*$")
_STRAIGHT = str.maketrans("‘’“”", "''\"\"")
_EMPHASIS = str.maketrans("", "", "*_")
_LATIN = "[A-Za-zÀ-ɏ]"
_WITHIN_A_WORD = f"(?<={_LATIN})(?={_LATIN})"


def _straighten(text: str) -> str:
    """Replace curved quotation marks and apostrophes, which models mix up with straight ones."""
    return text.translate(_STRAIGHT)


def _plain(text: str) -> str:
    """Straighten the quotation marks, and remove the marks of bold and italics."""
    return _straighten(text).translate(_EMPHASIS)


def starts_with(value: str, text: str) -> bool:
    """Return whether the text begins with the value, in bold or not, and not with a longer word.

    Example for "Ahoy!": "**Ahoy!** Yes." / "Yes. Ahoy!".
    """
    start = re.compile(f"{re.escape(_straighten(value))}(?!{_WITHIN_A_WORD})")
    return any(start.match(form.lstrip()) for form in (_straighten(text), _plain(text)))


def starts_with_cannot_pass(value: str, prefix: str) -> bool:
    """Return whether the prefix differs from the beginning of the value ("Ahoi" for "Ahoy!")."""
    start = _straighten(value)
    forms = (_straighten(prefix).lstrip(), _plain(prefix).lstrip())
    return not any(start.startswith(form) or form.startswith(start) for form in forms)


def ends_with(value: str, text: str) -> bool:
    """Return whether the text ends with the value, in bold or not, and not with a longer word.

    Example for "So it goes.": "Yes. So it goes." / "So it goes. Yes.".
    """
    end = re.compile(f"(?!{_WITHIN_A_WORD}){re.escape(_straighten(value))}\\Z")
    return any(end.search(form.rstrip()) for form in (_straighten(text), _plain(text)))


def first_word_starts_with(value: str, text: str) -> bool:
    """Return whether the first word begins with the value, ignoring case.

    Example for "S": "so it is." / "It is so.".
    """
    first = WORD.search(text)
    return first is not None and first[0].casefold().startswith(value.casefold())


def first_word_starts_with_cannot_pass(value: str, prefix: str) -> bool:
    """Return whether the first word has begun with other letters."""
    first = WORD.search(prefix)
    return first is not None and starts_with_cannot_pass(value.casefold(), first[0].casefold())


def is_signed(value: str, text: str) -> bool:
    r"""Return whether the last line is "- value", in bold or not, with text above it.

    Example for "Ada": "It is.\n- Ada" / "It is. - Ada".
    """
    lines = text.strip().splitlines()
    return len(lines) > 1 and _plain(lines[-1]).strip() == _plain(f"- {value}")


def has_postscript(value: str, text: str) -> bool:
    """Return whether the last line has a remark after "P.S.", which does not stand in a sentence.

    Example: "Yes. P.S. So is the sea." / "Yes. P.S.".
    """
    return _POSTSCRIPT.search(text) is not None


def ends_with_question(value: str, text: str) -> bool:
    """Return whether the last word is followed by a question mark, and by no period after it.

    Example: "It is. Or is it?" / "Is it? Yes.".
    """
    return bool(words(text)) and _QUESTION.search(closing_marks(text.rstrip())) is not None


def mentions(value: str, text: str) -> bool:
    """Return whether the text has the value as separate words, ignoring case.

    In a script without spaces, it may stand anywhere. Example for "river": "The River is wide." /
    "The riverbank is wide.".
    """
    return _has_words(value, r"(?![^\W_])", text)


def mentions_in_prefix(value: str, prefix: str) -> bool:
    """Return whether every text that begins with `prefix` mentions the value.

    A prefix that ends with the value does not count: the next letters may make a longer word.
    """
    return _has_words(value, r"(?=[\W_])", prefix)


def _has_words(value: str, boundary: str, text: str) -> bool:
    pattern = re.escape(_straighten(value))
    if not UNSPACED.search(value):
        # Underscores do not belong to words: they mark italics.
        pattern = rf"(?<![^\W_]){pattern}{boundary}"
    return re.search(pattern, _straighten(text), re.IGNORECASE) is not None


def has_letters(value: str, text: str) -> bool:
    """Return whether the text has the value anywhere, ignoring case ("z": "A zoo." / "It is.")."""
    return value.casefold() in text.casefold()


def has_digit(value: str, text: str) -> bool:
    """Return whether the text has a digit of any script, or a superscript ("4 m²" / "four")."""
    return any(map(str.isdigit, text))


def has_decimal(value: str, text: str) -> bool:
    """Return whether the text has a decimal digit of any script ("4 legs" / "four legs")."""
    return any(map(str.isdecimal, text))


def is_not_blank(value: str, text: str) -> bool:
    """Return whether the text has anything but white space."""
    return bool(text.strip())
