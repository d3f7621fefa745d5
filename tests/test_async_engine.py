"""The engine of the server with real models: its queue, and adapters over shared weights."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

import pytest
from support.cores import pretend_cores
from support.families import save_family

from pipeline.errors import GattError
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.merge import open_base
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.inference.async_engine import AnswerStream, AsyncEngine, ModelSource
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama.model import Adapter
from pipeline.inference.request import GenerationRequest, QueueFullError
from pipeline.inference.scheduler import Limits
from pipeline.records import Message, Request, SamplerSettings


def test_a_full_queue_refuses_and_a_waiting_request_is_served_or_cancelled(base: Path) -> None:
    async def run(engine: AsyncEngine) -> None:
        tokens, _ = engine.chat_prompt("m", ({"role": "user", "content": "Tell a story."},))
        sampling = Request(messages=(), seed=1, max_tokens=60, temperature=0)
        request = GenerationRequest(tokens=tokens, sampling=sampling)
        running, waiting = engine.generate("m", request), engine.generate("m", request)
        with pytest.raises(QueueFullError, match="1 requests wait"):
            engine.generate("m", request)
        assert engine.stats("m") == (1, 1, 1)
        waiting.cancel()
        assert (await waiting.wait()).finish == "cancelled"
        next_answer = engine.generate("m", request)
        running.cancel()
        assert (await running.wait()).finish == "cancelled"
        assert len([piece async for piece in next_answer]) > 0
        assert next_answer.result and next_answer.result.finish in ("stop", "length")

    limits = Limits(context=256, max_waiting=1, max_sequences=1)
    engine = AsyncEngine({"m": ModelSource(base)}, limits)
    try:
        asyncio.run(run(engine))
    finally:
        engine.close()


class _Answer(NamedTuple):
    text: str
    cached_tokens: int


async def _ask_twice(engine: AsyncEngine, request: Request) -> dict[str, _Answer]:
    """Return the second answer of each model to the same request."""
    answers: dict[str, _Answer] = {}
    for _ in range(2):
        for name in engine.names:
            tokens, _ = engine.chat_prompt(name, request.messages)
            stream = engine.generate(name, GenerationRequest(tokens=tokens, sampling=request))
            text = "".join([piece.text async for piece in stream])
            assert stream.result
            answers[name] = _Answer(text, stream.result.cached_tokens)
    return answers


def test_an_adapter_is_a_model_of_its_own_over_the_same_weights(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    file, adapter = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    write_formats(Model("tiny", tiny_llama), None, {"F32": file})
    write_adapter(open_base(tiny_llama), tiny_adapter, adapter)
    sources = {"plain": ModelSource(file), "adapted": ModelSource(file, Adapter(adapter))}
    request = Request(
        messages=({"role": "user", "content": "It's 2,026"},), seed=1, max_tokens=12, temperature=0
    )
    engine = AsyncEngine(sources, Limits(context=256, max_sequences=2))
    try:
        answers = asyncio.run(_ask_twice(engine, request))
    finally:
        engine.close()
    assert min(answer.cached_tokens for answer in answers.values()) > 0
    for name, source in sources.items():
        with BatchEngine(source.path, 1, 256, adapter=source.adapter) as exact:
            assert answers[name].text == exact.complete(request).text
    assert answers["plain"].text != answers["adapted"].text


_Tokens = tuple[tuple[bytes, float], ...]
_USERS = ("Tell me a story.", "Why is the sky blue? " * 12, "List five rivers.", "Count to ten.")


async def _converse(engine: AsyncEngine, user: str) -> list[_Tokens]:
    """Return the tokens and log-probabilities of two answers; the second prompt is cached."""
    chat: tuple[Message, ...] = ()
    answers: list[_Tokens] = []
    for seed in range(2):
        chat = (*chat, {"role": "user", "content": user})
        sampler = SamplerSettings(logprobs=1)
        request = Request(messages=chat, seed=seed, max_tokens=24, sampler=sampler)
        tokens, _ = engine.chat_prompt("m", chat)
        stream = engine.generate("m", GenerationRequest(tokens=tokens, sampling=request))
        pieces = [piece async for piece in stream]
        answers.append(tuple((t.token, t.logprob) for piece in pieces for t in piece.logprobs))
        chat = (*chat, {"role": "assistant", "content": "".join(piece.text for piece in pieces)})
    return answers


def test_batch_invariant_answers_are_those_of_the_batch_engine(base: Path) -> None:
    """Bit for bit: alone, beside others, and in their text as `gatt evaluate` generates them."""

    async def run(engine: AsyncEngine) -> tuple[list[list[_Tokens]], list[list[_Tokens]]]:
        alone = [await _converse(engine, user) for user in _USERS]
        return alone, await asyncio.gather(*(_converse(engine, user) for user in _USERS))

    limits = Limits(context=512, max_sequences=4, batch_invariant=True)
    engine = AsyncEngine({"m": ModelSource(base)}, limits)
    try:
        alone, together = asyncio.run(run(engine))
    finally:
        engine.close()
    assert alone == together
    with BatchEngine(base, 1, 512) as exact:
        for user, (first, _) in zip(_USERS, alone, strict=True):
            chat: tuple[Message, ...] = ({"role": "user", "content": user},)
            text = exact.complete(Request(messages=chat, seed=0, max_tokens=24)).text
            assert b"".join(token for token, _ in first).decode() == text


def test_a_full_sequence_between_others_does_not_end_them(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle sequences between busy ones are padded, and this one has no cell left for it."""
    pretend_cores(monkeypatch, 1)

    def answer(engine: AsyncEngine, words: int) -> AnswerStream:
        user: Message = {"role": "user", "content": "Tell a story. " * words}
        tokens, _ = engine.chat_prompt("m", (user,))
        sampler = SamplerSettings(ignore_eos=True)
        room = 40 if words == 1 else 256 - len(tokens)
        sampling = Request(messages=(), seed=1, max_tokens=room, sampler=sampler)
        return engine.generate("m", GenerationRequest(tokens=tokens, sampling=sampling))

    async def run(engine: AsyncEngine) -> list[str]:
        streams = [answer(engine, words) for words in (1, 50, 1)]
        return [(await stream.wait()).finish for stream in streams]

    limits = Limits(context=256, max_sequences=3, batch_invariant=True)
    engine = AsyncEngine({"m": ModelSource(base)}, limits)
    try:
        assert asyncio.run(run(engine)) == ["length"] * 3
    finally:
        engine.close()


def test_a_model_with_a_state_has_no_batch_invariant_answers(tmp_path: Path) -> None:
    folder, file = tmp_path / "lfm2", tmp_path / "lfm2.gguf"
    save_family("lfm2", folder)
    write_formats(Model("tiny", folder), None, {"F32": file})
    with pytest.raises(GattError, match=r"keeps a state for it\. Leave out --batch-invariant"):
        AsyncEngine({"m": ModelSource(file)}, Limits(128, batch_invariant=True))
