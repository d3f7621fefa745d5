"""A chat off a terminal: what is piped is sent, and no answer, empty or not, ends it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cli import call_gatt
from support.scripted_model import PLAIN_TEMPLATE, write_scripted_gguf

from pipeline.chat.files import read_chat

THINKING = ("<think>", "Hmm", "</think>", "Yes", "!")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return models that answer at once, think first, never end to think, or cannot be asked."""
    broken = "{{ messages[0].content.nothing() }}<|begin|>"
    return {
        name: write_scripted_gguf(tmp_path_factory.mktemp(name), words, template, name)
        for name, words, template in (
            ("yes", ("Yes", "!"), PLAIN_TEMPLATE),
            ("empty", (), PLAIN_TEMPLATE),
            ("thinking", THINKING, PLAIN_TEMPLATE),
            ("opened", THINKING, PLAIN_TEMPLATE + "<think>"),
            ("endless", ("<think>", "Hmm"), PLAIN_TEMPLATE),
            ("broken", ("Yes",), broken),
        )
    }


def _pipe(monkeypatch: pytest.MonkeyPatch, text: str, *words: object) -> Any:
    """Run `gatt chat` with a text on stdin."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return call_gatt("chat", *words, "--context", 256, "--max-tokens", 8, "--temperature", 0)


def test_all_of_stdin_is_one_message(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The river Elbe is long.\n\n/save is a word.\n  Which river?\n"
    sent: list[str] = []
    from pipeline.chat.session import ChatSession

    turn = ChatSession.turn

    async def record(session: ChatSession, user: str, *others: Any) -> Any:
        sent.append(user)
        return await turn(session, user, *others)

    monkeypatch.setattr(ChatSession, "turn", record)
    done = _pipe(monkeypatch, text, models["yes"])
    assert (done.returncode, done.stdout) == (0, "Yes!\n")
    assert sent == [text.rstrip("\n")]
    assert "All of stdin is one message" in done.stderr
    done = _pipe(monkeypatch, "/help is not a command here", models["yes"])
    assert (done.returncode, sent[1]) == (0, "/help is not a command here")
    for nothing in ("", "\n \n"):
        done = _pipe(monkeypatch, nothing, models["yes"])
        assert (done.returncode, done.stdout, len(sent)) == (0, "", 2)


def test_lines_are_messages_and_commands_if_asked_for(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "chat.json"
    text = f"One.\n\n   \nTwo.\n/save {file}\nThree.\n"
    done = _pipe(monkeypatch, text, models["yes"], "--lines")
    assert (done.returncode, done.stdout) == (0, "Yes!\n" * 3)
    users = [m["content"] for m in read_chat(file) if m["role"] == "user"]
    assert users == ["One.", "Two."]


def test_an_empty_answer_is_a_turn(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = _pipe(monkeypatch, "First paragraph.\nSecond line.\n", models["empty"])
    assert (done.returncode, done.stdout) == (0, "\n")
    assert "empty: the model ended its answer at once" in done.stderr
    file = tmp_path / "chat.json"
    done = _pipe(monkeypatch, f"One.\nTwo.\n/save {file}\n", models["empty"], "--lines")
    assert (done.returncode, done.stdout) == (0, "\n\n")
    assert done.stderr.count("empty: the model ended its answer at once") == 2
    assert [m["content"] for m in json.loads(file.read_text())] == ["One.", "", "Two.", ""]
    assert "Stopped" not in done.stderr


@pytest.mark.parametrize("model", ["thinking", "opened"])
def test_thoughts_are_not_the_answer(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    file = tmp_path / "chat.json"
    words = (models[model], "--lines", "--instruction", "Say yes.", "--check", "opening=Yes")
    done = _pipe(monkeypatch, f"One.\nTwo.\n/save {file}\n", *words)
    assert (done.returncode, done.stdout) == (0, "Yes!\nYes!\n")
    assert done.stderr.count("follows the instruction") == 2
    assert [m["content"] for m in json.loads(file.read_text())[1::2]] == ["Yes!", "Yes!"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("One.\n"))
    done = call_gatt("chat", models[model], "--max-tokens", 2, "--temperature", 0)
    assert done.stdout == "Yes!\n"  # a thought does not spend the answer's two tokens


def test_thoughts_without_an_end_are_no_answer(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = _pipe(monkeypatch, "One.\n", models["endless"])
    assert (done.returncode, done.stdout) == (0, "\n")
    assert "no answer: its thoughts did not end" in done.stderr


def test_a_template_that_fails_is_one_line(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = _pipe(monkeypatch, "One.\n", models["broken"])
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gatt: ")][-1:]
    assert "chat template of broken.gguf fails" in line
    assert "Traceback" not in done.stderr
