"""Checks of an answer's shape: length, layout, and what encloses it; see content_checks.py."""

from __future__ import annotations

import json
import re

from pipeline.gatt.constraints.content_checks import starts_with_cannot_pass
from pipeline.gatt.text import BULLET, split_sentences, words

BRACKETS = {"parentheses": "()", "square brackets": "[]", "curly braces": "{}"}
_QUOTES = ('""', "“”", "„“", "„”")


def at_most_words(value: str, text: str) -> bool:
    """Return whether there are one to `value` words ("3": "Yes, it is." / "Yes, it is so.")."""
    return 0 < len(words(text)) <= int(value)


def too_many_words(value: str, prefix: str) -> bool:
    """Return whether there are more than `value` words."""
    return len(words(prefix)) > int(value)


def at_least_words(value: str, text: str) -> bool:
    """Return whether there are at least `value` words ("3": "Yes, it is." / "It is.")."""
    return len(words(text)) >= int(value)


def at_most_sentences(value: str, text: str) -> bool:
    """Return whether there are one to `value` sentences ("1": "It is, Dr. No." / "Yes. It is.")."""
    return 0 < len(split_sentences(text)) <= int(value)


def exactly_sentences(value: str, text: str) -> bool:
    """Return whether there are `value` sentences ("2": "Yes. It is." / "Yes. It is. So.")."""
    return len(split_sentences(text)) == int(value)


def too_many_sentences(value: str, prefix: str) -> bool:
    """Return whether there are more than `value` sentences; an unfinished one counts."""
    return len(split_sentences(prefix)) > int(value)


def filled_lines(text: str) -> list[str]:
    """Return the lines that are not blank."""
    return [line for line in text.splitlines() if line.strip()]


def exactly_lines(value: str, text: str) -> bool:
    r"""Return whether `value` lines are not blank ("2": "Yes.\n\nIt is." / "Yes.")."""
    return len(filled_lines(text)) == int(value)


def too_many_lines(value: str, prefix: str) -> bool:
    """Return whether more than `value` lines are not blank."""
    return len(filled_lines(prefix)) > int(value)


def count_paragraphs(text: str) -> int:
    """Return the number of paragraphs: runs of lines between blank lines."""
    filled = [bool(line.strip()) for line in text.splitlines()]
    starts = zip([False, *filled], filled, strict=False)
    return sum(current and not previous for previous, current in starts)


def exactly_paragraphs(value: str, text: str) -> bool:
    r"""Return whether there are `value` paragraphs ("2": "Yes.\n\nIt is." / "Yes.\nIt is.")."""
    return count_paragraphs(text) == int(value)


def too_many_paragraphs(value: str, prefix: str) -> bool:
    """Return whether there are more than `value` paragraphs."""
    return count_paragraphs(prefix) > int(value)


def is_one_line(value: str, text: str) -> bool:
    r"""Return whether the text is one line, and not blank ("Yes.\n" / "Yes.\nNo.")."""
    return len(text.strip().splitlines()) == 1


def has_more_lines(value: str, prefix: str) -> bool:
    """Return whether text follows a line break."""
    return len(prefix.strip().splitlines()) > 1


def is_numbered_list(value: str, text: str) -> bool:
    r"""Return whether every line is an item, numbered from 1, the number in bold or not.

    Example: "1. Yes.\n2) It is." / "Items:\n1. Yes.".
    """
    lines = filled_lines(text)
    return bool(lines) and all(
        re.match(rf"\s*[*_]*{n}[.)][*_]*\s+\S", line) for n, line in enumerate(lines, 1)
    )


def is_numbered_list_cannot_pass(value: str, prefix: str) -> bool:
    """Return whether a line has begun with something else than its number."""
    return any(
        not re.match(rf"\s*[*_]*{n}[.)][*_]*(\s|$)", line)
        and not f"{n}".startswith(line.strip().lstrip("*_"))
        for n, line in enumerate(filled_lines(prefix), 1)
    )


def is_bullet_list(value: str, text: str) -> bool:
    r"""Return whether every line is an item with a bullet ("* Yes.\n* No." / "- Yes.\nNo.")."""
    lines = filled_lines(text)
    return bool(lines) and all(re.match(rf"\s*{BULLET}\s+\S", line) for line in lines)


def is_bullet_list_cannot_pass(value: str, prefix: str) -> bool:
    """Return whether a line has begun with something else than a bullet."""
    return any(not re.match(rf"\s*{BULLET}(\s|$)", line) for line in filled_lines(prefix))


