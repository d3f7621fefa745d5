"""Read the rows of text files: JSON Lines, JSON and tables; in UTF-8, compressed or not."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import GattError
from pipeline.files import decode_text, not_utf8

CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold the messages of a chat."""
USER_ROLES = ("user", "human", "prompter")
"""Roles of the user, in lower case."""
_LIST_KEYS = ("data", "rows", "train", "dialogues", "conversations", "examples", "items")
"""Keys under which an object holds the list of rows, the likeliest first."""
_MESSAGE_KEYS = {"role", "from", "content", "value"}
_OPENERS: dict[bytes, Callable[[Path], io.BufferedIOBase]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
"""Compressed files by their first bytes."""


class Row(NamedTuple):
    """One value of a source; errors name it by `place`. `number` counts from 1."""

    value: object
    place: str
    number: int


def _open(path: Path) -> io.BufferedIOBase:
    return path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, which may be compressed.

    Raises:
        GattError: not UTF-8 (nor UTF-16 or 32), or a damaged archive.
    """
    with path.open("rb") as file:
        head = file.read(8)
    openers = (opener for magic, opener in _OPENERS.items() if head.startswith(magic))
    try:
        with next(openers, _open)(path) as stream:
            encoding = json.detect_encoding(stream.read(4))
            stream.seek(0)
            if not encoding.startswith("utf-8"):
                yield from io.StringIO(decode_text(stream.read(), path))
                return
            for number, line in enumerate(stream, 1):
                try:
                    yield line.decode(encoding if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise not_utf8(path, number) from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; gzip and bz2 raise theirs without a number
        raise GattError(f"{path} is a damaged archive ({error}). Pack it again.") from error


def json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of JSON Lines, or of one JSON array or object."""
    lines = ((number, line) for number, line in enumerate(_lines(path), 1) if line.strip())
    first = list(islice(lines, 2))
    if not first:
        return
    try:
        values = [(number, json.loads(line)) for number, line in first]
    except (ValueError, RecursionError):
        yield from _document_rows(path)
        return
    if len(values) == 1:
        yield from _rows_in(values[0][1], path)
        return
    for number, value in values:
        yield Row(value, f"{path}, line {number}", number)
    for number, line in lines:
        try:
            yield Row(json.loads(line), f"{path}, line {number}", number)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, number, error) from error


def _document_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON document of many lines, the form of most ShareGPT files.

    Raises:
        GattError: not one, but perhaps JSON Lines; then the first line is named that is no JSON.
    """
    text = "".join(_lines(path))
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise GattError(
                f"{path} begins as a JSON array but is not valid JSON: {error}. "
                "Write one dialogue a line instead."
            ) from error
        raise _not_json(path, *_first_bad_line(text, error)) from error
    yield from _rows_in(document, path)


def _first_bad_line(text: str, document_error: Exception) -> tuple[int, Exception]:
    """Return the number of the line that is at fault, and its error."""
    errors: dict[int, Exception] = {}
    has_objects = False
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            has_objects |= isinstance(json.loads(line), dict)
        except (ValueError, RecursionError) as error:
            errors.setdefault(number, error)
    if has_objects and errors:
        return next(iter(errors.items()))
    return getattr(document_error, "lineno", 1), document_error


def _not_json(path: Path, number: int, error: Exception) -> GattError:
    return GattError(f"{path}, line {number}: not a line of JSON ({error}). Correct or delete it.")


def _rows_in(document: object, path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON document: a list, an object around one, or a single row."""
    rows = _row_list(document, path)
    if rows is None:
        yield Row(document, f"{path}, line 1", 1)
        return
    for number, value in enumerate(rows, 1):
        yield Row(value, f"{path}, dialogue {number}", number)


def _row_list(document: object, path: Path) -> Sequence[object] | None:
    """Return the list of rows in a JSON document, or None if it is one row itself."""
    if isinstance(document, list):
        return None if document and _is_message(document[0]) else document
    if not isinstance(document, dict):
        return None
    lists = {key: value for key, value in document.items() if isinstance(value, list)}
    for key in ("turns", *CHAT_COLUMNS):
        items = lists.get(key)
        if items and (_is_message(items[0]) or _is_exchange(items[0])):
            return None
        if items and not isinstance(items[0], dict | list):
            return None
    candidates = [key for key in _LIST_KEYS if key in lists] or list(lists)
    if "turns" in document or not candidates:
        return None
    if len(candidates) > 1 and candidates[0] not in _LIST_KEYS:
        raise GattError(
            f"{path}: which of {', '.join(candidates)} has the dialogues? Write them alone to a "
            "file, one a line."
        )
    return lists[candidates[0]]


def _is_message(item: object) -> bool:
    """Return whether `item` is a message, as an object or as a pair of texts."""
    if isinstance(item, dict):
        return not (_MESSAGE_KEYS.isdisjoint(item) or _has_chat(item))
    return isinstance(item, list) and len(item) == 2 and all(isinstance(i, str) for i in item)


def _is_exchange(item: object) -> bool:
    """Return whether `item` is what the user says and the answer: {"user": ..., ...}."""
    if not isinstance(item, dict) or _has_chat(item):
        return False
    return any(str(key).lower() in USER_ROLES for key in item)


def _has_chat(item: Mapping[str, object]) -> bool:
    """Return whether an object is a row, whatever other columns it has."""
    return any(column in item for column in ("turns", *CHAT_COLUMNS))


def csv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table in text form; cells are texts, some of them JSON."""
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
    lines = _lines(path)
    header = next((line for line in lines if line.strip()), "")
    delimiter = max("\t,;", key=header.count)
    reader = csv.DictReader(chain([header], lines), delimiter=delimiter)
    try:
        for number, value in enumerate(reader, 1):
            yield Row(value, f"{path}, row {number}", number)
    except csv.Error as error:
        raise GattError(f"{path}, line {reader.line_num}: {error}. Correct it.") from error
