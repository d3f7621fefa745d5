"""Conversations as values and as files."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from support.chat import AHOY, BEGIN_WITH_AHOY, BYE, END_WITH_BYE, conversation

from pipeline.chat.conversation import (
    NO_INSTRUCTION,
    SUMMARY_REQUEST,
    Conversation,
    StandingInstruction,
    Verdict,
    parse_conversation,
)
from pipeline.chat.files import append_dialogue, parse_chat, read_chat, write_chat
from pipeline.chat.session import tally
from pipeline.data.dialogues import load_dialogues
from pipeline.errors import GattError
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import KINDS, compatible
from pipeline.gatt.instructions import parse_instruction, render_instruction
from pipeline.records import Constraint, Dialogue

_WORDINGS = range(3)
_PAIRS_STEP = 7
"""Every 7th pair of constraints is rendered; it shares no factor with the number of wordings."""


def test_every_wording_of_a_kind_is_recognized() -> None:
    constraints = [
        Constraint(name, value)
        for name, kind in KINDS.items()
        if not kind.judged
        for value in kind.values
    ]
    pairs = [pair for pair in product(constraints, constraints) if compatible(*pair)]
    assert len(pairs) > 3000
    cases: list[tuple[tuple[Constraint, ...], int]]
    cases = [((constraint,), wording) for constraint in constraints for wording in _WORDINGS]
    cases += [(pair, number) for number, pair in enumerate(pairs[::_PAIRS_STEP])]
    for combination, wording in cases:
        instruction = render_instruction(combination, wording)
        assert parse_instruction(instruction.text) == combination, instruction.text
        assert parse_instruction(instruction.short) == combination, instruction.short
    paired_kinds = {constraint.kind for pair in pairs[::_PAIRS_STEP] for constraint in pair}
    assert paired_kinds == {constraint.kind for pair in pairs for constraint in pair}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("begin every answer with “Hark!”", (Constraint("opening", "Hark!"),)),
        ("Be kind to me.", ()),
        ("In all your answers, talk like a pirate.", ()),  # only a judge can check it
    ],
)
def test_instructions_in_other_words(text: str, expected: tuple[Constraint, ...]) -> None:
    assert parse_instruction(text) == expected


def test_a_changed_instruction_is_worded_as_in_the_training_data() -> None:
    users = ("Hello", "And rain?", "And snow?", "Thanks")
    answers = ("Ahoy! Hi.", "Ahoy! Wet.", "White. Bye.")
    trained = AssignedDialogue(
        dialogue=Dialogue("1", "", users),
        instruction=render_instruction((AHOY,)),
        next_instruction=render_instruction((BYE,)),
        change_turn=2,
    )
    chat = conversation(*zip(users[:2], answers, strict=False), system="Be brief.")
    chat = replace(chat, instruction=END_WITH_BYE).with_turn(users[2], answers[2:])
    assert chat.messages(0, users[3]) == trained.student_prompt(answers, "Be brief.")


def test_undo_and_edit_restore_the_instruction_of_their_turn() -> None:
    chat = conversation(("One", "Ahoy! 1."), ("Two", "Ahoy! 2."))
    changed = replace(chat, instruction=END_WITH_BYE).with_turn("Three", ("3. Bye.",))
    assert [turn.user for turn in changed.without_last_turn().turns] == ["One", "Two"]
    assert changed.without_last_turn().instruction == END_WITH_BYE
    assert changed.before(2) == conversation(("One", "Ahoy! 1."))
    assert changed.before(3).instruction == END_WITH_BYE


def test_a_verdict_needs_a_constraint_and_a_valid_answer() -> None:
    rain = "Ahoy! Rain falls from clouds."
    answers = (rain, "Rain falls.", rain, "Ahoy!")
    chat = conversation(*(("What is rain?", answer) for answer in answers))
    verdicts = [chat.verdict(0, number) for number in (1, 2, 3, 4)]
    assert [verdict.mark for verdict in verdicts] == ["✓", "✗", "~", "~"]
    assert [verdict.defect for verdict in verdicts[2:]] == ["repeat", "empty"]
    assert tally(verdicts) == "1 of 4"
    unknown = conversation(("a", "Hi."), instruction=StandingInstruction("Be nice."))
    assert unknown.verdict(0, 1) == Verdict(None)
    assert tally([Verdict(None)]) == ""


def test_a_summary_spares_the_first_turn_the_last_and_a_change_of_instruction() -> None:
    chat = conversation(*((f"u{n}", f"a{n}") for n in range(1, 6)))
    chat = replace(chat, instruction=END_WITH_BYE)
    for n in range(6, 11):
        chat = chat.with_turn(f"u{n}", (f"a{n}",))
    summarized = [message["content"] for message in chat.summary_prompt(3, 0)]
    middle = [text for n in (2, 3, 4, 5, 7) for text in (f"u{n}", f"a{n}")]
    assert summarized == [*middle, SUMMARY_REQUEST]
    short = chat.with_summaries(3, ["In short."])
    assert [t.user for t in short.turns] == ["u1", "u6", SUMMARY_REQUEST, "u8", "u9", "u10"]
    messages = short.messages(0, "u11")
    assert messages[0]["content"] == f"u1\n\n{BEGIN_WITH_AHOY.text}"
    assert messages[2]["content"] == f"u6\n\nFrom now on: {END_WITH_BYE.text}"
    marks = [short.verdict(0, number).mark for number in range(1, 7)]
    assert [mark is None for mark in marks] == [turn.is_summary for turn in short.turns]


@pytest.mark.parametrize(
    "instruction", [BEGIN_WITH_AHOY, StandingInstruction("Be very nice to me, please.")]
)
def test_a_saved_chat_is_the_same_when_it_is_loaded(
    instruction: StandingInstruction, tmp_path: Path
) -> None:
    chat = conversation(
        ("One\n\nand a half", "Ahoy! 1."),
        ("Two", "2."),
        instruction=instruction,
        system="Be brief.",
    )
    chat = replace(chat, instruction=END_WITH_BYE).with_turn("Three", ("3. Bye.",))
    file = tmp_path / "chat.json"
    write_chat(file, chat.messages(0))
    messages = read_chat(file)
    assert json.loads(file.read_text()) == list(messages) == list(chat.messages(0))
    loaded = parse_conversation([messages], NO_INSTRUCTION)
    assert loaded.messages(0, "Four") == chat.messages(0, "Four")
    assert loaded.turns[2].instruction == loaded.instruction == END_WITH_BYE
    if instruction == BEGIN_WITH_AHOY:
        assert loaded == chat


def test_an_instruction_in_own_words_is_separated_if_it_is_given_again() -> None:
    instruction = StandingInstruction("Be very nice to me, please.")
    chat = conversation(("One", "1."), ("Two", "2."), instruction=instruction)
    assert parse_conversation([chat.messages(0)], instruction) == chat


def test_messages_that_only_look_like_instructions_remain_unchanged() -> None:
    messages = Conversation().with_turn("One", ("1.",)).messages(0)
    text = f"Two\n\n{END_WITH_BYE.text}"  # without "From now on:", so not how a change is sent
    chat = parse_conversation([messages], NO_INSTRUCTION).with_turn(text, ("2.",))
    loaded = parse_conversation([chat.messages(0)], NO_INSTRUCTION)
    assert [turn.user for turn in loaded.turns] == ["One", text]
    assert loaded.messages(0) == chat.messages(0)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no message"),
        ('[{"role": "user"}]', "is not a chat"),
        ('{"a": 1}', "is not a chat"),
        ("7", "is not a chat"),
        ('[{"role": "user", "content": "a"}]', "ends with a message of the user"),
        (
            '[{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]',
            "message 2 .* has the role user; expected assistant",
        ),
        ('[{"role": "tool", "content": "a"}]', "has the role tool; expected user"),
    ],
)
def test_files_that_are_not_chats(content: str, problem: str) -> None:
    with pytest.raises(GattError, match=problem):
        parse_chat(content, "x.json")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GattError, match="Cannot read"):
        read_chat(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(GattError, match="is not JSON"):
        read_chat(tmp_path / "latin.json")


def test_exported_dialogues_are_read_by_dialogues_source(tmp_path: Path) -> None:
    file = tmp_path / "new" / "mine.jsonl"
    chat = conversation(("One", "Ahoy! 1."), ("Two", "2.")).without_instruction()
    assert append_dialogue(file, chat.messages(0)) == 1
    file.write_text(file.read_text().rstrip())  # as some editors leave a file
    assert append_dialogue(file, chat.messages(0)) == 2
    assert [dialogue.turns for dialogue in load_dialogues(str(file))] == [("One", "Two")] * 2
    file.write_text("no JSON")
    with pytest.raises(GattError, match="line 1"):
        append_dialogue(file, chat.messages(0))
    assert file.read_text() == "no JSON"
