"""The chat: its state, its files, its cache, and a real terminal as a user sees it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pipeline.chat.commands import chat_loop
from pipeline.chat.conversation import (
    SUMMARY_REQUEST,
    Conversation,
    StandingInstruction,
    parse_conversation,
    tally,
)
from pipeline.chat.files import append_dialogue, read_chat, write_chat
from pipeline.chat.session import ChatParams, Session
from pipeline.data.dialogues import load_dialogues
from pipeline.errors import GattError
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import KINDS, compatible
from pipeline.gatt.instructions import parse_instruction, render_instruction
from pipeline.gguf.reader import open_gguf
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.chat_engine import ChatEngine
from pipeline.inference.context import BatchContext
from pipeline.inference.model import Adapter, LoadedModel
from pipeline.records import Completion, Constraint, Dialogue, Request

AHOY, BYE = Constraint("opening", "Ahoy!"), Constraint("closing", "Bye.")
TOLD, THEN = (StandingInstruction(render_instruction((c,)).text, (c,)) for c in (AHOY, BYE))


def _said(
    *turns: tuple[str, str], instruction: StandingInstruction = TOLD, system: str = ""
) -> Conversation:
    chat = Conversation(system, instruction)
    for user, answer in turns:
        chat = chat.with_turn(user, (answer,))
    return chat


def test_every_wording_of_a_kind_is_recognized() -> None:
    known = [
        Constraint(name, value)
        for name, kind in KINDS.items()
        if not kind.judged
        for value in kind.values
    ]
    asked = [(c,) for c in known] + [(a, b) for a, b in product(known, known) if compatible(a, b)]
    assert len(asked) > 3000
    for number, constraints in enumerate(asked):
        instruction = render_instruction(constraints, number)
        assert parse_instruction(instruction.text) == constraints, instruction.text
        assert parse_instruction(instruction.short) == constraints, instruction.short
    assert parse_instruction("begin every answer with “Hark!”") == (Constraint("opening", "Hark!"),)
    assert (
        parse_instruction("Be kind to me.")
        == parse_instruction("In all your answers, talk like a pirate.")
        == ()
    )


def test_an_instruction_that_changes_is_said_as_in_the_training_data() -> None:
    users, answers = (
        ("Hello", "And rain?", "And snow?", "Thanks"),
        ("Ahoy! Hi.", "Ahoy! Wet.", "White. Bye."),
    )
    one, then = (render_instruction((c,)) for c in (AHOY, BYE))
    taught = AssignedDialogue(
        Dialogue("1", "", users), one, "plain", next_instruction=then, change_turn=2
    ).student_prompt(answers, "Be brief.")
    chat = _said(*zip(users[:2], answers, strict=False), system="Be brief.")
    chat = Conversation(chat.system, THEN, chat.turns).with_turn(users[2], answers[2:])
    assert chat.messages(0, users[3]) == taught


def test_undo_and_edit_give_back_the_instruction_of_their_turn() -> None:
    chat = _said(("One", "Ahoy! 1."), ("Two", "Ahoy! 2."))
    changed = Conversation("", THEN, chat.turns).with_turn("Three", ("3. Bye.",))
    assert [t.user for t in changed.without_last_turn().turns] == ["One", "Two"]
    assert changed.without_last_turn().instruction == THEN
    assert changed.before(2) == _said(("One", "Ahoy! 1."))
    assert changed.before(3).instruction == THEN


def test_the_tally_counts_what_obeys_and_is_an_answer() -> None:
    answers = (
        "Ahoy! Rain falls from clouds.",
        "Rain falls.",
        "Ahoy! Rain falls from clouds.",
        "Ahoy!",
    )
    chat = _said(*(("What is rain?", answer) for answer in answers))
    assert tally(chat.marks(0)) == "kept 1 of 4: ✓✗~~"
    assert chat.verdict(0, 3) == ("~", "repeat")
    assert chat.verdict(0, 4) == ("~", "empty")
    assert tally(_said(("a", "Hi."), instruction=StandingInstruction("Be nice.")).marks(0)) == ""


def test_a_summary_spares_the_first_turn_the_last_and_a_change_of_instruction() -> None:
    chat = _said(*((f"u{n}", f"a{n}") for n in range(1, 6)))
    chat = Conversation("", THEN, chat.turns)
    for n in range(6, 11):
        chat = chat.with_turn(f"u{n}", (f"a{n}",))
    assert [m["content"] for m in chat.summary_prompt(3, 0)] == [
        "u2",
        "a2",
        "u3",
        "a3",
        "u4",
        "a4",
        "u5",
        "a5",
        "u7",
        "a7",
        SUMMARY_REQUEST,
    ]
    short = chat.with_summaries(3, ["In short."])
    assert [t.user for t in short.turns] == ["u1", "u6", SUMMARY_REQUEST, "u8", "u9", "u10"]
    said = short.messages(0, "u11")
    assert said[0]["content"] == f"u1\n\n{TOLD.text}"
    assert said[2]["content"] == f"u6\n\nFrom now on: {THEN.text}"
    assert len(short.marks(0)) == 5


@pytest.mark.parametrize("told", [TOLD, StandingInstruction("Be very nice to me, please.")])
def test_a_saved_chat_is_the_same_when_it_is_loaded(
    told: StandingInstruction, tmp_path: Path
) -> None:
    chat = _said(
        ("One\n\nand a half", "Ahoy! 1."), ("Two", "2."), instruction=told, system="Be brief."
    )
    chat = Conversation("Be brief.", THEN, chat.turns).with_turn("Three", ("3. Bye.",))
    write_chat(tmp_path / "chat.json", chat.messages(0))
    messages = read_chat(tmp_path / "chat.json")
    assert (
        json.loads((tmp_path / "chat.json").read_text()) == list(messages) == list(chat.messages(0))
    )
    found = parse_conversation([messages], StandingInstruction())
    assert found.messages(0, "Four") == chat.messages(0, "Four")
    assert found.turns[2].instruction == found.instruction == THEN
    if told == TOLD:
        assert found == chat


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not JSON"),
        ("[]", "has no message"),
        ('[{"role": "user"}]', "is no chat"),
        ('{"a": 1}', "is no chat"),
        ('[{"role": "user", "content": "a"}]', "ends with a message of the user"),
        (
            '[{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]',
            "message 2 .* is of user; expected assistant",
        ),
        ('[{"role": "tool", "content": "a"}]', "is of tool; expected user"),
    ],
)
def test_a_file_that_is_no_chat(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(content)
    with pytest.raises(GattError, match=said):
        read_chat(tmp_path / "chat.json")
    with pytest.raises(GattError, match="Cannot read"):
        read_chat(tmp_path / "none.json")


def test_exported_dialogues_are_read_by_dialogues_source(tmp_path: Path) -> None:
    file = tmp_path / "new" / "mine.jsonl"
    chat = _said(("One", "Ahoy! 1."), ("Two", "2.")).without_instruction()
    assert append_dialogue(file, chat.messages(0)) == 1
    file.write_text(file.read_text().rstrip())  # as some editors leave a file
    assert append_dialogue(file, chat.messages(0)) == 2
    assert [d.turns for d in load_dialogues(str(file))] == [("One", "Two")] * 2
    file.write_text("no JSON")
    with pytest.raises(GattError, match="line 1"):
        append_dialogue(file, chat.messages(0))
    assert file.read_text() == "no JSON"


class Script:
    """A screen on which everything is typed beforehand; what is shown is kept."""

    def __init__(self, *said: str, chosen: Sequence[str] = (), watched: bool = True) -> None:
        self.watched = watched
        self._said, self._chosen = iter(said), iter(chosen)
        self.shown: list[str] = []
        self.drafts: list[str] = []
        self.offered: list[Mapping[str, str]] = []
        self.status = ""

    def ask(self, status: str, draft: str = "") -> str:
        self.status = status
        self.drafts.append(draft)
        text = next(self._said, None)
        if text is None:
            raise EOFError
        return text

    def change(self, status: str, text: str) -> str:
        self.drafts.append(text)
        return next(self._said)

    def choose(self, question: str, options: Mapping[str, str]) -> str:
        self.shown.append(question)
        self.offered.append(options)
        return next(self._chosen)

    @contextmanager
    def answering(
        self, names: Sequence[str], status: Callable[[], str], stop: Callable[[], None]
    ) -> Iterator[Callable[[int, str], None]]:
        yield lambda side, piece: None

    def beside(self, names: Sequence[str], remarks: Sequence[str]) -> None:
        self.shown += remarks

    def say(self, text: str) -> None:
        self.shown.append(text)

    complain = say

    def explain(self, rows: Mapping[str, str]) -> None:
        self.shown += rows


@pytest.fixture(scope="module")
def weights(base: Path) -> Iterator[LoadedModel]:
    loaded = LoadedModel(open_gguf(base))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of the embedded model, strong enough to be heard."""
    import gguf
    import numpy as np

    file = tmp_path_factory.mktemp("adapter") / "random.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    draw = np.random.default_rng(1)
    for tensor in open_gguf(base).tensors:
        if tensor.name.endswith("attn_q.weight"):
            for half, shape in (("a", (4, tensor.shape[1])), ("b", (tensor.shape[0], 4))):
                writer.add_tensor(
                    f"{tensor.name}.lora_{half}", draw.normal(0, 0.12, shape).astype(np.float32)
                )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _talk(
    weights: LoadedModel,
    screen: Script,
    context: int = 512,
    max_tokens: int = 12,
    chat: Conversation | None = None,
) -> Session:
    speakers = ChatEngine([(weights, None)], context)
    session = Session(
        screen,
        speakers,
        ["model"],
        1024,
        ChatParams(0.7, max_tokens, context),
        chat or Conversation("", TOLD),
    )
    try:
        chat_loop(session)
    finally:
        session.speakers.close()
    return session


