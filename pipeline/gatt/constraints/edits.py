"""Edits that make an answer pass a check. All take a value and an answer of at least a few words.

Each is exact: what it returns passes the check of its kind.
"""

from __future__ import annotations

import json
import re

from pipeline.gatt.constraints.format_checks import BRACKETS, is_bracketed
from pipeline.gatt.constraints.style_checks import COMMAS, EMOJI, EXCLAMATION_MARKS
from pipeline.gatt.text import ENDS, WORD, closing_marks, join_sentences, split_sentences, words

EMOJI_TO_ADD = "🙂🌟🎉👍🌊🌱🎈🍀"
_LIST_MARK = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_SENTENCE_START = re.compile(
    r"(?:A|Absolutely|All|Although|An|And|Any|Are|As|At|Because|Both|But|By|Can|Certainly|Could|Do|"
    r"Does|Don|Each|For|From|Good|Have|He|Here|How|If|In|Is|It|Its|Just|Let|Many|Maybe|Most|No|Not|"
    r"Of|On|One|Or|Our|Perhaps|She|Should|Since|So|Some|Sorry|Sure|That|The|Their|There|These|They|"
    r"This|Those|Though|To|Try|Unfortunately|Use|Usually|We|Well|What|When|Where|Whether|Which|"
    r"While|Who|Why|With|Would|Yes|You|Your)\W+[a-z]"
)
"""A word with a capital only because a sentence begins there: not in capitals or in title case."""


def prepend(value: str, text: str) -> str:
    """Put the value in front ("Ahoy! It is.")."""
    return f"{value} {text.lstrip()}"


def append(value: str, text: str) -> str:
    """Put the value at the end ("It is. So it goes.")."""
    return f"{text.rstrip()} {value}"


def sign(value: str, text: str) -> str:
    r"""Put "- value" on a line of its own at the end ("It is.\n- Ada")."""
    return f"{text.rstrip()}\n- {value}"


def cut_words(value: str, text: str) -> str:
    """Keep the first sentences that fit in `value` words, or else the first words."""
    fitting: list[str] = []
    for sentence in split_sentences(text):
        if len(words(" ".join([*fitting, sentence]))) > int(value):
            break
        fitting.append(sentence)
    return join_sentences(fitting) or _first_words(int(value), text) + "."


def _first_words(count: int, text: str) -> str:
    ends = [word.end() for word in WORD.finditer(text)][:count]
    return text[: ends[-1] if ends else None].strip()


def cut_sentences(value: str, text: str) -> str:
    """Keep the first `value` sentences, on one line; fewer if joined lines have one more."""
    sentences = split_sentences(text)[: int(value)]
    while len(split_sentences(join_sentences(sentences))) > int(value):
        sentences.pop()
    return join_sentences(sentences)


def uppercase(value: str, text: str) -> str:
    """Convert to capitals ("IT IS.")."""
    return text.upper()


def lowercase(value: str, text: str) -> str:
    """Convert to lowercase ("it is.")."""
    return text.lower()


def capitalize_words(value: str, text: str) -> str:
    """Begin every word with a capital ("It Is.")."""
    capitalized = WORD.sub(lambda word: word[0][0].upper() + word[0][1:], text)
    # A letter whose capital is two makes two words of one: "ß.a" becomes "SS" and "a".
    return capitalized if capitalized == text else capitalize_words(value, capitalized)


def remove_commas(value: str, text: str) -> str:
    """Remove the commas of all scripts."""
    return text.translate(dict.fromkeys(map(ord, COMMAS)))


def remove_exclamation_marks(value: str, text: str) -> str:
    """Replace exclamation marks by a period, or by the other mark before them ("Is it?!")."""
    without_inverted = text.replace("¡", "")
    return re.sub(rf"([.?…])?[{EXCLAMATION_MARKS}]+", lambda run: run[1] or ".", without_inverted)


