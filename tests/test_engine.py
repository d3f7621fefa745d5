"""Generation with the embedded model: batch-invariant, and each completion says why it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import numpy as np
import pytest
import scipy.special
from support.cores import pretend_cores

from pipeline.data.dialogues import load_dialogues
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.batch_worker import _TaskSequence
from pipeline.inference.llama.context import BatchContext
from pipeline.records import Completion, Message, Request, Task


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one thread: several would wait for each other while another program holds a core."""
    pretend_cores(monkeypatch, 1)


class _Turn(NamedTuple):
    dialogue: str
    turn: int


def _ask(text: str, max_tokens: int, temperature: float = 0.7) -> Request:
    messages: tuple[Message, ...] = ({"role": "user", "content": text},)
    return Request(messages=messages, seed=1, max_tokens=max_tokens, temperature=temperature)


def _chat(
    users: Sequence[str], max_tokens: int, record: Callable[[int, Completion], object]
) -> Task:
    """Generate an answer to each of the users' messages, with the turn as its seed."""
    messages: list[Message] = []
    for turn, user in enumerate(users):
        messages.append({"role": "user", "content": user})
        completion = yield Request(messages=tuple(messages), seed=turn, max_tokens=max_tokens)
        record(turn, completion)
        messages.append({"role": "assistant", "content": completion.text})


_LONG = " ".join(f"Fact {n}: tide {n} came at {n % 12} o'clock." for n in range(12))
"""About 170 tokens."""


def _converse(
    model: Path, sequences: int, *, dialogues: int = 4, turns: int = 3, max_tokens: int = 16
) -> dict[_Turn, Completion]:
    """Return the completions of some built-in dialogues, `sequences` of them in parallel.

    The first begins with a long message, so that three turns cross a boundary of 256 tokens.
    """
    completions: dict[_Turn, Completion] = {}

    def tasks() -> Iterator[Task]:
        for number, dialogue in enumerate(load_dialogues("seed")[:dialogues]):

            def record(turn: int, completion: Completion, name: str = dialogue.id) -> None:
                completions[_Turn(name, turn)] = completion

            long = [f"{_LONG} {dialogue.turns[0]}", *dialogue.turns[1:turns]]
            yield _chat(dialogue.turns[:turns] if number else long, max_tokens, record)

    with BatchEngine(model, sequences, 1024) as engine:
        engine.run(tasks())
    assert len(completions) == dialogues * turns
    return completions


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("format_name", ["Q4_0", pytest.param("Q8_0", marks=pytest.mark.slow)])
def test_answers_do_not_depend_on_what_is_in_the_batch(format_name: str) -> None:
    model = cached_gguf(find_model("smollm2-135m"), format_name)
    one_by_one, batched = _converse(model, 1), _converse(model, 4)
    # llama.cpp pads the KV cache to multiples of 256 cells: the dialogues must cross one.
    tokens = [completion.prompt_tokens for completion in one_by_one.values()]
    assert min(tokens) < 256 < max(tokens)
    assert one_by_one == batched


