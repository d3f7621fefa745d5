"""Generation: independent of the batch, and each completion says why it stopped."""

from __future__ import annotations

from pathlib import Path

from pipeline.backends.llama import Llama
from pipeline.backends.teacher import Task
from pipeline.dialogues import load_dialogues
from pipeline.records import Completion, Message, Request


def _converse(base: Path, sequences: int) -> dict[tuple[str, int], Completion]:
    got: dict[tuple[str, int], Completion] = {}

    def talk(name: str, turns: tuple[str, ...]) -> Task:
        messages: list[Message] = []
        for turn, user in enumerate(turns[:5]):
            messages.append({"role": "user", "content": user})
            got[name, turn] = yield Request(tuple(messages), turn, 48)
            messages.append({"role": "assistant", "content": got[name, turn].text})

    with Llama(base, sequences, 1024) as llama:
        llama.run(talk(d.id, d.turns) for d in load_dialogues("seed")[:6])
    return got


def test_answers_do_not_depend_on_what_runs_beside_them(base: Path) -> None:
    alone, together = _converse(base, 1), _converse(base, 4)
    assert len(alone) == 30
    assert max(said.prompt_tokens for said in alone.values()) > 256  # llama.cpp pads the cache to multiples of 256
    assert alone == together


def test_a_full_context_is_said_and_not_cut(base: Path) -> None:
    with Llama(base, 1, 256) as llama:
        said = llama.complete(Request(({"role": "user", "content": "word " * 300},), 1, 16))
    assert said.finish == "context"
    assert said.text == ""