def test_turn_20_feeds_no_more_than_turn_2(
    weights: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []
    feed = BatchContext._feed
    monkeypatch.setattr(
        BatchContext, "_feed", lambda self, rows: (fed.append(len(rows)), feed(self, rows))[1]
    )
    screen, by_turn = Script(*["Say one word about rain."] * 20), []
    beside = screen.beside
    monkeypatch.setattr(
        screen,
        "beside",
        lambda names, remarks: (by_turn.append(sum(fed)), fed.clear(), beside(names, remarks)),
    )
    session = _talk(weights, screen, context=1024, max_tokens=4)
    assert len(session.chat.turns) == 20
    assert session.used() > 400
    # Tokens are fed two by two, one for company: a turn's own are 20 or so.
    assert max(by_turn[1:]) <= by_turn[1] + 12 < 60


def test_a_probe_leaves_the_chat_and_what_follows_as_they_were(weights: LoadedModel) -> None:
    plain = _talk(weights, Script("Hello there", "What is rain?"))
    asked = Script("Hello there", "/probe What is your name?", "What is rain?")
    probed = _talk(weights, asked)
    assert any("as if this had not been said" in text for text in asked.shown)
    assert probed.chat == plain.chat
    assert len(plain.chat.turns) == 2


def test_undo_retry_and_edit(weights: LoadedModel) -> None:
    first = _talk(weights, Script("Hello there", "What is rain?"))
    without_last_turn = _talk(weights, Script("Hello there", "What is rain?", "/undo"))
    assert without_last_turn.chat.turns == first.chat.turns[:1]
    again = _talk(weights, Script("Hello there", "What is rain?", "/retry"))
    assert [t.user for t in again.chat.turns] == ["Hello there", "What is rain?"]
    assert again.chat.turns[0] == first.chat.turns[0]
    assert again.chat.turns[1].answers != first.chat.turns[1].answers
    screen = Script("Hello there", "What is rain?", "/edit 1", "Hi", "/edit 9")
    edited = _talk(weights, screen)
    assert [t.user for t in edited.chat.turns] == ["Hi"]
    assert "Hello there" in screen.drafts
    assert "expected a turn from 1 to 1" in screen.shown[-1]


def test_mistakes_are_said_and_change_nothing(weights: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "there.json").write_text("mine")
    commands = {
        "/sav x": "Did you mean /save?",
        f"/load {tmp_path / 'bad.json'}": "is not JSON",
        "/probe": "expected a question",
        f"/save {tmp_path / 'there.json'}": "exists already",
        "/params temprature=1": "Did you mean temperature?",
        "/params max_tokens=many": "expected a number",
        "/params context=4096": "expected 64 to 1024",
        "/params temperature=-1": "expected 0",
        "/export": "expected the name of a file",
    }
    screen = Script("Hello there", *commands)
    session = _talk(weights, screen)
    assert len(session.chat.turns) == 1
    assert (tmp_path / "there.json").read_text() == "mine"
    for said, expected in zip(screen.shown[-len(commands) :], commands.values(), strict=True):
        assert expected in said
    overwrite = Script("Hello there", f"/save! {tmp_path / 'there.json'}")
    assert _talk(weights, overwrite).chat.messages(0) == read_chat(tmp_path / "there.json")


def test_a_full_context_loses_nothing_and_offers_more(weights: LoadedModel) -> None:
    before = _said(
        *(
            (f"Tell me about the number {n}.", f"Ahoy! The number {n} is nice and rather small.")
            for n in range(1, 8)
        )
    )
    user = "And the number 9?"
    stopped = Script(user, chosen="q")
    assert _talk(weights, stopped, 256, 16, before).chat == before
    assert stopped.drafts[-1] == user  # to be sent again
    assert "Nothing has been dropped" in stopped.shown[0]
    assert list(stopped.offered[0]) == ["l", "s", "q"]

    larger = _talk(weights, Script(user, chosen="l"), 256, 16, before)
    assert larger.speakers.context == 512
    assert larger.chat.turns[:7] == before.turns
    assert len(larger.chat.turns) == 8

    summed = _talk(weights, Script(user, chosen="sy"), 256, 16, before)
    assert [t.user for t in summed.chat.turns[2:]] == [*(t.user for t in before.turns[-3:]), user]
    assert summed.chat.messages(0)[:2] == before.messages(0)[:2]
    assert summed.chat.turns[1].is_summary
    assert summed.chat.turns[1].answers[0].strip()

    kept = _talk(weights, Script(user, chosen="snq"), 256, 16, before)
    assert kept.chat == before


def test_two_models_over_one_copy_of_the_weights_answer_as_each_alone(
    weights: LoadedModel, adapter: Path
) -> None:
    asked = [({"role": "user", "content": text},) for text in ("What is rain?", "Name a river.")]
    alone: list[list[Completion]] = []
    for laid in (Adapter(adapter), None):
        with BatchEngine(weights, 1, 256, adapter=laid) as llama:
            alone.append([llama.complete(Request(messages, 1, 16)) for messages in asked])
    speakers = ChatEngine([(weights, Adapter(adapter)), (weights, None)], 256)
    try:
        together = [
            dict(
                heard
                for heard in speakers.answer([Request(messages, 1, 16)] * 2)
                if isinstance(heard[1], Completion)
            )
            for messages in asked
        ]
    finally:
        speakers.close()
    assert [[turn[side] for turn in together] for side in (0, 1)] == [
        [Completion(c.text, c.tokens, c.prompt_tokens, c.finish) for c in side] for side in alone
    ]
    assert alone[0] != alone[1]


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", "pipeline", "chat", "smollm2-135m", *map(str, words)]


def _piped(text: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(*words), input=text, capture_output=True, text=True, check=False)


def test_lines_off_a_terminal(tmp_path: Path) -> None:
    words = ("--instruction", "Begin with Ahoy!", "--check", "opening=Ahoy!", "--max-tokens", 12)
    done = _piped(f"Hello there\nWhat is rain?\n/save {tmp_path / 'chat.json'}\n", *words)
    assert done.returncode == 0, done.stderr
    answers = [m["content"] for m in read_chat(tmp_path / "chat.json") if m["role"] == "assistant"]
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)
    assert len(answers) == 2
    assert "of 2: " in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    wrong = _piped("/undoo\n", *words, "--load", tmp_path / "chat.json")
    assert wrong.returncode == 1
    assert "Loaded" in wrong.stderr
    assert wrong.stderr.splitlines()[-1].startswith(
        "gatt: Unknown command /undoo. Did you mean /undo?"
    )
    full = _piped(f"{'word ' * 60}\n", "--context", 64, "--max-tokens", 32)
    assert full.returncode == 1
    assert "nearly full" in full.stderr.splitlines()[-1]