def test_answers_do_not_depend_on_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more cores, dialogues are divided among contexts, or a context uses several threads.

    Few tokens: while another program holds a core, several threads take seconds for each.
    """
    model = cached_gguf(find_model("smollm2-135m"), "Q4_0")

    def converse(cores: int, dialogues: int) -> dict[_Turn, Completion]:
        pretend_cores(monkeypatch, cores)
        return _converse(model, dialogues, dialogues=dialogues, turns=1, max_tokens=6)

    assert converse(cores=2, dialogues=3) == converse(cores=1, dialogues=3)
    assert converse(cores=2, dialogues=1) == converse(cores=1, dialogues=1)


@pytest.mark.usefixtures("one_core")
def test_a_recall_question_does_not_change_the_dialogue_after_it() -> None:
    """A branch of the dialogue is answered in its sequence, and then dropped."""
    question: Message = {"role": "user", "content": "What is your name, and what did I say first?"}
    branches: list[Completion] = []

    def talk(users: Sequence[str], answers: list[Completion], *, with_branches: bool) -> Task:
        messages: list[Message] = []
        for turn, user in enumerate(users):
            if with_branches:
                branch = (*messages, question)
                branches.append((yield Request(messages=branch, seed=turn, max_tokens=12)))
            messages.append({"role": "user", "content": user})
            answers.append((yield Request(messages=tuple(messages), seed=turn, max_tokens=20)))
            messages.append({"role": "assistant", "content": answers[-1].text})

    def run(*, with_branches: bool) -> list[list[Completion]]:
        dialogues = load_dialogues("seed")[:2]
        answers: list[list[Completion]] = [[] for _ in dialogues]
        with BatchEngine(cached_gguf(find_model("smollm2-135m"), "Q4_0"), 2, 1024) as engine:
            engine.run(
                talk(dialogue.turns[:3], record, with_branches=with_branches)
                for dialogue, record in zip(dialogues, answers, strict=True)
            )
        return answers

    assert run(with_branches=True) == run(with_branches=False)
    assert len(branches) == 6


def test_an_error_in_a_dialogue_ends_the_run_but_not_the_engine(base: Path) -> None:
    def talk(*, fails: bool) -> Task:
        yield _ask("Say hello.", 200)
        if fails:
            raise ValueError("the disk is full")

    with BatchEngine(base, 4, 512) as engine:
        with pytest.raises(ValueError, match="disk is full"):
            engine.run(talk(fails=n == 0) for n in range(400))
        assert engine.complete(_ask("Say hello.", 8)).tokens > 0


def test_a_prompt_that_exceeds_the_context_is_reported_and_not_truncated(base: Path) -> None:
    with BatchEngine(base, 1, 256) as engine:
        completion = engine.complete(_ask("word " * 300, 16))
    assert completion.finish == "context"
    assert completion.text == ""
    assert completion.prompt_tokens > 256


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("finish", ["stop", "stop_when", "length"])
def test_a_completion_says_why_it_stopped(base: Path, finish: str) -> None:
    stop_when = (lambda text: "o" in text) if finish == "stop_when" else None
    request = Request(
        messages=({"role": "user", "content": "What is two plus two?"},),
        seed=1,
        max_tokens=2 if finish == "length" else 200,
        temperature=0,
        stop_when=stop_when,
    )
    with BatchEngine(base, 1, 512) as engine:
        completion = engine.complete(request)
    assert completion.finish == finish
    assert (completion.tokens == 2) == (finish == "length")
    if finish == "stop_when":
        assert completion.text.index("o") >= completion.text.rindex("o")


@pytest.mark.usefixtures("one_core")
def test_the_last_busy_sequence_takes_the_id_of_one_that_has_ended(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a gap between the ids in use llama.cpp decodes all of them in one pass."""
    ids: list[list[int]] = []
    decode = BatchContext.decode

    def recorded(
        self: BatchContext[_TaskSequence], sequences: Sequence[_TaskSequence]
    ) -> list[int]:
        ids.append([sequence.id for sequence in sequences])
        return decode(self, sequences)

    def talk(max_tokens: int) -> Task:
        yield _ask("Tell a long story.", max_tokens)

    monkeypatch.setattr(BatchContext, "decode", recorded)
    with BatchEngine(base, 4, 256) as engine:
        engine.run(map(talk, (4, 8, 12, 24)))
    assert all(numbers == list(range(len(numbers))) for numbers in ids)
    assert [len(numbers) for numbers in ids] == sorted(map(len, ids), reverse=True)
    assert {len(numbers) for numbers in ids} == {1, 2, 3, 4}


@pytest.mark.usefixtures("one_core")
def test_perplexity_is_that_of_the_logits(base: Path) -> None:
    text = "The lighthouse keeper climbed the stairs every evening."
    with BatchEngine(base, 1, 256) as engine:
        tokens = engine.tokenize(text)
        losses = [
            scipy.special.logsumexp(row.astype(np.float64)) - float(row[token])
            for row, token in zip(engine.logits(tokens[:-1]), tokens[1:], strict=True)
        ]
        perplexity = engine.perplexity([text])
    assert 1 < perplexity < 1000
    assert perplexity == pytest.approx(np.exp(np.mean(losses)))


# --- draft tokens


