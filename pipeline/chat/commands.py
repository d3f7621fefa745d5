"""What a user can do in a chat besides talking: the commands, and the loop that takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pipeline.chat.conversation import (
    NO_INSTRUCTION,
    Conversation,
    StandingInstruction,
    parse_conversation,
)
from pipeline.chat.files import append_dialogue, read_chat, write_chat
from pipeline.chat.session import Session, did_you_mean, pluralize
from pipeline.errors import GattError
from pipeline.gatt.instructions import parse_instruction


def chat_loop(session: Session) -> None:
    """Take messages and commands until the user leaves.

    Raises:
        GattError: a mistake where nobody is there to try again.
    """
    while True:
        draft, session.draft = session.draft, ""
        try:
            said = session.screen.ask(session.status(), draft)
        except EOFError:
            return
        if said == "/quit":
            return
        try:
            if said.startswith("/") and not said.startswith("//"):
                _command(session, said)
            else:
                session.turn(said[said.startswith("//") :])
        except GattError as error:
            if not session.screen.watched:
                raise
            session.screen.complain(str(error))


def show_instruction(session: Session, text: str = "") -> None:
    """/instruction: give one, or show the one in force and how it is checked."""
    if text:
        session.chat = replace(
            session.chat, instruction=StandingInstruction(text, parse_instruction(text))
        )
    told = session.chat.instruction
    if not told.text:
        session.screen.say("No instruction. /instruction TEXT gives one.")
        return
    names = ", ".join(c.name for c in told.constraints)
    checked = (
        f"checked as {names}"
        if names
        else "not checked: its wording is none that `word` knows; --check names a kind"
    )
    session.screen.say(f"Instruction: {told.text} ({checked})")
    if text and session.chat.turns:
        session.screen.say('It goes with your next message, as "From now on: ...".')


def load(session: Session, text: str) -> None:
    """/load: go on with a saved chat, under the present instruction if nothing was said yet.

    Raises:
        GattError: the file is no chat; the present one stays.
    """
    path = _path(text, "/load FILE")
    others = [_other(path, side) for side in session.sides[1:]]
    sides = [read_chat(file if file.exists() else path) for file in (path, *others)]
    users = [[m["content"] for m in side if m["role"] != "assistant"] for side in sides]
    if any(one != users[0] for one in users):
        raise GattError(
            f"{others[0]} has other messages of the user than {path}. Move it away, or load another chat."
        )
    if session.screen.watched and session.unsaved:
        question = "The present chat is not saved, and would be gone."
        if session.screen.choose(question, {"y": f"load {path}", "n": "stay"}) == "n":
            return
    session.chat = session.saved = parse_conversation(
        sides, NO_INSTRUCTION if session.chat.turns else session.chat.instruction
    )
    session.screen.say(f"Loaded {path}: {pluralize(session.chat.turns)}.")


def _command(session: Session, said: str) -> None:
    name, _, rest = said.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise GattError(
            f"Unknown command {name}.{did_you_mean(name, COMMANDS)} /help lists them; a message begins with // instead."
        )
    command.act(session, rest.strip())


def _retry(session: Session, text: str) -> None:
    last = _begun(session).turns[-1]
    _again(session, session.chat.without_last_turn(), last.user)


def _again(session: Session, start: Conversation, user: str) -> None:
    """Go on from `start` with another turn; if none comes of it, the chat stays as it was."""
    before, session.chat = session.chat, start
    try:
        session.turn(user)
    finally:
        if len(session.chat.turns) <= len(start.turns):
            session.chat = before


def _undo(session: Session, text: str) -> None:
    taken = _begun(session).turns[-1].user
    session.chat = session.chat.without_last_turn()
    session.screen.say(
        f"Took back turn {len(session.chat.turns) + 1}: {' '.join(taken.split())[:60]}"
    )


def _edit(session: Session, text: str) -> None:
    count = len(_begun(session).turns)
    number = int(text) if text.isdecimal() else 0 if text else count
    if not 1 <= number <= count:
        raise GattError(f"/edit {text}: expected a turn from 1 to {count}.")
    later = (
        f" What comes after it ({pluralize(session.chat.turns[number:])}) will be dropped."
        if number < count
        else ""
    )
    session.screen.say(f"Turn {number}, to be changed and sent.{later} Ctrl-C leaves all as it is.")
    if user := session.screen.change(
        f"turn {number} of {count}", session.chat.turns[number - 1].user
    ):
        _again(session, session.chat.before(number), user)


def _probe(session: Session, text: str) -> None:
    if not text:
        raise GattError("/probe QUESTION: expected a question.")
    if session.used(text) + session.parameters.max_tokens > session.speakers.context:
        raise GattError(
            "The context has no room for this question and an answer. `/params max_tokens=...` makes some."
        )
    session.hear(
        [session.chat.messages(side, text) for side in session.sides], session.parameters.max_tokens
    )
    session.screen.say("Asked aside: the chat goes on as if this had not been said.")


def _save(session: Session, text: str, overwrite: bool = False) -> None:
    path = _path(text, "/save FILE")
    chat = _begun(session)
    files = {_other(path, side) if side else path: chat.messages(side) for side in session.sides}
    there = next((file for file in files if file.exists()), None)
    if there and not overwrite:
        raise GattError(
            f"{there} exists already; it is left as it is. Name another file, or `/save! {text}` overwrites it."
        )
    for file, messages in files.items():
        write_chat(file, messages)
    session.saved = chat
    session.screen.say(f"Saved {pluralize(chat.turns)}: {', '.join(map(str, files))}")


def _export(session: Session, text: str) -> None:
    path = _path(text, "/export FILE")
    count = append_dialogue(path, _begun(session).without_instruction().messages(0))
    session.screen.say(
        f"Appended, without the instruction: {path} (dialogues.source) has {count} of them now."
    )


def _params(session: Session, text: str) -> None:
    wanted = session.parameters.set(text).checked(session.limit)
    if wanted.context != session.parameters.context:
        if (used := session.used()) > wanted.context:
            raise GattError(
                f"context is {wanted.context}; expected at least the {used} tokens that the chat has already."
            )
        session.resize(wanted.context)
    session.parameters = wanted
    session.screen.say(str(wanted))


def _help(session: Session, text: str) -> None:
    session.screen.explain({c.usage: c.meaning for c in COMMANDS.values()} | _KEYS)


def _begun(session: Session) -> Conversation:
    if not session.chat.turns:
        raise GattError("Nothing has been said yet. Type a message first.")
    return session.chat


def _path(text: str, usage: str) -> Path:
    if not text:
        raise GattError(f"{usage}: expected the name of a file.")
    return Path(text).expanduser()


def _other(path: Path, side: int) -> Path:
    """Where the chat of a model beside the first one is kept."""
    return path.with_name(f"{path.stem}-{side + 1}{path.suffix}")


class _Command(NamedTuple):
    usage: str
    meaning: str
    act: Callable[[Session, str], None]


COMMANDS = {
    c.usage.split()[0]: c
    for c in (
        _Command(
            "/instruction [TEXT]",
            "show the instruction, or give one from your next message on",
            show_instruction,
        ),
        _Command("/retry", "answer the last message again, with another draw", _retry),
        _Command("/undo", "take the last turn back", _undo),
        _Command(
            "/edit [N]", "change your message of turn N, or the last, and go on from there", _edit
        ),
        _Command("/probe QUESTION", "ask aside: the chat goes on as if you had not", _probe),
        _Command("/save FILE", "write the chat as messages (JSON)", _save),
        _Command(
            "/save! FILE",
            "the same over a file that exists",
            lambda session, text: _save(session, text, True),
        ),
        _Command("/load FILE", "go on with a saved chat", load),
        _Command("/export FILE", "append the chat as a training dialogue (JSONL)", _export),
        _Command(
            "/params [NAME=VALUE]", "show or set temperature, max_tokens, context, seed", _params
        ),
        _Command("/help", "this", _help),
    )
}
_KEYS = {
    "Enter": "sends",
    "Alt-Enter, or \\ Enter": "begins a new line",
    "up and down": "bring back what you typed before",
    "Ctrl-C": "stops an answer, and keeps what was said so far",
    "Ctrl-D, or /quit": "leaves",
    "✓ ✗ ~": "the answer keeps the instruction; does not; obeys without being one (a loop, a repeat, empty)",
}
