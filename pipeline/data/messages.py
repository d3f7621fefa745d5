"""Read the messages of one row, in any of the forms in which chats are published."""

from __future__ import annotations

import ast
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from pipeline.data.text_files import CHAT_COLUMNS, USER_ROLES, Row
from pipeline.errors import GattError
from pipeline.files import without_surrogates

Side = Literal["system", "user", "assistant", "other"]
"""Whose a message is; "other" is a tool's, or of a role that is not known."""

_SIDES: dict[str, Side] = {
    **dict.fromkeys(USER_ROLES, "user"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "gpt4", "gpt-4", "bing", "bard", "claude", "gemini"),
        "assistant",
    ),
    **dict.fromkeys(("model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "tools", "tool_call", "tool_calls", "tool_response"), "other"),
    **dict.fromkeys(("tool_result", "function", "function_call", "function_response"), "other"),
    **dict.fromkeys(("function-call", "function-response", "observation", "ipython"), "other"),
}
"""Roles of ShareGPT and its descendants, of OpenAI and of LLaMA-Factory, in lower case."""
_NUMBERS = ("weight", "loss_weight")
_SWITCHES = ("loss", "train", "training", "train_on_turn")
"""Fields of a message that say whether it is learned: numbers, or true and false."""


class UnusableRowError(Exception):
    """Says what a row lacks, or has, so that it is skipped; such rows are counted."""


class ParsedMessage(NamedTuple):
    """A message with the fields it came with; `text` is None if its content is not a text."""

    side: Side
    text: str | None
    fields: Mapping[str, object]

    @property
    def has_attachment(self) -> bool:
        """Return whether the content has a part that is not text, such as an image."""
        content = self.fields.get("content")
        return isinstance(content, list) and any(_part_text(part) is None for part in content)

    @property
    def calls_tool(self) -> bool:
        """Return whether this is an assistant's call of a tool."""
        return bool(self.fields.get("tool_calls") or self.fields.get("function_call"))


def parse_messages(row: Row, column: str, notes: Counter[str]) -> list[ParsedMessage]:
    """Parse the messages of a row, or of its `column`; `notes` counts what is remarkable.

    Raises:
        GattError: a message has no role, or is in no form that is known.
    """
    value = row.value[column] if isinstance(row.value, dict) else row.value
    messages = []
    for role, content, fields in _items(items_of(value) or [], row.place):
        if not isinstance(role, str):
            raise GattError(f"{row.place}: expected a text as the role, found {_shown(role)}.")
        side = _SIDES.get(role.strip().lower())
        if side is None:
            notes[f"messages of {_shown(role)}, which is taken for another side than the user"] += 1
        messages.append(ParsedMessage(side or "other", clean(_text(content), notes), fields))
    return messages


def chat_column(row: Row, further: Sequence[str] = ()) -> str:
    """Return the column of a row that holds its messages; "" if the row is a list of them.

    Raises:
        GattError: it has none.
    """
    if isinstance(row.value, list):
        return ""
    columns = (*further, *CHAT_COLUMNS)
    fields = row.value if isinstance(row.value, dict) else {}
    for column in columns:
        if items_of(fields.get(column)) is not None:
            return column
    for column in columns:
        if column in fields:
            raise GattError(
                f"{row.place}: `{column}` is not a list of messages: {_shown(fields[column])}."
            )
    present = f"; it has {', '.join(map(str, fields))}" if fields else ""
    names = [f"`{name}`" for name in (*further, "messages", "conversations")]
    raise GattError(
        f"{row.place}: expected an object with {', '.join(names[:-1])} or {names[-1]}{present}."
    )


def items_of(value: object) -> list[object] | None:
    """Return a list that is one, is written as text in a cell, or is in columns; None if not one.

    A list of objects in columns is an object of lists: `datasets` wrote Sequence so.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = _parse_cell(value)
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        rows = zip(*value.values(), strict=False)
        return [dict(zip(value, row, strict=True)) for row in rows]
    return value if isinstance(value, list) else None


def _parse_cell(text: str) -> object:
    """Parse JSON, or a Python value as pandas writes it; None if it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


class _Item(NamedTuple):
    role: object
    content: object
    fields: Mapping[str, object]


def _items(items: Sequence[object], place: str) -> Iterator[_Item]:
    """Yield the messages of a list of objects, of pairs, or of texts that take turns."""
    if all(isinstance(item, str) for item in items):
        for n, item in enumerate(items):
            yield _Item("assistant" if n % 2 else "user", item, {})
        return
    pairs = [item for item in items if isinstance(item, list) and len(item) == 2]
    has_roles = all(str(pair[0]).lower() in _SIDES for pair in pairs)
    for item in items:
        if isinstance(item, list) and len(item) == 2:
            user, answer = item
            # Either a role and a text, or what the user says and the answer.
            named = [(user, answer)] if has_roles else [("user", user), ("assistant", answer)]
            yield from (_Item(role, content, {}) for role, content in named)
        elif not isinstance(item, dict):
            raise GattError(f"{place}: expected an object as each message, found {_shown(item)}.")
        elif (role := _first(item, "role", "from")) is not None:
            yield _Item(role, _first(item, "content", "value", "text"), item)
        else:
            named = [(key, text) for key, text in item.items() if str(key).lower() in _SIDES]
            if not any(_SIDES[str(role).lower()] == "user" for role, _ in named):
                raise GattError(f"{place}: a message without `role` (or `from`): {_shown(item)}.")
            yield from (_Item(role, content, {}) for role, content in named)


def _first(item: Mapping[str, object], *keys: str) -> object:
    """Return the first value that is not null."""
    return next((item[key] for key in keys if item.get(key) is not None), None)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _text(content: object) -> str | None:
    """Return a content as text: a text, or the texts of its parts; None if there is none."""
    if isinstance(content, list):
        texts = [text for part in content if (text := _part_text(part)) is not None]
        return "\n".join(texts) if texts else None
    return content if isinstance(content, str) else None


def _part_text(part: object) -> str | None:
    """Return the text of one part of a content: a text, or {"type": "text", "text": ...}."""
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else None


def clean(text: str | None, notes: Counter[str]) -> str | None:
    """Return `text` without halves of surrogate pairs, which are counted."""
    if text is None:
        return None
    cleaned = without_surrogates(text)
    notes["texts with half of a surrogate pair, which is replaced by U+FFFD"] += cleaned != text
    return cleaned


def loss_weight(message: ParsedMessage, place: str) -> float:
    """Return the weight of an answer in the loss: 1, or what its fields say; 0 is not learned.

    Raises:
        GattError: a field is neither a number from 0 nor true or false, or sets the weight of
            single characters.
    """
    weight = 1.0
    for key in (*_NUMBERS, *_SWITCHES):
        value = message.fields.get(key)
        if value is None:
            continue
        number = float(value) if isinstance(value, int | float) else math.nan
        if not 0 <= number < math.inf or (key in _SWITCHES and number not in (0, 1)):
            expected = "true or false" if key in _SWITCHES else "a number from 0"
            raise GattError(f"{place}: {key} = {_shown(value)}; expected {expected}.")
        weight *= number
    if detail := message.fields.get("train_detail"):
        raise GattError(
            f"{place}: train_detail = {_shown(detail)} is not supported. Use `weight` or `train`, "
            "which count for the whole message."
        )
    return weight
