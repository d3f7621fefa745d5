"""Asks a model of Inspect, whatever its provider is, and returns what our engines would."""

from __future__ import annotations

from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentReasoning,
    GenerateConfig,
    Model,
    ModelOutput,
)

from pipeline.inference.remote.parameters import is_overflow
from pipeline.inference.thoughts import split_thoughts
from pipeline.records import Completion, FinishReason, Message, Request

_OPENAI = "openai"
"""Begins the names of the providers that get the seed as `gatt exam` sends it."""
_INT31 = 0x7FFFFFFF
"""What others take: Google's API refuses a larger seed."""
_MIN_THOUGHT_TOKENS = 64
_CUT = ("max_tokens", "model_length", "content_filter")
"""Reasons of an answer that did not come to its own end."""


class ModelClient:
    """The model under test. Once it has thought, it gets tokens for that in each request."""

    def __init__(self, model: Model) -> None:
        self._model, self._thinks = model, False
        self._seeds = 0xFFFFFFFF if str(model).startswith(_OPENAI) else _INT31

    async def answer(self, request: Request) -> Completion:
        """Return the answer, with "context" if the prompt does not fit.

        Where prompt, answer and thoughts do not fit in the context, the thoughts get less.
        """
        thought_tokens = request.max_thought_tokens if self._thinks else 0
        while True:
            completion = completion_of(await self._generate(request, thought_tokens))
            if completion.finish == "context" and thought_tokens:
                thought_tokens //= 2
                thought_tokens *= thought_tokens >= _MIN_THOUGHT_TOKENS
                continue
            has_thought = bool(completion.thoughts) or completion.finish == "thinking"
            if self._thinks or not has_thought:
                return completion
            self._thinks = True
            if completion.finish != "thinking":
                return completion
            thought_tokens = request.max_thought_tokens

    async def _generate(self, request: Request, thought_tokens: int) -> ModelOutput:
        config = GenerateConfig(
            max_tokens=request.max_tokens + thought_tokens,
            temperature=request.temperature,
            top_p=request.top_p if request.top_p < 1 else None,
            seed=request.seed & self._seeds,
        )
        try:
            return await self._model.generate(chat_of(request.messages), config=config)
        except Exception as error:
            if _is_overflow(error):
                return ModelOutput.from_content(str(self._model), "", stop_reason="model_length")
            raise


def chat_of(messages: tuple[Message, ...]) -> list[ChatMessage]:
    """Return a chat in Inspect's types."""
    types = {
        "system": ChatMessageSystem,
        "user": ChatMessageUser,
        "assistant": ChatMessageAssistant,
    }
    return [types[message["role"]](content=message["content"]) for message in messages]


def completion_of(output: ModelOutput) -> Completion:
    """Return what a provider gave as our engines would.

    Inspect turns some errors into an answer without usage, whose text is the error: the prompt does
    not fit in the context, or a filter refused it. A refusal is an empty answer here.
    """
    usage = output.usage
    if not output.empty and not usage and output.stop_reason == "model_length":
        return Completion("", 0, 0, "context")
    is_refusal = output.empty or (not usage and output.stop_reason == "content_filter")
    if is_refusal or output.error:
        return Completion("", 0, 0, "length")
    split = split_thoughts(output.completion)
    own = _reasoning(output)
    thoughts = "\n".join(text for text in (*own, split.thoughts) if text)
    finish: FinishReason = "length" if output.stop_reason in _CUT else "stop"
    has_thought = bool(own or (usage and usage.reasoning_tokens))
    if not split.finished or (has_thought and not split.answer.strip()):
        finish = "thinking"
    tokens, prompt_tokens = 0, 0
    if usage:
        cached = (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)
        tokens, prompt_tokens = usage.output_tokens, usage.input_tokens + cached
    return Completion(split.answer, tokens, prompt_tokens, finish, thoughts)


def _reasoning(output: ModelOutput) -> list[str]:
    """Return the thoughts that the provider gave apart from the answer; "" where it hides one."""
    content = output.message.content
    parts = [] if isinstance(content, str) else content
    thoughts = [part for part in parts if isinstance(part, ContentReasoning)]
    return [(part.summary or "" if part.redacted else part.reasoning).strip() for part in thoughts]


def _is_overflow(error: BaseException) -> bool:
    """Return whether a server refused a prompt that is too long, in words Inspect does not know."""
    from openai import APIStatusError

    causes = (error, error.__cause__, error.__context__)
    return any(isinstance(cause, APIStatusError) and is_overflow(cause) for cause in causes)
