"""The edits that make an answer obey. Functions of a value and a text, for the table in catalogue.py.

Each is exact: what it returns for an answer of a few words passes the check of its kind.
"""

from __future__ import annotations

import json
import re

from pipeline.gatt.constraints.content_checks import COMMAS, EMOJI, EXCLAMATIONS, sentence_end
from pipeline.gatt.constraints.format_checks import BRACKETS, is_bracketed
from pipeline.gatt.text import WORD, split_sentences, words

EMOJI_TO_ADD = "🙂🌟🎉👍🌊🌱🎈🍀"


def cut_words(value: str, text: str) -> str:
    """As many whole sentences as fit in the limit, else the first words."""
    kept: list[str] = []
    for sentence in split_sentences(text):
        if len(words(" ".join([*kept, sentence]))) > int(value):
            break
        kept.append(sentence)
    return " ".join(kept) or _first_words(int(value), text) + "."


def _first_words(count: int, text: str) -> str:
    ends = [word.end() for word in WORD.finditer(text)][:count]
    return text[: ends[-1] if ends else None].strip()


def cut_sentences(value: str, text: str) -> str:
    """The first sentences, on one line."""
    return " ".join(split_sentences(text)[: int(value)])


def drop_commas(value: str, text: str) -> str:
    """Without its commas."""
    return text.translate(dict.fromkeys(map(ord, COMMAS)))


def calm(value: str, text: str) -> str:
    """A full stop for each run of exclamation marks that no other sign stands before."""
    return re.sub(rf"([.?…])?[{EXCLAMATIONS}]+", lambda run: run[1] or ".", text.replace("¡", ""))


def exclaim(value: str, text: str) -> str:
    """Every sentence with an exclamation mark at its end."""
    lines = text.strip().splitlines()
    return "\n".join(" ".join(map(_exclaimed, split_sentences(line))) or line for line in lines)


def _exclaimed(sentence: str) -> str:
    end = sentence_end(sentence)
    body = sentence[: len(sentence) - len(end)]
    *before, after = re.split(r"[.!?…]+", end)
    return f"{body}{''.join(before)}!{after}" if before else f"{body}!{after.lstrip(',;: ')}"


def drop_emoji(value: str, text: str) -> str:
    """Without its emoji, and without the spaces before them."""
    return re.sub(rf" ?\u200d?[{EMOJI}]", "", text)


def add_emoji(value: str, text: str) -> str:
    """An emoji at the end; which one depends on the text, so that no single one is learned."""
    return f"{text.rstrip()} {EMOJI_TO_ADD[len(text) % len(EMOJI_TO_ADD)]}"


def title(value: str, text: str) -> str:
    """Every word with a capital letter at its beginning."""
    return WORD.sub(lambda word: word[0][0].upper() + word[0][1:], text)


def address(value: str, text: str) -> str:
    """The name by which the user is called, before the last full stop."""
    end = re.search(r"[.!?…]+[\"'”’)*\]]*\s*$", text)
    body = text[: end.start()] if end else text
    return f"{body.rstrip()}, {value}{end[0].rstrip() if end else '.'}"


def bold(value: str, text: str) -> str:
    """The longest word in bold."""
    longest = max(WORD.finditer(text), key=lambda word: len(word[0]))
    return f"{text[: longest.start()]}**{longest[0]}**{text[longest.end() :]}"


def number_sentences(value: str, text: str) -> str:
    """A numbered list, a sentence a point."""
    return "\n".join(f"{n}. {point}" for n, point in enumerate(_points(text), 1))


def bullet_sentences(value: str, text: str) -> str:
    """A bullet list, a sentence a point."""
    return "\n".join(f"- {point}" for point in _points(text))


def _points(text: str) -> list[str]:
    """The sentences without the marks of a list that they may have already."""
    bare = [re.sub(r"^(?:[-*•]|\d+[.)])\s+", "", sentence) for sentence in split_sentences(text)]
    return [point for point in bare if words(point)]


def join_lines(value: str, text: str) -> str:
    """On one line."""
    return " ".join(text.split())


def quote_lines(value: str, text: str) -> str:
    """A block quotation of Markdown."""
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines())


def quote(value: str, text: str) -> str:
    """In straight double quotes; those inside become single."""
    return '"' + text.strip().replace('"', "'") + '"'


def bracket(value: str, text: str) -> str:
    """In brackets; the same brackets inside give way to others where they are no pairs."""
    pair = BRACKETS[value]
    whole = f"{pair[0]}{text.strip()}{pair[1]}"
    if is_bracketed(value, whole):
        return whole
    return (
        pair[0]
        + text.strip().translate(str.maketrans(pair, "[]" if pair == "()" else "()"))
        + pair[1]
    )


def fence(value: str, text: str) -> str:
    """In a fenced block of Markdown."""
    return "```\n" + text.strip().replace("```", "~~~") + "\n```"


def to_json(value: str, text: str) -> str:
    """A JSON object with the text under its only key."""
    return json.dumps({value: text.strip()}, ensure_ascii=False)
