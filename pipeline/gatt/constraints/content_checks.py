"""Does an answer obey? And is a beginning hopeless? Functions of a value and a text, for the table in catalogue.py.

None raises, whatever the text. Those that a kind takes for its `hopeless` hold of a beginning of an answer only where
nothing that may follow can make it pass. What an answer's layout must be stands in shapes.py.
"""

from __future__ import annotations

import re
import unicodedata

from pipeline.gatt.text import WORD, split_sentences, words

COMMAS = ",،，、"
EXCLAMATIONS = "!¡！‼⁉"
QUESTIONS = "?¿？⁇⁈⁉"
EMOJI = (
    "⌚⌛⏩-⏬⏰⏳◽◾☀-☄☎☔☕☘☝☠☢☣☮☯☹☺♀♂♈-♓♠♣♥♦♨♿⚓⚔⚖⚙⚛⚠⚡⚪⚫⚽⚾⛄⛅⛎⛔⛪⛲⛳⛵⛺⛽✂✅✈-✍✏✒✔✖✝✡✨✳✴❄❇❌❎❓-❕❗❣❤➕-➗➡➰➿⬛⬜⭐⭕"
    "\U0001f004\U0001f0cf\U0001f170\U0001f171\U0001f17e\U0001f17f\U0001f18e\U0001f191-\U0001f19a\U0001f1e6-\U0001f202"
    "\U0001f21a\U0001f22f\U0001f232-\U0001f23a\U0001f250\U0001f251\U0001f300-\U0001f64f\U0001f680-\U0001f6ff"
    "\U0001f7e0-\U0001f7eb\U0001f90c-\U0001f9ff\U0001fa70-\U0001faff\u20e3\ufe0f"
)
"""Emoji as a set of a regular expression; the last two make one of a sign before them (1️⃣, ❤️)."""
_EMOJI = re.compile(f"[{EMOJI}]")
_BOLD = re.compile(r"\*\*(?=\S)[^*\n]*[^\W_][^*\n]*(?<=\S)\*\*")
_POSTSCRIPT = re.compile(r"(?:\S\s*\n|[^\w\s,;]\s)\s*[*_]*P\.\s?S\.\W*\w.*\s*\Z")
_OTHER_END = re.compile(r"[?…]|\.(?!!)")
_STRAIGHT = str.maketrans("‘’“”", "''\"\"")
_EMPHASIS = str.maketrans("", "", "*_")
_LATIN = "[A-Za-zÀ-ɏ]"
_WITHIN_A_WORD = f"(?<={_LATIN})(?={_LATIN})"


def _straight(text: str) -> str:
    """With straight quotation marks and apostrophes, which models put for curved ones and the other way round."""
    return text.translate(_STRAIGHT)


def _plain(text: str) -> str:
    """Straight, and without the marks of bold and italics."""
    return _straight(text).translate(_EMPHASIS)


def opens(value: str, text: str) -> bool:
    """Begins with the value, in bold or not, and not with a longer word."""
    start = re.compile(f"{re.escape(_straight(value))}(?!{_WITHIN_A_WORD})")
    return any(start.match(begun.lstrip()) for begun in (_straight(text), _plain(text)))


def opens_hopeless(value: str, text: str) -> bool:
    """Has begun otherwise."""
    start = _straight(value)
    return not any(
        start.startswith(b) or b.startswith(start)
        for b in (_straight(text).lstrip(), _plain(text).lstrip())
    )


def closes(value: str, text: str) -> bool:
    """Ends with the value, in bold or not, and not with a longer word."""
    end = re.compile(f"(?!{_WITHIN_A_WORD}){re.escape(_straight(value))}\\Z")
    return any(end.search(ended.rstrip()) for ended in (_straight(text), _plain(text)))


def begins_with_letters(value: str, text: str) -> bool:
    """The first word begins with the value, in capitals or not."""
    first = WORD.search(text)
    return first is not None and first[0].casefold().startswith(value.casefold())


def begins_with_letters_hopeless(value: str, text: str) -> bool:
    """The first word has begun otherwise."""
    first = WORD.search(text)
    return first is not None and opens_hopeless(value.casefold(), first[0].casefold())


def signed(value: str, text: str) -> bool:
    """The last line is the signature, and something stands above it."""
    lines = text.strip().splitlines()
    return len(lines) > 1 and lines[-1].strip() == f"- {value}"


def has_postscript(value: str, text: str) -> bool:
    """Something, then "P.S." and a line that is the last; not "P.S." in the middle of a sentence."""
    return _POSTSCRIPT.search(text) is not None


def mentions(value: str, text: str) -> bool:
    """Has the value as a word or words of its own, in capitals or not."""
    return _found(value, r"(?![^\W_])", text)


def mentions_for_good(value: str, text: str) -> bool:
    """The same, of a beginning: the value's last letter is not the last one, so that no longer word can come of it."""
    return _found(value, r"(?=[\W_])", text)


def _found(value: str, behind: str, text: str) -> bool:
    """Underscores are signs, not letters: they make italics."""
    return (
        re.search(
            rf"(?<![^\W_]){re.escape(_straight(value))}{behind}", _straight(text), re.IGNORECASE
        )
        is not None
    )


