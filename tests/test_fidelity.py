"""Reminder fidelity: exact divergences on the ceiling's own answers, and what they sum up to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import scipy.special

from pipeline.evaluation import fidelity
from pipeline.evaluation.arms import Arm
from pipeline.evaluation.fidelity import chosen_dialogues, measure_fidelity
from pipeline.evaluation.scores import Fidelity
from pipeline.evaluation.scoring.fidelity import AnswerKl, summarize
from pipeline.files import read_json, write_json
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.bake import baked_instruction, with_prompt
from pipeline.gatt.instructions import render_instruction
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.base import Array
from pipeline.gguf.merge import open_base
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.chat_template import ChatTemplate
from pipeline.inference.llama.model import Adapter
from pipeline.recipe import Dialogues, Evaluate, Recipe
from pipeline.records import Constraint, Dialogue, Instruction, Message, Reply
from pipeline.report.tables import fidelity_table

_RECIPE = Recipe(dialogues=Dialogues(system="Be kind."), evaluate=Evaluate(turns=3, max_tokens=16))
_ANSWERS = ("I'll pay €35.50!", "naïve café", "2,026")


def _assigned(n: int, instruction: Instruction | None = None) -> AssignedDialogue:
    turns = tuple(f"It's {n} and {turn}?" for turn in range(3))
    return AssignedDialogue(
        dialogue=Dialogue(f"d{n}", "numbers", turns),
        instruction=instruction or render_instruction((Constraint("opening", f"Ahoy {n}!"),)),
    )


def _replies(
    dialogues: Sequence[AssignedDialogue], answers: Sequence[str] = _ANSWERS
) -> list[Reply]:
    return [
        Reply(
            arm="ceiling",
            dialogue=assigned.dialogue.id,
            turn=turn,
            text=text,
            prompt_tokens=9,
            tokens=9,
            finish="stop",
            obeys=True,
            defect="",
        )
        for assigned in dialogues
        for turn, text in enumerate(answers, 1)
    ]


@pytest.fixture(scope="module")
def arms(
    tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Arm]:
    """Return a base, the tuned file, the same as an adapter, the base again, and the ceiling."""
    folder = tmp_path_factory.mktemp("arms")
    base, merged, adapter = (folder / f"{name}.gguf" for name in ("base", "merged", "adapter"))
    write_formats(Model("tiny", tiny_llama), None, {"F32": base})
    write_formats(Model("tiny", tiny_llama), tiny_adapter, {"F32": merged})
    write_adapter(open_base(tiny_llama), tiny_adapter, adapter)
    return [
        Arm(name="base", path=base),
        Arm(name="tuned", path=merged),
        Arm(name="adapter", path=base, adapter=Adapter(adapter)),
        Arm(name="again", path=base),
        Arm(name="server", server="http://localhost:1/v1"),
        Arm(name="ceiling", path=base, in_all_suites=False, repeats_instruction=True),
    ]


def _direct(
    base_dir: Path, adapter: Path, assigned: AssignedDialogue, turn: int
) -> tuple[float, float, int]:
    """Return KL(reminded base‖base), KL(reminded base‖tuned) and tokens, by transformers."""
    import peft
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base_dir)
    network = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(network, str(adapter)).eval()
    answers = _ANSWERS[: turn - 1]

    def log_probs(messages: tuple[Message, ...], *, base: bool) -> Array:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        answer = tokenizer(_ANSWERS[turn - 1], add_special_tokens=False).input_ids
        with torch.no_grad():
            if base:
                with tuned.disable_adapter():
                    logits = tuned(torch.tensor([prompt + answer])).logits[0]
            else:
                logits = tuned(torch.tensor([prompt + answer])).logits[0]
        rows = logits[len(prompt) - 1 : -1].double().numpy()
        return cast(Array, scipy.special.log_softmax(rows, axis=-1))

    system = _RECIPE.dialogues.system
    reference = log_probs(assigned.reminded_prompt(answers, system), base=True)
    once = assigned.student_prompt(answers, system)

    def kl(other: Array) -> float:
        return float(scipy.special.rel_entr(np.exp(reference), np.exp(other)).sum())

    base, model = (kl(log_probs(once, base=flag)) for flag in (True, False))
    return base, model, len(reference)


@pytest.mark.parametrize("max_bytes", [1e9, 1.0])
def test_divergences_are_those_of_transformers(
    max_bytes: float,
    arms: list[Arm],
    tiny_llama: Path,
    tiny_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With too little memory for all chats, they are scored one after another."""
    monkeypatch.setattr(fidelity, "max_logits_bytes", lambda: max_bytes)
    dialogues = [_assigned(n) for n in range(2)]
    result = measure_fidelity(arms, dialogues, _replies(dialogues), _RECIPE)
    assert result
    assert {row.arm for row in result.overall} == {"tuned", "adapter", "again"}
    for turn in (2, 3):
        sums = [_direct(tiny_llama, tiny_adapter, assigned, turn) for assigned in dialogues]
        base_kl, kl, tokens = (sum(column) for column in zip(*sums, strict=True))
        for arm in ("tuned", "adapter"):
            (row,) = (r for r in result.by_turn if (r.arm, r.at) == (arm, turn))
            assert (row.tokens, row.dialogues) == (tokens, 2)
            # Keys and values are cached in float16.
            assert row.base_kl == pytest.approx(base_kl / tokens, rel=0.001)
            assert row.kl == pytest.approx(kl / tokens, rel=0.001)
            assert 1 - row.value == pytest.approx(kl / base_kl, rel=0.002)
            assert abs(kl / base_kl - 1) > 0.002  # the tuned model is another one
    for row in (*result.overall, *result.by_turn, *result.by_instruction):
        if row.arm == "again":
            assert (row.value, row.kl) == (0, row.base_kl)
    assert {row.at for row in result.by_turn} == {2, 3}  # in turn 1 both see the same
    assert {row.at for row in result.overall} == {"turns 2 to 3"}
    assert {row.at for row in result.by_instruction} == {"opening: Ahoy 0!", "opening: Ahoy 1!"}


