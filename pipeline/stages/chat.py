"""`gatt chat`: chat with a GGUF, or with two at once, in the terminal.

Message 1, which holds the instruction, is never dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import platformdirs

from pipeline.chat.backend import LocalBackend
from pipeline.chat.commands import MIN_CONTEXT, chat_loop, load, show_instruction
from pipeline.chat.conversation import Conversation, StandingInstruction
from pipeline.chat.screen import Screen
from pipeline.chat.session import ChatSession, SamplingParams
from pipeline.chat.terminal import TerminalChat, open_screen
from pipeline.errors import GattError
from pipeline.gatt.constraints.registry import prepare
from pipeline.gguf.reader import open_gguf
from pipeline.hub.convert import runnable_gguf
from pipeline.hub.models import find_model
from pipeline.inference.chat_engine import ChatEngine
from pipeline.inference.llama.model import Adapter, LoadedModel
from pipeline.records import Constraint
from pipeline.system import require_memory

Models = Sequence[tuple[str, Adapter | None]]
"""The name of each model, and the adapter applied to it."""


def run(
    models: Models,
    start: Conversation,
    sampling: SamplingParams,
    context: int,
    saved_chat: Path | None,
    *,
    lines: bool = False,
) -> None:
    """Chat with all `models` at once until the user leaves, continuing `saved_chat`, if given.

    Off a terminal, all of stdin is one message; with `lines`, each line is one, or a command.

    Raises:
        GattError: a model or a file cannot be used, or, off a terminal, the context is full.
    """
    screen = open_screen(platformdirs.user_data_path("gatt") / "chat-history", lines=lines)
    found_models = [find_model(name) for name, _ in models]
    files = [runnable_gguf(model) for model in found_models]
    adapters = [adapter for _, adapter in models]
    names = _distinct_names([model.name for model in found_models], adapters)
    max_context = min(open_gguf(file).context_length for file in files)
    sampling, context = _fit(sampling, context, max_context, screen)
    with _open_engine(list(zip(files, adapters, strict=True)), context) as engine:
        backend = LocalBackend(engine, names, max_context)
        chat = TerminalChat(screen, ChatSession(backend, start, sampling), backend)
        try:
            asyncio.run(_converse(chat, saved_chat))
        finally:
            backend.close()


def start_conversation(instruction: str, checks: Sequence[str], system: str) -> Conversation:
    """Return an empty conversation under an instruction, checked by `checks` or by its wording.

    Raises:
        GattError: an unknown check, or one without a value that it needs.
    """
    parsed = StandingInstruction.parse(instruction)
    constraints = tuple(map(_parse_check, checks)) or parsed.constraints
    return Conversation(system, StandingInstruction(instruction, constraints))


async def _converse(chat: TerminalChat, saved_chat: Path | None) -> None:
    if saved_chat:
        await load(chat, str(saved_chat))
    names = " and ".join(chat.backend.names)
    chat.screen.info(f"{names}, context of {chat.backend.context} tokens. {chat.screen.usage}")
    await show_instruction(chat)
    await chat_loop(chat)


def _parse_check(check: str) -> Constraint:
    """Return the constraint of "kind=value", or "kind"."""
    kind, _, value = check.partition("=")
    constraint = Constraint(kind, value)
    prepare(constraint)
    return constraint


def _distinct_names(names: Sequence[str], adapters: Sequence[Adapter | None]) -> list[str]:
    """Return the models' names with their adapters', numbered where they are equal."""
    full_names = [
        f"{name} + {adapter.path.name}" if adapter else name
        for name, adapter in zip(names, adapters, strict=True)
    ]
    return [
        f"{name} ({number})" if full_names.count(name) > 1 else name
        for number, name in enumerate(full_names, 1)
    ]


def _fit(
    sampling: SamplingParams, context: int, max_context: int, screen: Screen
) -> tuple[SamplingParams, int]:
    """Return the parameters lowered to the context that the models were trained for."""
    if context < MIN_CONTEXT:
        raise GattError(f"context is {context}; expected at least {MIN_CONTEXT}.")
    fitted_context = min(context, max_context)
    fitted = replace(sampling, max_tokens=min(sampling.max_tokens, fitted_context // 2))
    if (fitted, fitted_context) != (sampling, context):
        screen.info(
            f"Lowered to fit the model's {max_context} tokens and two of the longest answers: "
            f"max_tokens={fitted.max_tokens} context={fitted_context}"
        )
    return fitted.checked(fitted_context), fitted_context


@contextmanager
def _open_engine(
    models: Sequence[tuple[Path, Adapter | None]], context: int
) -> Iterator[ChatEngine]:
    """Yield an engine for the models, which the caller closes; each file is loaded once."""
    infos = {file: open_gguf(file) for file, _ in models}
    # Twice: a larger context is allocated before the present one is freed.
    caches = sum(2 * context * infos[file].kv_bytes_per_token for file, _ in models)
    require_memory(
        sum(info.bytes for info in infos.values()) + caches,
        f"chat with {' and '.join(file.name for file in infos)}",
    )
    with ExitStack() as stack:
        weights: dict[Path, LoadedModel] = {}
        for file, info in infos.items():
            weights[file] = LoadedModel(info)
            stack.callback(weights[file].close)
        yield ChatEngine([(weights[file], adapter) for file, adapter in models], context)
