"""Has the whole answer the shape that was asked for: a list, a quotation, an object? As checks.py, for layouts."""

from __future__ import annotations

import json
import re

from pipeline.gatt.constraints.content_checks import filled_lines, opens_hopeless

BRACKETS = {"parentheses": "()", "square brackets": "[]", "curly braces": "{}"}
QUOTES = ('""', "“”", "„“", "„”")
BULLET = "[-*•●◦▪‣]"


def is_numbered_list(value: str, text: str) -> bool:
    """Every line is a point, numbered from 1 on, the number in bold or not."""
    lines = filled_lines(text)
    return bool(lines) and all(
        re.match(rf"\s*[*_]*{n}[.)][*_]*\s+\S", line) for n, line in enumerate(lines, 1)
    )


def is_numbered_list_hopeless(value: str, text: str) -> bool:
    """A line has begun with something else than its number."""
    return any(
        not re.match(rf"\s*[*_]*{n}[.)][*_]*(\s|$)", line)
        and not f"{n}".startswith(line.strip().lstrip("*_"))
        for n, line in enumerate(filled_lines(text), 1)
    )


def is_bullet_list(value: str, text: str) -> bool:
    """Every line is a point with a bullet."""
    lines = filled_lines(text)
    return bool(lines) and all(re.match(rf"\s*{BULLET}\s+\S", line) for line in lines)


def is_bullet_list_hopeless(value: str, text: str) -> bool:
    """A line has begun with something else than a bullet."""
    return any(not re.match(rf"\s*{BULLET}(\s|$)", line) for line in filled_lines(text))


def is_block_quote(value: str, text: str) -> bool:
    """Every line begins with ">", and one has something behind it."""
    lines = [line.strip() for line in filled_lines(text)]
    return all(line[0] == ">" for line in lines) and any(line.strip("> ") for line in lines)


def is_block_quote_hopeless(value: str, text: str) -> bool:
    """A line has begun with something else than ">"."""
    return any(line.strip()[0] != ">" for line in filled_lines(text))


def is_quoted(value: str, text: str) -> bool:
    """Stands in double quotation marks, straight, curved or low, with none of the same marks in between."""
    inner = text.strip()[1:-1]
    return bool(inner.strip()) and any(
        text.strip()[0] == pair[0] and text.strip()[-1] == pair[1] and not set(pair) & set(inner)
        for pair in QUOTES
    )


def is_quoted_hopeless(value: str, text: str) -> bool:
    """Has begun with another sign, or gone on after the closing mark."""
    begun = text.strip()
    return bool(begun) and not any(
        begun[0] == pair[0] and not set(pair) & set(begun[1:-1]) for pair in QUOTES
    )


def is_bracketed(value: str, text: str) -> bool:
    """Begins with the opening bracket, whose closing one is the last sign; pairs may stand in between."""
    whole = text.strip()
    return bool(whole[1:-1].strip()) and _closing(BRACKETS[value], whole) == len(whole) - 1


def is_bracketed_hopeless(value: str, text: str) -> bool:
    """Has begun with another sign, or gone on after the closing bracket."""
    begun = text.strip()
    return bool(begun) and (
        begun[0] != BRACKETS[value][0] or -1 < _closing(BRACKETS[value], begun) < len(begun) - 1
    )


def _closing(pair: str, text: str) -> int:
    """Where the bracket that opens at the beginning is closed; -1 where it is not."""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign == pair[0]) - (sign == pair[1])
        if depth <= 0:
            return place if place else -1
    return -1


def is_headed(value: str, text: str) -> bool:
    """The first line is the heading, and something stands below it."""
    heading, _, below = text.strip().partition("\n")
    return heading.rstrip() == f"# {value}" and bool(below.strip())


def is_headed_hopeless(value: str, text: str) -> bool:
    """The first line has begun otherwise, or gone on after the heading."""
    heading, *below = text.lstrip().split("\n", 1)
    return heading.rstrip() != f"# {value}" and (
        bool(below) or not f"# {value}".startswith(heading)
    )


def is_code_block(value: str, text: str) -> bool:
    """One fenced block of Markdown with something in it, and nothing around it."""
    lines = text.strip().splitlines()
    inner = "\n".join(lines[1:-1])
    fenced = (
        len(lines) > 2
        and re.fullmatch(r"```[^\s`]*", lines[0].rstrip()) is not None
        and lines[-1] == "```"
    )
    return fenced and "```" not in inner and bool(inner.strip())


def is_code_block_hopeless(value: str, text: str) -> bool:
    """Has begun with something else than a fence."""
    return opens_hopeless("```", text)


def is_json(value: str, text: str) -> bool:
    """A JSON object with the value as its only key, and a text that is not blank under it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(found, dict)
        and list(found) == [value]
        and isinstance(found[value], str)
        and bool(found[value].strip())
    )


def is_json_hopeless(value: str, text: str) -> bool:
    """Has begun with something else than a brace and a quotation mark."""
    return re.fullmatch(r'[ \t\n\r]*(\{[ \t\n\r]*("(?s:.*))?)?', text) is None
