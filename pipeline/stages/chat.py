"""`gatt chat`: talk with any GGUF in the terminal, or with two at once; message 1, with the instruction, is never dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import platformdirs

from pipeline.chat.commands import chat_loop, load, show_instruction
from pipeline.chat.conversation import Conversation, StandingInstruction
from pipeline.chat.session import ChatParams, Session
from pipeline.chat.terminal import Screen, open_screen
from pipeline.gatt.constraints.registry import kind_of
from pipeline.gatt.instructions import parse_instruction
from pipeline.gguf.reader import open_gguf
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.chat_engine import ChatEngine
from pipeline.inference.model import Adapter, LoadedModel
from pipeline.records import Constraint
from pipeline.system import require_memory


def run(
    models: Sequence[tuple[str, Adapter | None]],
    instruction: str,
    checks: Sequence[str],
    system: str,
    parameters: ChatParams,
    chat: Path | None,
) -> None:
    """Talk with all `models` (a name, and what is laid over it) at once, until the user leaves; go on with `chat`, if given.

    Raises:
        GattError: a model or a file that cannot be used, or, off a terminal, a context that is full.
    """
    told = StandingInstruction(
        instruction, tuple(map(_constraint, checks)) or parse_instruction(instruction)
    )
    screen = open_screen(platformdirs.user_data_path("gatt") / "chat-history")
    found = [find_model(name) for name, _ in models]
    files = [model.path if model.is_gguf else cached_gguf(model, "Q8_0") for model in found]
    names = _names(
        [
            m.name + (f" + {a.path.name}" if a else "")
            for m, (_, a) in zip(found, models, strict=True)
        ]
    )
    limit = min(open_gguf(file).context_length for file in files)
    parameters = _fitted(parameters, limit, screen)
    with _opened(
        [(file, adapter) for file, (_, adapter) in zip(files, models, strict=True)],
        parameters.context,
    ) as speakers:
        session = Session(screen, speakers, names, limit, parameters, Conversation(system, told))
        try:
            if chat:
                load(session, str(chat))
            ends = "Ctrl-D leaves" if screen.watched else "an empty line ends the chat"
            screen.say(
                f"{' beside '.join(names)}, context of {parameters.context} tokens. /help lists the commands; {ends}."
            )
            show_instruction(session)
            chat_loop(session)
        finally:
            session.speakers.close()


def _constraint(check: str) -> Constraint:
    """The constraint of "kind=value", or "kind"."""
    kind, _, value = check.partition("=")
    constraint = Constraint(kind, value)
    kind_of(constraint)
    return constraint


def _names(names: list[str]) -> list[str]:
    """The names, told apart where they are the same."""
    return [f"{name} ({n})" if names.count(name) > 1 else name for n, name in enumerate(names, 1)]


def _fitted(parameters: ChatParams, limit: int, screen: Screen) -> ChatParams:
    """Within what the model was made for; says what it changes."""
    context = min(parameters.context, limit)
    fitted = replace(
        parameters, context=context, max_tokens=min(parameters.max_tokens, context // 2)
    )
    if fitted != parameters:
        screen.say(
            f"Made smaller, to fit the model's {limit} tokens and two answers of the longest: {fitted}"
        )
    return fitted.checked(limit)


@contextmanager
def _opened(models: Sequence[tuple[Path, Adapter | None]], context: int) -> Iterator[ChatEngine]:
    """The models, ready to talk, with each file's weights there once; who resizes them closes the new ones."""
    infos = {file: open_gguf(file) for file, _ in models}
    caches = sum(2 * context * infos[file].kv_bytes_per_token for file, _ in models)
    require_memory(
        sum(info.bytes for info in infos.values()) + caches,
        f"chat with {' and '.join(f.name for f in infos)}",
    )
    with ExitStack() as stack:
        weights: dict[Path, LoadedModel] = {}
        for file, info in infos.items():
            weights[file] = LoadedModel(info)
            stack.callback(weights[file].close)
        yield ChatEngine([(weights[file], adapter) for file, adapter in models], context)