def test_a_baked_prompt_is_measured_with_and_without_it(arms: list[Arm]) -> None:
    """The base again: without the prompt it is the base, and with it the reference itself."""
    prompt = baked_instruction("naïve café")
    dialogues = [with_prompt(_assigned(n).dialogue, prompt) for n in range(2)]
    result = measure_fidelity(arms, dialogues, _replies(dialogues), _RECIPE)
    assert result and result.baked
    overall = {row.arm: row for row in result.overall}
    assert {row.at for row in result.overall} == {"turns 1 to 3"}
    assert overall["again"].value == 0
    again = overall["again, with the prompt"]
    assert (again.value, again.kl, again.low, again.high) == (1, 0, 1, 1)
    assert again.base_kl == overall["again"].kl > 0
    assert 0 < overall["tuned, with the prompt"].kl != overall["tuned"].kl
    assert "base, with the prompt" not in overall
    with BatchEngine(arms[0].path or Path(), 1, 256) as engine:
        views = (dialogues[0].reminded_prompt([], ""), dialogues[0].student_prompt([], ""))
        longer, shorter = (len(engine.tokenize(engine.template.render(v))) for v in views)
    assert result.saved_tokens == longer - shorter > 0
    # Under another system message, the base again is the base, and the tuned model another one.
    leaks = {row.arm: row for row in result.leaks}
    assert leaks.keys() == {"tuned", "adapter", "again"}
    assert (leaks["again"].value, leaks["again"].kl) == (0, leaks["again"].base_kl)
    assert leaks["tuned"].value != 0 and leaks["tuned"].base_kl == leaks["again"].base_kl > 0
    without_system = _RECIPE.model_copy(update={"dialogues": Dialogues(system="")})
    result = measure_fidelity(arms[:2], dialogues[:1], _replies(dialogues), without_system)
    assert result and not result.leaks


class _ScriptedEngine:
    """Predicts by the place in the answer, and by whether the latest user message reminds of it.

    Each character is a token.
    """

    vocab_size = 128

    def __init__(self, template: str, *, always_reminded: bool = False) -> None:
        self.template = ChatTemplate(template, "", "")
        self._always_reminded = always_reminded

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def logits(self, tokens: Sequence[int], start: int = 0) -> Iterator[Array]:
        text = bytes(tokens).decode("ascii")
        for end in range(start + 1, len(tokens) + 1):
            user = text[:end].rpartition("U:")[2]
            row = np.zeros(self.vocab_size, np.float32)
            row[len(user.rpartition("A:")[2])] = 2.0
            row[100] = 3.0 if self._always_reminded or "Ahoy" in user else 0.0
            yield row


_PLAIN = (
    "{% for m in messages %}{{ {'user': 'U:', 'system': 'S:', 'assistant': 'A:'}[m.role] }}"
    "{{ m.content }}|{% endfor %}A:"
)
_THINKING = _PLAIN + "<think></think>"
"""A prompt ends with an empty thought, which the later history does not have."""


def _scripted(engine: _ScriptedEngine) -> BatchEngine:
    return cast(BatchEngine, engine)


