"""The bodies of OpenAI's interface: what is taken, what is refused, and what is sent."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipeline.inference.scheduler import GenerationResult
from pipeline.records import Message, Request
from pipeline.server.errors import ApiError

_ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields that would change the answer, and their values under which they do not; with others they are refused.

Fields that change nothing (`user`, `metadata`, `store`, ...) are ignored.
"""

_TEMPERATURE = Request((), 0, 1).temperature


def _unicode(text: str) -> str:
    """JSON can name halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair is no character") from error
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Stop = Annotated[str, Field(min_length=1)]
Whole = Annotated[int, Field(ge=1, le=1 << 31)]


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class Body(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: str
    max_tokens: Whole | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Refuse what cannot be had.

        Raises:
            ApiError: a field that is not supported, or not with this value.
        """
        for name, value in (self.model_extra or {}).items():
            if value is not None and name in _ONLY and value not in _ONLY[name]:
                allowed = " or ".join(map(json.dumps, _ONLY[name]))
                hint = f"Only {allowed} is." if allowed else "Leave it out."
                raise ApiError(
                    400,
                    f"This value of '{name}' is not supported here. {hint}",
                    name,
                    "unsupported_parameter",
                )
        if self.stream_options and not self.stream:
            raise ApiError(
                400,
                "'stream_options' goes with 'stream': true only.",
                "stream_options",
                "invalid_value",
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts before which the answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether the last event of a stream tells the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens of the answer."""
        return self.max_tokens

    def request(self, messages: tuple[Message, ...], left: int) -> Request:
        """As the engine takes it; an answer without a limit has the `left` tokens of the context."""
        return Request(
            messages,
            secrets.randbits(32) if self.seed is None else self.seed,
            self.answer_tokens or max(left, 1),
            _TEMPERATURE if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
        )


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def plain(self) -> Message:
        """As chat templates take it."""
        text = (
            self.content
            if isinstance(self.content, str)
            else "\n".join(part.text for part in self.content)
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Whole | None = None

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens


class TextBody(Body):
    """The body of /v1/completions: one text, also as a list of one."""

    prompt: Text

    @model_validator(mode="before")
    @classmethod
    def _one(cls, data: Any) -> Any:
        prompt = data.get("prompt") if isinstance(data, dict) else None
        return (
            {**data, "prompt": prompt[0]} if isinstance(prompt, list) and len(prompt) == 1 else data
        )


class ResponseBuilder:
    """How one answer is written, as a chat or as a text, whole or in pieces."""

    def __init__(self, chat: bool, model: str) -> None:
        self._chat, self._model = chat, model
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, text: str, outcome: GenerationResult) -> dict[str, Any]:
        """The answer in one."""
        said = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self._chat
            else {"text": text}
        )
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": outcome.finish}
        return self._envelope("chat.completion", [choice], usage=usage(outcome))

    def opening(self) -> dict[str, Any] | None:
        """The first event of a stream, before there is any text."""
        return self._event({"delta": {"role": "assistant", "content": ""}}) if self._chat else None

    def piece(self, text: str) -> dict[str, Any]:
        """An event with a piece of text."""
        return self._event({"delta": {"content": text}} if self._chat else {"text": text})

    def closing(self, outcome: GenerationResult) -> dict[str, Any]:
        """The event that says why the answer ended."""
        return self._event({"delta": {}} if self._chat else {"text": ""}, outcome.finish)

    def bill(self, outcome: GenerationResult) -> dict[str, Any]:
        """The event with the usage."""
        return self._envelope("chat.completion.chunk", [], usage=usage(outcome))

    def _event(self, said: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return self._envelope(
            "chat.completion.chunk",
            [{"index": 0, **said, "logprobs": None, "finish_reason": finish}],
        )

    def _envelope(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind = kind if self._chat else "text_completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **more,
        }


def usage(outcome: GenerationResult) -> dict[str, Any]:
    """Tokens of the prompt, how many of them were in the cache, and of the answer (with the one that ends it)."""
    return {
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.tokens,
        "total_tokens": outcome.prompt_tokens + outcome.tokens,
        "prompt_tokens_details": {"cached_tokens": outcome.cached_tokens},
    }
