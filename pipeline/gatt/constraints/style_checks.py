"""Checks of how an answer is written: case, punctuation, emoji and bold; see content_checks.py."""

from __future__ import annotations

import re
import unicodedata

from pipeline.gatt.text import WORD, closing_marks, split_sentences, words

COMMAS = ",،，、"
EXCLAMATION_MARKS = "!¡！‼⁉"
QUESTION_MARKS = "?¿？⁇⁈⁉"
EMOJI = (
    "⌚⌛⏩-⏬⏰⏳◽◾☀-☄☎☔☕☘☝☠☢☣☮☯☹☺♀♂♈-♓♠♣♥♦♨♿⚓⚔⚖⚙⚛⚠⚡⚪⚫⚽⚾⛄⛅⛎⛔⛪⛲⛳⛵⛺⛽✂✅✈-✍✏✒✔✖✝✡✨✳✴❄❇❌❎❓-❕❗❣❤➕-➗➡➰➿⬛⬜⭐⭕"
    "\U0001f004\U0001f0cf\U0001f170\U0001f171\U0001f17e\U0001f17f\U0001f18e\U0001f191-\U0001f19a"
    "\U0001f1e6-\U0001f202\U0001f21a\U0001f22f\U0001f232-\U0001f23a\U0001f250\U0001f251"
    "\U0001f300-\U0001f64f\U0001f680-\U0001f6ff\U0001f7e0-\U0001f7eb\U0001f90c-\U0001f9ff"
    "\U0001fa70-\U0001faff\u20e3\ufe0f"
)
"""Emoji as the set of a regular expression; the last two turn the sign before them into one (1️⃣)."""
_EMOJI = re.compile(f"[{EMOJI}]")
_BOLD = re.compile(r"\*\*(?=\S)[^*\n]*[^\W_][^*\n]*(?<=\S)\*\*")
_NOT_EXCLAIMED = re.compile(r"[?？؟…。]|\.(?!!)")


def has_lowercase_letter(value: str, text: str) -> bool:
    """Return whether the text has a lowercase (or title case) letter ("Yes" / "YES 1")."""
    return any(unicodedata.category(c) in ("Ll", "Lt") for c in text)


def has_uppercase_letter(value: str, text: str) -> bool:
    """Return whether the text has an uppercase (or title case) letter ("Yes" / "yes 1")."""
    return any(unicodedata.category(c) in ("Lu", "Lt") for c in text)


def has_lowercase_word(value: str, text: str) -> bool:
    """Return whether a word begins with a lowercase letter ("It is" / "It Is The 3rd")."""
    return any(unicodedata.category(word[0][0]) == "Ll" for word in WORD.finditer(text))


def is_uppercase(value: str, text: str) -> bool:
    """Return whether all letters are capitals, with at least one ("YES, 1." / "Yes.")."""
    return any(map(str.isupper, text)) and not has_lowercase_letter(value, text)


def is_lowercase(value: str, text: str) -> bool:
    """Return whether no letter is a capital, with at least one letter ("yes, 1." / "Yes.")."""
    return any(map(str.islower, text)) and not has_uppercase_letter(value, text)


def is_title_case(value: str, text: str) -> bool:
    """Return whether words begin with a capital, and none with a lowercase letter.

    Numbers begin with neither. Example: "It Is The 3rd." / "It Is the Third.".
    """
    capitalized = any(word[0][0].isupper() for word in WORD.finditer(text))
    return capitalized and not has_lowercase_word(value, text)


def has_comma(value: str, text: str) -> bool:
    """Return whether the text has a comma of any script ("Yes, it is." / "Yes it is.")."""
    return any(c in COMMAS for c in text)


def has_exclamation_mark(value: str, text: str) -> bool:
    """Return whether the text has an exclamation mark of any script ("Yes!" / "Yes.")."""
    return any(c in EXCLAMATION_MARKS for c in text)


def has_question_mark(value: str, text: str) -> bool:
    """Return whether the text has a question mark of any script ("Is it?" / "It is.")."""
    return any(c in QUESTION_MARKS for c in text)


def exclaims(value: str, text: str) -> bool:
    """Return whether every sentence ends with an exclamation mark ("Yes! It is!" / "Yes! No.")."""
    return bool(words(text)) and all(map(_is_exclaimed, split_sentences(text)))


def exclaims_cannot_pass(value: str, prefix: str) -> bool:
    """Return whether a sentence with another one after it ends otherwise ("It is. S")."""
    return not all(map(_is_exclaimed, split_sentences(prefix)[:-1]))


def _is_exclaimed(sentence: str) -> bool:
    marks = closing_marks(sentence)
    return ("!" in marks or "！" in marks) and not _NOT_EXCLAIMED.search(marks)


def has_other_sentence_end(value: str, text: str) -> bool:
    """Return whether a sentence ends with something else than "!" ("It is." / "It is!")."""
    return any(_NOT_EXCLAIMED.search(closing_marks(s)) for s in split_sentences(text))


def has_emoji(value: str, text: str) -> bool:
    """Return whether the text has an emoji ("It is 👍🏽." / "It is :-) ♪")."""
    return _EMOJI.search(text) is not None


def has_bold(value: str, text: str) -> bool:
    """Return whether a line has a word between "**" ("It is **blue**." / "It is ** blue **.")."""
    return _BOLD.search(text) is not None
