"""A server's answer, without the thoughts of a reasoning model.

Some servers send thoughts in a field of their own, others in the text, with or without the marker
that opens them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.inference.thoughts import ThoughtSplitter, split_thoughts
from pipeline.records import Completion, FinishReason, Request

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion, ChatCompletionChunk
    from openai.types.completion_usage import CompletionUsage

_THOUGHT_FIELDS = ("reasoning_content", "reasoning")
"""Fields of a message: vLLM, llama-server, DeepSeek and SGLang; Ollama, OpenRouter, LM Studio."""
_TRUNCATED = ("length", "content_filter", "abort")
"""Finish reasons of an answer that did not come to its own end."""


class StreamedAnswer:
    """An answer that arrives in chunks.

    `opened` is the marker of a thought that the server opens without sending it. `thought_tokens`
    were requested in addition to the answer's: then the answer is cut here.
    """

    def __init__(self, request: Request, opened: str, *, thought_tokens: int) -> None:
        self._request, self._opened, self._thought_tokens = request, opened, thought_tokens
        self.text = ""
        self._thoughts = ""
        self._chunks = self._answer_chunks = 0
        self._finish = ""
        self._usage: CompletionUsage | None = None

    def add(self, chunk: ChatCompletionChunk) -> bool:
        """Add a chunk; return whether the answer is enough, so that the stream can be closed."""
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices or ():
            delta = (choice.delta and choice.delta.content) or ""
            thought = _thoughts(choice.delta)
            self.text, self._thoughts = self.text + delta, self._thoughts + thought
            self._chunks += bool(delta) or bool(thought)
            self._finish = choice.finish_reason or self._finish
            if delta and self._is_enough():
                return True
        return False

    def _is_enough(self) -> bool:
        answer = ThoughtSplitter(self._opened).feed(self.text).answer
        self._answer_chunks += bool(answer)
        if answer and self._request.stop_when and self._request.stop_when(answer):
            self._finish = "stop_when"
        elif self._thought_tokens and self._answer_chunks >= self._request.max_tokens:
            self._finish = "length"
        else:
            return False
        return True

    def completion(self) -> Completion | None:
        """Return the answer; None if the stream broke off.

        If the server sends no usage, `tokens` counts the chunks and `prompt_tokens` is 0.
        """
        if not self._finish:
            return None
        raw = _RawAnswer(self.text, self._thoughts, self._finish, self._usage)
        return raw.completion(self._opened, self._chunks)


def complete_answer(response: ChatCompletion, request: Request, opened: str) -> Completion:
    """Return the answer in a response that was not streamed."""
    choice = response.choices[0]
    raw = _RawAnswer(
        choice.message.content or "",
        _thoughts(choice.message),
        choice.finish_reason or "",
        response.usage,
    )
    completion = raw.completion(opened, 0)
    if request.stop_when and completion.text and request.stop_when(completion.text):
        return Completion(
            completion.text,
            completion.tokens,
            completion.prompt_tokens,
            "stop_when",
            completion.thoughts,
        )
    return completion


@dataclass(frozen=True, slots=True)
class _RawAnswer:
    """Text, thoughts from their own field, finish reason and usage, as a server sent them."""

    text: str
    thoughts: str
    finish: str
    usage: CompletionUsage | None

    def completion(self, opened: str, chunks: int) -> Completion:
        """Return the completion; "thinking" if it ended within a thought."""
        split = split_thoughts(self.text, opened or None)
        thoughts = "\n".join(filter(None, (self.thoughts.strip(), split.thoughts)))
        finish: FinishReason = "length" if self.finish in _TRUNCATED else "stop"
        if self.finish == "stop_when":
            finish = "stop_when"
        elif not split.finished or (self._has_thoughts and not split.answer.strip()):
            finish = "thinking"
        if not self.usage:
            return Completion(split.answer, chunks, 0, finish, thoughts)
        tokens, prompt_tokens = self.usage.completion_tokens, self.usage.prompt_tokens
        return Completion(split.answer, tokens, prompt_tokens, finish, thoughts)

    @property
    def _has_thoughts(self) -> bool:
        """Return whether the model thought in a place of its own, shown or not."""
        details = self.usage.completion_tokens_details if self.usage else None
        return bool(self.thoughts or (details and details.reasoning_tokens))


def _thoughts(message: object) -> str:
    """Return the thoughts in a field of a message or of a piece of one."""
    values = (getattr(message, name, None) for name in _THOUGHT_FIELDS)
    return next((value for value in values if isinstance(value, str) and value), "")
