"""A request to a served model: what is asked, how its answer arrives, and why it may be refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from pipeline.errors import GattError
from pipeline.inference.logits import TokenLogprob
from pipeline.inference.thoughts import Split, ThoughtSplitter
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


class OptionError(GattError):
    """A model cannot follow an option of a request; `option` is its name in the API."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class PromptOptions(NamedTuple):
    """How a chat becomes a prompt: the variables of its template that are set.

    `continue_final`: the answer continues the last message, which is the assistant's.
    """

    template_variables: Mapping[str, object] = MappingProxyType({})
    continue_final: bool = False


PROMPT_OPTIONS = PromptOptions()


class Prompt(NamedTuple):
    """A prompt in tokens. `thought` is the marker of a thought that it leaves open, or ""."""

    tokens: list[int]
    thought: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A prompt in tokens, and how to answer it.

    The answer ends before the first of the texts `stop`. `sampling` gives seed, temperature, top-p
    and `max_tokens`; its messages are only what the DRY sampler should not repeat. Thoughts are
    told from the answer if `thought` is not None: it is the marker of one that the prompt leaves
    open, or "".
    """

    tokens: list[int]
    sampling: Request
    stop: tuple[str, ...] = ()
    thought: str | None = None

    @property
    def thought_tokens(self) -> int:
        """The tokens that thoughts may have in addition to `max_tokens`."""
        return 0 if self.thought is None else self.sampling.max_thought_tokens


class TextPiece(NamedTuple):
    """A piece of an answer, or of the thoughts before it.

    `logprobs` has the answer's tokens since the last piece, if the request wants them.
    """

    text: str
    thoughts: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """How an answer ended.

    `cached_tokens` of the `prompt_tokens` were in the KV cache; `tokens` are those of the answer,
    of which `thought_tokens` were thoughts. Seconds count from the arrival of the request.
    """

    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    thought_tokens: int = 0
    first_token_seconds: float | None
    seconds: float


class Job:
    """A request on its way through the engine.

    `on_piece` and `on_result` are called from the engine's threads and must not block.
    """

    def __init__(
        self,
        request: GenerationRequest,
        on_piece: Callable[[TextPiece], None],
        on_result: Callable[[GenerationResult], None],
    ) -> None:
        self.request, self.on_result = request, on_result
        self.cancelled = False
        self.started = False
        self.cached_tokens = 0
        self.arrived = time.monotonic()
        self._on_piece = on_piece
        self._first_token_seconds: float | None = None
        self._splitter = None if request.thought is None else ThoughtSplitter(request.thought)
        self._thought_tokens = 0
        self._held = ""
        self._logprobs: list[TokenLogprob] = []

    @property
    def thinking(self) -> bool:
        """Whether a thought is open."""
        return bool(self._splitter and self._splitter.thinking)

    @property
    def max_tokens(self) -> int:
        """The maximum tokens of the thoughts so far and the answer."""
        thought_tokens = min(self._thought_tokens, self.request.thought_tokens)
        return self.request.sampling.max_tokens + thought_tokens

    def emit(self, piece: str, tokens: int = 0, logprob: TokenLogprob | None = None) -> bool:
        """Pass on the text of token number `tokens`; return whether a stop text was found.

        The beginning of a possible stop text or marker is held back until the next piece.
        """
        if self._first_token_seconds is None:
            self._first_token_seconds = time.monotonic() - self.arrived
        was_thinking = self.thinking
        split = self._splitter.feed(piece) if self._splitter else Split("", piece)
        if was_thinking or self.thinking:
            self._thought_tokens = tokens
        elif logprob:
            self._logprobs.append(logprob)
        return self._pass_on(split, last=False)

    def flush(self) -> bool:
        """Pass on what was held back, at the end; return whether a stop text was found."""
        split = self._splitter.close() if self._splitter else Split("", "")
        return self._pass_on(split, last=True)

    def _pass_on(self, split: Split, *, last: bool) -> bool:
        text, stopped = self._until_stop(split.answer, last=last)
        if text or split.thoughts or (last and self._logprobs):
            piece = TextPiece(text, split.thoughts, tuple(self._logprobs))
            self._logprobs = []
            self._on_piece(piece)
        return stopped

    def _until_stop(self, piece: str, *, last: bool) -> tuple[str, bool]:
        """Return the answer's text up to a stop text, and whether there is one."""
        text = self._held + piece
        stops = [start for stop in self.request.stop if (start := text.find(stop)) >= 0]
        if stops:
            end = min(stops)
        elif last:
            end = len(text)
        else:
            end = len(text) - _partial_stop(text, self.request.stop)
        self._held = text[end:]
        return text[:end], bool(stops)

    def result(self, finish: Finish, tokens: int = 0) -> GenerationResult:
        """Return the result, with the time until now."""
        return GenerationResult(
            finish=finish,
            prompt_tokens=len(self.request.tokens),
            cached_tokens=self.cached_tokens,
            tokens=tokens,
            thought_tokens=min(self._thought_tokens, tokens),
            first_token_seconds=self._first_token_seconds,
            seconds=time.monotonic() - self.arrived,
        )


def _partial_stop(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that a stop text begins with."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)
