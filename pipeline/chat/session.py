"""A chat with one model or several: sampling, turns, verdicts, and what fits in the context.

The terminal and the web page drive the same `ChatSession`. It shows nothing and asks nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from pipeline.chat.conversation import LAST_TURNS, SUMMARY_TOKENS, Conversation, Turn, Verdict
from pipeline.errors import GattError
from pipeline.inference.request import TextPiece
from pipeline.records import Completion, Message, Request

OnText = Callable[[int, TextPiece], None]
"""Receives a model's index and the next piece of its answer, on the event loop's thread."""


class ChatBackend(Protocol):
    """The models of a chat, in the order of their indices."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the models."""

    @property
    def context(self) -> int:
        """The tokens that a prompt and its answer may have together."""

    @property
    def max_context(self) -> int:
        """The largest `context` that the backend could be resized to."""

    async def count_tokens(self, prompts: Sequence[Sequence[Message]]) -> list[int]:
        """Return the tokens of each model's prompt for the next answer."""

    async def generate(self, requests: Sequence[Request], on_text: OnText) -> list[Completion]:
        """Answer one request with each model; `finish` is "cancelled" for stopped answers."""

    def stop(self) -> None:
        """End the answers before their next token; signal handlers may call it."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How answers are sampled; `max_tokens` limits one answer."""

    temperature: float = 0.7
    max_tokens: int = 256
    seed: int = 1

    def checked(self, context: int) -> SamplingParams:
        """Return the parameters if they are valid for a context of `context` tokens.

        Raises:
            GattError: a value is out of range.
        """
        if not 0 <= self.temperature <= 5:
            raise GattError(
                f"temperature is {self.temperature:g}; expected 0 (greedy decoding) to 5."
            )
        if not 1 <= self.max_tokens <= context // 2:
            raise GattError(
                f"max_tokens is {self.max_tokens}; expected 1 to {context // 2}, half of the "
                "context."
            )
        if self.seed < 0:
            raise GattError(f"seed is {self.seed}; expected an integer from 0.")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Whether a message and an answer fit in the context; sizes are in tokens.

    `larger_context` is the next larger context, or 0. `summarizable_turns` is the number of turns
    that a summary would replace, or 0.
    """

    prompt_tokens: int
    max_tokens: int
    context: int
    larger_context: int
    summarizable_turns: int

    @property
    def fits(self) -> bool:
        """Whether the prompt and an answer of `max_tokens` fit."""
        return self.tokens_left >= self.max_tokens

    @property
    def tokens_left(self) -> int:
        """The tokens that an answer could have."""
        return self.context - self.prompt_tokens


class ChatSession:
    """A conversation with the models of `backend`, each of which continues its own answers.

    `attempts` counts the turns sampled so far. It is added to the seed, so that a retry differs.
    """

    def __init__(
        self,
        backend: ChatBackend,
        conversation: Conversation,
        sampling: SamplingParams,
        attempts: int = 0,
    ) -> None:
        self.backend, self.conversation, self.sampling = backend, conversation, sampling
        self.attempts = attempts
        self.is_answering = False
        self._judged: tuple[Turn, ...] = ()
        self._verdicts: list[list[Verdict]] = [[] for _ in backend.names]

    def stop(self) -> None:
        """End the answers before their next token; their text so far remains."""
        self.backend.stop()

    async def turn(self, user: str, max_tokens: int, on_text: OnText) -> list[Completion]:
        """Send a message and add a turn with the models' answers.

        Raises:
            GattError: stopped before the first token; the conversation is unchanged.
        """
        # The user may give another instruction while the answers to this prompt are generated.
        instruction = self.conversation.instruction
        completions = await self._generate(self._prompts(user), max_tokens, on_text)
        answers = [completion.text for completion in completions]
        stopped = [completion.finish == "cancelled" for completion in completions]
        if any(stopped) and not any(answers):
            raise GattError("Stopped before the first token; the message was not added.")
        self.attempts += 1
        self.conversation = self.conversation.with_turn(user, answers, instruction)
        return completions

    async def probe(self, question: str, on_text: OnText) -> list[Completion]:
        """Ask a question without adding a turn.

        Raises:
            GattError: the question and an answer do not fit in the context.
        """
        if not (await self.room_for(question)).fits:
            raise GattError(
                "The context has no room for this question and an answer. Lower max_tokens, or "
                "take a larger context."
            )
        return await self._generate(self._prompts(question), self.sampling.max_tokens, on_text)

    async def summarize(self, on_text: OnText) -> list[str]:
        """Return each model's summary of the middle turns, for `replace_middle`.

        Raises:
            GattError: a model generated nothing.
        """
        prompts = [self.conversation.summary_prompt(LAST_TURNS, index) for index in self._models]
        max_tokens = min(SUMMARY_TOKENS, self.sampling.max_tokens)
        completions = await self._generate(prompts, max_tokens, on_text)
        if not all(completion.text.strip() for completion in completions):
            raise GattError("No summary was generated. Undo some turns, or start a new chat.")
        return [completion.text for completion in completions]

    def replace_middle(self, summaries: Sequence[str]) -> None:
        """Replace the middle turns with each model's summary."""
        self.conversation = self.conversation.with_summaries(LAST_TURNS, summaries)

    async def tokens_used(self, user: str | None = None) -> int:
        """Return the tokens of the longest prompt: the chat, and the message `user`, if given."""
        if user is None and not self.conversation.turns:
            return 0
        return max(await self.backend.count_tokens(self._prompts(user)))

    async def room_for(self, user: str) -> Room:
        """Return whether the message `user` and an answer fit, and what would make room."""
        context, middle = self.backend.context, self.conversation.middle(LAST_TURNS)
        larger_context = min(2 * context, self.backend.max_context)
        return Room(
            prompt_tokens=await self.tokens_used(user),
            max_tokens=self.sampling.max_tokens,
            context=context,
            larger_context=larger_context if larger_context > context else 0,
            summarizable_turns=0 if all(turn.is_summary for turn in middle) else len(middle),
        )

    def undo(self) -> str:
        """Remove the last turn and return its message.

        Raises:
            GattError: there are no turns.
        """
        user = self.turn_at(len(self.conversation.turns)).user
        self.conversation = self.conversation.without_last_turn()
        return user

    @contextmanager
    def resume_from(self, conversation: Conversation) -> Iterator[None]:
        """Continue from `conversation`; without a new turn, the present one is restored."""
        previous, attempts = self.conversation, self.attempts
        self.conversation = conversation
        try:
            yield
        finally:
            if self.attempts == attempts:
                self.conversation = previous

    def turn_at(self, number: int) -> Turn:
        """Return turn `number`, from 1.

        Raises:
            GattError: there is no such turn.
        """
        count = len(self.conversation.turns)
        if not count:
            raise GattError("The chat has no turns yet. Type a message first.")
        if not 1 <= number <= count:
            raise GattError(f"No turn {number}; expected a turn from 1 to {count}.")
        return self.conversation.turns[number - 1]

    def verdicts(self) -> list[list[Verdict]]:
        """Return for each model the verdict on every turn."""
        turns = self.conversation.turns
        # A verdict depends on the turns up to its own only: those that are unchanged are reused.
        unchanged = 0
        for judged, turn in zip(self._judged, turns, strict=False):
            if judged is not turn:
                break
            unchanged += 1
        for model_index, verdicts in enumerate(self._verdicts):
            verdicts[unchanged:] = [
                self.conversation.verdict(model_index, number)
                for number in range(unchanged + 1, len(turns) + 1)
            ]
        self._judged = turns
        return self._verdicts

    @property
    def _models(self) -> range:
        return range(len(self.backend.names))

    def _prompts(self, user: str | None) -> list[tuple[Message, ...]]:
        return [self.conversation.messages(index, user) for index in self._models]

    async def _generate(
        self, prompts: Sequence[tuple[Message, ...]], max_tokens: int, on_text: OnText
    ) -> list[Completion]:
        seed, temperature = self.sampling.seed + self.attempts, self.sampling.temperature
        requests = [
            Request(messages=prompt, seed=seed, max_tokens=max_tokens, temperature=temperature)
            for prompt in prompts
        ]
        self.is_answering = True
        try:
            return await self.backend.generate(requests, on_text)
        finally:
            self.is_answering = False


def tally(verdicts: Sequence[Verdict]) -> str:
    """Return "2 of 3": how many checked answers follow their instruction; "" if none is checked."""
    marks = [verdict.mark for verdict in verdicts if verdict.mark]
    return f"{marks.count('✓')} of {len(marks)}" if marks else ""


def cut_note(completion: Completion, max_tokens: int) -> str:
    """Return why an answer is incomplete or empty, or ""."""
    if completion.finish == "stop" and not completion.text.strip():
        return "empty: the model ended its answer at once"
    notes = {
        "cancelled": "stopped",
        "length": f"cut at {max_tokens} tokens",
        "thinking": "no answer: its thoughts did not end",
    }
    return notes.get(completion.finish, "")


def pluralize(count: int, noun: str) -> str:
    """Return "1 turn" or "2 turns"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
