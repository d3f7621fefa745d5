"""The users' turns: the built-in seed set, a JSONL file, or any dataset that `datasets` can load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline.errors import GattError
from pipeline.files import read_jsonl
from pipeline.records import Dialogue, Message

_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}


def load_dialogues(source: str) -> list[Dialogue]:
    """All dialogues of `source`: "seed", a JSONL, JSON or Parquet file, or what `datasets` loads (an id, a folder).

    Raises:
        GattError: nothing there, an empty file, or a broken dialogue (named by its line).
    """
    found = [parse(row, place, name) for row, place, name in _rows(source)]
    if not found:
        raise GattError(
            f"{source} is empty. Expected one dialogue a line: messages, conversations or turns."
        )
    return found


def load_chats(source: str) -> list[tuple[Message, ...]]:
    """All chats of `source` with their answers, each up to its last one.

    Raises:
        GattError: as `load_dialogues`, or a chat without an answer.
    """
    return [parse_chat(row, place) for row, place, _ in _rows(source)]


def _rows(source: str) -> Iterator[tuple[Any, str, str]]:
    """Each row of `source`, where it stands, and its number."""
    if source == "seed":
        source = str(resources.files("pipeline.data") / "seed_dialogues.jsonl")
    path = Path(source).expanduser()
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.is_file():
        raise GattError(f'No dialogues at {path}. Expected a JSONL file, a dataset id, or "seed".')
    if path.suffix == ".parquet":
        yield from _from_datasets(source, "parquet", data_files=str(path))
    elif not path.is_file():
        yield from _from_datasets(source, source)
    else:
        with path.open("rb") as file:
            array = file.read(1) == b"["
        yield from (
            _from_array(path)
            if array
            else ((row, f"{path}, line {n}", str(n)) for n, row in read_jsonl(path))
        )


def _from_array(path: Path) -> Iterator[tuple[Any, str, str]]:
    """One JSON array of dialogues, as ShareGPT files are published."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GattError(
            f"{path} begins as a JSON array and is none: {error}. Write one dialogue a line instead."
        ) from error
    yield from ((row, f"{path}, dialogue {n}", str(n)) for n, row in enumerate(rows, 1))


def _from_datasets(source: str, *arguments: str, **options: str) -> Iterator[tuple[Any, str, str]]:
    import datasets

    try:
        rows = datasets.load_dataset(*arguments, split="train", **options)
    except Exception as error:  # datasets raises a dozen classes, of several libraries
        raise GattError(
            f'Cannot load the dataset {source!r} ({type(error).__name__}). Use a local JSONL, or "seed".'
        ) from error
    yield from ((row, f"{source}, row {n}", str(n)) for n, row in enumerate(rows, 1))


def parse(row: Any, place: str, name: str) -> Dialogue:
    """One row: `turns` (plain user turns), `messages`, or ShareGPT's `conversations`.

    Raises:
        GattError: none of these, two user turns in a row, or no user turn; the message begins with `place`.
    """
    if isinstance(row, dict) and isinstance(row.get("turns"), list):
        turns = row["turns"]
    else:
        turns = [
            m["content"]
            for m in _messages(row, place, "`turns`, `messages` or `conversations`")
            if m["role"] == "user"
        ]
    if not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise GattError(f"{place}: every user turn must be a text, and there must be at least one.")
    return Dialogue(str(row.get("id", name)), str(row.get("topic", "")), tuple(turns))


def parse_chat(row: Any, place: str) -> tuple[Message, ...]:
    """One row with `messages` or `conversations` as a chat that ends with an answer.

    Raises:
        GattError: no answer in it, or one that is no text; the message begins with `place`.
    """
    messages = _messages(row, place, "`messages` or `conversations`")
    last = max((n for n, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    chat = messages[: last + 1]
    if not last or not all(isinstance(m["content"], str) and m["content"].strip() for m in chat):
        raise GattError(f"{place}: expected at least one answer, and a text in every message.")
    return tuple(chat)


def _messages(row: Any, place: str, expected: str) -> list[Message]:
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        pairs = [(m.get("role"), m.get("content")) for m in row["messages"]]
    elif isinstance(row, dict) and isinstance(row.get("conversations"), list):
        pairs = [(_SHAREGPT.get(m.get("from")), m.get("value")) for m in row["conversations"]]
    else:
        raise GattError(f"{place}: expected an object with {expected}.")
    previous = None
    for role, _ in pairs:
        if role not in ("system", "user", "assistant"):
            raise GattError(f"{place}: unknown role {role!r}; expected system, user or assistant.")
        if role == previous == "user":
            raise GattError(
                f"{place}: two user turns in a row. Put the assistant's answer between them, or join them."
            )
        previous = role
    return [{"role": role, "content": content} for role, content in pairs]
