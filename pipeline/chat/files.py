"""Chats as files: `messages` in JSON, and training dialogues in JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TypeGuard

from pipeline.errors import GattError
from pipeline.files import json_line, read_jsonl, without_surrogates, write_json
from pipeline.records import Message


def read_chat(path: Path) -> tuple[Message, ...]:
    """Return the messages of a chat file, as `parse_chat` accepts them.

    Raises:
        GattError: the file cannot be read, or does not hold a chat.
    """
    try:
        return parse_chat(path.expanduser().read_bytes(), str(path))
    except OSError as error:
        raise GattError(
            f"Cannot read {path} ({error.strerror}). Expected a chat that /save wrote."
        ) from error


def parse_chat(content: str | bytes, name: str) -> tuple[Message, ...]:
    """Return the messages of a chat in JSON.

    `content` is a list of {"role", "content"}, or an object with such a list as `messages`. Half of
    a surrogate pair becomes U+FFFD. Error messages call it `name`.

    Raises:
        GattError: not such a list, or not (system,) user, assistant, user, assistant, ...
    """
    try:
        data: object = json.loads(content)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise GattError(
            f"{name} is not JSON ({error}). Expected a chat that /save wrote."
        ) from error
    rows = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(map(_is_message, rows)):
        raise GattError(
            f"{name} is not a chat. Expected a list such as "
            '[{"role": "user", "content": "Hello"}, ...].'
        )
    messages: list[Message] = [
        {"role": row["role"], "content": without_surrogates(row["content"])} for row in rows
    ]
    _check_roles([message["role"] for message in messages], name)
    return tuple(messages)


def _check_roles(roles: list[str], name: str) -> None:
    if roles and roles[0] == "system":
        roles = roles[1:]
    pairs = zip(roles, cycle(("user", "assistant")), strict=False)
    for number, (role, expected) in enumerate(pairs, 1):
        if role != expected:
            raise GattError(
                f"{name}: message {number} (not counting a system message) has the role {role}; "
                f"expected {expected}."
            )
    if not roles or len(roles) % 2:
        problem = "ends with a message of the user" if roles else "has no message"
        raise GattError(
            f"{name} {problem}. Expected messages of user and assistant by turns, an answer last."
        )


def _is_message(row: object) -> TypeGuard[Message]:
    return (
        isinstance(row, dict)
        and isinstance(row.get("role"), str)
        and isinstance(row.get("content"), str)
    )


def write_chat(path: Path, messages: Sequence[Message]) -> None:
    """Write a chat that `read_chat` reads, replacing the file.

    Raises:
        GattError: the file cannot be written.
    """
    try:
        write_json(path, messages)
    except OSError as error:
        raise GattError(f"Cannot write {path} ({error.strerror}). Name another file.") from error


def append_dialogue(path: Path, messages: Sequence[Message]) -> int:
    """Append a chat to a JSON Lines file and return the number of dialogues in it.

    Raises:
        GattError: the file does not hold JSON Lines, or cannot be written.
    """
    try:
        count = sum(1 for _ in read_jsonl(path)) if path.exists() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            # Some editors leave a last line without a line break.
            file.seek(max(0, file.seek(0, 2) - 1))
            separator = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(separator + json_line({"messages": list(messages)}).encode())
    except OSError as error:
        raise GattError(
            f"Cannot append to {path} ({error.strerror}). Name another file."
        ) from error
    return count + 1
