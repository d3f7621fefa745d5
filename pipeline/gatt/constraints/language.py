"""The language of a text, out of those that an answer can be asked for in.

Of the libraries for short texts, py3langid is the smallest, and none is more accurate
(`scripts/bench/language.py`). It always returns one of the languages it may choose from, so a
text in another language gets a wrong name.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from pipeline.gatt.text import words

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

LANGUAGES = {
    "French": "fr",
    "Spanish": "es",
    "German": "de",
    "Italian": "it",
    "Portuguese": "pt",
    "Dutch": "nl",
    "Swedish": "sv",
    "Polish": "pl",
    "Turkish": "tr",
    "English": "en",
}
"""The languages that an answer can be asked for in, with their ISO 639-1 codes."""
MIN_WORDS = 3
"""Fewer words are not enough: one in ten pairs of adjacent words gets a wrong language."""


def language_of(text: str) -> str:
    """Return one of `LANGUAGES`, or "" for a text of fewer than `MIN_WORDS` words."""
    if len(words(text)) < MIN_WORDS:
        return ""
    detected = _identifier().classify(text.lower())[0]
    return next(name for name, code in LANGUAGES.items() if code == detected)


def is_in_language(value: str, text: str) -> bool:
    """Return whether the text is in the language `value`.

    Example for "French": "Le ciel est bleu." / "The sky is blue.".
    """
    return language_of(text) == value


@cache
def _identifier() -> LanguageIdentifier:
    """Load the library on first use: it takes half a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(LANGUAGES.values()))
    return identifier