def test_what_cannot_be_is_said_in_a_line(base: Path, tmp_path: Path, gatt: Any) -> None:
    for words, said in (
        (("chat", "smollm2-135n"), "Did you mean 'smollm2-135m'"),
        (("chat", base, "--adapter", base), "is no adapter"),
        (("chat", base, "--check", "opening"), "needs a value"),
        (("chat", base, "--temperature", "-1"), "expected 0"),
        (("chat", base, "--load", tmp_path / "none.json"), "Cannot read"),
    ):
        done = gatt(*words)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert said in done.stderr.splitlines()[-1]


class Tmux:
    """A terminal of its own, with the chat in it."""

    def __init__(self, folder: Path, width: int, words: Sequence[object]) -> None:
        self._server = ["tmux", "-L", f"gatt-{os.getpid()}", "-f", "/dev/null"]
        chat = f"{shlex.join(_command(*words))}; echo left; sleep 600"
        environment = {
            **os.environ,
            "XDG_DATA_HOME": str(folder),
            "TERM": "xterm-256color",
            "LC_ALL": "C.UTF-8",
        }
        size = ["-x", str(width), "-y", "40"]
        subprocess.run(
            [*self._server, "new-session", "-d", *size, chat],
            check=True,
            env=environment,
            cwd=Path.cwd(),
        )

    def type(self, *keys: str) -> None:
        subprocess.run([*self._server, "send-keys", *keys], check=True)

    def screen(self, *options: str) -> str:
        return subprocess.run(
            [*self._server, "capture-pane", "-p", *options],
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def wait(self, seen: Callable[[str], bool] | str, seconds: float = 90) -> str:
        end = time.monotonic() + seconds
        while True:
            screen = self.screen()
            if (seen in screen) if isinstance(seen, str) else seen(screen):
                return screen
            assert time.monotonic() < end, f"waited for {seen}; the screen is\n{screen}"
            time.sleep(0.05)

    def close(self) -> None:
        subprocess.run([*self._server, "kill-server"], check=False)


@pytest.mark.skipif(
    not shutil.which("tmux"), reason="tmux, the terminal of this test, is not installed"
)
@pytest.mark.slow
def test_a_terminal_as_a_user_sees_it(adapter: Path, tmp_path: Path) -> None:
    words = (
        "--adapter",
        adapter,
        "--compare",
        "smollm2-135m",
        "--instruction",
        TOLD.text,
        "--max-tokens",
        1000,
    )
    names = ("smollm2-135m + random.gguf", "smollm2-135m ─")
    tmux = Tmux(tmp_path, 120, words)
    try:
        tmux.wait("turn 1 · context 0 of 4096, 4096 left")
        assert "checked as opening: Ahoy!" in tmux.screen()
        tmux.type("Write a long story", "M-Enter", "about **rain**.", "Enter")
        sizes = set()
        tmux.wait(
            lambda s: (
                "Ctrl-C stops" in s
                and (sizes.add(len(s.split("──", 1)[-1].split())) or len(sizes) > 3)
            )
        )  # it streams
        tmux.type("C-c")
        screen = tmux.wait("turn 2 · context")
        assert any(
            all(name in line for name in names) for line in screen.splitlines()
        )  # side by side
        assert (
            screen.count("kept 0 of 1: ✗")
            + screen.count("kept 1 of 1: ✓")
            + screen.count("obeys, but")
            >= 2
        )
        assert screen.count("stopped") == 2
        assert "^C" not in screen

        tmux.type(f"/save {tmp_path / 'chat.json'}", "Enter")
        tmux.wait("Saved 1 turn")
        (user, answer), (same, other) = (
            read_chat(tmp_path / name) for name in ("chat.json", "chat-2.json")
        )
        assert (
            user["content"]
            == same["content"]
            == f"Write a long story\nabout **rain**.\n\n{TOLD.text}"
        )
        assert answer["content"] != other["content"]
        tmux.type("/undo", "Enter")
        tmux.wait("Took back turn 1: Write a long story")
        tmux.wait("turn 1 · context 0 of")
        tmux.type(f"/load {tmp_path / 'chat.json'}", "Enter")
        tmux.wait("turn 2 · context")

        tmux.type("/params max_tokens=8", "Enter")
        tmux.wait("max_tokens=8 context")
        subprocess.run([*tmux._server, "resize-window", "-x", "60"], check=True)
        tmux.type(*["Up"] * 6, "Enter")  # the first message again
        screen = tmux.wait("turn 3 · context")
        assert not any(all(name in line for name in names) for line in screen.splitlines())
        assert screen.count("of 2: ") == 2
        tmux.type("C-c")
        tmux.wait("Ctrl-D leaves the chat")
        tmux.type("C-d")
        tmux.wait("left")
    finally:
        tmux.close()