@pytest.mark.parametrize(("template", "passes"), [(_PLAIN, 1), (_THINKING, 3)])
def test_a_model_that_is_the_reminded_base_has_fidelity_1(template: str, passes: int) -> None:
    base = _scripted(_ScriptedEngine(template))
    tuned = _scripted(_ScriptedEngine(template, always_reminded=True))
    dialogues = [_assigned(n) for n in range(2)]
    replies = _replies(dialogues, ("one", "second", "3"))
    views = [fidelity._views(d, replies, "Be kind.") for d in dialogues]
    references = fidelity._references(base, [v for v in views if v])
    assert [len(reference.once) for reference in references] == [passes, passes]
    answers = [(a.tokens, a.values.shape) for a in references[0].answers]
    assert answers == [(list(b"second"), (6, 128)), (list(b"3"), (1, 128))]
    kl = {
        name: [score for r in references for score in fidelity._divergences(model, r, r.once)]
        for name, model in {"base": base, "tuned": tuned}.items()
    }
    # One token gets the logit 3, not 0; another has 2, and 126 have 0.
    rest = 126 + math.exp(2)
    p, q = (math.exp(logit) / (math.exp(logit) + rest) for logit in (3, 0))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    result = summarize(kl["base"], kl)
    by_arm = {row.arm: row for row in result.overall}
    assert by_arm["base"].value == 0
    assert by_arm["base"].kl == by_arm["base"].base_kl == pytest.approx(expected, rel=1e-6)
    assert (by_arm["tuned"].value, by_arm["tuned"].kl) == (1, 0)
    assert (by_arm["tuned"].low, by_arm["tuned"].high) == (1, 1)
    assert by_arm["tuned"].tokens == 2 * len("second3")


def _answer(dialogue: str, turn: int, kl: float, tokens: int = 10) -> AnswerKl:
    return AnswerKl(dialogue, f"instruction {dialogue}", turn, tokens, kl)


def test_figures_weigh_tokens_and_intervals_draw_dialogues() -> None:
    base = [_answer("a", 2, 4.0), _answer("a", 3, 6.0), _answer("b", 2, 10.0, 30)]
    model = [_answer("a", 2, 1.0), _answer("a", 3, 1.5), _answer("b", 2, 12.5, 30)]
    result = summarize(base, {"tuned": model})
    (overall,) = result.overall
    assert (overall.at, overall.tokens, overall.dialogues) == ("turns 2 to 3", 50, 2)
    assert (overall.base_kl, overall.kl) == (20 / 50, 15 / 50)
    assert overall.value == 1 - 15 / 20
    # Only dialogue b is drawn, or only a, in more than 2.5 % of the resamples each.
    assert (overall.low, overall.high) == (1 - 12.5 / 10, 1 - 2.5 / 10)
    turn_2, turn_3 = result.by_turn
    assert (turn_2.at, turn_3.at, turn_3.value) == (2, 3, 0.75)
    assert turn_2.value == pytest.approx(1 - 13.5 / 14)
    assert math.isnan(turn_3.low) and math.isnan(turn_3.high)  # of one dialogue
    assert {row.at: row.value for row in result.by_instruction} == {
        "instruction a": 0.75,
        "instruction b": -0.25,
    }


def test_the_table_has_a_row_for_each_turn_and_columns_for_each_model(tmp_path: Path) -> None:
    base = [_answer("a", 2, 4.0), _answer("b", 2, 4.0), _answer("a", 3, 0.0)]
    model = [_answer("a", 2, 1.0), _answer("b", 2, 2.0), _answer("a", 3, 1.0)]
    write_json(tmp_path / "f.json", summarize(base, {"tuned": model, "rival": base}))
    result = read_json(tmp_path / "f.json", Fidelity, "evaluate")  # nan is null in the file
    table = fidelity_table("fidelity_by_turn", "turn", result.by_turn)
    assert table.columns == [
        *("turn", "base: nats per token"),
        *("tuned: nats per token", "tuned: fidelity", "tuned: 95 % interval"),
        *("rival: nats per token", "rival: fidelity", "rival: 95 % interval"),
    ]
    assert table.rows == [
        [2, 0.4, 0.15, "62%", "50 to 75%", 0.4, "0%", "0 to 0%"],
        [3, 0.0, 0.1, None, "", 0.0, None, ""],
    ]


def test_each_instruction_that_no_program_can_check_is_scored() -> None:
    texts = [Instruction(f"Speak like sailor {n}.", "Sailor.", ()) for n in range(10)]
    unchecked = [_assigned(n, text) for n, text in enumerate(texts)]
    checked = [_assigned(n) for n in range(10, 20)]
    assert chosen_dialogues([*checked, *unchecked]) == unchecked
    assert chosen_dialogues([*checked, *unchecked[:3]]) == [*unchecked[:3], *checked[:5]]
    twice = [*unchecked[:5], *(replace(d, instruction=texts[0]) for d in unchecked[5:])]
    assert chosen_dialogues(twice) == twice[:8]
    assert chosen_dialogues([*checked[:9], *twice]) == [*twice[:5], *checked[:3]]


def test_without_a_reminded_turn_there_is_no_figure(arms: list[Arm]) -> None:
    dialogues = [_assigned(0)]
    assert measure_fidelity(arms, dialogues, _replies(dialogues, _ANSWERS[:1]), _RECIPE) is None
    assert measure_fidelity(arms, dialogues, [], _RECIPE) is None
