"""OpenAI's request and response bodies: what is accepted, what is refused, and what is sent."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Literal

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_usage import PromptTokensDetails
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipeline.inference.request import GenerationResult
from pipeline.records import Message, Request
from pipeline.server.errors import ApiError

Json = dict[str, object]
"""A JSON object."""

_NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
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
"""Unsupported fields, and the values with which they do not change the answer; others are refused.

Fields that never change the answer (`user`, `metadata`, `store`, ...) are ignored.
"""

_DEFAULT_TEMPERATURE = Request(messages=(), seed=0, max_tokens=1).temperature


def _check_unicode(text: str) -> str:
    """Refuse unpaired surrogates, which JSON can contain and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("an unpaired surrogate is not a character") from error
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
Stop = Annotated[str, Field(min_length=1)]
MaxTokens = Annotated[int, Field(ge=1, le=1 << 31)]


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class Body(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: str
    max_tokens: MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Refuse fields and values that are not supported.

        Raises:
            ApiError: the first of them.
        """
        for name, value in (self.model_extra or {}).items():
            neutral = _NEUTRAL_VALUES.get(name)
            if value is None or neutral is None or value in neutral:
                continue
            hint = f"Only {' or '.join(map(json.dumps, neutral))} is." if neutral else "Omit it."
            message = f"This value of '{name}' is not supported here. {hint}"
            raise ApiError(400, message, name, "unsupported_parameter")
        if self.stream_options and not self.stream:
            message = "'stream_options' requires 'stream': true."
            raise ApiError(400, message, "stream_options", "invalid_value")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which the answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with an event that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def answer_tokens(self) -> int | None:
        """The maximum tokens of the answer."""
        return self.max_tokens

    def request(self, messages: tuple[Message, ...], tokens_left: int) -> Request:
        """Return the engine's request; without a limit, an answer may have `tokens_left`."""
        return Request(
            messages=messages,
            seed=secrets.randbits(32) if self.seed is None else self.seed,
            max_tokens=self.answer_tokens or max(tokens_left, 1),
            temperature=_DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
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

    def to_message(self) -> Message:
        """Return the message as chat templates accept it."""
        text = self.content
        if not isinstance(text, str):
            text = "\n".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None

    @property
    def answer_tokens(self) -> int | None:
        """The maximum tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens


class TextBody(Body):
    """The body of /v1/completions: one text, or a list of one."""

    prompt: Text

    @model_validator(mode="before")
    @classmethod
    def _unpack_prompt(cls, data: object) -> object:
        prompt = data.get("prompt") if isinstance(data, dict) else None
        if isinstance(data, dict) and isinstance(prompt, list) and len(prompt) == 1:
            return {**data, "prompt": prompt[0]}
        return data


class ResponseBuilder:
    """Builds the response bodies of one chat completion."""

    prefix = "chatcmpl"

    def __init__(self, model: str) -> None:
        self._envelope = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def completion(self, text: str, result: GenerationResult) -> Json:
        """Return the body of a response that is not streamed."""
        message = ChatCompletionMessage(role="assistant", content=text, refusal=None)
        choice = Choice(index=0, message=message, logprobs=None, finish_reason=result.finish)
        return _dump(
            ChatCompletion(
                **self._envelope, object="chat.completion", choices=[choice], usage=_usage(result)
            )
        )

    def role_chunk(self) -> Json | None:
        """Return the first event of a stream, before any text; None if there is none."""
        return self._chunk(ChoiceDelta(role="assistant", content=""))

    def content_chunk(self, text: str) -> Json:
        """Return an event with a piece of text."""
        return self._chunk(ChoiceDelta(content=text))

    def final_chunk(self, result: GenerationResult) -> Json:
        """Return the event that gives the reason for the answer's end."""
        return self._chunk(ChoiceDelta(), result.finish)

    def usage_chunk(self, result: GenerationResult) -> Json:
        """Return the event with the usage."""
        return self._event([], usage=_usage(result))

    def _chunk(self, delta: ChoiceDelta, finish_reason: str | None = None) -> Json:
        choice = ChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=finish_reason)
        return self._event([choice])

    def _event(self, choices: list[ChunkChoice], **usage: CompletionUsage) -> Json:
        return _dump(
            ChatCompletionChunk(
                **self._envelope, object="chat.completion.chunk", choices=choices, **usage
            )
        )


class TextResponseBuilder(ResponseBuilder):
    """Builds the response bodies of one text completion, which are alike in a stream and not."""

    prefix = "cmpl"

    def completion(self, text: str, result: GenerationResult) -> Json:
        """Return the body of a response that is not streamed."""
        return self._text([self._choice(text, result.finish)], usage=_usage(result))

    def role_chunk(self) -> Json | None:
        """Return None: a text has no role."""
        return None

    def content_chunk(self, text: str) -> Json:
        """Return an event with a piece of text."""
        return self._text([self._choice(text)])

    def final_chunk(self, result: GenerationResult) -> Json:
        """Return the event that gives the reason for the answer's end."""
        return self._text([self._choice("", result.finish)])

    def usage_chunk(self, result: GenerationResult) -> Json:
        """Return the event with the usage."""
        return self._text([], usage=_usage(result))

    @staticmethod
    def _choice(text: str, finish_reason: str | None = None) -> CompletionChoice:
        # Not validated: the type has no place for a stream's pieces, whose reason is null.
        return CompletionChoice.model_construct(
            index=0, text=text, logprobs=None, finish_reason=finish_reason
        )

    def _text(self, choices: list[CompletionChoice], **usage: CompletionUsage) -> Json:
        return _dump(
            Completion.model_construct(
                **self._envelope, object="text_completion", choices=choices, **usage
            )
        )


def _usage(result: GenerationResult) -> CompletionUsage:
    """Return the tokens of the prompt and the answer, which includes its end-of-turn token."""
    return CompletionUsage(
        prompt_tokens=result.prompt_tokens,
        completion_tokens=result.tokens,
        total_tokens=result.prompt_tokens + result.tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=result.cached_tokens),
    )


def _dump(body: BaseModel) -> Json:
    # Clients expect the fields that are null here, such as finish_reason, but no others.
    return body.model_dump(exclude_unset=True, warnings="none")
