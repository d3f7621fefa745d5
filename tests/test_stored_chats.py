"""The page's chats in storage, and their answers, with a scripted engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from support.engines import CONTEXT, ScriptedAsyncEngine

from pipeline.chat.conversation import Conversation
from pipeline.chat.session import SamplingParams
from pipeline.errors import GattError
from pipeline.inference.async_engine import AnswerStream
from pipeline.inference.request import (
    PROMPT_OPTIONS,
    GenerationRequest,
    Prompt,
    PromptOptions,
    QueueFullError,
    TextPiece,
)
from pipeline.records import Message
from pipeline.server.web.stored_chats import ChatStore, PageChat


def _answer(chat: PageChat, user: str) -> None:
    asyncio.run(chat.turn(user, 9, lambda model_index, piece: None))


def test_a_stored_chat_is_the_same_when_it_is_loaded() -> None:
    engine, storage = ScriptedAsyncEngine(names=("a", "b")), dict[str, Any]()
    store = ChatStore(engine, storage)
    chat = store.load_last()
    assert (chat.models, chat.sampling.max_tokens) == (("a", "b"), CONTEXT // 2)
    store.save(chat)
    assert store.titles() == {}  # empty chats are not stored
    chat.conversation = Conversation("Be brief.")
    _answer(chat, "Hello " * 20)
    store.save(chat)
    store.set_open(chat)
    restarted = ChatStore(engine, json.loads(json.dumps(storage)))
    loaded = restarted.load_last()
    assert loaded.conversation == chat.conversation
    assert (loaded.id, loaded.models, loaded.attempts) == (chat.id, chat.models, 1)
    assert loaded.sampling == chat.sampling == SamplingParams(max_tokens=CONTEXT // 2)
    (title,) = restarted.titles().values()
    assert title == f"{('Hello ' * 20)[:47]}…"
    assert restarted.load_newer(loaded) is None
    loaded.saved_at -= 1
    assert restarted.load_newer(loaded) is not None


def test_deleted_and_unreadable_chats_do_not_come_back() -> None:
    storage: dict[str, Any] = {"chats": {"old": {"title": "From another version"}}, "open": "old"}
    engine = ScriptedAsyncEngine(names=("a",))
    store = ChatStore(engine, storage)
    assert store.load("old") is None
    chat = store.load_last()
    _answer(chat, "Hello")
    store.save(chat)
    assert list(store.titles().values()) == ["Hello", "From another version"]
    store.delete(chat.id)
    store.save(chat)  # its answer was still being generated
    assert list(store.titles()) == ["old"]
    ChatStore(engine, storage).save(chat)  # or in another tab
    assert list(store.titles()) == ["old"]
    engine.names.remove("a")
    assert not chat.is_served


def test_stopping_a_served_chat_keeps_the_text_so_far() -> None:
    engine = ScriptedAsyncEngine(names=("a", "b"), endless=True)
    chat = PageChat(engine, ("a", "b"), Conversation(), SamplingParams())
    pieces: list[tuple[int, str]] = []

    def stop_after_four(model_index: int, piece: TextPiece) -> None:
        pieces.append((model_index, piece.text))
        if len(pieces) == 4:
            chat.stop()

    completions = asyncio.run(chat.turn("Hello", 9, stop_after_four))
    assert [completion.finish for completion in completions] == ["cancelled"] * 2
    assert chat.conversation.turns[0].answers == ("One two.", "One two.")
    assert sorted(pieces) == [(0, "One "), (0, "two."), (1, "One "), (1, "two.")]


def test_stopping_before_the_prompt_is_read_sends_nothing() -> None:
    class StoppingEngine(ScriptedAsyncEngine):
        def chat_prompt(
            self, name: str, messages: tuple[Message, ...], options: PromptOptions = PROMPT_OPTIONS
        ) -> Prompt:
            chat.stop()
            return super().chat_prompt(name, messages, options)

    engine = StoppingEngine()
    chat = PageChat(engine, ("m",), Conversation(), SamplingParams())
    with pytest.raises(GattError, match="Stopped before the first token"):
        _answer(chat, "Hello")
    assert engine.requests == []


def test_a_refused_request_cancels_the_other_models_answer() -> None:
    class FullEngine(ScriptedAsyncEngine):
        def generate(self, name: str, request: GenerationRequest) -> AnswerStream:
            if name == "b":
                raise QueueFullError("full")
            return super().generate(name, request)

    engine = FullEngine(names=("a", "b"), endless=True)
    chat = PageChat(engine, ("a", "b"), Conversation(), SamplingParams())
    with pytest.raises(QueueFullError):
        _answer(chat, "Hello")
    result = asyncio.run(engine.answers[0].wait())
    assert result.finish == "cancelled"
    assert not chat.conversation.turns
    assert not chat.is_answering
