"""A request to a served model: what is asked, how its answer arrives, and why it may be refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import GattError
from pipeline.records import Request

Finish = Literal["stop", "length", "cancelled", "closed", "failed"]
"""Why an answer ended; "closed": the engine stopped, "failed": a step of it raised an error."""


class QueueFullError(GattError):
    """All slots are in use, and the queue is full."""


class EngineClosedError(GattError):
    """The engine has stopped or is stopping."""

    def __init__(self, message: str = "The server is stopping. Try again when it is back.") -> None:
        super().__init__(message)


class ContextLengthError(GattError):
    """A prompt and its answer do not fit in the context; all three are in tokens."""

    def __init__(self, prompt: int, answer: int, context: int) -> None:
        super().__init__(
            f"The prompt has {prompt} tokens and the answer may have {answer}; expected at most "
            f"{context} in all. Shorten the prompt, or lower max_tokens."
        )
        self.prompt, self.answer, self.context = prompt, answer, context


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt in tokens, and how to answer it.

    The answer ends before the first of the texts `stop`. `sampling` gives seed, temperature, top-p
    and `max_tokens`; its messages are only what the DRY sampler should not repeat.
    """

    tokens: list[int]
    sampling: Request
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """How an answer ended.

    `cached_tokens` of the `prompt_tokens` were in the KV cache; `tokens` are those of the answer.
    Seconds count from the arrival of the request.
    """

    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    first_token_seconds: float | None
    seconds: float


class Job:
    """A request on its way through the engine.

    `on_text` and `on_result` are called from the engine's threads and must not block.
    """

    def __init__(
        self,
        request: GenerationRequest,
        on_text: Callable[[str], None],
        on_result: Callable[[GenerationResult], None],
    ) -> None:
        self.request, self.on_result = request, on_result
        self.cancelled = False
        self.started = False
        self.cached_tokens = 0
        self.arrived = time.monotonic()
        self._on_text = on_text
        self._first_token_seconds: float | None = None
        self._held = ""

    def emit(self, piece: str, *, last: bool) -> bool:
        """Pass on text; return whether a stop text was found, before which the answer ends.

        The beginning of a possible stop text is held back until the next piece, or passed on with
        the `last` piece.
        """
        if self._first_token_seconds is None:
            self._first_token_seconds = time.monotonic() - self.arrived
        text = self._held + piece
        stops = [start for stop in self.request.stop if (start := text.find(stop)) >= 0]
        if stops:
            end = min(stops)
        elif last:
            end = len(text)
        else:
            end = len(text) - _partial_stop(text, self.request.stop)
        self._held = text[end:]
        if end:
            self._on_text(text[:end])
        return bool(stops)

    def result(self, finish: Finish, tokens: int = 0) -> GenerationResult:
        """Return the result, with the time until now."""
        return GenerationResult(
            finish=finish,
            prompt_tokens=len(self.request.tokens),
            cached_tokens=self.cached_tokens,
            tokens=tokens,
            first_token_seconds=self._first_token_seconds,
            seconds=time.monotonic() - self.arrived,
        )


def _partial_stop(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that a stop text begins with."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)