def is_block_quote(value: str, text: str) -> bool:
    r"""Return whether every line begins with ">", one with text ("> Yes.\n>" / "> Yes.\nNo.")."""
    lines = [line.strip() for line in filled_lines(text)]
    return all(line[0] == ">" for line in lines) and any(line.strip("> ") for line in lines)


def is_block_quote_cannot_pass(value: str, prefix: str) -> bool:
    """Return whether a line has begun with something else than ">"."""
    return any(line.strip()[0] != ">" for line in filled_lines(prefix))


def has_heading(value: str, text: str) -> bool:
    r"""Return whether the first line is "# value", with text below it.

    Example for "Answer": "# Answer\n\nYes." / "# Answers\n\nYes.".
    """
    heading, _, body = text.strip().partition("\n")
    return heading.rstrip() == f"# {value}" and bool(body.strip())


def has_heading_cannot_pass(value: str, prefix: str) -> bool:
    """Return whether the first line has begun otherwise, or has more after the heading."""
    heading, *body = prefix.lstrip().split("\n", 1)
    return heading.rstrip() != f"# {value}" and (bool(body) or not f"# {value}".startswith(heading))


def is_quoted(value: str, text: str) -> bool:
    """Return whether the text is in double quotation marks, with none of the same marks inside.

    They may be straight, curved or low. Example: "“Yes.”" / '"Yes." he said.'.
    """
    quoted = text.strip()
    content = quoted[1:-1]
    return bool(content.strip()) and any(
        quoted[0] == pair[0] and quoted[-1] == pair[1] and not set(pair) & set(content)
        for pair in _QUOTES
    )


def is_quoted_cannot_pass(value: str, prefix: str) -> bool:
    """Return whether the prefix begins with another sign, or has more after the closing mark."""
    quoted = prefix.strip()
    return bool(quoted) and not any(
        quoted[0] == pair[0] and not set(pair) & set(quoted[1:-1]) for pair in _QUOTES
    )


def is_bracketed(value: str, text: str) -> bool:
    """Return whether the first sign is an opening bracket that the last sign closes.

    Pairs may stand inside. Example: "(Yes (it is).)" / "(Yes) (it is)".
    """
    bracketed = text.strip()
    closed = _closing_position(BRACKETS[value], bracketed)
    return bool(bracketed[1:-1].strip()) and closed == len(bracketed) - 1


def is_bracketed_cannot_pass(value: str, prefix: str) -> bool:
    """Return whether the prefix begins with another sign, or has more after the closing bracket."""
    bracketed, pair = prefix.strip(), BRACKETS[value]
    return bool(bracketed) and (
        bracketed[0] != pair[0] or -1 < _closing_position(pair, bracketed) < len(bracketed) - 1
    )


def _closing_position(pair: str, text: str) -> int:
    """Return where the bracket that opens the text is closed, or -1."""
    depth = 0
    for position, sign in enumerate(text):
        if sign == pair[0]:
            depth += 1
        elif sign == pair[1]:
            depth -= 1
        if depth <= 0:
            return position or -1
    return -1


def is_code_block(value: str, text: str) -> bool:
    r"""Return whether the text is one fenced block of Markdown that is not empty.

    Example: "```text\nYes.\n```" / "```\nYes.\n```\nNo.".
    """
    lines = text.strip().splitlines()
    if len(lines) <= 2 or not re.fullmatch(r"```[^\s`]*", lines[0].rstrip()) or lines[-1] != "```":
        return False
    content = "\n".join(lines[1:-1])
    return "```" not in content and bool(content.strip())


def is_code_block_cannot_pass(value: str, prefix: str) -> bool:
    """Return whether the prefix begins with something else than a fence."""
    return starts_with_cannot_pass("```", prefix)


def is_json(value: str, text: str) -> bool:
    """Return whether the text is a JSON object with the one key `value` and a text under it.

    Example for "reply": '{"reply": "Yes."}' / '{"reply": "Yes.", "more": 1}'.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(parsed, dict) or list(parsed) != [value]:
        return False
    return isinstance(parsed[value], str) and bool(parsed[value].strip())


def is_json_cannot_pass(value: str, prefix: str) -> bool:
    """Return whether the prefix begins with something else than a brace and a quotation mark."""
    return re.fullmatch(r'[ \t\n\r]*(\{[ \t\n\r]*("(?s:.*))?)?', prefix) is None
