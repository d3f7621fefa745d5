"""OpenAI's request bodies, with the sampling parameters of llama.cpp, vLLM and Hugging Face."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipeline.inference.request import GenerationRequest, Prompt, PromptOptions
from pipeline.inference.thoughts import split_thoughts
from pipeline.records import DEFAULT_SAMPLER, Message, Request, SamplerSettings
from pipeline.server.errors import ApiError
from pipeline.server.fields import GRAMMAR_FIELDS, check_extra, grammar_of

_DEFAULT_TEMPERATURE = Request(messages=(), seed=0, max_tokens=1).temperature
_MAX_CHOICES = 16
_IGNORED_MESSAGE_FIELDS = ("name", "reasoning_content", "reasoning", "refusal", "annotations")
"""Fields of a message that chat templates do not get: thoughts are not sent back to a model."""


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
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Factor = Annotated[float, Field(gt=0, le=10)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: str
    max_tokens: MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    # llama.cpp
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Probability | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    dry_multiplier: Annotated[float, Field(ge=0, le=100)] | None = None
    repeat_penalty: Factor | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    ignore_eos: bool | None = None
    grammar: Text | None = None
    json_schema: dict[str, object] | None = None
    # Hugging Face and vLLM
    repetition_penalty: Factor | None = None
    guided_grammar: Text | None = None
    guided_json: dict[str, object] | Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1)] | None = None
    # OpenAI
    response_format: dict[str, object] | None = None

    def check(self) -> None:
        """Refuse fields and values that are not supported.

        Raises:
            ApiError: the first of them.
        """
        check_extra(self.model_extra or {}, type(self).model_fields)
        if self.stream_options and not self.stream:
            raise _conflict("stream_options", "'stream_options' requires 'stream': true.")
        if self.repeat_penalty is not None and self.repetition_penalty is not None:
            message = "'repetition_penalty' is another name of 'repeat_penalty'. Omit one."
            raise _conflict("repetition_penalty", message)

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

    @property
    def top_count(self) -> int | None:
        """The likely tokens whose log-probabilities are wanted; None if no tokens' are."""
        return None

    def sampler(self) -> SamplerSettings:
        """Return how tokens are drawn.

        Raises:
            ApiError: a token of `logit_bias` or a grammar is not valid.
        """
        window = -1 if self.repetition_penalty is not None else DEFAULT_SAMPLER.repeat_last_n
        grammar = grammar_of({name: getattr(self, name) for name in GRAMMAR_FIELDS})
        if grammar and self.ignore_eos:
            message = "A grammar decides where the answer ends, so 'ignore_eos' must be omitted."
            raise _conflict("ignore_eos", message)
        values: dict[str, Any] = {
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "typical_p": self.typical_p,
            "min_p": self.min_p,
            "dry_multiplier": self.dry_multiplier,
            "repeat_penalty": self.repeat_penalty or self.repetition_penalty,
            "repeat_last_n": window if self.repeat_last_n is None else self.repeat_last_n,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": tuple(map(_parse_bias, (self.logit_bias or {}).items())),
            "ignore_eos": self.ignore_eos,
            "grammar": grammar,
            "logprobs": self.top_count,
        }
        given = {name: value for name, value in values.items() if value is not None}
        return replace(DEFAULT_SAMPLER, **given)

    def generation(
        self, prompt: Prompt, messages: tuple[Message, ...], context: int
    ) -> GenerationRequest:
        """Return the engine's request; without a limit, an answer may fill the `context`."""
        left = max(context - len(prompt.tokens), 1)
        max_tokens = self.answer_tokens or left
        sampling = Request(
            messages=messages,
            seed=secrets.randbits(32) if self.seed in (None, -1) else self.seed,
            max_tokens=max_tokens,
            temperature=_DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            sampler=self.sampler(),
        )
        return GenerationRequest(tokens=prompt.tokens, sampling=sampling, stop=self.stops)


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]

    def check(self, place: str) -> None:
        """Refuse fields that would be ignored, though they have a value.

        Raises:
            ApiError: the first of them.
        """
        for name, value in (self.model_extra or {}).items():
            if value and name not in _IGNORED_MESSAGE_FIELDS:
                message = f"'{name}' of a message is not supported here. Omit it."
                raise ApiError(400, message, f"{place}.{name}", "unsupported_parameter")

    def to_message(self, *, keep_thoughts: bool = False) -> Message:
        """Return the message as chat templates accept it, without an answer's thoughts."""
        text = self.content
        if not isinstance(text, str):
            text = "\n".join(part.text for part in text)
        if self.role == "assistant" and not keep_thoughts:
            text = split_thoughts(text).answer
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: Text | None = None
    # Hugging Face and vLLM
    chat_template_kwargs: dict[str, object] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def check(self) -> None:
        """Refuse fields and values that are not supported.

        Raises:
            ApiError: the first of them.
        """
        super().check()
        for index, message in enumerate(self.messages):
            message.check(f"messages.{index}")
        if self.top_logprobs and not self.logprobs:
            raise _conflict("top_logprobs", "'top_logprobs' requires 'logprobs': true.")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            text = "'continue_final_message' requires that the last message is the assistant's."
            raise _conflict("continue_final_message", text)
        continues = bool(self.continue_final_message)
        if self.add_generation_prompt is not None and self.add_generation_prompt is continues:
            text = "'add_generation_prompt' must be the opposite of 'continue_final_message'."
            raise _conflict("add_generation_prompt", text)

    @property
    def answer_tokens(self) -> int | None:
        """The maximum tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_count(self) -> int | None:
        """The likely tokens whose log-probabilities are wanted; None if no tokens' are."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def to_messages(self) -> tuple[Message, ...]:
        """Return the messages as chat templates accept them."""
        continued = self.messages[-1] if self.continue_final_message else None
        return tuple(m.to_message(keep_thoughts=m is continued) for m in self.messages)

    def prompt_options(self) -> PromptOptions:
        """Return how the messages become a prompt."""
        effort = (
            {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        )
        variables = {**effort, **(self.chat_template_kwargs or {})}
        return PromptOptions(variables, bool(self.continue_final_message))

    def generation(
        self, prompt: Prompt, messages: tuple[Message, ...], context: int
    ) -> GenerationRequest:
        """Return the engine's request, in which thoughts are told from the answer.

        They may fill the context in addition to `max_tokens`. `max_completion_tokens` includes
        them, as OpenAI defines it. What follows a grammar is an answer.
        """
        request = super().generation(prompt, messages, context)
        if request.sampling.sampler.grammar:
            return request
        spare = context - len(prompt.tokens) - request.sampling.max_tokens
        thought_tokens = 0 if self.max_completion_tokens else max(spare, 0)
        sampling = replace(request.sampling, max_thought_tokens=thought_tokens)
        return replace(request, sampling=sampling, thought=prompt.thought)


class TextBody(Body):
    """The body of /v1/completions: one text, or a list of one."""

    prompt: Text
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def top_count(self) -> int | None:
        """The likely tokens whose log-probabilities are wanted; None if no tokens' are."""
        return self.logprobs

    @model_validator(mode="before")
    @classmethod
    def _unpack_prompt(cls, data: object) -> object:
        prompt = data.get("prompt") if isinstance(data, dict) else None
        if isinstance(data, dict) and isinstance(prompt, list) and len(prompt) == 1:
            return {**data, "prompt": prompt[0]}
        return data


def _parse_bias(item: tuple[str, float]) -> tuple[int, float]:
    token, bias = item
    if not (token.isascii() and token.isdecimal() and len(token) < 10):
        message = f"'logit_bias' has the key {token[:20]!r}; expected token ids, such as \"42\"."
        raise ApiError(400, message, "logit_bias", "invalid_value")
    return int(token), bias


def _conflict(param: str, message: str) -> ApiError:
    return ApiError(400, message, param, "invalid_value")
