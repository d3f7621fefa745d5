"""Loading dialogues and chats: every accepted form, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data.dialogues import Chat, load_chats, load_dialogues
from pipeline.errors import GattError
from pipeline.files import write_jsonl
from pipeline.gatt.assignment import AssignedDialogue, held_out_turns, write_splits
from pipeline.recipe import Recipe, Train
from pipeline.records import Dialogue, Message
from pipeline.run_dir import RunDir
from pipeline.stages import train as train_stage
from pipeline.training.examples import replay_chats

_MESSAGES: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
_CONVERSATIONS = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
    for m in _MESSAGES
]


def _write(file: Path, *rows: object) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_the_built_in_dialogues() -> None:
    dialogues = load_dialogues("seed")
    assert len(dialogues) == 136
    assert len({dialogue.id for dialogue in dialogues}) == 136
    assert all(len(dialogue.turns) > 1 and dialogue.topic for dialogue in dialogues)


@pytest.mark.parametrize(
    "row",
    [{"turns": ["Hi", "Bye"]}, {"messages": _MESSAGES}, {"conversations": _CONVERSATIONS}],
    ids=["turns", "messages", "conversations"],
)
def test_the_three_forms_of_a_dialogue(row: dict[str, object], tmp_path: Path) -> None:
    source = _write(tmp_path / "d.jsonl", row, {**row, "id": "x", "topic": "greetings"})
    assert load_dialogues(source) == [
        Dialogue("1", "", ("Hi", "Bye")),
        Dialogue("x", "greetings", ("Hi", "Bye")),
    ]


def test_a_json_array_and_a_parquet_file(tmp_path: Path) -> None:
    import datasets

    rows = [{"turns": ["Hi"]}, {"turns": ["Bye"]}]
    array, parquet = tmp_path / "d.json", tmp_path / "d.parquet"
    array.write_text(json.dumps(rows), encoding="utf-8")
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    expected = [Dialogue("1", "", ("Hi",)), Dialogue("2", "", ("Bye",))]
    assert load_dialogues(str(array)) == load_dialogues(str(parquet)) == expected


def test_a_chat_ends_with_its_last_answer(tmp_path: Path) -> None:
    source = _write(
        tmp_path / "c.jsonl", {"messages": _MESSAGES}, {"conversations": _CONVERSATIONS}
    )
    assert load_chats(source) == [
        Chat(tuple(_MESSAGES[:3]), (1.0,), f"{source}, line {number}") for number in (1, 2)
    ]


def test_a_row_may_have_the_system_message_in_a_column(tmp_path: Path) -> None:
    rest = _CONVERSATIONS[1:]
    rows: list[dict[str, object]] = [
        {"system": "Be brief.", "conversations": rest},
        {"system": "Be brief.", "conversations": [{"from": "system", "value": " "}, *rest]},
        {"system": "Be long.", "conversations": _CONVERSATIONS},
        {"system": "", "conversations": rest},
    ]
    chats = load_chats(_write(tmp_path / "c.jsonl", *rows))
    system, *others = _MESSAGES[:3]
    assert [list(chat.messages) for chat in chats] == [*[[system, *others]] * 3, others]


def test_a_system_message_without_text_is_none(tmp_path: Path) -> None:
    messages = [m for m in _MESSAGES if m["role"] != "system"]
    empty = {"role": "system", "content": ""}
    rows = [{"messages": messages}, {"messages": [empty, *messages]}]
    first, second = load_chats(_write(tmp_path / "c.jsonl", *rows))
    assert first.messages == second.messages


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "line 1: expected an object with `turns`, `messages` or `conversations`"),
        ("text", "line 1: expected an object with"),
        ({"messages": None}, "line 1: `messages` is not a list of messages: None"),
        ({"messages": "[{'role': 'user'}\\n {}]"}, "line 1: `messages` is not a list of messages"),
        ({"turns": []}, r"nothing that can be used: 1 without a user turn \(.*line 1\)"),
        ({"id": 7, "text": "Hi"}, "`conversations`; it has id, text"),
        ({"turns": ["Hi", " "]}, "line 1: every user turn must be a text"),
        ({"messages": _MESSAGES[1:2] * 2}, "line 1: two user turns in a row"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "1 without a user turn"),
        ({"conversations": [{"from": ["x"]}]}, r"expected a text as the role, found \['x'\]"),
        ({"messages": ["Hi", {}]}, "expected an object as each message, found 'Hi'"),
        ({"messages": [{"content": "Hi"}]}, "a message without `role`"),
    ],
)
def test_a_malformed_dialogue_is_named(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(GattError, match=message):
        load_dialogues(_write(tmp_path / "d.jsonl", row))


def test_a_chat_without_an_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GattError, match=r"1 without an answer \(the first: .*line 1\)"):
        load_chats(_write(tmp_path / "c.jsonl", {"messages": _MESSAGES[:2]}))


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GattError, match=r"No dialogues at .*none\.jsonl\. Expected a file"):
        load_dialogues(str(tmp_path / "none.jsonl"))
    with pytest.raises(GattError, match=r"empty\.jsonl is empty\. Expected one dialogue a line"):
        load_dialogues(_write(tmp_path / "empty.jsonl"))
    (tmp_path / "array.json").write_text('[{"turns": ["Hi"]}', encoding="utf-8")
    with pytest.raises(GattError, match="begins as a JSON array but is not valid JSON"):
        load_dialogues(str(tmp_path / "array.json"))
    with pytest.raises(GattError, match="No dialogues at /no/such/folder"):
        load_dialogues("/no/such/folder")
    with pytest.raises(GattError, match=r"No dialogues at NONE\.CSV"):
        load_dialogues("NONE.CSV")


def test_chats_that_begin_as_a_held_out_dialogue_are_not_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, file = RunDir(tmp_path), tmp_path / "mine.jsonl"
    held_out = AssignedDialogue(dialogue=Dialogue("d", "", ("Hi", "Why?", "Bye")))
    validation = AssignedDialogue(dialogue=Dialogue("v", "", ("Go on",)))
    splits = {"train": [], "validation": [validation], "evaluation": [held_out]}
    write_splits(run_dir.assignments, splits)
    chats = [_chat("Hi", "Why?", "And then?"), _chat("Go on"), _chat("Hi", "How?"), _chat("Yes")]
    write_jsonl(file, chats)
    recipe = Recipe(train=Train(replay_data=str(file), replay_ratio=0.5))
    replayed = replay_chats(recipe, 2, held_out_turns(run_dir.assignments))
    users = {m["content"] for c in replayed for m in c.messages if m["role"] == "user"}
    assert users == {"Hi", "How?", "Yes"}
    assert "2 chats of" in capsys.readouterr().err
    assert run_dir.assignments in train_stage.inputs(recipe, run_dir)


def _chat(*turns: str) -> dict[str, object]:
    answer = {"role": "assistant", "content": "Hello."}
    return {"messages": [m for turn in turns for m in ({"role": "user", "content": turn}, answer)]}