def exclaim(value: str, text: str) -> str:
    """End every sentence with an exclamation mark ("Yes! It is!")."""
    lines = text.strip().splitlines()
    return "\n".join(" ".join(map(_exclaimed, split_sentences(line))) or line for line in lines)


def _exclaimed(sentence: str) -> str:
    marks = closing_marks(sentence)
    body = sentence[: len(sentence) - len(marks)]
    *before, after = re.split(rf"[{ENDS}]+", marks)
    return f"{body}{''.join(before)}!{after}" if before else f"{body}!{after.lstrip(',;: ')}"


def remove_emoji(value: str, text: str) -> str:
    """Remove emoji and the spaces before them."""
    return re.sub(rf" ?\u200d?[{EMOJI}]", "", text)


def add_emoji(value: str, text: str) -> str:
    """Put an emoji at the end; it varies with the text, so that the model does not learn one."""
    return f"{text.rstrip()} {EMOJI_TO_ADD[len(text) % len(EMOJI_TO_ADD)]}"


def embolden(value: str, text: str) -> str:
    """Put the longest word in bold ("It **is**."); a text without a word stays as it is."""
    longest = max(WORD.finditer(text), key=lambda word: len(word[0]), default=None)
    if longest is None:
        return text
    return f"{text[: longest.start()]}**{longest[0]}**{text[longest.end() :]}"


def address(value: str, text: str) -> str:
    """Call the user by the value in front, after the mark of a list ("My friend, it is.")."""
    mark = _LIST_MARK.match(text)
    before, body = (mark[0], text[mark.end() :]) if mark else ("", text.lstrip())
    if not body[:1].isupper():
        return f"{before}{value}, {body}"
    if _SENTENCE_START.match(body):
        body = body[0].lower() + body[1:]
    return f"{before}{value[:1].upper()}{value[1:]}, {body}"


def number_sentences(value: str, text: str) -> str:
    r"""Make a numbered list of the sentences ("1. Yes.\n2. It is.")."""
    return "\n".join(f"{n}. {item}" for n, item in enumerate(_list_items(text), 1))


def bullet_sentences(value: str, text: str) -> str:
    r"""Make a bullet list of the sentences ("- Yes.\n- It is.")."""
    return "\n".join(f"- {item}" for item in _list_items(text))


def _list_items(text: str) -> list[str]:
    """Return the sentences, without the marks of a list that they may already have."""
    items = [_LIST_MARK.sub("", sentence) for sentence in split_sentences(text)]
    return [item for item in items if words(item)]


def join_lines(value: str, text: str) -> str:
    """Put everything on one line."""
    return " ".join(text.split())


def quote_lines(value: str, text: str) -> str:
    """Begin every line with ">", as a block quote of Markdown."""
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines())


def add_heading(value: str, text: str) -> str:
    r"""Put the heading "# value" above the text ("# Answer\n\nIt is.")."""
    return f"# {value}\n\n{text.strip()}"


def quote(value: str, text: str) -> str:
    """Enclose in straight double quotes; those inside become single."""
    return '"' + text.strip().replace('"', "'") + '"'


def bracket(value: str, text: str) -> str:
    """Enclose in brackets; unbalanced brackets of that kind inside are replaced by others."""
    pair = BRACKETS[value]
    bracketed = f"{pair[0]}{text.strip()}{pair[1]}"
    if is_bracketed(value, bracketed):
        return bracketed
    replacements = str.maketrans(pair, "[]" if pair == "()" else "()")
    return f"{pair[0]}{text.strip().translate(replacements)}{pair[1]}"


def fence(value: str, text: str) -> str:
    """Enclose in a fenced code block of Markdown."""
    return "```\n" + text.strip().replace("```", "~~~") + "\n```"


def to_json(value: str, text: str) -> str:
    """Make a JSON object with the text as its only value."""
    return json.dumps({value: text.strip()}, ensure_ascii=False)
