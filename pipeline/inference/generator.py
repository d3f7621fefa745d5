"""Opens what a name stands for: a model on this machine, or an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.gguf.reader import open_gguf
from pipeline.hub.convert import runnable_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.chat_template import ChatTemplate
from pipeline.inference.llama.model import Adapter
from pipeline.inference.openai_client import OpenAIClient
from pipeline.inference.remote.address import is_server_url
from pipeline.inference.thoughts import thinks
from pipeline.records import MAX_THOUGHT_TOKENS, Task

_MARGIN = 200
"""Tokens of the system message and of the chat template's opening."""


class GenerationEngine(Protocol):
    """Something that drives many dialogues in parallel.

    `changes` are the parameters of requests that a server has refused, with what became of them.
    """

    name: str
    changes: dict[str, str]

    def run(self, tasks: Iterable[Task]) -> None:
        """Drive all `tasks` to their end."""

    def __enter__(self) -> GenerationEngine: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What an engine is opened for: up to `dialogues` dialogues of `context` tokens each.

    `max_parallel` limits the dialogues in parallel; 0 uses what a machine allows.
    """

    dialogues: int
    context: int
    max_parallel: int = 0
    adapter: Adapter | None = None


OpenEngine = Callable[[Path, EngineOptions], GenerationEngine]
"""Opens a GGUF file as an engine."""
_remote: list[OpenEngine] = []
"""The innermost block of `engines_opened_by` is the last one."""


@contextmanager
def engines_opened_by(open_remote: OpenEngine) -> Iterator[None]:
    """Let `open_engine` open models elsewhere, as on a cluster, until the block ends."""
    _remote.append(open_remote)
    try:
        yield
    finally:
        _remote.pop()


def generates_elsewhere() -> bool:
    """Return whether `open_engine` opens models elsewhere: this process needs no weights."""
    return bool(_remote)


def open_engine(gguf: Path, options: EngineOptions) -> GenerationEngine:
    """Open a GGUF file on this machine, or where `engines_opened_by` says.

    Raises:
        GattError: not a GGUF, a broken one, or too little memory.
    """
    if _remote:
        return _remote[-1](gguf, options)
    return BatchEngine(
        gguf, options.dialogues, options.context, options.max_parallel, adapter=options.adapter
    )


def context_for(turns: int, max_tokens: int, user_tokens: int = 60) -> int:
    """Return the context size in tokens of a dialogue of `turns` user messages and their answers.

    `user_tokens` is the room for a user message with the template's markers around both messages
    of a turn.
    """
    return turns * (max_tokens + user_tokens) + _MARGIN


def thought_room(gguf: Path, max_thought_tokens: int) -> int:
    """Return the tokens that the thoughts of a model need in its context: none if it has none.

    Thoughts are not sent back with a chat, so a context holds those of one answer.
    """
    info = open_gguf(gguf)
    template = ChatTemplate(info.chat_template, info.bos, info.eos, gguf.name)
    return max_thought_tokens if thinks(template) else 0


def model_files(name: str) -> list[Path]:
    """Return the file or folder of the model called `name`; a server has none on this machine.

    Raises:
        GattError: no such model.
    """
    return [] if is_server_url(name) else [find_model(name).path]


def open_generator(
    name: str,
    *,
    dialogues: int,
    context: int,
    format_name: str = "",
    max_parallel: int = 0,
    max_thought_tokens: int = MAX_THOUGHT_TOKENS,
) -> GenerationEngine:
    """Open the model or server called `name` for up to `dialogues` dialogues.

    Args:
        name: a preset, a GGUF file, a Hugging Face folder, a Hub id, or a server:
            "http://host:port/v1" for its first model, or "http://host:port/v1#model"; several
            servers of one model are separated by commas.
        dialogues: how many dialogues there are; no more sequences than this are made.
        context: tokens of each sequence, as far as the model was made for that many. A server has
            its own limit.
        format_name: llama.cpp format to run a model in; "" as for `runnable_gguf`. A server has
            its own.
        max_parallel: dialogues in parallel; 0 uses what the machine allows.
        max_thought_tokens: of the requests; a model that thinks gets a larger context for them.

    Raises:
        GattError: no such model, not a valid address, or too little memory.
    """
    if is_server_url(name):
        return OpenAIClient(name, max_parallel=max_parallel, probe=True)
    model = find_model(name)
    gguf = runnable_gguf(model, format_name)
    context += thought_room(gguf, max_thought_tokens)
    context = min(context, open_gguf(gguf).context_length)
    options = EngineOptions(dialogues=dialogues, context=context, max_parallel=max_parallel)
    engine = open_engine(gguf, options)
    engine.name = f"{model.name} {format_name}".strip()
    return engine
