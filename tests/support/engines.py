"""A served engine without a model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from pipeline.inference.async_engine import AnswerStream, AsyncEngine
from pipeline.inference.request import (
    PROMPT_OPTIONS,
    ContextLengthError,
    Finish,
    GenerationRequest,
    GenerationResult,
    Prompt,
    PromptOptions,
    TextPiece,
)
from pipeline.inference.scheduler import EngineStats
from pipeline.records import Message, SamplerSettings

CONTEXT = 64


def generation_result(finish: Finish = "stop", tokens: int = 3) -> GenerationResult:
    """Return the result of an answer to a prompt of five tokens, of which two were cached."""
    return GenerationResult(
        finish=finish,
        prompt_tokens=5,
        cached_tokens=2,
        tokens=tokens,
        first_token_seconds=0.2,
        seconds=1.0,
    )


class ScriptedAnswer(AnswerStream):
    """An answer of fixed pieces; with `endless`, it ends only when it is cancelled."""

    def __init__(
        self,
        pieces: Sequence[str],
        on_result: Callable[[GenerationResult], None],
        *,
        endless: bool = False,
    ) -> None:
        self.result: GenerationResult | None = None
        self._unread, self._on_result = list(pieces), on_result
        self._end = asyncio.Event()
        self._finish: Finish = "stop"
        if not endless:
            self._end.set()

    async def __anext__(self) -> TextPiece:
        if self._unread:
            return TextPiece(self._unread.pop(0))
        if self.result is None:
            await self.wait()
        raise StopAsyncIteration

    def cancel(self) -> None:
        """End the answer."""
        if not self.result and not self._end.is_set():
            self._finish = "cancelled"
            self._end.set()

    async def wait(self) -> GenerationResult:
        """Wait for the end."""
        await self._end.wait()
        if self.result is None:
            self.result = generation_result(self._finish)
            self._on_result(self.result)
        return self.result


class ScriptedAsyncEngine(AsyncEngine):
    """An engine that answers every request with `pieces`; a token is a word.

    `error` is raised for a request instead, if given. `requests` and `answers` are those so far.
    """

    def __init__(
        self,
        pieces: Sequence[str] = ("One ", "two."),
        *,
        names: Sequence[str] = ("m",),
        error: Exception | None = None,
        endless: bool = False,
    ) -> None:
        self.on_result = lambda name, result: None
        self.requests: list[GenerationRequest] = []
        self.answers: list[ScriptedAnswer] = []
        self._names, self._pieces = list(names), pieces
        self._error, self._endless = error, endless

    @property
    def names(self) -> list[str]:
        """The names of the models."""
        return self._names

    def chat_prompt(
        self, name: str, messages: tuple[Message, ...], options: PromptOptions = PROMPT_OPTIONS
    ) -> Prompt:
        """Return a token for each word."""
        return Prompt([0] * sum(len(message["content"].split()) for message in messages))

    def check(self, name: str, sampler: SamplerSettings) -> None:
        """Accept everything."""

    def text_tokens(self, name: str, text: str) -> list[int]:
        """Return a token for each word."""
        return [0] * len(text.split())

    def context_length(self, name: str) -> int:
        """Return `CONTEXT`."""
        return CONTEXT

    def stats(self, name: str) -> EngineStats:
        """Return that one of four sequences is in use."""
        return EngineStats(4, 1, 2)

    def generate(self, name: str, request: GenerationRequest) -> AnswerStream:
        """Return the next answer."""
        self.requests.append(request)
        max_tokens = request.sampling.max_tokens
        if len(request.tokens) + max_tokens > CONTEXT:
            raise ContextLengthError(len(request.tokens), max_tokens, CONTEXT)
        if self._error:
            raise self._error

        def on_result(result: GenerationResult) -> None:
            self.on_result(name, result)

        self.answers.append(ScriptedAnswer(self._pieces, on_result, endless=self._endless))
        return self.answers[-1]
