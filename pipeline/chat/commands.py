"""The commands of a chat in a terminal, and the loop that reads them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from pipeline.chat.conversation import (
    NO_INSTRUCTION,
    Conversation,
    StandingInstruction,
    parse_conversation,
)
from pipeline.chat.files import append_dialogue, read_chat, write_chat
from pipeline.chat.session import SamplingParams, pluralize
from pipeline.chat.terminal import TerminalChat
from pipeline.errors import GattError, did_you_mean

MIN_CONTEXT = 64


async def chat_loop(chat: TerminalChat) -> None:
    """Read messages and commands until the user leaves.

    Raises:
        GattError: a mistake, if nobody is there to try again.
    """
    while True:
        draft, chat.draft = chat.draft, ""
        try:
            line = await chat.screen.read_message(await chat.status(), draft)
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                await _run_command(chat, line)
            else:
                await chat.send(line.removeprefix("/") if line.startswith("//") else line)
        except GattError as error:
            if not chat.screen.interactive:
                raise
            chat.screen.warn(str(error))


async def show_instruction(chat: TerminalChat, text: str = "") -> None:
    """/instruction: give an instruction, or show the active one and how it is checked."""
    session = chat.session
    if text:
        instruction = StandingInstruction.parse(text)
        session.conversation = replace(session.conversation, instruction=instruction)
    instruction = session.conversation.instruction
    if not instruction.text:
        chat.screen.info("No instruction. /instruction TEXT gives one.")
        return
    names = ", ".join(constraint.name for constraint in instruction.constraints)
    check = (
        f"checked as {names}" if names else "not checked: unknown wording; --check names the check"
    )
    chat.screen.info(f"Instruction: {instruction.text} ({check})")
    if text and session.conversation.turns:
        chat.screen.info('It is sent with your next message, as "From now on: ...".')


async def load(chat: TerminalChat, text: str) -> None:
    """/load: continue a saved chat, under the present instruction if there are no turns yet.

    Raises:
        GattError: the file is not a chat; the present one is unchanged.
    """
    session = chat.session
    path, *further_paths = _paths(chat, text, "/load FILE")
    chats = [read_chat(file if file.exists() else path) for file in (path, *further_paths)]
    users = [[m["content"] for m in messages if m["role"] != "assistant"] for messages in chats]
    for file, messages in zip(further_paths, users[1:], strict=True):
        if messages != users[0]:
            raise GattError(
                f"{file} has other user messages than {path}. Move it away, or load another chat."
            )
    if chat.screen.interactive and chat.is_unsaved:
        question = "The present chat is not saved and would be lost."
        options = {"y": f"load {path}", "n": "cancel"}
        if await chat.screen.choose(question, options) == "n":
            return
    present = session.conversation
    instruction = NO_INSTRUCTION if present.turns else present.instruction
    session.conversation = chat.saved = parse_conversation(chats, instruction)
    chat.screen.info(f"Loaded {path}: {pluralize(len(chat.saved.turns), 'turn')}.")


async def _run_command(chat: TerminalChat, line: str) -> None:
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        hint = did_you_mean(name, COMMANDS)
        raise GattError(
            f"Unknown command {name}. {hint + ' ' if hint else ''}/help lists the commands; a "
            "message that starts with a slash starts with //."
        )
    try:
        await command.run(chat, argument.strip())
    except OSError as error:  # a folder that nobody may enter, a name that is too long
        raise GattError(f"{line}: {error.strerror or error}. Name another file.") from error


async def _retry(chat: TerminalChat, text: str) -> None:
    conversation = chat.session.conversation
    user = chat.session.turn_at(len(conversation.turns)).user
    await _resend(chat, conversation.without_last_turn(), user)


async def _resend(chat: TerminalChat, conversation: Conversation, user: str) -> None:
    """Send a message in place of the turns that `conversation` does not have."""
    try:
        with chat.session.resume_from(conversation):
            await chat.send(user)
    finally:
        chat.draft = ""  # without an answer the turns are still there, and it would be another one


async def _undo(chat: TerminalChat, text: str) -> None:
    user = chat.session.undo()
    number = len(chat.session.conversation.turns) + 1
    chat.screen.info(f"Removed turn {number}: {' '.join(user.split())[:60]}")


async def _edit(chat: TerminalChat, text: str) -> None:
    conversation = chat.session.conversation
    count = len(conversation.turns)
    if text and not text.isdecimal():
        raise GattError(f"/edit {text}: expected a turn from 1 to {count}.")
    number = int(text) if text else count
    turn = chat.session.turn_at(number)
    dropped = count - number
    note = f" The {pluralize(dropped, 'turn')} after it will be removed." if dropped else ""
    chat.screen.info(f"Edit turn {number} and send it.{note} Ctrl-C cancels.")
    if user := await chat.screen.edit(f"turn {number} of {count}", turn.user):
        await _resend(chat, conversation.before(number), user)


async def _probe(chat: TerminalChat, text: str) -> None:
    if not text:
        raise GattError("/probe QUESTION: expected a question.")
    await chat.stream(lambda on_text: chat.session.probe(text, on_text))
    chat.screen.info("The question and its answers are not part of the chat.")


async def _save(chat: TerminalChat, text: str) -> None:
    paths = _paths(chat, text, "/save FILE")
    _require_turns(chat)
    for path in paths:
        if path.exists():
            raise GattError(
                f"{path} exists already and is unchanged. Name another file, or `/save! {text}` "
                "overwrites it."
            )
    await _save_over(chat, text)


async def _save_over(chat: TerminalChat, text: str) -> None:
    paths = _paths(chat, text, "/save! FILE")
    conversation = _require_turns(chat)
    for model_index, path in enumerate(paths):
        write_chat(path, conversation.messages(model_index))
    chat.saved = conversation
    count = pluralize(len(conversation.turns), "turn")
    chat.screen.info(f"Saved {count}: {', '.join(map(str, paths))}")


async def _export(chat: TerminalChat, text: str) -> None:
    path = _path(text, "/export FILE")
    messages = _require_turns(chat).without_instruction().messages(0)
    count = append_dialogue(path, messages)
    chat.screen.info(
        f"Appended without the instruction: {path} has {pluralize(count, 'dialogue')} for "
        "dialogues.source."
    )


async def _params(chat: TerminalChat, text: str) -> None:
    session, backend = chat.session, chat.backend
    sampling, context = parse_params(text, session.sampling, backend.context)
    if not MIN_CONTEXT <= context <= backend.max_context:
        raise GattError(
            f"context is {context}; expected {MIN_CONTEXT} to {backend.max_context}, for which "
            "the model was trained."
        )
    sampling.checked(context)
    if context != backend.context:
        if (used := await session.tokens_used()) > context:
            raise GattError(
                f"context is {context}; expected at least {used}, the tokens of the chat."
            )
        chat.resize(context)
    session.sampling = sampling
    params = {**asdict(sampling), "context": context}
    chat.screen.info(" ".join(f"{name}={value}" for name, value in params.items()))


def parse_params(text: str, sampling: SamplingParams, context: int) -> tuple[SamplingParams, int]:
    """Return the parameters and the context with the changes of "name=value name=value".

    Raises:
        GattError: an unknown name, or a value of another type.
    """
    values: dict[str, float] = {**asdict(sampling), "context": context}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in values:
            hint = did_you_mean(name, values)
            raise GattError(
                f"Unknown parameter {name!r}. {hint + ' ' if hint else ''}Expected name=value with "
                f"a name of {', '.join(values)}."
            )
        try:
            values[name] = type(values[name])(value)
        except ValueError as error:
            raise GattError(
                f"{name} is {value!r}; expected a number such as {values[name]}."
            ) from error
    changed = SamplingParams(values["temperature"], int(values["max_tokens"]), int(values["seed"]))
    return changed, int(values["context"])


async def _help(chat: TerminalChat, text: str) -> None:
    usages = {command.usage: command.meaning for command in COMMANDS.values()}
    chat.screen.print_table(usages | _KEYS)


def _require_turns(chat: TerminalChat) -> Conversation:
    chat.session.turn_at(1)
    return chat.session.conversation


def _path(text: str, usage: str) -> Path:
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise GattError(f"{text}: {error} Expected the name of a file.") from error
    if not path.name:
        raise GattError(f"{usage}: expected the name of a file.")
    return path


def _paths(chat: TerminalChat, text: str, usage: str) -> list[Path]:
    """Return a file for each model: chat.json, chat-2.json, ..."""
    path = _path(text, usage)
    numbers = range(2, len(chat.session.backend.names) + 1)
    return [path, *(path.with_name(f"{path.stem}-{n}{path.suffix}") for n in numbers)]


class _Command(NamedTuple):
    usage: str
    meaning: str
    run: Callable[[TerminalChat, str], Awaitable[None]]


COMMANDS = {
    command.usage.split()[0]: command
    for command in (
        _Command(
            "/instruction [TEXT]",
            "show the instruction, or give one from your next message on",
            show_instruction,
        ),
        _Command("/retry", "answer the last message again, with another seed", _retry),
        _Command("/undo", "remove the last turn", _undo),
        _Command("/edit [N]", "change your message of turn N, or the last, and resend it", _edit),
        _Command("/probe QUESTION", "ask without adding the question to the chat", _probe),
        _Command("/save FILE", "write the chat as messages (JSON)", _save),
        _Command("/save! FILE", "the same, overwriting the file", _save_over),
        _Command("/load FILE", "continue a saved chat", load),
        _Command("/export FILE", "append the chat as a training dialogue (JSONL)", _export),
        _Command(
            "/params [NAME=VALUE]", "show or set temperature, max_tokens, seed, context", _params
        ),
        _Command("/help", "show this table", _help),
    )
}
_KEYS = {
    "Enter": "sends",
    "Alt-Enter, or \\ Enter": "starts a new line",
    "up and down": "recall what you typed before",
    "Ctrl-C": "stops an answer; its text so far remains",
    "Ctrl-D, or /quit": "leaves",
    "✓ ✗ ~": "the answer follows the instruction; does not; follows it but is not a valid answer "
    "(a loop, a repeat, empty)",
}