@pytest.mark.usefixtures("one_core")
def test_a_repeated_answer_is_drafted_and_unchanged(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0
    decode = BatchContext.decode

    def counted(self: BatchContext[_TaskSequence], sequences: Sequence[_TaskSequence]) -> list[int]:
        nonlocal passes
        passes += 1
        return decode(self, sequences)

    monkeypatch.setattr(BatchContext, "decode", counted)
    request = Request(
        messages=({"role": "user", "content": "What is a lighthouse for?"},), seed=7, max_tokens=40
    )
    with BatchEngine(base, 1, 512) as engine:
        first = engine.complete(request)
        first_passes = passes
        assert engine.complete(request) == first
    assert first_passes <= first.tokens <= 40
    # Every second token came with the one before it.
    assert passes - first_passes <= first.tokens // 2 + 2


@pytest.mark.usefixtures("one_core")
def test_a_rejected_draft_leaves_the_cache_as_it_was(base: Path) -> None:
    """An answer that ends before its draft is used, and the turns after it, need no history."""

    def talk(answers: list[str], stop_when: Callable[[str], bool] | None) -> Task:
        messages: list[Message] = [{"role": "user", "content": "Name three fruits."}]
        for turn in range(3):
            completion = yield Request(
                messages=tuple(messages),
                seed=3,
                max_tokens=30,
                stop_when=stop_when if turn == 1 else None,
            )
            answers.append(completion.text)
            messages += [
                {"role": "assistant", "content": completion.text},
                {"role": "user", "content": "Name three fruits, please."},
            ]

    def run(*, with_history: bool) -> list[str]:
        answers: list[str] = []
        with BatchEngine(base, 1, 512) as engine:
            if with_history:
                engine.run([talk([], None), talk([], lambda text: len(text) > 12)])
            engine.run([talk(answers, lambda text: len(text) > 9)])
        return answers

    assert run(with_history=True) == run(with_history=False)


# --- llama-cpp-python's own generation


@pytest.mark.slow
@pytest.mark.usefixtures("one_core")
def test_greedy_answers_are_those_of_llama_cpp() -> None:
    model = cached_gguf(find_model("smollm2-135m"), "F32")
    questions = [dialogue.turns[0] for dialogue in load_dialogues("seed")[:50]]
    batched, one_by_one = (_greedy_answers(model, questions, sequences) for sequences in (32, 1))
    assert batched == one_by_one
    peer = llama_cpp.Llama(
        str(model),
        n_ctx=512,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=True,
        logits_all=True,
        verbose=False,
    )
    with BatchEngine(model, 1, 256, cache_type="F32") as engine:
        prompts = [
            engine.tokenize(engine.template.render(_ask(question, 24).messages))
            for question in questions
        ]
    gaps: list[float] = []
    for prompt, answer in zip(prompts, one_by_one, strict=True):
        completion = peer.create_completion(
            prompt, max_tokens=24, temperature=0, repeat_penalty=1.0
        )
        peer_answer = completion["choices"][0]["text"]
        if answer != peer_answer:
            gaps.append(_logit_gap(peer, prompt, answer, peer_answer))
    # A tie but for rounding: llama-cpp-python sums a long prompt in another order.
    assert len(gaps) <= 5
    assert all(gap < 0.01 for gap in gaps)


def _greedy_answers(model: Path, questions: Sequence[str], sequences: int) -> list[str]:
    answers: dict[str, str] = {}

    def ask(question: str) -> Task:
        completion = yield _ask(question, 24, temperature=0)
        answers[question] = completion.text

    with BatchEngine(model, sequences, 256, cache_type="F32") as engine:
        engine.run(map(ask, questions))
    return [answers[question] for question in questions]


def _logit_gap(peer: llama_cpp.Llama, prompt: list[int], first: str, second: str) -> float:
    """Return how far apart the logits of the first different tokens of two answers are."""
    tokens, others = (peer.tokenize(text.encode(), add_bos=False) for text in (first, second))
    pairs = enumerate(zip(tokens, others, strict=False))
    same = next(n for n, (token, other) in pairs if token != other)
    peer.reset()
    peer.eval([*prompt, *tokens[:same]])
    logits = peer.scores[len(prompt) + same - 1]
    return abs(float(logits[tokens[same]] - logits[others[same]]))
