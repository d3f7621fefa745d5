"""A chat of the page with one served model or two: what is said, how answers are drawn, and the form in which it is kept."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from starlette.concurrency import run_in_threadpool

from pipeline.chat.conversation import (
    LAST_TURNS,
    SUMMARY_TOKENS,
    Conversation,
    Mark,
    StandingInstruction,
)
from pipeline.errors import GattError
from pipeline.gatt.instructions import parse_instruction
from pipeline.inference.async_engine import AnswerStream, AsyncEngine
from pipeline.inference.scheduler import GenerationRequest
from pipeline.records import Message, Request


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How answers are drawn; `max_tokens` of one answer."""

    temperature: float = 0.7
    max_tokens: int = 256
    seed: int = 1


@dataclass(slots=True)
class Heard:
    """An answer as far as it has come; `finish` is `lanes.Finish` at its end."""

    text: str = ""
    finish: str = ""


@lru_cache(maxsize=256)
def told(text: str) -> StandingInstruction:
    """An instruction in the user's words, with what can be checked of it."""
    text = text.strip()
    return StandingInstruction(text, parse_instruction(text))


class Talk:
    """A conversation with `models` of `engine`, each of which goes on with its own answers."""

    def __init__(
        self,
        engine: AsyncEngine,
        models: Sequence[str],
        chat: Conversation,
        drawing: SamplingParams,
    ) -> None:
        self.models, self.chat, self.drawing = tuple(models), chat, drawing
        self.id = secrets.token_hex(8)
        self.when = 0.0
        """Seconds since the epoch at which it was last kept."""
        self.heard: list[Heard] = []
        """The answers that are on their way; empty when none are."""
        self._engine = engine
        self._answers: list[AnswerStream] = []
        self._stopped = False
        self._draws = 0
        self._verdicts: tuple[Conversation | None, list[list[tuple[Mark | None, str]]]] = (None, [])

    @property
    def sides(self) -> range:
        """The models by number."""
        return range(len(self.models))

    @property
    def title(self) -> str:
        """The beginning of the first message."""
        words = " ".join(self.chat.turns[0].user.split()) if self.chat.turns else "New chat"
        return words if len(words) <= 48 else f"{words[:47]}…"

    @property
    def context(self) -> int:
        """Tokens that the chat may have with all models."""
        return min(map(self._engine.context, self.models))

    def stop(self) -> None:
        """End the answers before their next token; what was said so far stays."""
        self._stopped = True
        for answer in self._answers:
            answer.cancel()

    async def used(self, user: str | None = None) -> int:
        """Tokens of the longest side's chat, up to the answer to `user`."""
        if user is None and not self.chat.turns:
            return 0
        prompts = await self._prompts([self.chat.messages(side, user) for side in self.sides])
        return max(map(len, prompts))

    async def turn(self, user: str, max_tokens: int) -> list[Heard]:
        """Send a message and take the answers; `heard` shows them while they come.

        Raises:
            GattError: no answer, and the chat is as before.
        """
        heard = await self._hear(
            [self.chat.messages(side, user) for side in self.sides], max_tokens
        )
        if not any(one.text for one in heard):
            raise GattError("Stopped before a word was said: the message is back in its box.")
        self._draws += 1
        chat, verdicts = self.chat, self.verdicts()
        self.chat = chat.with_turn(user, [one.text for one in heard])
        for side, found in enumerate(verdicts):
            found.append(self.chat.verdict(side, len(self.chat.turns)))
        self._verdicts = (self.chat, verdicts)
        return heard

    async def summary(self) -> list[str]:
        """Each model's summary of the middle.

        Raises:
            GattError: none came of it.
        """
        chats = [self.chat.summary_prompt(LAST_TURNS, side) for side in self.sides]
        heard = await self._hear(chats, min(SUMMARY_TOKENS, self.drawing.max_tokens))
        if not all(one.text.strip() for one in heard):
            raise GattError("No summary came of it. Take some turns back, or begin a new chat.")
        return [one.text for one in heard]

    def verdicts(self) -> list[list[tuple[Mark | None, str]]]:
        """For each side, of every turn: its mark, and what makes it no answer."""
        chat, found = self._verdicts
        if chat is not self.chat:
            turns = range(1, len(self.chat.turns) + 1)
            found = [[self.chat.verdict(side, turn) for turn in turns] for side in self.sides]
            self._verdicts = (self.chat, found)
        return found

    def anew(self, models: Sequence[str]) -> Talk:
        """A new chat under the same instruction and settings."""
        return Talk(
            self._engine,
            models,
            Conversation(self.chat.system, self.chat.instruction),
            self.drawing,
        )

    async def _hear(self, chats: Sequence[tuple[Message, ...]], max_tokens: int) -> list[Heard]:
        """An answer of each model to its chat."""
        self.heard, self._stopped = [Heard() for _ in chats], False
        # The count of draws: another attempt at the same turn is to be another draw.
        seed = self.drawing.seed + self._draws
        try:
            for name, tokens, chat in zip(
                self.models, await self._prompts(chats), chats, strict=True
            ):
                request = Request(chat, seed, max_tokens, self.drawing.temperature)
                if not self._stopped:
                    self._answers.append(self._engine.ask(name, GenerationRequest(tokens, request)))
            await asyncio.gather(*map(_listen, self._answers, self.heard))
            return self.heard
        finally:
            for answer in self._answers:
                answer.cancel()
            self._answers, self.heard = [], []

    async def _prompts(self, chats: Sequence[tuple[Message, ...]]) -> list[list[int]]:
        """As tokens; off the event loop, since long ones take a while."""
        tokens = (
            run_in_threadpool(self._engine.chat_tokens, *pair)
            for pair in zip(self.models, chats, strict=True)
        )
        return await asyncio.gather(*tokens)

    def kept(self) -> dict[str, Any]:
        """As JSON takes it; from it `restored` makes the chat again."""
        self.when = time.time()
        return {
            "models": list(self.models),
            "system": self.chat.system,
            "told": self.chat.instruction.text,
            "title": self.title,
            "turns": [
                [turn.user, turn.instruction.text, *turn.answers] for turn in self.chat.turns
            ],
            "drawing": [self.drawing.temperature, self.drawing.max_tokens, self.drawing.seed],
            "draws": self._draws,
            "when": self.when,
        }


def restored(engine: AsyncEngine, name: str, kept: dict[str, Any]) -> Talk:
    """The chat that was kept under `name`. Models that are no longer served stay named, and cannot answer."""
    chat = Conversation(kept["system"])
    for user, text, *answers in kept["turns"]:
        chat = replace(chat, instruction=told(text)).with_turn(user, answers)
    talk = Talk(
        engine,
        kept["models"],
        replace(chat, instruction=told(kept["told"])),
        SamplingParams(*kept["drawing"]),
    )
    talk.id, talk.when, talk._draws = name, kept["when"], kept["draws"]
    return talk


async def _listen(answer: AnswerStream, heard: Heard) -> None:
    async for piece in answer:
        heard.text += piece
    assert answer.outcome is not None
    heard.finish = answer.outcome.finish
