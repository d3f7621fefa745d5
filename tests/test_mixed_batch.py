"""Generation as on a GPU, with a GPU that is not there: llama.cpp computes on the CPU."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.gpu import install_fake_gpu
from support.shared import make_once

from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.inference.async_engine import AsyncEngine, ModelSource
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama import plan
from pipeline.inference.llama.batch_builder import BatchRow
from pipeline.inference.llama.mixed_batch import MixedBatchContext
from pipeline.inference.llama.sampler import Sampler
from pipeline.inference.request import GenerationRequest
from pipeline.inference.scheduler import Limits, Slot
from pipeline.records import Completion, Message, Request, SamplerSettings, Task

_CONTEXT = 256
_QUESTIONS = tuple(f"It's 2,0{n} and I'll pay {'€35.50! ' * (1 + n % 5)}" for n in range(20))


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        folder.mkdir()
        write_formats(Model("tiny", tiny_llama), None, {"F32": folder / "tiny.gguf"})

    return make_once(tmp_path_factory, "tiny-f32", make) / "tiny.gguf"


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[BatchRow]]:
    """Record the rows of every batch, without those of idle sequences."""
    recorded: list[list[BatchRow]] = []
    decode = MixedBatchContext._decode_rows

    def record(self: MixedBatchContext[Slot], rows: Sequence[BatchRow]) -> list[int]:
        recorded.append(list(rows))
        return decode(self, rows)

    monkeypatch.setattr(MixedBatchContext, "_decode_rows", record)
    return recorded


def _request(text: str, max_tokens: int = 12, temperature: float = 0) -> Request:
    messages: tuple[Message, ...] = ({"role": "user", "content": text},)
    return Request(messages=messages, seed=1, max_tokens=max_tokens, temperature=temperature)


def _answer(
    model: Path, sequences: int, *, turns: int = 1, temperature: float = 0
) -> dict[str, list[Completion]]:
    """Return the completions of a dialogue for each question, with a KV cache in F32."""
    completions: dict[str, list[Completion]] = {}

    def talk(question: str) -> Task:
        messages: list[Message] = []
        for turn in range(turns):
            messages.append({"role": "user", "content": question})
            request = Request(
                messages=tuple(messages), seed=turn, max_tokens=12, temperature=temperature
            )
            completion = yield request
            completions.setdefault(question, []).append(completion)
            messages.append({"role": "assistant", "content": completion.text})

    with BatchEngine(model, sequences, _CONTEXT, cache_type="F32") as engine:
        engine.run(map(talk, _QUESTIONS))
    return completions


def test_greedy_answers_are_those_of_the_cpu(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, batches: list[list[BatchRow]]
) -> None:
    """In float32, rounding does not change which token of a random model is the most likely."""
    exact = _answer(tiny_gguf, 4, turns=2)
    assert not batches
    install_fake_gpu(monkeypatch, 6)
    mixed = _answer(tiny_gguf, 8, turns=2)
    assert {len(completions) for completions in mixed.values()} == {2}
    assert mixed == exact
    for rows in batches:
        busy = sorted({row.sequence for row in rows})
        assert busy == list(range(len(busy)))  # llama.cpp needs no second pass


def test_prompts_share_batches_of_up_to_their_size(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, batches: list[list[BatchRow]]
) -> None:
    install_fake_gpu(monkeypatch, 6)
    monkeypatch.setattr(plan, "GPU_BATCH_TOKENS", 256)
    answers = _answer(tiny_gguf, len(_QUESTIONS))
    prompt_tokens = sum(completions[0].prompt_tokens for completions in answers.values())
    prefilling = [rows for rows in batches if max(Counter(r.sequence for r in rows).values()) > 1]
    assert len(prefilling) == math.ceil(prompt_tokens / 256) > 1
    assert batches[: len(prefilling)] == prefilling
    assert [len(rows) for rows in prefilling[:-1]] == [256] * (len(prefilling) - 1)
    assert all(len({row.sequence for row in rows}) > 4 for rows in prefilling)
    # Answers begin while other prompts are decoded, in the same batches.
    assert any(row.logits for row in prefilling[0])
    assert all(row.logits for rows in batches[len(prefilling) :] for row in rows)
    # Every token of every prompt is decoded once.
    decoded = Counter(row[:2] for rows in prefilling for row in rows)
    assert set(decoded.values()) == {1}


def test_an_answer_does_not_wait_for_the_prompt_of_another(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, batches: list[list[BatchRow]]
) -> None:
    install_fake_gpu(monkeypatch, 6)
    monkeypatch.setattr(plan, "GPU_BATCH_TOKENS", 64)

    def talk(question: str) -> Task:
        yield _request(question, max_tokens=24)

    with BatchEngine(tiny_gguf, 2, _CONTEXT) as engine:
        engine.run(map(talk, ("Hi", "€35.50! " * 24)))
    rows_of = [Counter(row.sequence for row in rows) for rows in batches]
    assert sum(counts[0] == 1 and counts[1] > 1 for counts in rows_of) >= 2


def test_tokens_are_drawn_in_parallel(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads meet in the sampler: one after another, they would wait in vain."""
    install_fake_gpu(monkeypatch, 6)
    monkeypatch.setattr("pipeline.inference.llama.mixed_batch.core_count", lambda: 2)
    alone = _answer(tiny_gguf, 1, temperature=0.7)
    barrier = threading.Barrier(2)
    met = threading.Event()
    sample = Sampler.sample

    def wait_for_another(self: Sampler, context: object, index: int, size: int) -> int | None:
        if not met.is_set():
            barrier.wait(timeout=20)
            met.set()
        return sample(self, context, index, size)

    monkeypatch.setattr(Sampler, "sample", wait_for_another)
    assert _answer(tiny_gguf, len(_QUESTIONS), temperature=0.7) == alone
    assert met.is_set()


