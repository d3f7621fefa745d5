"""OpenAI's response bodies: one for a whole answer, or one for each event of a stream."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import BaseModel

from pipeline.inference.logits import TokenLogprob
from pipeline.inference.request import GenerationResult, TextPiece

Json = dict[str, object]
"""A JSON object."""


class Answer(NamedTuple):
    """An answer that has ended: all pieces of it in one, and how it ended."""

    piece: TextPiece
    result: GenerationResult


class ResponseBuilder:
    """Builds the response bodies of one chat completion; `logprobs`: with log-probabilities."""

    prefix = "chatcmpl"

    def __init__(self, model: str, *, logprobs: bool = False) -> None:
        self._envelope = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._logprobs = logprobs

    def completion(self, answers: Sequence[Answer]) -> Json:
        """Return the body of a response that is not streamed."""
        choices = [
            Choice.model_construct(
                index=index,
                message=ChatCompletionMessage(
                    role="assistant", content=piece.text, refusal=None, **_thoughts(piece)
                ),
                logprobs=self._logprobs_of(piece),
                finish_reason=result.finish,
            )
            for index, (piece, result) in enumerate(answers)
        ]
        return _dump(
            ChatCompletion.model_construct(
                **self._envelope,
                object="chat.completion",
                choices=choices,
                usage=_usage([answer.result for answer in answers]),
            )
        )

    def role_chunk(self, index: int) -> Json | None:
        """Return the first event of a choice, before any text; None if there is none."""
        return self._chunk(index, ChoiceDelta(role="assistant", content=""))

    def piece_chunk(self, index: int, piece: TextPiece) -> Json:
        """Return an event with a piece of a choice."""
        content = {"content": piece.text} if piece.text or not piece.thoughts else {}
        return self._chunk(index, ChoiceDelta(**content, **_thoughts(piece)), piece=piece)

    def final_chunk(self, index: int, result: GenerationResult) -> Json:
        """Return the event that gives the reason for a choice's end."""
        return self._chunk(index, ChoiceDelta(), result.finish)

    def usage_chunk(self, results: Sequence[GenerationResult]) -> Json:
        """Return the event with the usage."""
        return self._event([], usage=_usage(results))

    def _chunk(
        self,
        index: int,
        delta: ChoiceDelta,
        finish_reason: str | None = None,
        piece: TextPiece | None = None,
    ) -> Json:
        logprobs = self._logprobs_of(piece) if piece and piece.logprobs else None
        choice = ChunkChoice.model_construct(
            index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason
        )
        return self._event([choice])

    def _event(self, choices: list[ChunkChoice], **usage: CompletionUsage) -> Json:
        return _dump(
            ChatCompletionChunk.model_construct(
                **self._envelope, object="chat.completion.chunk", choices=choices, **usage
            )
        )

    def _logprobs_of(self, piece: TextPiece) -> Json | None:
        if not self._logprobs:
            return None
        content = [
            {
                **_token_logprob(entry.token, entry.logprob),
                "top_logprobs": [_token_logprob(*likely) for likely in entry.top],
            }
            for entry in piece.logprobs
        ]
        return {"content": content, "refusal": None}


class TextResponseBuilder(ResponseBuilder):
    """Builds the response bodies of one text completion, which are alike in a stream and not."""

    prefix = "cmpl"

    def __init__(self, model: str, *, logprobs: bool = False) -> None:
        super().__init__(model, logprobs=logprobs)
        self._characters: Counter[int] = Counter()
        """Of the tokens of each choice so far, from which a stream's next offsets count."""

    def completion(self, answers: Sequence[Answer]) -> Json:
        """Return the body of a response that is not streamed."""
        choices = [
            self._choice(index, piece, result.finish)
            for index, (piece, result) in enumerate(answers)
        ]
        return self._text(choices, usage=_usage([answer.result for answer in answers]))

    def role_chunk(self, index: int) -> Json | None:
        """Return None: a text has no role."""
        return None

    def piece_chunk(self, index: int, piece: TextPiece) -> Json:
        """Return an event with a piece of a choice."""
        return self._text([self._choice(index, piece)])

    def final_chunk(self, index: int, result: GenerationResult) -> Json:
        """Return the event that gives the reason for a choice's end."""
        return self._text([self._choice(index, TextPiece(""), result.finish)])

    def usage_chunk(self, results: Sequence[GenerationResult]) -> Json:
        """Return the event with the usage."""
        return self._text([], usage=_usage(results))

    def _choice(
        self, index: int, piece: TextPiece, finish_reason: str | None = None
    ) -> CompletionChoice:
        # Not validated: the type has no place for a stream's pieces, whose reason is null.
        return CompletionChoice.model_construct(
            index=index,
            text=piece.text,
            logprobs=self._text_logprobs(index, piece.logprobs) if self._logprobs else None,
            finish_reason=finish_reason,
        )

    def _text_logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> Json:
        """Return the log-probabilities of a choice's next tokens in the older form."""
        tokens = [entry.token.decode(errors="replace") for entry in entries]
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._characters[index])
            self._characters[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                {token.decode(errors="replace"): logprob for token, logprob in entry.top}
                for entry in entries
            ],
            "text_offset": offsets,
        }

    def _text(self, choices: list[CompletionChoice], **usage: CompletionUsage) -> Json:
        return _dump(
            Completion.model_construct(
                **self._envelope, object="text_completion", choices=choices, **usage
            )
        )


def _thoughts(piece: TextPiece) -> dict[str, str]:
    """Return the thoughts under the name that DeepSeek's API gave them."""
    return {"reasoning_content": piece.thoughts} if piece.thoughts else {}


def _token_logprob(token: bytes, logprob: float) -> Json:
    text = token.decode(errors="replace")
    return {"token": text, "bytes": list(token), "logprob": logprob}


def _usage(results: Sequence[GenerationResult]) -> CompletionUsage:
    """Return the tokens of the prompt and all answers, with their end-of-turn tokens."""
    prompt, tokens = results[0].prompt_tokens, sum(result.tokens for result in results)
    thoughts = sum(result.thought_tokens for result in results)
    details = {"completion_tokens_details": CompletionTokensDetails(reasoning_tokens=thoughts)}
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=tokens,
        total_tokens=prompt + tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=results[0].cached_tokens),
        **(details if thoughts else {}),
    )


def _dump(body: BaseModel) -> Json:
    # Clients expect the fields that are null here, such as finish_reason, but no others.
    return body.model_dump(exclude_unset=True, warnings="none")
