"""Chats as files: `messages` in JSON, and lines of JSONL that `dialogues` reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from pipeline.errors import GattError
from pipeline.files import json_line, read_jsonl, write_json
from pipeline.records import Message


def read_chat(path: Path) -> tuple[Message, ...]:
    """The messages of a chat in a file, as `parse_chat` takes them.

    Raises:
        GattError: no such file, or no chat in it.
    """
    try:
        return parse_chat(path.expanduser().read_bytes(), str(path))
    except OSError as error:
        raise GattError(
            f"Cannot read {path} ({error.strerror}). Expected a chat that /save wrote."
        ) from error


def parse_chat(content: str | bytes, name: str) -> tuple[Message, ...]:
    """The messages of a chat: a JSON list of {"role", "content"}, or an object whose `messages` are one; errors call it `name`.

    Raises:
        GattError: no such list, or not (system,) user, assistant, user, assistant, ...
    """
    try:
        data = json.loads(content)
    except (
        ValueError,
        RecursionError,
    ) as error:  # JSONDecodeError and UnicodeDecodeError; nested too deeply
        raise GattError(
            f"{name} is not JSON ({error}). Expected a chat that /save wrote."
        ) from error
    rows = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(map(_is_message, rows)):
        raise GattError(
            f'{name} is no chat. Expected a list such as [{{"role": "user", "content": "Hello"}}, ...].'
        )
    messages: list[Message] = [{"role": row["role"], "content": row["content"]} for row in rows]
    roles = [m["role"] for m in messages][bool(messages) and messages[0]["role"] == "system" :]
    for number, (role, expected) in enumerate(
        zip(roles, cycle(("user", "assistant")), strict=False), 1
    ):
        if role != expected:
            raise GattError(
                f"{name}: message {number} (not counting a system message) is of {role}; expected {expected}."
            )
    if not roles or len(roles) % 2:
        found = "ends with a message of the user" if roles else "has no message"
        raise GattError(
            f"{name} {found}. Expected messages of user and assistant by turns, an answer last."
        )
    return tuple(messages)


def _is_message(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("role"), str)
        and isinstance(row.get("content"), str)
    )


def write_chat(path: Path, messages: Sequence[Message]) -> None:
    """Write a chat that `read_chat` reads, over what was there.

    Raises:
        GattError: the file cannot be written.
    """
    try:
        write_json(path, messages)
    except OSError as error:
        raise GattError(f"Cannot write {path} ({error.strerror}). Name another file.") from error


def append_dialogue(path: Path, messages: Sequence[Message]) -> int:
    """Append a chat as a line of JSONL; the number of dialogues that the file has then.

    Raises:
        GattError: the file holds something else than JSON Lines, or cannot be written.
    """
    try:
        before = sum(1 for _ in read_jsonl(path)) if path.exists() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(max(0, file.seek(0, 2) - 1))
            broken = file.read(1) not in (b"", b"\n")
            file.write(
                (b"\n" if broken else b"") + json_line({"messages": list(messages)}).encode()
            )
    except OSError as error:
        raise GattError(
            f"Cannot append to {path} ({error.strerror}). Name another file."
        ) from error
    return before + 1
