"""The chat session and the terminal's commands, with a scripted engine and screen."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.chat import (
    BEGIN_WITH_AHOY,
    END_WITH_BYE,
    ScriptedEngine,
    ScriptedScreen,
    conversation,
    open_chat,
    run_chat,
)

from pipeline.chat.commands import COMMANDS, chat_loop, parse_params
from pipeline.chat.conversation import SUMMARY_REQUEST, Conversation
from pipeline.chat.files import read_chat
from pipeline.chat.session import ChatSession, SamplingParams, pluralize
from pipeline.errors import GattError
from pipeline.inference.request import TextPiece
from pipeline.records import FinishReason, Request

LONG_CHAT = conversation(*((f"Number {n}?", "Ahoy! " + "word " * 20) for n in range(1, 8)))
"""Seven turns, 166 words with the instruction."""


def _ignore(model_index: int, piece: TextPiece) -> None:
    """Receive a piece of an answer."""


def _session(engine: ScriptedEngine, start: Conversation | None = None) -> ChatSession:
    return open_chat(engine, ScriptedScreen(()), start).session


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        (SamplingParams(temperature=-1), "temperature is -1; expected 0"),
        (SamplingParams(temperature=5.1), "temperature is 5.1"),
        (SamplingParams(max_tokens=0), "max_tokens is 0; expected 1 to 256"),
        (SamplingParams(max_tokens=257), "max_tokens is 257"),
        (SamplingParams(seed=-1), "seed is -1"),
    ],
)
def test_sampling_parameters_out_of_range(params: SamplingParams, problem: str) -> None:
    with pytest.raises(GattError, match=problem):
        params.checked(512)


def test_parameters_are_read_as_their_types() -> None:
    params = SamplingParams()
    changed = parse_params("temperature=1 max_tokens=9 context=128", params, 512)
    assert changed == (SamplingParams(1.0, 9, 1), 128)
    assert isinstance(changed[0].temperature, float)
    assert parse_params("", params, 512) == (params, 512)


def test_a_turn_is_added_with_the_instruction_under_which_it_was_sent() -> None:
    def answer_and_change(request: Request) -> str:
        session.conversation = replace(session.conversation, instruction=END_WITH_BYE)
        return "Ahoy! Hi."

    session = _session(ScriptedEngine(answer_and_change))
    asyncio.run(session.turn("Hello", 9, _ignore))
    assert session.conversation == replace(
        conversation(("Hello", "Ahoy! Hi.")), instruction=END_WITH_BYE
    )
    assert session.conversation.turns[0].instruction == BEGIN_WITH_AHOY
    assert not session.is_answering


def test_pieces_arrive_in_order() -> None:
    pieces: list[tuple[int, str]] = []

    def record(model_index: int, piece: TextPiece) -> None:
        pieces.append((model_index, piece.text))

    session = _session(ScriptedEngine(lambda request: "Ahoy! You there."))
    asyncio.run(session.turn("Hello", 9, record))
    assert pieces == [(0, "Ahoy! "), (0, "You "), (0, "there.")]


@pytest.mark.parametrize(
    ("finish", "note"),
    [("stop", ""), ("cancelled", " · stopped"), ("length", " · cut at 12 tokens")],
)
def test_what_cut_an_answer_off_is_noted(finish: FinishReason, note: str) -> None:
    screen = ScriptedScreen(("Hello",))
    run_chat(ScriptedEngine(finish=finish), screen)
    assert screen.shown == [f"✓ followed 1 of 1: ✓{note}"]


def test_a_stopped_message_without_an_answer_is_not_added() -> None:
    session = _session(ScriptedEngine(lambda request: "", finish="cancelled"))
    start = session.conversation
    with pytest.raises(GattError, match="Stopped before the first token"):
        asyncio.run(session.turn("Hello", 9, _ignore))
    assert session.conversation is start
    assert not session.is_answering


def test_an_empty_answer_is_a_turn_and_the_chat_goes_on() -> None:
    answers = iter(("", "Ahoy! You."))
    screen = ScriptedScreen(("Hello", "You"), interactive=False)
    chat = run_chat(ScriptedEngine(lambda request: next(answers)), screen)
    assert [turn.answers for turn in chat.turns] == [("",), ("Ahoy! You.",)]
    assert "empty: the model ended its answer at once" in screen.shown[0]
    assert "✓" in screen.shown[1]


def test_every_turn_and_retry_has_a_seed_of_its_own() -> None:
    engine = ScriptedEngine()
    run_chat(engine, ScriptedScreen(("Hi", "/probe Who?", "You", "/retry", "/retry")))
    assert [request.seed for request in engine.requests] == [1, 2, 2, 3, 4]
    assert {request.temperature for request in engine.requests} == {0.7}


def test_verdicts_are_those_of_the_present_conversation() -> None:
    session = _session(ScriptedEngine(lambda request: "Ahoy! Rain falls from clouds."))
    for user in ("What is rain?", "And snow?"):
        asyncio.run(session.turn(user, 9, _ignore))
    assert [verdict.mark for verdict in session.verdicts()[0]] == ["✓", "~"]
    session.conversation = session.conversation.without_last_turn().with_turn("x", ("No.",))
    assert [verdict.mark for verdict in session.verdicts()[0]] == ["✓", "✗"]
    session.undo()
    session.undo()
    assert session.verdicts() == [[]]


def test_resuming_restores_the_conversation_unless_a_turn_is_added() -> None:
    session = _session(ScriptedEngine(), LONG_CHAT)
    with session.resume_from(LONG_CHAT.before(3)):
        pass
    assert session.conversation is LONG_CHAT
    with session.resume_from(LONG_CHAT.without_last_turn()):
        session.replace_middle(["In short."])  # fewer turns than before, and yet one is added
        asyncio.run(session.turn("Again", 9, _ignore))
    users = [turn.user for turn in session.conversation.turns]
    assert users == ["Number 1?", SUMMARY_REQUEST, "Number 4?", "Number 5?", "Number 6?", "Again"]


def test_room_counts_the_prompt_and_names_what_would_make_room() -> None:
    session = _session(ScriptedEngine(context=175), LONG_CHAT)
    room = asyncio.run(session.room_for("And now?"))
    assert not room.fits
    assert (room.prompt_tokens, room.tokens_left, room.max_tokens) == (168, 7, 12)
    assert (room.larger_context, room.summarizable_turns) == (350, 3)
    session.sampling = replace(session.sampling, max_tokens=7)
    assert asyncio.run(session.room_for("And now?")).fits
    empty = _session(ScriptedEngine(context=1024))
    room = asyncio.run(empty.room_for("word " * 1020))
    assert (room.fits, room.larger_context, room.summarizable_turns) == (False, 0, 0)
    assert asyncio.run(empty.tokens_used()) == 0


def test_commands_undo_retry_and_edit() -> None:
    first = run_chat(ScriptedEngine(), ScriptedScreen(("Hello there", "What is rain?")))
    undone = run_chat(ScriptedEngine(), ScriptedScreen(("Hello there", "What is rain?", "/undo")))
    assert undone.turns == first.turns[:1]
    again = run_chat(ScriptedEngine(), ScriptedScreen(("Hello there", "What is rain?", "/retry")))
    assert [turn.user for turn in again.turns] == ["Hello there", "What is rain?"]
    assert again.turns[0] == first.turns[0]
    assert again.turns[1].answers != first.turns[1].answers
    screen = ScriptedScreen(("Hello there", "What is rain?", "/edit 1", "Hi", "/edit 9"))
    edited = run_chat(ScriptedEngine(), screen)
    assert [turn.user for turn in edited.turns] == ["Hi"]
    assert "Hello there" in screen.drafts
    assert "expected a turn from 1 to 1" in screen.shown[-1]
    canceled = run_chat(ScriptedEngine(), ScriptedScreen(("Hello there", "/edit", "")))
    assert canceled.turns == first.turns[:1]


def test_the_instruction_is_shown_changed_and_marked() -> None:
    screen = ScriptedScreen(("Hello", f"/instruction {END_WITH_BYE.text}", "And?", "/instruction"))
    chat = run_chat(ScriptedEngine(), screen)
    assert chat.messages(0)[2]["content"] == f"And?\n\nFrom now on: {END_WITH_BYE.text}"
    assert screen.shown == [
        "✓ followed 1 of 1: ✓",
        f"Instruction: {END_WITH_BYE.text} (checked as closing: Bye.)",
        'It is sent with your next message, as "From now on: ...".',
        "✗ followed 1 of 2: ✓✗",
        f"Instruction: {END_WITH_BYE.text} (checked as closing: Bye.)",
    ]


def test_a_message_may_start_with_a_slash_and_the_status_counts_turns() -> None:
    screen = ScriptedScreen(("//etc is what?", "/help"))
    chat = run_chat(ScriptedEngine(), screen)
    assert [turn.user for turn in chat.turns] == ["/etc is what?"]
    assert screen.statuses[0] == "turn 1 · context 0 of 512, 512 left"
    assert screen.statuses[1].startswith("turn 2 · ")  # after the answer
    assert screen.statuses[2].startswith("turn 2 · context 13 of 512, 499 left")
    assert {command.usage for command in COMMANDS.values()} < set(screen.shown)


def test_params_are_shown_and_set() -> None:
    screen = ScriptedScreen(("/params", "/params seed=7 context=256 max_tokens=9", "Hello"))
    engine = ScriptedEngine()
    run_chat(engine, screen)
    assert screen.shown[:3] == [
        "temperature=0.7 max_tokens=12 seed=1 context=512",
        "The context is 256 tokens now.",
        "temperature=0.7 max_tokens=9 seed=7 context=256",
    ]
    assert engine.context == 256
    assert [(request.seed, request.max_tokens) for request in engine.requests] == [(7, 9)]


def test_a_mistake_ends_a_chat_without_a_user() -> None:
    with pytest.raises(GattError, match=r"Unknown command /undone\. Did you mean '/undo'\?"):
        run_chat(ScriptedEngine(), ScriptedScreen(("/undone", "Hi"), interactive=False))


def test_a_full_context_loses_nothing_and_offers_more() -> None:
    def run(choices: str, answer: Callable[[Request], str] | None = None) -> Conversation:
        engine = ScriptedEngine(answer, 180) if answer else ScriptedEngine(context=180)
        screens.append(ScriptedScreen((user,), choices))
        engines.append(engine)
        return run_chat(engine, screens[-1], LONG_CHAT)

    user, screens, engines = "And the number 9?", list[ScriptedScreen](), list[ScriptedEngine]()
    assert run("q") == LONG_CHAT
    assert screens[-1].drafts[-1] == user  # to be sent again
    assert "Nothing has been dropped" in screens[-1].shown[0]
    assert screens[-1].offers == [["l", "s", "q"]]

    larger = run("l")
    assert engines[-1].context == 360
    assert larger.turns[:7] == LONG_CHAT.turns
    assert [turn.user for turn in larger.turns[7:]] == [user]

    summarized = run("sy")
    last_users = [turn.user for turn in LONG_CHAT.turns[-3:]]
    assert [turn.user for turn in summarized.turns[2:]] == [*last_users, user]
    assert summarized.messages(0)[:2] == LONG_CHAT.messages(0)[:2]
    assert summarized.turns[1].is_summary
    assert summarized.turns[1].answers[0].strip()

    assert run("snq") == LONG_CHAT
    assert run("sq", lambda request: " ") == LONG_CHAT
    assert any("No summary was generated" in text for text in screens[-1].shown)


def test_a_message_that_was_not_sent_is_not_a_command_when_it_comes_back() -> None:
    message = "//undo does what?"
    screen = ScriptedScreen((message,), "q")
    run_chat(ScriptedEngine(context=180), screen, LONG_CHAT)
    assert screen.drafts[-1] == message


@pytest.mark.parametrize("command", [("/retry",), ("/edit", "What is hail?")])
def test_a_turn_that_was_not_answered_again_is_not_sent_twice(command: tuple[str, ...]) -> None:
    answers = iter(("Ahoy! It is water.", ""))
    stopped = ScriptedEngine(lambda request: next(answers), finish="cancelled")
    screen = ScriptedScreen(("What is rain?", *command))
    chat = run_chat(stopped, screen)
    assert [turn.user for turn in chat.turns] == ["What is rain?"]
    assert screen.drafts[-1] == ""


@pytest.mark.parametrize(
    "command", ["/save ~nobody-here/x.json", f"/save {'x' * 300}", "/load .", "/export /"]
)
def test_a_mistyped_file_does_not_end_the_chat(command: str) -> None:
    screen = ScriptedScreen(("Hello", command, "And?"))
    assert len(run_chat(ScriptedEngine(), screen).turns) == 2
    assert re.search("Name another file|expected the name of a file", "".join(screen.shown), re.I)


def test_a_summary_is_not_offered_twice_in_a_row() -> None:
    short = LONG_CHAT.with_summaries(3, ["In short."])
    screen = ScriptedScreen(("word " * 90,), "q")
    run_chat(ScriptedEngine(context=180), screen, short)
    assert screen.offers == [["l", "q"]]


def test_several_models_save_and_load_a_file_each(tmp_path: Path) -> None:
    def chat_with_two(*lines: str) -> tuple[Conversation, ScriptedScreen]:
        screen = ScriptedScreen(lines, "n")
        chat = open_chat(ScriptedEngine(), screen, names=("first", "second"))
        asyncio.run(chat_loop(chat))
        return chat.session.conversation, screen

    file = tmp_path / "chat.json"
    chat, _ = chat_with_two("Hello", f"/save {file}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat-2.json", "chat.json"]
    loaded, screen = chat_with_two(f"/load {file}")
    assert loaded == chat
    assert screen.shown == [f"Loaded {file}: 1 turn."]
    unsaved, screen = chat_with_two("Bonjour", f"/load {file}")
    assert [turn.user for turn in unsaved.turns] == ["Bonjour"]
    assert screen.offers == [["y", "n"]]
    (tmp_path / "chat-2.json").write_text(
        '[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]'
    )
    _, screen = chat_with_two(f"/load {file}")
    assert "has other user messages" in screen.shown[-1]


def test_mistakes_are_explained_and_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "existing.json").write_text("mine")
    commands = {
        "/xyz": "Unknown command /xyz. /help lists",
        "/par": "Did you mean '/params'?",
        f"/load {tmp_path / 'bad.json'}": "is not JSON",
        "/probe": "expected a question",
        f"/probe {'word ' * 600}": "no room for this question",
        f"/save {tmp_path / 'existing.json'}": "exists already",
        "/params temp=1": "Did you mean 'temperature'?",
        "/params max_tokens=many": "expected a number",
        "/params context=4096": "expected 64 to 1024",
        "/params temperature=-1": "expected 0",
        "/edit first": "expected a turn from 1 to 1",
        "/export": "expected the name of a file",
    }
    screen = ScriptedScreen(("Hello there", *commands))
    chat = run_chat(ScriptedEngine(), screen)
    assert len(chat.turns) == 1
    assert (tmp_path / "existing.json").read_text() == "mine"
    problems = screen.shown[-len(commands) :]
    for problem, expected in zip(problems, commands.values(), strict=True):
        assert expected in problem
    overwrite = ScriptedScreen(("Hello there", f"/save! {tmp_path / 'existing.json'}"))
    saved = run_chat(ScriptedEngine(), overwrite)
    assert saved.messages(0) == read_chat(tmp_path / "existing.json")


def test_half_of_an_emoji_in_a_loaded_chat_is_replaced(tmp_path: Path) -> None:
    """JSON can have it, and neither a tokenizer nor a file in UTF-8 accepts it."""
    file = tmp_path / "chat.json"
    messages = [
        {"role": "user", "content": "Hi \ud83d"},
        {"role": "assistant", "content": "Ahoy! \ude00"},
    ]
    file.write_text(json.dumps(messages))
    screen = ScriptedScreen((f"/load {file}",))
    chat = run_chat(ScriptedEngine(), screen)
    contents = [message["content"] for message in chat.messages(0)]
    assert contents == ["Hi \ufffd", "Ahoy! \ufffd"]


@pytest.mark.parametrize("command", ["/retry", "/undo", "/edit", "/save x", "/export x"])
def test_commands_that_need_a_turn(command: str) -> None:
    screen = ScriptedScreen((command,))
    run_chat(ScriptedEngine(), screen)
    assert screen.shown == ["The chat has no turns yet. Type a message first."]


def test_counts_are_pluralized() -> None:
    counts = [pluralize(count, "turn") for count in (0, 1, 2)]
    assert counts == ["0 turns", "1 turn", "2 turns"]
