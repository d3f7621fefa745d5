"""The chat backend of the terminal: a `ChatEngine` of this process, driven from an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pipeline.chat.session import OnText
from pipeline.inference.chat_engine import ChatEngine
from pipeline.records import Completion, Message, Request


class LocalBackend:
    """The models of `engine`, which it closes; they were trained for up to `max_context` tokens."""

    def __init__(self, engine: ChatEngine, names: Sequence[str], max_context: int) -> None:
        self.names, self.max_context = tuple(names), max_context
        self._engine = engine

    @property
    def context(self) -> int:
        """The tokens that a prompt and its answer may have together."""
        return self._engine.context

    async def count_tokens(self, prompts: Sequence[Sequence[Message]]) -> list[int]:
        """Return the tokens of each model's prompt for the next answer."""
        return [
            self._engine.count_tokens(index, prompt, add_generation_prompt=True)
            for index, prompt in enumerate(prompts)
        ]

    async def generate(self, requests: Sequence[Request], on_text: OnText) -> list[Completion]:
        """Answer one request with each model; `finish` is "cancelled" for stopped answers."""
        loop = asyncio.get_running_loop()
        completions: dict[int, Completion] = {}

        def answer() -> None:
            for index, part in self._engine.generate(requests):
                if isinstance(part, Completion):
                    completions[index] = part
                else:
                    loop.call_soon_threadsafe(on_text, index, part)

        await asyncio.to_thread(answer)
        return [completions[index] for index in range(len(requests))]

    def stop(self) -> None:
        """End the answers before their next token; signal handlers may call it."""
        self._engine.stop()

    def resize(self, context: int) -> None:
        """Continue with a context of `context` tokens.

        Raises:
            GattError: too little memory; the context is unchanged.
        """
        self._engine = self._engine.resized(context)

    def close(self) -> None:
        """Free the memory of the contexts; the weights remain."""
        self._engine.close()
