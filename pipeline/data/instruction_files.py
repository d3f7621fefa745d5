"""Read instructions in the user's own words from a file, or from a folder of system prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import tomlkit
from tomlkit.exceptions import TOMLKitError

from pipeline.custom_instructions import parse_custom_instruction
from pipeline.errors import GattError
from pipeline.files import decode_text
from pipeline.records import CustomInstruction

_FORMS = (
    "TOML with [[instructions]], JSONL with a table on each line, a text with an instruction on "
    "each line, or a folder of system prompts (*.txt, *.md)"
)
_PROMPTS = (".txt", ".md")
_OTHER_FORMS = (".yaml", ".yml", ".csv", ".tsv", ".xml")
"""Suffixes of files that are not read; their lines are not instructions."""
_COMMENT = "# "
"""Begins a line of a plain text that is not an instruction."""


class _Entry(NamedTuple):
    """A table of an instruction, or only its text, and where it stands."""

    value: object
    place: str


def read_instructions(path: Path) -> list[CustomInstruction]:
    """Return the instructions of a file or a folder, in their order.

    Raises:
        GattError: it cannot be read, holds no instruction, or one is not valid; the message says
            where.
    """
    path = path.expanduser()
    try:
        instructions = _read_folder(path) if path.is_dir() else _parsed(_entries(path), path.parent)
    except OSError as error:
        raise GattError(
            f"instructions.file: cannot read {error.filename or path} ({error.strerror}). "
            f"Expected {_FORMS}."
        ) from error
    if not instructions:
        raise GattError(f"instructions.file: {path} holds no instruction. Expected {_FORMS}.")
    return instructions


def _read_folder(folder: Path) -> list[CustomInstruction]:
    return [_read_prompt(file) for file in sorted(folder.iterdir()) if _is_prompt(file)]


def _is_prompt(file: Path) -> bool:
    is_visible = not file.name.startswith(".")
    return is_visible and file.suffix.lower() in _PROMPTS and file.is_file()


def count_skipped(path: Path) -> int:
    """Return how many visible entries of a folder of prompts are not read; 0 for a file."""
    path = path.expanduser()
    entries = path.iterdir() if path.is_dir() else ()
    return sum(not (entry.name.startswith(".") or _is_prompt(entry)) for entry in entries)


def _read_prompt(file: Path) -> CustomInstruction:
    text = decode_text(file.read_bytes(), file)
    if not text.strip():
        raise GattError(f"{file} is empty. Write a system prompt there, or delete the file.")
    return parse_custom_instruction({"text": text, "place": "system"}, file.parent)


def _parsed(entries: Iterable[_Entry], folder: Path) -> list[CustomInstruction]:
    instructions = []
    for value, place in entries:
        table = {"text": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping):
            raise GattError(f"{place}: {str(value)[:60]!r} is no instruction. Expected a table.")
        try:
            instructions.append(parse_custom_instruction(table, folder))
        except ValueError as error:
            raise GattError(f"{place}: {error}") from error
    return instructions


def _entries(file: Path) -> Iterator[_Entry]:
    """Yield the entries of a file; its form is told by the name."""
    match file.suffix.lower():
        case ".toml":
            yield from _toml_entries(file)
        case ".jsonl" | ".ndjson":
            yield from _json_lines(file)
        case ".json":
            yield from _json_entries(file)
        case ".md":
            text = decode_text(file.read_bytes(), file)
            yield _Entry({"text": text, "place": "system"}, str(file))
        case suffix if suffix in _OTHER_FORMS:
            raise GattError(
                f"instructions.file: {file} has a form that is not read. Expected {_FORMS}."
            )
        case _:
            for line, place in _lines(file):
                if not line.startswith(_COMMENT):
                    yield _Entry(line, place)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank, and where they stand.

    `str.splitlines` would also cut at signs that stand within a line, such as U+2028.
    """
    lines = re.split(r"\r\n|\r|\n", decode_text(file.read_bytes(), file))
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield line, f"{file}, line {number}"


def _json_lines(file: Path) -> Iterator[_Entry]:
    for line, place in _lines(file):
        try:
            yield _Entry(json.loads(line), place)
        except (ValueError, RecursionError) as error:
            raise GattError(
                f"{place}: not a line of JSON ({error}). Correct or delete it."
            ) from error


def _toml_entries(file: Path) -> Iterator[_Entry]:
    try:
        tables = tomlkit.parse(decode_text(file.read_bytes(), file)).unwrap()
    except (TOMLKitError, RecursionError) as error:
        raise GattError(f"{file} is not valid TOML: {error}. Correct it.") from error
    listed = tables.pop("instructions", [])
    if tables or not isinstance(listed, list):
        keys = ", ".join(tables) or "instructions, which is no list"
        raise GattError(f'{file} has the keys {keys}. Expected [[instructions]] with text = "...".')
    for number, value in enumerate(listed, 1):
        yield _Entry(value, f"{file}, instruction {number}")


def _json_entries(file: Path) -> Iterator[_Entry]:
    try:
        listed = json.loads(decode_text(file.read_bytes(), file))
    except (ValueError, RecursionError) as error:
        raise GattError(f"{file} is not JSON ({error}). Correct it, or name it .jsonl.") from error
    if not isinstance(listed, list):
        raise GattError(f"{file} is not a list. Expected a list of tables with a text.")
    for number, value in enumerate(listed, 1):
        yield _Entry(value, f"{file}, instruction {number}")