def has_letters(value: str, text: str) -> bool:
    """Has the value anywhere, in capitals or not."""
    return value.casefold() in text.casefold()


def has_small_letter(value: str, text: str) -> bool:
    """Has a letter that is no capital."""
    return any(unicodedata.category(c) in ("Ll", "Lt") for c in text)


def has_capital(value: str, text: str) -> bool:
    """Has a capital letter."""
    return any(unicodedata.category(c) in ("Lu", "Lt") for c in text)


def has_small_initial(value: str, text: str) -> bool:
    """Has a word that begins with a small letter."""
    return any(unicodedata.category(word[0][0]) == "Ll" for word in WORD.finditer(text))


def is_uppercase(value: str, text: str) -> bool:
    """Has capitals, and no small letter."""
    return any(map(str.isupper, text)) and not has_small_letter(value, text)


def is_lowercase(value: str, text: str) -> bool:
    """Has small letters, and no capital."""
    return any(map(str.islower, text)) and not has_capital(value, text)


def is_title_case(value: str, text: str) -> bool:
    """Has words that begin with a capital, and none that begins with a small letter; a number begins with neither."""
    return any(word[0][0].isupper() for word in WORD.finditer(text)) and not has_small_initial(
        value, text
    )


def has_comma(value: str, text: str) -> bool:
    """Has a comma of any script."""
    return any(c in COMMAS for c in text)


def has_exclamation_mark(value: str, text: str) -> bool:
    """Has an exclamation mark."""
    return any(c in EXCLAMATIONS for c in text)


def has_question_mark(value: str, text: str) -> bool:
    """Has a question mark."""
    return any(c in QUESTIONS for c in text)


def has_digit(value: str, text: str) -> bool:
    """Has a digit of any script, superscripts with them."""
    return any(map(str.isdigit, text))


def has_emoji(value: str, text: str) -> bool:
    """Has an emoji."""
    return _EMOJI.search(text) is not None


def has_bold(value: str, text: str) -> bool:
    """Has a word between two pairs of asterisks, on one line."""
    return _BOLD.search(text) is not None


def sentence_end(sentence: str) -> str:
    """What stands behind the last word of a sentence."""
    return re.split(r"[^\W_]", sentence)[-1]


def ends_with_question(value: str, text: str) -> bool:
    """The last sentence has a question mark behind its last word, and no full stop behind that."""
    return bool(words(text)) and re.search(r"\?[^.]*$", sentence_end(text.rstrip())) is not None


def exclaims(value: str, text: str) -> bool:
    """Every sentence ends with an exclamation mark."""
    return bool(words(text)) and all(map(_is_exclaimed, split_sentences(text)))


def exclaims_hopeless(value: str, text: str) -> bool:
    """A sentence that another one follows ends otherwise."""
    return not all(map(_is_exclaimed, split_sentences(text)[:-1]))


def _is_exclaimed(sentence: str) -> bool:
    end = sentence_end(sentence)
    return "!" in end and not _OTHER_END.search(end)


def has_other_end(value: str, text: str) -> bool:
    """Has a sentence that ends with another sign than an exclamation mark."""
    return any(_OTHER_END.search(sentence_end(s)) for s in split_sentences(text))


def at_most_words(value: str, text: str) -> bool:
    """Some words, and not too many."""
    return 0 < len(words(text)) <= int(value)


def too_many_words(value: str, text: str) -> bool:
    """More words than the value."""
    return len(words(text)) > int(value)


def at_least_words(value: str, text: str) -> bool:
    """As many words as the value, or more."""
    return len(words(text)) >= int(value)


def at_most_sentences(value: str, text: str) -> bool:
    """Some sentences, and not too many."""
    return 0 < len(split_sentences(text)) <= int(value)


def exactly_sentences(value: str, text: str) -> bool:
    """As many sentences as the value."""
    return len(split_sentences(text)) == int(value)


def too_many_sentences(value: str, text: str) -> bool:
    """More sentences than the value; an unfinished one counts, since it cannot go away."""
    return len(split_sentences(text)) > int(value)


def filled_lines(text: str) -> list[str]:
    """The lines that are not blank."""
    return [line for line in text.splitlines() if line.strip()]


def exactly_lines(value: str, text: str) -> bool:
    """As many lines as the value; blank ones do not count."""
    return len(filled_lines(text)) == int(value)


def too_many_lines(value: str, text: str) -> bool:
    """More lines than the value."""
    return len(filled_lines(text)) > int(value)


def paragraphs(text: str) -> int:
    """How many runs of lines stand between blank lines."""
    lines = [bool(line.strip()) for line in text.splitlines()]
    return sum(here and not before for before, here in zip([False, *lines], lines, strict=False))


def exactly_paragraphs(value: str, text: str) -> bool:
    """As many paragraphs as the value."""
    return paragraphs(text) == int(value)


def too_many_paragraphs(value: str, text: str) -> bool:
    """More paragraphs than the value."""
    return paragraphs(text) > int(value)


def is_one_line(value: str, text: str) -> bool:
    """A text without a line break in it."""
    return len(text.strip().splitlines()) == 1


def has_more_lines(value: str, text: str) -> bool:
    """Goes on after a line break."""
    return len(text.strip().splitlines()) > 1
