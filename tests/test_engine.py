"""Generation: independent of the batch, and each completion says why it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.dialogues import load_dialogues
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.context import BatchContext
from pipeline.records import Completion, Message, Request, Task


def _converse(base: Path, sequences: int) -> dict[tuple[str, int], Completion]:
    got: dict[tuple[str, int], Completion] = {}

    def talk(name: str, turns: tuple[str, ...]) -> Task:
        messages: list[Message] = []
        for turn, user in enumerate(turns[:5]):
            messages.append({"role": "user", "content": user})
            got[name, turn] = yield Request(tuple(messages), turn, 48)
            messages.append({"role": "assistant", "content": got[name, turn].text})

    with BatchEngine(base, sequences, 1024) as llama:
        llama.run(talk(d.id, d.turns) for d in load_dialogues("seed")[:4])
    return got


@pytest.mark.parametrize("format_name", ["Q4_0", pytest.param("Q8_0", marks=pytest.mark.slow)])
def test_answers_do_not_depend_on_what_runs_beside_them(format_name: str) -> None:
    model = cached_gguf(find_model("smollm2-135m"), format_name)
    alone, together = _converse(model, 1), _converse(model, 4)
    assert len(alone) == 20
    assert (
        max(said.prompt_tokens for said in alone.values()) > 256
    )  # llama.cpp pads the cache to multiples of 256
    assert alone == together


def test_a_branch_leaves_the_dialogue_after_it_exactly_as_it_was() -> None:
    def talk(name: str, turns: tuple[str, ...], probed: bool) -> Task:
        messages: list[Message] = []
        for turn, user in enumerate(turns[:4]):
            if probed:
                asked: Message = {
                    "role": "user",
                    "content": "What is your name, and what did I say first?",
                }
                branches.append((yield Request((*messages, asked), turn, 32)))
            messages.append({"role": "user", "content": user})
            said[probed].append((name, (yield Request(tuple(messages), turn, 40))))
            messages.append({"role": "assistant", "content": said[probed][-1][1].text})

    branches: list[Completion] = []
    said: dict[bool, list[tuple[str, Completion]]] = {True: [], False: []}
    for probed in (True, False):
        with BatchEngine(cached_gguf(find_model("smollm2-135m"), "Q4_0"), 2, 1024) as llama:
            llama.run(talk(d.id, d.turns, probed) for d in load_dialogues("seed")[:2])
    assert len(branches) == 8
    assert sorted(said[True], key=str) == sorted(said[False], key=str)


def test_an_error_in_a_dialogue_ends_the_run_and_the_engine_goes_on(base: Path) -> None:
    def talk(broken: bool) -> Task:
        yield Request(({"role": "user", "content": "Say hello."},), 1, 200)
        if broken:
            raise ValueError("the disk is full")

    with BatchEngine(base, 4, 512) as llama:
        with pytest.raises(ValueError, match="disk is full"):
            llama.run(talk(n == 0) for n in range(400))
        assert (
            llama.complete(Request(({"role": "user", "content": "Say hello."},), 1, 8)).tokens > 0
        )


def test_a_full_context_is_said_and_not_cut(base: Path) -> None:
    with BatchEngine(base, 1, 256) as llama:
        said = llama.complete(Request(({"role": "user", "content": "word " * 300},), 1, 16))
    assert said.finish == "context"
    assert said.text == ""


@pytest.mark.slow
def test_greedy_answers_are_those_of_llama_cpp_alone() -> None:
    import llama_cpp

    model = cached_gguf(find_model("smollm2-135m"), "F32")
    questions = [d.turns[0] for d in load_dialogues("seed")[:50]]
    together, alone = (_greedy(model, questions, sequences) for sequences in (32, 1))
    kind = llama_cpp.GGML_TYPE_F32
    peer = llama_cpp.Llama(
        str(model),
        n_ctx=512,
        type_k=kind,
        type_v=kind,
        flash_attn=True,
        logits_all=True,
        verbose=False,
    )
    with BatchEngine(model, 1, 256, cache="F32") as llama:
        prompts = [
            llama.tokenize(llama.template.render(({"role": "user", "content": q},)))
            for q in questions
        ]
    theirs = [
        peer.create_completion(p, max_tokens=24, temperature=0, repeat_penalty=1.0)["choices"][0][
            "text"
        ]
        for p in prompts
    ]
    assert together == alone
    apart = [
        _gap(peer, p, ours, said)
        for p, ours, said in zip(prompts, alone, theirs, strict=True)
        if ours != said
    ]
    assert len(apart) <= 5
    assert all(
        gap < 0.01 for gap in apart
    )  # a tie but for rounding: llama.cpp alone sums a long prompt in another order


def _gap(peer: Any, prompt: list[int], ours: str, theirs: str) -> float:
    """How far apart the logits of the two answers' first different tokens are."""
    one, other = (peer.tokenize(text.encode(), add_bos=False) for text in (ours, theirs))
    same = next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    peer.reset()
    peer.eval([*prompt, *one[:same]])
    logits = peer.scores[len(prompt) + same - 1]
    return abs(float(logits[one[same]] - logits[other[same]]))


def _greedy(model: Path, questions: list[str], sequences: int) -> list[str]:
    got: dict[str, str] = {}

    def ask(question: str) -> Task:
        got[question] = (
            yield Request(({"role": "user", "content": question},), 1, 24, temperature=0)
        ).text

    with BatchEngine(model, sequences, 256, cache="F32") as llama:
        llama.run(map(ask, questions))
    return [got[question] for question in questions]


def test_what_was_said_before_is_foreseen_and_changes_nothing(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    decode = BatchContext.decode

    def counting(self: Any, busy: Any) -> list[int]:
        passes.append(len(busy))
        return decode(self, busy)

    monkeypatch.setattr(BatchContext, "decode", counting)
    asked = Request(({"role": "user", "content": "What is a lighthouse for?"},), 7, 40)
    with BatchEngine(base, 1, 512) as llama:
        first = llama.complete(asked)
        taken = len(passes)
        assert llama.complete(asked) == first
    assert first.tokens <= 40 and taken <= first.tokens
    assert (
        len(passes) - taken <= first.tokens // 2 + 2
    )  # every second token came with the one before it


def test_a_guess_that_nobody_takes_leaves_the_cache_as_it_was(base: Path) -> None:
    """An answer that ends in the middle of what was foreseen, and the turns after it, are those of an engine without a past."""

    def talk(said: list[str], enough: Callable[[str], bool] | None) -> Task:
        messages: list[Message] = [{"role": "user", "content": "Name three fruits."}]
        for turn in range(3):
            done = yield Request(tuple(messages), 3, 30, stop_when=enough if turn == 1 else None)
            said.append(done.text)
            messages += [
                {"role": "assistant", "content": done.text},
                {"role": "user", "content": "Name three fruits, please."},
            ]

    found: list[list[str]] = []
    for warm in (False, True):
        with BatchEngine(base, 1, 512) as llama:
            if warm:
                llama.run([talk([], None), talk([], lambda text: len(text) > 12)])
            found.append([])
            llama.run([talk(found[-1], lambda text: len(text) > 9)])
    assert found[0] == found[1]
