"""Load dialogues, of which only the user turns are used, and chats with their answers.

`sources` reads the rows, `messages` what is in one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

from pipeline.console import log
from pipeline.data.messages import (
    ParsedMessage,
    UnusableRowError,
    chat_column,
    clean,
    items_of,
    loss_weight,
    parse_messages,
)
from pipeline.data.sources import read_rows
from pipeline.data.text_files import CHAT_COLUMNS, Row
from pipeline.errors import GattError
from pipeline.records import Dialogue, Message

T = TypeVar("T")


class Chat(NamedTuple):
    """A chat to learn; `answer_weights` has the weight of each answer in the loss.

    Errors name it by `place`.
    """

    messages: tuple[Message, ...]
    answer_weights: tuple[float, ...]
    place: str


def load_dialogues(source: str) -> list[Dialogue]:
    """Return the user turns of all dialogues of `source`, each under an id of its own.

    `source` is "seed" (built in), a file, a folder, or a dataset id. Rows without a user turn are
    skipped and counted.

    Raises:
        GattError: no such source, no dialogue in it, or a malformed one (named by its line).
    """
    notes: Counter[str] = Counter()
    parsed = _load(source, partial(_parse_dialogue, notes=notes))
    dialogues = _with_unique_ids(parsed, notes)
    _log_notes(source, notes)
    return dialogues


def load_chats(source: str) -> list[Chat]:
    """Return all chats of `source` with their answers, each up to its last answer to learn.

    Rows without one, and those with tools or images, are skipped and counted.

    Raises:
        GattError: as for `load_dialogues`.
    """
    notes: Counter[str] = Counter()
    chats = [chat for chat, _ in _load(source, partial(_parse_chat, notes=notes))]
    _log_notes(source, notes)
    return chats


def _load(source: str, parse: Callable[[Row], T]) -> list[tuple[T, int]]:
    """Return what `parse` makes of each row, with its number; skipped rows are logged."""
    parsed: list[tuple[T, int]] = []
    skipped: dict[str, list[str]] = {}
    for row in read_rows(source):
        try:
            parsed.append((parse(row), row.number))
        except UnusableRowError as reason:
            skipped.setdefault(str(reason), []).append(row.place)
    summary = "; ".join(
        f"{len(places)} {reason} (the first: {places[0]})" for reason, places in skipped.items()
    )
    if not parsed and skipped:
        raise GattError(f"{source} has nothing that can be used: {summary}.")
    if not parsed:
        raise GattError(
            f"{source} is empty. Expected one dialogue a line: messages, conversations or turns."
        )
    if skipped:
        log(f"{source}: skipped {summary}; {len(parsed)} are used.")
    return parsed


def _log_notes(source: str, notes: Counter[str]) -> None:
    for note, count in notes.items():
        if count:
            log(f"{source}: {count} {note}.")


def _with_unique_ids(parsed: Sequence[tuple[Dialogue, int]], notes: Counter[str]) -> list[Dialogue]:
    """Return the dialogues; where two share an id, the later one gets its row as well.

    Answers and replies are stored by these ids. Evaluation derives "ID~SUITE" of them.
    """
    ids = {dialogue.id for dialogue, _ in parsed}
    taken: set[str] = set()
    dialogues: list[Dialogue] = []
    for dialogue, number in parsed:
        name = dialogue.id
        if name in taken or name.rpartition("~")[0] in ids:
            notes["dialogues with the id of another one, told apart by their place"] += 1
            name = f"{name}#{number}"
            while name in ids | taken:
                name += "#"
        taken.add(name)
        dialogues.append(replace(dialogue, id=name))
    return dialogues


def _parse_dialogue(row: Row, notes: Counter[str]) -> Dialogue:
    """Parse a row with `turns` (user turns) or the messages of a chat.

    A text in `turns` is the only user turn, but next to messages it may be their number.

    Raises:
        GattError: neither, two user turns in a row, or a user turn without text.
        UnusableRowError: no user turn, or one with an attachment.
    """
    fields = row.value if isinstance(row.value, dict) else {}
    turns = fields.get("turns")
    items = items_of(turns)
    if items is None and isinstance(turns, str) and not _has_messages(fields):
        items = [turns]
    if items is None or any(isinstance(item, dict | list) for item in items):
        items = _user_turns(parse_messages(row, chat_column(row, ("turns",)), notes), row)
    if not items:
        raise UnusableRowError("without a user turn")
    if not all(isinstance(turn, str) and turn.strip() for turn in items):
        raise GattError(
            f"{row.place}: every user turn must be a text, and there must be at least one."
        )
    texts = tuple(clean(str(turn), notes) or "" for turn in items)
    name, topic = (_text_field(fields, key, notes) for key in ("id", "topic"))
    return Dialogue(name if name.strip() else str(row.number), topic, texts)


def _has_messages(fields: Mapping[str, object]) -> bool:
    return any(items_of(fields.get(column)) is not None for column in CHAT_COLUMNS)


def _text_field(fields: Mapping[str, object], key: str, notes: Counter[str]) -> str:
    value = fields.get(key)
    return "" if value is None else clean(str(value), notes) or ""


def _user_turns(messages: Sequence[ParsedMessage], row: Row) -> list[object]:
    _require_answers_between(messages, row)
    users = [message for message in messages if message.side == "user"]
    if any(message.has_attachment for message in users):
        raise UnusableRowError("with an image or another attachment")
    return [message.text for message in users]


def _require_answers_between(messages: Sequence[ParsedMessage], row: Row) -> None:
    for first, second in pairwise(messages):
        if first.side == second.side == "user":
            raise GattError(
                f"{row.place}: two user turns in a row. Put the assistant's answer between them, "
                "or join them."
            )


def _parse_chat(row: Row, notes: Counter[str]) -> Chat:
    """Parse the messages of a row as a chat that ends with an answer to learn.

    Raises:
        GattError: a message without text, or with a weight that is none.
        UnusableRowError: no such answer, or a message that is neither text nor of the three roles.
    """
    messages = parse_messages(row, chat_column(row), notes)
    if not any(message.side == "system" and (message.text or "").strip() for message in messages):
        messages = [*_row_system(row, notes), *messages]
    _require_answers_between(messages, row)
    if any(message.side == "other" or message.calls_tool for message in messages):
        raise UnusableRowError("with tools or other roles")
    if any(message.has_attachment for message in messages):
        raise UnusableRowError("with an image or another attachment")
    weights = [
        loss_weight(message, row.place) if message.side == "assistant" else 0.0
        for message in messages
    ]
    length = max((n for n, weight in enumerate(weights, 1) if weight), default=0)
    if not any(message.side == "assistant" for message in messages):
        raise UnusableRowError("without an answer")
    if length == 0:
        raise UnusableRowError("without an answer that is learned")
    if not any(message.side == "user" for message in messages[:length]):
        raise UnusableRowError("without a user turn before the answer")
    chat = tuple(_chat_messages(messages[:length], row))
    answers = zip(messages[:length], weights, strict=False)
    answer_weights = tuple(weight for message, weight in answers if message.side == "assistant")
    return Chat(chat, answer_weights, row.place)


def _row_system(row: Row, notes: Counter[str]) -> Iterator[ParsedMessage]:
    """Yield the system message that a row has in a column of its own, if any."""
    system = row.value.get("system") if isinstance(row.value, dict) else None
    if isinstance(system, str) and system.strip():
        yield ParsedMessage("system", clean(system, notes), {})


def _chat_messages(messages: Sequence[ParsedMessage], row: Row) -> Iterator[Message]:
    for message in messages:
        if message.side == "system" and not (message.text or "").strip():
            continue
        if message.side == "other" or not (message.text or "").strip():
            raise GattError(f"{row.place}: expected a text in every message.")
        yield {"role": message.side, "content": message.text or ""}
