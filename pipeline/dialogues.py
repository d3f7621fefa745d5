"""The users' turns: the built-in seed set, a JSONL file, or any dataset that `datasets` can load."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline.errors import GattError
from pipeline.files import read_jsonl
from pipeline.records import Dialogue

_SHAREGPT = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def load_dialogues(source: str) -> list[Dialogue]:
    """All dialogues of `source`: "seed", a JSONL, JSON or Parquet file, or what `datasets` loads (an id, a folder).

    Raises:
        GattError: nothing there, an empty file, or a broken dialogue (named by its line).
    """
    if source == "seed":
        return _read(Path(str(resources.files("pipeline") / "data" / "dialogues.jsonl")))
    path = Path(source).expanduser()
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.is_file():
        raise GattError(f"No dialogues at {path}. Expected a JSONL file, a dataset id, or \"seed\".")
    if path.suffix == ".parquet":
        return _from_datasets(source, "parquet", data_files=str(path))
    if not path.is_file():
        return _from_datasets(source, source)
    with path.open("rb") as file:
        array = file.read(1) == b"["
    return _read_array(path) if array else _read(path)


def _read(path: Path) -> list[Dialogue]:
    found = [parse(row, f"{path}, line {line}", str(line)) for line, row in read_jsonl(path)]
    if not found:
        raise GattError(f"{path} is empty. Expected one dialogue a line: messages, conversations or turns.")
    return found


def _read_array(path: Path) -> list[Dialogue]:
    """One JSON array of dialogues, as ShareGPT files are published."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GattError(f"{path} begins as a JSON array and is none: {error}. Write one dialogue a line instead.") from error
    return [parse(row, f"{path}, dialogue {n}", str(n)) for n, row in enumerate(rows, 1)]


def _from_datasets(source: str, *arguments: str, **options: str) -> list[Dialogue]:
    import datasets

    try:
        rows = datasets.load_dataset(*arguments, split="train", **options)
    except Exception as error:  # datasets raises a dozen classes, of several libraries
        raise GattError(f"Cannot load the dataset {source!r} ({type(error).__name__}). Use a local JSONL, or \"seed\".") from error
    return [parse(row, f"{source}, row {n}", str(n)) for n, row in enumerate(rows, 1)]


def parse(row: Any, place: str, name: str) -> Dialogue:
    """One row: `turns` (plain user turns), `messages`, or ShareGPT's `conversations`.

    Raises:
        GattError: none of these, two user turns in a row, or no user turn; the message begins with `place`.
    """
    if isinstance(row, dict) and isinstance(row.get("turns"), list):
        turns = row["turns"]
    elif isinstance(row, dict) and isinstance(row.get("messages"), list):
        turns = _user_turns([(m.get("role"), m.get("content")) for m in row["messages"]], place)
    elif isinstance(row, dict) and isinstance(row.get("conversations"), list):
        turns = _user_turns([(_SHAREGPT.get(m.get("from")), m.get("value")) for m in row["conversations"]], place)
    else:
        raise GattError(f"{place}: expected an object with `turns`, `messages` or `conversations`.")
    if not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise GattError(f"{place}: every user turn must be a text, and there must be at least one.")
    return Dialogue(str(row.get("id", name)), str(row.get("topic", "")), tuple(turns))


def _user_turns(messages: list[tuple[Any, Any]], place: str) -> list[Any]:
    previous = None
    for role, _ in messages:
        if role not in ("system", "user", "assistant"):
            raise GattError(f"{place}: unknown role {role!r}; expected system, user or assistant.")
        if role == previous == "user":
            raise GattError(f"{place}: two user turns in a row. Put the assistant's answer between them, or join them.")
        previous = role
    return [content for role, content in messages if role == "user"]