def test_a_model_that_does_not_fit_runs_on_the_cpu_and_says_so(
    tiny_gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    batches: list[list[BatchRow]],
) -> None:
    exact = _answer(tiny_gguf, 4)
    install_fake_gpu(monkeypatch, 0.1)
    capsys.readouterr()
    assert _answer(tiny_gguf, 4) == exact
    assert not batches
    unfit, where = capsys.readouterr().err.splitlines()
    assert unfit.startswith(
        "llama.cpp: Tiny Llama (0.0 GB) does not fit in the 0.1 GB that are free"
    )
    assert unfit.endswith("on Fake RTX: it runs on the CPU")
    assert where == "llama.cpp: 4 sequences of 256 tokens on the CPU"


def test_the_log_says_how_many_sequences_run_where(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_fake_gpu(monkeypatch, 6)
    with BatchEngine(tiny_gguf, 200, _CONTEXT):
        assert capsys.readouterr().err == ("llama.cpp: 64 sequences of 256 tokens on Fake RTX\n")


def test_the_server_decodes_prompts_together(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, batches: list[list[BatchRow]]
) -> None:
    async def ask(engine: AsyncEngine) -> list[str]:
        async def answer(question: str) -> str:
            request = _request(question)
            tokens, _ = engine.chat_prompt("m", request.messages)
            stream = engine.generate("m", GenerationRequest(tokens=tokens, sampling=request))
            return "".join([piece.text async for piece in stream])

        return await asyncio.gather(*map(answer, _QUESTIONS))

    def serve() -> list[str]:
        engine = AsyncEngine({"m": ModelSource(tiny_gguf)}, Limits(context=_CONTEXT))
        try:
            return asyncio.run(ask(engine))
        finally:
            engine.close()

    on_cpu = serve()
    install_fake_gpu(monkeypatch, 6)
    assert serve() == on_cpu
    rows_of = [Counter(row.sequence for row in rows) for rows in batches]
    assert max(sum(count > 1 for count in counts.values()) for counts in rows_of) > 1
    assert max(len(counts) for counts in rows_of) > 8


def test_a_request_that_waits_gets_the_slot_of_a_canceled_answer(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts in the step after; the answers that go on are not disturbed."""
    install_fake_gpu(monkeypatch, 6)
    sampling = replace(_request("Hi", 180), sampler=SamplerSettings(ignore_eos=True))

    async def ask(engine: AsyncEngine) -> list[str]:
        tokens, _ = engine.chat_prompt("m", sampling.messages)
        request = GenerationRequest(tokens=tokens, sampling=sampling)
        running, canceled, waiting = (engine.generate("m", request) for _ in range(3))
        await anext(canceled)
        canceled.cancel()
        answers = (running, canceled, waiting)
        return [(await answer.wait()).finish for answer in answers]

    limits = Limits(context=_CONTEXT, max_sequences=2)
    engine = AsyncEngine({"m": ModelSource(tiny_gguf)}, limits)
    try:
        assert asyncio.run(ask(engine)) == ["length", "cancelled", "length"]
    finally:
        engine.close()
