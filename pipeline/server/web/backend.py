"""The chat backend of the page: models of the server's own `AsyncEngine`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from starlette.concurrency import run_in_threadpool

from pipeline.chat.session import OnText
from pipeline.inference.async_engine import AnswerStream, AsyncEngine
from pipeline.inference.request import GenerationRequest, Prompt, TextPiece
from pipeline.records import Completion, Message, Request


class ServedBackend:
    """The models `names` of `engine`; they need not be served until they are used."""

    def __init__(self, engine: AsyncEngine, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._engine = engine
        self._answers: list[AnswerStream] = []
        self._stopped = False

    @property
    def context(self) -> int:
        """The tokens that a prompt and its answer may have together."""
        return min(map(self._engine.context_length, self.names))

    @property
    def max_context(self) -> int:
        """The same: a server does not resize its contexts."""
        return self.context

    async def count_tokens(self, prompts: Sequence[Sequence[Message]]) -> list[int]:
        """Return the tokens of each model's prompt for the next answer."""
        return [len(prompt.tokens) for prompt in await self._render(prompts)]

    async def generate(self, requests: Sequence[Request], on_text: OnText) -> list[Completion]:
        """Answer one request with each model; `finish` is "cancelled" for stopped answers.

        Raises:
            GattError: the engine refused a request.
            RuntimeError: the engine failed.
        """
        self._stopped = False
        prompts = await self._render([request.messages for request in requests])
        if self._stopped:
            return [Completion("", 0, len(prompt.tokens), "cancelled") for prompt in prompts]
        try:
            for name, prompt, request in zip(self.names, prompts, requests, strict=True):
                spare = self.context - len(prompt.tokens) - request.max_tokens
                generation = GenerationRequest(
                    tokens=prompt.tokens,
                    sampling=replace(request, max_thought_tokens=max(spare, 0)),
                    thought=prompt.thought,
                )
                self._answers.append(self._engine.generate(name, generation))
            answers = enumerate(self._answers)
            return await asyncio.gather(
                *(_read(index, answer, on_text) for index, answer in answers)
            )
        finally:
            self.stop()
            self._answers = []

    def stop(self) -> None:
        """End the answers before their next token."""
        self._stopped = True
        for answer in self._answers:
            answer.cancel()

    async def _render(self, prompts: Sequence[Sequence[Message]]) -> list[Prompt]:
        """Render and tokenize in threads: long prompts would block the event loop."""
        return await asyncio.gather(
            *(
                run_in_threadpool(self._engine.chat_prompt, name, tuple(prompt))
                for name, prompt in zip(self.names, prompts, strict=True)
            )
        )


async def _read(model_index: int, answer: AnswerStream, on_text: OnText) -> Completion:
    pieces: list[TextPiece] = []
    async for piece in answer:
        pieces.append(piece)
        on_text(model_index, piece)
    assert answer.result is not None
    result = answer.result
    # The stream raises an error for these two.
    assert result.finish != "closed" and result.finish != "failed"
    text = "".join(piece.text for piece in pieces)
    thoughts = "".join(piece.thoughts for piece in pieces)
    is_thinking = result.finish == "length" and not text and bool(thoughts)
    finish = "thinking" if is_thinking else result.finish
    return Completion(text, result.tokens, result.prompt_tokens, finish, thoughts)
