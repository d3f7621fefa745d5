"""Opens what a name stands for: a model on this machine, or an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from pipeline.hub.convert import runnable_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.openai_client import DEFAULT_MAX_PARALLEL, OpenAIClient, is_server_url
from pipeline.records import Task

_MARGIN = 200
"""Tokens of the system message and of the chat template's opening."""


class GenerationEngine(Protocol):
    """Something that drives many dialogues in parallel."""

    name: str

    def run(self, tasks: Iterable[Task]) -> None:
        """Drive all `tasks` to their end."""

    def __enter__(self) -> GenerationEngine: ...

    def __exit__(self, *_: object) -> None: ...


def context_for(turns: int, max_tokens: int, user_tokens: int = 60) -> int:
    """Return the context size in tokens of a dialogue of `turns` user messages and their answers.

    `user_tokens` is the room for a user message with the template's markers around both messages
    of a turn.
    """
    return turns * (max_tokens + user_tokens) + _MARGIN


def open_generator(
    name: str, *, dialogues: int, context: int, format_name: str = "", max_parallel: int = 0
) -> GenerationEngine:
    """Open the model or server called `name` for up to `dialogues` dialogues.

    Args:
        name: a preset, a GGUF file, a Hugging Face folder, a Hub id, or a server:
            "http://host:port/v1" for its first model, or "http://host:port/v1#model".
        dialogues: how many dialogues there are; no more sequences than this are made.
        context: tokens of each sequence. A server has its own limit.
        format_name: llama.cpp format to run a model in; "" as for `runnable_gguf`. A server has
            its own.
        max_parallel: dialogues in parallel; 0 uses what the machine allows.

    Raises:
        GattError: no such model, not a valid address, or too little memory.
    """
    if is_server_url(name):
        url, _, served_model = name.partition("#")
        return OpenAIClient(url, served_model, max_parallel or DEFAULT_MAX_PARALLEL)
    model = find_model(name)
    engine = BatchEngine(runnable_gguf(model, format_name), dialogues, context, max_parallel)
    engine.name = f"{model.name} {format_name}".strip()
    return engine
