"""Which language a text is in, out of the declared ones.

Of the libraries that know short texts, py3langid is the smallest and as right as any (`scripts/bench/language.py`). It
always names one of the languages that it may choose from, so a text in another language gets a wrong name.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pipeline.gatt.text import words

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
FEWEST_WORDS = 3
"""Fewer words tell too little: of the sentences' words taken two by two, one pair in ten is named wrongly."""


def language_of(text: str) -> str:
    """One of `LANGUAGES`, or "" for a text of fewer than `FEWEST_WORDS` words."""
    if len(words(text)) < FEWEST_WORDS:
        return ""
    code = _identifier().classify(text.lower())[0]
    return next(name for name, its_code in LANGUAGES.items() if its_code == code)


@cache
def _identifier() -> Any:
    """Half a second to load, so it is loaded when it is first asked."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(LANGUAGES.values()))
    return identifier
