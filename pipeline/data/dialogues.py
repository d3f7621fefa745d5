"""Load user turns: the built-in dialogues, a local file, or a dataset that `datasets` loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import GattError
from pipeline.files import read_jsonl
from pipeline.records import Dialogue, Message, Role

_SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def load_dialogues(source: str) -> list[Dialogue]:
    """Return the user turns of all dialogues of `source`.

    `source` is "seed" (built in), a JSONL, JSON or Parquet file, or what `datasets` loads: a
    dataset id or a folder.

    Raises:
        GattError: no such source, no dialogue in it, or a malformed one (named by its line).
    """
    dialogues = [_parse_dialogue(row) for row in _rows(source)]
    if not dialogues:
        raise GattError(
            f"{source} is empty. Expected one dialogue a line: messages, conversations or turns."
        )
    return dialogues


def load_chats(source: str) -> list[tuple[Message, ...]]:
    """Return all chats of `source` with their answers, each up to its last answer.

    Raises:
        GattError: as for `load_dialogues`, or a chat without an answer.
    """
    return [_parse_chat(row) for row in _rows(source)]


class _Row(NamedTuple):
    """One JSON value of a source; errors name it by `place`. `number` counts from 1."""

    value: object
    place: str
    number: int


def _rows(source: str) -> Iterator[_Row]:
    if source == "seed":
        source = str(resources.files("pipeline.data") / "seed_dialogues.jsonl")
    path = Path(source).expanduser()
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.is_file():
        raise GattError(f'No dialogues at {path}. Expected a JSONL file, a dataset id, or "seed".')
    if path.suffix == ".parquet":
        yield from _dataset_rows(source, "parquet", data_files=str(path))
    elif not path.is_file():
        yield from _dataset_rows(source, source)
    elif _is_json_array(path):
        yield from _array_rows(path)
    else:
        for number, value in read_jsonl(path):
            yield _Row(value, f"{path}, line {number}", number)


def _is_json_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"["


def _array_rows(path: Path) -> Iterator[_Row]:
    """Yield the items of one JSON array, the form in which ShareGPT files are published."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GattError(
            f"{path} begins as a JSON array but is not valid JSON: {error}. "
            "Write one dialogue a line instead."
        ) from error
    for number, value in enumerate(values, 1):
        yield _Row(value, f"{path}, dialogue {number}", number)


def _dataset_rows(source: str, name: str, **options: str) -> Iterator[_Row]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train", **options)
    except Exception as error:  # datasets raises a dozen classes, of several libraries
        raise GattError(
            f"Cannot load the dataset {source!r} ({type(error).__name__}). Use a local JSONL, or "
            '"seed".'
        ) from error
    for number, value in enumerate(rows, 1):
        yield _Row(value, f"{source}, row {number}", number)


def _parse_dialogue(row: _Row) -> Dialogue:
    """Parse a row with `turns` (user turns), `messages`, or ShareGPT's `conversations`.

    Raises:
        GattError: none of these, two user turns in a row, or no user turn.
    """
    fields = row.value if isinstance(row.value, dict) else {}
    turns = fields.get("turns")
    if not isinstance(turns, list):
        messages = _parse_messages(row, "`turns`, `messages` or `conversations`")
        turns = [message["content"] for message in messages if message["role"] == "user"]
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise GattError(
            f"{row.place}: every user turn must be a text, and there must be at least one."
        )
    name, topic = str(fields.get("id", row.number)), str(fields.get("topic", ""))
    return Dialogue(name, topic, tuple(turns))


def _parse_chat(row: _Row) -> tuple[Message, ...]:
    """Parse a row with `messages` or `conversations` as a chat that ends with an answer.

    Raises:
        GattError: no answer, or a message without text.
    """
    messages = _parse_messages(row, "`messages` or `conversations`")
    last = max((n for n, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    chat = messages[: last + 1]
    if not last or not all(message["content"].strip() for message in chat):
        raise GattError(f"{row.place}: expected at least one answer, and a text in every message.")
    return tuple(chat)


def _parse_messages(row: _Row, expected: str) -> Sequence[Message]:
    """Parse `messages` or `conversations`; a content that is not a text becomes ""."""
    fields = row.value if isinstance(row.value, dict) else {}
    if isinstance(fields.get("messages"), list):
        items, role_key, content_key, roles = fields["messages"], "role", "content", _ROLES
    elif isinstance(fields.get("conversations"), list):
        items, role_key, content_key = fields["conversations"], "from", "value"
        roles = _SHAREGPT_ROLES
    else:
        raise GattError(f"{row.place}: expected an object with {expected}.")
    messages: list[Message] = []
    for item in items:
        if not isinstance(item, dict):
            raise GattError(f"{row.place}: expected an object as each message, found {item!r}.")
        role = item.get(role_key)
        if role not in list(roles):
            raise GattError(f"{row.place}: unknown role {role!r}; expected {', '.join(roles)}.")
        content = item.get(content_key)
        message: Message = {
            "role": roles[role],
            "content": content if isinstance(content, str) else "",
        }
        if messages and messages[-1]["role"] == message["role"] == "user":
            raise GattError(
                f"{row.place}: two user turns in a row. Put the assistant's answer between them, "
                "or join them."
            )
        messages.append(message)
    return messages
