"""The chats of one browser, as its storage on the server holds them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypedDict

from pipeline.chat.conversation import Conversation, StandingInstruction
from pipeline.chat.session import ChatSession, SamplingParams
from pipeline.inference.async_engine import AsyncEngine
from pipeline.server.web.backend import ServedBackend

_MAX_TITLE_CHARACTERS = 48

_DELETED: set[str] = set()
"""The ids of chats that were deleted since the server started, in whichever tab."""


class StoredChat(TypedDict):
    """A chat as JSON. A turn is [user, instruction, answers...]; `saved_at` is Unix time."""

    models: list[str]
    system: str
    instruction: str
    title: str
    turns: list[list[str]]
    sampling: tuple[float, int, int]
    attempts: int
    saved_at: float


class PageChat(ChatSession):
    """A chat session with an id. The chat of a model that is not served any more is read-only."""

    def __init__(
        self,
        engine: AsyncEngine,
        models: Sequence[str],
        conversation: Conversation,
        sampling: SamplingParams,
        attempts: int = 0,
    ) -> None:
        super().__init__(ServedBackend(engine, models), conversation, sampling, attempts)
        self.models = tuple(models)
        self.id = secrets.token_hex(8)
        self.saved_at = 0.0
        self._is_preparing = False
        self._engine = engine

    @property
    def is_busy(self) -> bool:
        """Whether a turn is being prepared or answered."""
        return self._is_preparing or self.is_answering

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Be busy while a turn is prepared: the events of a tab are handled concurrently."""
        self._is_preparing = True
        try:
            yield
        finally:
            self._is_preparing = False

    @property
    def is_served(self) -> bool:
        """Whether all of its models are served now."""
        return all(name in self._engine.names for name in self.models)

    @property
    def title(self) -> str:
        """The beginning of the first message."""
        turns = self.conversation.turns
        title = " ".join(turns[0].user.split()) if turns else "New chat"
        if len(title) <= _MAX_TITLE_CHARACTERS:
            return title
        return f"{title[: _MAX_TITLE_CHARACTERS - 1]}…"

    def new_chat(self, models: Sequence[str]) -> PageChat:
        """Return an empty chat under the same instruction and settings."""
        conversation = replace(self.conversation, turns=())
        return PageChat(self._engine, models, conversation, self.sampling)

    def to_json(self) -> StoredChat:
        """Return what `from_json` reads."""
        sampling = self.sampling
        return {
            "models": list(self.models),
            "system": self.conversation.system,
            "instruction": self.conversation.instruction.text,
            "title": self.title,
            "turns": [
                [turn.user, turn.instruction.text, *turn.answers]
                for turn in self.conversation.turns
            ],
            "sampling": (sampling.temperature, sampling.max_tokens, sampling.seed),
            "attempts": self.attempts,
            "saved_at": self.saved_at,
        }

    @classmethod
    def from_json(cls, engine: AsyncEngine, chat_id: str, stored: StoredChat) -> PageChat:
        """Return the chat that was stored under `chat_id`."""
        conversation = Conversation(stored["system"])
        for user, instruction, *answers in stored["turns"]:
            conversation = _instructed(conversation, instruction).with_turn(user, answers)
        conversation = _instructed(conversation, stored["instruction"])
        sampling = SamplingParams(*stored["sampling"])
        chat = cls(engine, stored["models"], conversation, sampling, stored["attempts"])
        chat.id, chat.saved_at = chat_id, stored["saved_at"]
        return chat


def _instructed(conversation: Conversation, text: str) -> Conversation:
    if text == conversation.instruction.text:  # it is parsed once, not in every turn
        return conversation
    return replace(conversation, instruction=StandingInstruction.parse(text))


class ChatStore:
    """The chats in a browser's `storage`, which survives a reload and a restart of the server."""

    def __init__(self, engine: AsyncEngine, storage: dict[str, Any]) -> None:
        self.storage = storage
        self._engine = engine
        self._chats: dict[str, StoredChat] = storage.setdefault("chats", {})

    def titles(self) -> Mapping[str, str]:
        """Return the titles by id, the latest chat first."""
        return {chat_id: chat["title"] for chat_id, chat in reversed(list(self._chats.items()))}

    def load(self, chat_id: str) -> PageChat | None:
        """Return a chat; None if it is missing or cannot be read."""
        # The storage is a file, which another version may have written.
        with suppress(KeyError, TypeError, ValueError):
            return PageChat.from_json(self._engine, chat_id, self._chats[chat_id])
        return None

    def load_last(self) -> PageChat:
        """Return the chat that was shown last, or a new one with the first two models."""
        if chat := self.load(self.storage.get("open", "")):
            return chat
        models = self._engine.names[:2]
        max_tokens = min(map(self._engine.context_length, models)) // 2
        default = SamplingParams()
        sampling = replace(default, max_tokens=min(default.max_tokens, max_tokens))
        return PageChat(self._engine, models, Conversation(), sampling)

    def load_newer(self, chat: PageChat) -> PageChat | None:
        """Return the chat as another tab has saved it since; None if none has."""
        stored = self._chats.get(chat.id)
        return self.load(chat.id) if stored and stored["saved_at"] > chat.saved_at else None

    def set_open(self, chat: PageChat) -> None:
        """Remember the chat that is shown."""
        self.storage["open"] = chat.id

    def save(self, chat: PageChat) -> None:
        """Store the chat as the latest, unless it is empty or was deleted."""
        self._chats.pop(chat.id, None)
        if chat.conversation.turns and not self.is_deleted(chat):
            chat.saved_at = time.time()
            self._chats[chat.id] = chat.to_json()

    def delete(self, chat_id: str) -> None:
        """Delete a chat; an answer that is still generated does not bring it back."""
        _DELETED.add(chat_id)
        self._chats.pop(chat_id, None)

    def is_deleted(self, chat: PageChat) -> bool:
        """Return whether a tab has deleted the chat."""
        return chat.id in _DELETED
