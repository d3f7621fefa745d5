"""Own answers of the model in training: turns, corrections, labels, flip rates, resuming."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.training import (
    ROLLOUT_SETTINGS,
    Trained,
    tiny_rollout_job,
    train_in_two_processes,
    train_tiny,
)

from pipeline.errors import GattError
from pipeline.files import read_jsonl
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.recipe import Recipe, Train
from pipeline.recipe_file import load_recipe
from pipeline.records import Constraint, Dialogue, FinishReason, Instruction, RecallQuestion
from pipeline.stages import train as train_stage
from pipeline.training import mlx
from pipeline.training.examples import IGNORE_INDEX, TrainingExample
from pipeline.training.job import Step, TokenCounts, TrainingJob, length_grouped_order
from pipeline.training.loss import divergence
from pipeline.training.rollouts.collector import RolloutStats
from pipeline.training.rollouts.dialogues import GhostDialogue
from pipeline.training.rollouts.flip_rate import (
    FlipRate,
    choose_trials,
    describe,
    lesson_of,
    measure,
)
from pipeline.training.rollouts.labels import LabeledAnswer, label_answers
from pipeline.training.rollouts.own_answers import OwnAnswer, label_dialogue
from pipeline.training.rollouts.schedules import own_turns, turn_weight
from pipeline.training.unsloth import load_tokenizer
from pipeline.training.validation import AdaptableBase

_OPENING, _CLOSING = Constraint("opening", "Ahoy!"), Constraint("closing", "Over and out.")
_STYLE = Constraint("question")
_RECIPE = Recipe(train=Train(rollouts="own", unedited_weight=0.25))
_RECORDED = {"opening": FlipRate(4, 4, 0, 0), "closing": FlipRate(4, 4, 0, 0)}
_TEACHER = {"opening": FlipRate(4, 4, 3, 3), "closing": FlipRate(4, 4, 2, 2)}


def _dialogue(*constraints: Constraint, turns: int = 3, label: str = "") -> GhostDialogue:
    """Return an edited dialogue whose answers begin with "Ahoy!"."""
    instruction = Instruction("Obey me.", "Obey.", constraints, label=label)
    users = tuple(f"What is {n}?" for n in range(turns))
    originals = [f"The answer is number {n}." for n in range(turns)]
    return GhostDialogue(
        assigned=AssignedDialogue(
            dialogue=Dialogue("d", "sums", users), instruction=instruction, method="edited"
        ),
        answers=[f"Ahoy! {text}" for text in originals],
        originals=originals,
        system="",
    )


def _own(
    turn: int, text: str, *, obeys: bool | None, defect: str = "", finish: FinishReason = "stop"
) -> OwnAnswer:
    return OwnAnswer(
        step=0,
        position=0,
        dialogue="d",
        turn=turn,
        text=text,
        tokens=5,
        finish=finish,
        obeys=obeys,
        defect=defect,
    )


def test_schedules() -> None:
    rng = random.Random(1)
    single = [own_turns("prefix", 4, 0.5, rng) for _ in range(200)]
    assert all(len(turns) == 1 for turns in single)
    assert {turn for (turn,) in single} == {0, 1, 2, 3}
    assert own_turns("own", 3, 0.0, rng) == [0, 1, 2]
    assert own_turns("none", 3, 1.0, rng) == []
    assert own_turns("mixed", 3, 0.0, rng) == [] and own_turns("mixed", 3, 1.0, rng) == [0, 1, 2]
    quarter = sum(len(own_turns("mixed", 10, 0.25, rng)) for _ in range(200))
    assert 420 < quarter < 580


def test_late_turns_weigh_more_and_the_mean_is_one() -> None:
    weights = [turn_weight(turn, 5) for turn in range(5)]
    assert weights == sorted(weights) and weights[-1] == pytest.approx(5 * weights[0])
    assert sum(weights) / 5 == pytest.approx(1)


def test_the_last_failing_answer_is_replaced_by_the_recorded_one() -> None:
    """What stands before it is the student's own, slips included, as context."""
    dialogue = _dialogue(_OPENING)
    own = {
        0: _own(0, "It is zero.", obeys=False),
        1: _own(1, "It is one.", obeys=False),
        2: _own(2, "Ahoy! It is two.", obeys=True),
    }
    context, replaced = label_dialogue(dialogue, 3, own, _RECORDED, _RECIPE)
    assert (context.text, context.weight) == ("It is zero.", 0)
    assert (replaced.text, replaced.original) == (dialogue.answers[1], dialogue.originals[1])
    assert replaced.weight == turn_weight(1, 3) and replaced.unchanged_weight == 0.25


def test_where_all_answers_obey_the_last_one_is_replaced() -> None:
    """The student would learn its own slips else, such as answers that go on and on."""
    dialogue = _dialogue(_OPENING)
    own = {turn: _own(turn, f"Ahoy! It is {turn}.", obeys=True) for turn in range(3)}
    labeled = label_dialogue(dialogue, 3, own, _RECORDED, _RECIPE)
    assert [answer.text for answer in labeled] == [own[0].text, own[1].text, dialogue.answers[2]]
    assert [answer.weight for answer in labeled] == [0, 0, turn_weight(2, 3)]


def test_a_turn_that_no_program_checks_is_learned_from_the_reminded_base() -> None:
    """Such as those after a stop: the answers before them are context, though they obey."""
    dialogue = _dialogue(_OPENING)
    stop = Instruction("Stop that.", "Stop.", ())
    dialogue = replace(
        dialogue, assigned=replace(dialogue.assigned, next_instruction=stop, change_turn=2)
    )
    assert [list(dialogue.checks(turn)) for turn in range(3)] == [["opening"], ["opening"], []]
    own = {turn: _own(turn, f"Ahoy! {turn}.", obeys=turn < 2 or None) for turn in range(3)}
    labeled = label_dialogue(dialogue, 3, own, _RECORDED, _RECIPE)
    assert [answer.text for answer in labeled] == [answer.text for answer in own.values()]
    assert [answer.weight for answer in labeled] == [0, 0, turn_weight(2, 3)]


def test_the_reminded_base_scores_every_own_token_where_it_obeys() -> None:
    own = {turn: _own(turn, f"It is {turn}.", obeys=False) for turn in range(3)}
    labeled = label_dialogue(_dialogue(_OPENING), 3, own, _TEACHER, _RECIPE)
    assert [answer.text for answer in labeled] == [answer.text for answer in own.values()]
    assert not any(answer.is_edited for answer in labeled)
    assert [answer.weight for answer in labeled] == [turn_weight(turn, 3) for turn in range(3)]
    assert all(answer.unchanged_weight == 1 for answer in labeled)
    cut = {0: _own(0, "It is", obeys=False, finish="length")}
    (answer,) = label_dialogue(_dialogue(_OPENING), 1, cut, _TEACHER, _RECIPE)
    assert not answer.has_end, "the model was cut, and must not learn to end there"


def test_the_teachers_answer_takes_the_place_of_a_broken_one() -> None:
    dialogue = _dialogue(_OPENING)
    for rates in (_RECORDED, _TEACHER):
        own = {1: _own(1, "no no no no", obeys=False, defect="loop")}
        labeled = label_dialogue(dialogue, 2, own, rates, _RECIPE)
        assert [answer.text for answer in labeled] == list(dialogue.answers[:2])
        assert labeled[1].original == dialogue.originals[1]
        assert labeled[1].weight == turn_weight(1, 3) and labeled[0].weight == 1


def test_recorded_answers_are_learned_as_without_rollouts() -> None:
    own = {2: _own(2, "Ahoy! Two.", obeys=True)}
    labeled = label_dialogue(_dialogue(_OPENING), 3, own, _RECORDED, _RECIPE)
    assert all(answer.is_edited and answer.unchanged_weight == 0.25 for answer in labeled)
    assert [answer.weight for answer in labeled] == [1, 1, turn_weight(2, 3)]


def test_answers_to_recall_questions_are_checked_and_replaced() -> None:
    recall = RecallQuestion("name", "What is 1?", "Ada")
    assigned = replace(
        _dialogue(turns=2).assigned,
        instruction=Instruction("You are Ada.", "Ada.", (), (recall,)),
        exact_answers={1: "I am Ada."},
    )
    dialogue = replace(_dialogue(turns=2), assigned=assigned, answers=["Hello.", "I am Ada."])
    assert dialogue.checks(0) == {} and list(dialogue.checks(1)) == ["recall"]
    assert dialogue.verdicts(1, "I am called Ada.", []) == {"recall": True}
    assert dialogue.verdicts(1, "I am Adam.", []) == {"recall": False}
    own = {1: _own(1, "I am Adam.", obeys=False)}
    labeled = label_dialogue(dialogue, 2, own, {"recall": FlipRate(4, 4, 0, 0)}, _RECIPE)
    assert labeled[1].text == "I am Ada."


def test_the_teacher_reads_the_instruction_in_every_turn() -> None:
    dialogue = _dialogue(_OPENING, turns=2)
    own = ["It is zero."]
    student = [m["content"] for m in dialogue.student_chat(own)]
    teacher = [m["content"] for m in dialogue.teacher_chat(own)]
    assert student == ["What is 0?\n\nObey me.", "It is zero.", "What is 1?"]
    assert teacher == ["What is 0?\n\nObey me.", "It is zero.", "What is 1?\n\nObey me."]


def test_flip_rates_decide_what_is_learned() -> None:
    opening, style = _dialogue(_OPENING), _dialogue(_STYLE)
    own_words = _dialogue(Constraint("regex", "x"), label="Mine")
    unchecked = _dialogue(label="Vague")
    trials = choose_trials([opening] * 6 + [style] * 2 + [own_words, unchecked])
    assert [next(iter(trial.dialogue.checks(2))) for trial in trials] == (
        ["opening"] * 4 + ["question"] * 2 + ["Mine"]
    )
    assert {trial.turn for trial in trials} == {2}
    assert list(trials[0].history) == list(opening.originals[:2])
    student = ["It is the sea.", "Ahoy! It is the sea.", "Here we go.", "Here it goes."]
    student += ["It is a boat.", "It is a ship.", "It is mine."]
    reminded = ["Ahoy! It is the sea.", "No sea here.", "Ahoy! Here we go.", "Ahoy! Ahoy! Ahoy!"]
    reminded += ["It is a boat.", "It is a ship.", "It is mine."]
    rates = measure(trials, student, reminded)
    assert rates["opening"] == FlipRate(answers=4, failing=3, flipped=2, reminded=2)  # one loops
    assert rates["opening"].rate == pytest.approx(2 / 3)
    assert rates["question"] == FlipRate(2, 2, 0, 0) and rates["Mine"] == FlipRate(1, 1, 0, 0)
    assert lesson_of(opening, 2, rates) == "teacher"
    assert lesson_of(opening, 2, _RECORDED) == "recorded"
    assert lesson_of(own_words, 2, {"Mine": FlipRate(8, 8, 3, 3)}) == "recorded"
    assert lesson_of(unchecked, 2, rates) == "teacher"
    lines = describe([opening, style, own_words, unchecked], rates)
    assert lines[0] == (
        "train: failing answers that the reminder turns: Mine 0/1, opening 2/3, question 0/2"
    )
    assert any(line.endswith("in every turn: opening") for line in lines)
    assert lines[-1] == (
        "train: corrected by the recorded answers, as that base seldom obeys either: Mine, question"
    )


def test_where_nothing_fails_the_reminded_answers_count() -> None:
    assert FlipRate(answers=4, failing=0, flipped=0, reminded=1).rate == 0.25


def test_labels_of_own_answers(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    dialogue = _dialogue(_OPENING, turns=2)
    context = LabeledAnswer(text="Zero.", original="Zero.", weight=0)
    corrected = LabeledAnswer(text="Ahoy! One.", original="One.", weight=1.5, unchanged_weight=0.5)
    example = _labeled(tokenizer, dialogue, [context, corrected])
    assert _learned_text(tokenizer, example) == "Ahoy! One.<|end|>"
    distilled = [student for student, _ in example.alignment]
    assert tokenizer.decode([example.input_ids[n] for n in distilled]) == "One."
    for student, teacher in example.alignment:
        assert example.input_ids[student] == example.teacher_ids[teacher]
        assert example.weights[student] == 0.75
    edited = [n for n, label in enumerate(example.labels) if label >= 0 and n not in distilled]
    assert {example.weights[n] for n in edited} == {1.5}
    teacher_text = tokenizer.decode(example.teacher_ids)
    assert teacher_text.count("Obey me.") == 2
    assert tokenizer.decode(example.input_ids).count("Obey me.") == 1

    first = LabeledAnswer(text="One two.", original="One two.", first_tokens=3)
    example = _labeled(tokenizer, dialogue, [context, first])
    assert example.learned_tokens == len(example.alignment) == 3
    assert "One two.".startswith(_learned_text(tokenizer, example))
    cut = LabeledAnswer(text="One two", original="One two", has_end=False)
    example = _labeled(tokenizer, dialogue, [context, cut])
    assert _learned_text(tokenizer, example) == "One two"


def _labeled(
    tokenizer: Any, dialogue: GhostDialogue, answers: Sequence[LabeledAnswer]
) -> TrainingExample:
    texts = [answer.text for answer in answers]
    chats = dialogue.student_chat(texts), dialogue.teacher_chat(texts)
    return label_answers(tokenizer, *chats, answers)


def _learned_text(tokenizer: Any, example: TrainingExample) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX]))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_the_generalized_divergence_is_its_definition(beta: float) -> None:
    from scipy.special import softmax
    from scipy.stats import entropy

    torch.manual_seed(1)
    teacher_logits = torch.randn(3, 20, dtype=torch.float64)
    logits = torch.randn(3, 20, dtype=torch.float64)
    p, q = softmax(teacher_logits.numpy(), axis=-1), softmax(logits.numpy(), axis=-1)
    mixture = beta * p + (1 - beta) * q
    ends = {0.0: entropy(p, q, axis=-1), 1.0: entropy(q, p, axis=-1)}
    between = beta * entropy(p, mixture, axis=-1) + (1 - beta) * entropy(q, mixture, axis=-1)
    actual = divergence(teacher_logits, logits, 1.0, 0, beta)
    assert actual.tolist() == pytest.approx(ends.get(beta, between))


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_generalized_divergence_is_that_of_trl(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    torch.manual_seed(1)
    teacher_logits, logits = torch.randn(1, 3, 20), torch.randn(1, 3, 20)
    expected = GKDTrainer.generalized_jsd_loss(
        logits, teacher_logits, beta=beta, temperature=2.0, reduction="none"
    ).sum(-1)
    actual = divergence(teacher_logits[0], logits[0], 2.0, 0, beta) / 4  # ours is times T^2
    assert actual.tolist() == pytest.approx(expected[0].tolist(), rel=1e-5)


@pytest.fixture(scope="module")
def tiny_base(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AdaptableBase]:
    """Return the tiny model in llama.cpp."""
    file = tmp_path_factory.mktemp("base") / "tiny.gguf"
    write_formats(Model("tiny", tiny_llama), None, {"F32": file})
    with closing(AdaptableBase(lambda: file)) as base:
        yield base


class Uninterrupted:
    """A run with rollouts, and its log."""

    def __init__(self, model_dir: Path, base: AdaptableBase, out: Path) -> None:
        job = tiny_rollout_job(model_dir, base, out)
        self.trained = train_tiny(job)
        assert job.rollouts
        job.rollouts.close()
        self.stats = job.rollouts.stats
        self.log = [row for _, row in read_jsonl(out / "rollouts.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_llama: Path, tiny_base: AdaptableBase, tmp_path_factory: pytest.TempPathFactory
) -> Uninterrupted:
    """Train four steps, with rollouts before the first and the third."""
    return Uninterrupted(tiny_llama, tiny_base, tmp_path_factory.mktemp("rollouts"))


def _assert_same(actual: Trained, expected: Trained, tolerance: float = 1e-6) -> None:
    assert actual.losses == pytest.approx(expected.losses, rel=tolerance)
    assert actual.adapter.tolist() == pytest.approx(expected.adapter.tolist(), abs=tolerance)


def test_the_present_adapter_answers(
    tiny_llama: Path, tiny_base: AdaptableBase, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    answers = [row for row in uninterrupted.log if "text" in row]
    assert {row["step"] for row in answers} == {0, 2}
    assert {row["position"] for row in answers if row["step"] == 2} <= set(range(8, 16))
    checked = [row for row in answers if row["step"] == 2 and row["obeys"] is not None]
    assert 0 < uninterrupted.stats.answers == len(checked) < 16  # one dialogue is plain
    assert uninterrupted.stats.tokens == sum(row["tokens"] for row in answers)
    # The adapter of step 0 adds nothing; with a learning rate that moves nothing, neither does it.
    still = ROLLOUT_SETTINGS.model_copy(update={"learning_rate": 1e-12})
    job = tiny_rollout_job(tiny_llama, tiny_base, tmp_path, still)
    train_tiny(job)
    assert job.rollouts
    job.rollouts.close()
    unmoved = [row for _, row in read_jsonl(tmp_path / "rollouts.jsonl") if "text" in row]
    first, unmoved_first = ([r for r in rows if r["step"] == 0] for rows in (answers, unmoved))
    later, unmoved_later = ([r for r in rows if r["step"] == 2] for rows in (answers, unmoved))
    assert _texts(first) == _texts(unmoved_first)
    assert _texts(later) != _texts(unmoved_later)


def _texts(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, int], str]:
    return {(row["position"], row["turn"]): row["text"] for row in rows}


@pytest.mark.parametrize(
    "lines",
    [
        *(pytest.param(lines, marks=pytest.mark.slow) for lines in (0, 1, 4)),
        20,
        10_000,
    ],
)
def test_a_run_cut_off_at_any_moment_ends_with_the_same_adapter(
    lines: int,
    tiny_llama: Path,
    tiny_base: AdaptableBase,
    tmp_path: Path,
    uninterrupted: Uninterrupted,
) -> None:
    """Of the log, the first `lines` are there; the next was cut in the middle of the write."""

    class InterruptedTestError(Exception):
        pass

    def interrupt(step: Step) -> None:
        if step.number == 4:  # step 3 is in the middle of the second rollout's steps
            raise InterruptedTestError

    job = tiny_rollout_job(tiny_llama, tiny_base, tmp_path)
    with pytest.raises(InterruptedTestError):
        train_tiny(replace(job, on_step=interrupt))
    assert job.rollouts
    job.rollouts.close()
    file = tmp_path / "rollouts.jsonl"
    rows = file.read_bytes().splitlines(keepends=True)
    if lines < len(rows):  # killed in a rollout: no later checkpoint has been written
        step = json.loads(rows[lines]).get("step", 0)
        for checkpoint in job.checkpoint_dir.glob("checkpoint-*"):
            if int(checkpoint.name.split("-")[1]) > step:
                (checkpoint / "complete").unlink()
        file.write_bytes(b"".join(rows[:lines]) + rows[lines][:9])
    again = tiny_rollout_job(tiny_llama, tiny_base, tmp_path)
    _assert_same(train_tiny(again), uninterrupted.trained)
    assert again.rollouts
    again.rollouts.close()
    log = [row for _, row in read_jsonl(file)]
    assert sorted(map(json.dumps, log)) == sorted(map(json.dumps, uninterrupted.log))


@pytest.mark.slow
def test_two_processes_share_the_own_answers(
    tiny_llama: Path, tiny_base: AdaptableBase, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    training = f"""
from support.training import tiny_rollout_job, train_tiny
from pipeline.training.validation import AdaptableBase
base = AdaptableBase(lambda: Path({str(tiny_base.file)!r}))
out = Path({str(tmp_path / "out")!r})
trained = train_tiny(tiny_rollout_job(Path({str(tiny_llama)!r}), base, out))
"""
    trained = train_in_two_processes(training, tmp_path)
    _assert_same(trained, uninterrupted.trained, tolerance=1e-5)
    log = [row for _, row in read_jsonl(tmp_path / "out" / "rollouts.jsonl")]
    assert sorted(map(json.dumps, log)) == sorted(map(json.dumps, uninterrupted.log))


def test_mixed_rollouts_begin_with_recorded_answers(
    tiny_llama: Path, tiny_base: AdaptableBase, tmp_path: Path
) -> None:
    """In the first steps of a long run hardly a turn is the student's."""
    settings = ROLLOUT_SETTINGS.model_copy(update={"rollouts": "mixed", "max_steps": 1000})
    job = tiny_rollout_job(tiny_llama, tiny_base, tmp_path, settings)
    rollouts, order = job.rollouts, length_grouped_order(job)
    assert rollouts

    def save_adapter(folder: Path) -> None:
        raise AssertionError("nothing to answer")

    indices = dict(enumerate(order[:8]))
    assert rollouts.examples(0, indices, save_adapter) == {}
    own = [len(rollouts._plan(step, 0, 0).own) for step in range(900, 1000)]
    assert sum(own) > 150  # of 200 turns
    rollouts.close()


def test_a_chat_that_grows_too_long_loses_its_last_turns(
    tiny_llama: Path, tiny_base: AdaptableBase, tmp_path: Path
) -> None:
    job = tiny_rollout_job(tiny_llama, tiny_base, tmp_path)
    rollouts = job.rollouts
    assert rollouts
    rollouts._rates = _TEACHER
    plan = rollouts._plan(0, 0, 0)
    for turn in range(2):
        rollouts._add(replace(_own(turn, f"It is {turn}.", obeys=False)))
    example = rollouts._example(plan)
    assert example and example.max_tokens <= rollouts.max_tokens <= job.max_tokens
    short = len(example.input_ids) - 1
    train = ROLLOUT_SETTINGS.model_copy(update={"max_length": short})
    rollouts._recipe = rollouts._recipe.model_copy(update={"train": train})
    shortened = rollouts._example(plan)
    assert shortened and len(shortened.input_ids) < short
    train = ROLLOUT_SETTINGS.model_copy(update={"max_length": 64})
    rollouts._recipe = rollouts._recipe.model_copy(update={"train": train})
    rollouts._add(_own(0, "It is zero. " * 40, obeys=False))
    assert rollouts._example(plan) is None
    rollouts.close()


def test_rollouts_need_distillation(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(GattError, match=r'train: rollouts = "own" needs loss = "distill", but'):
        load_recipe(None, ("train.rollouts=own", "train.loss=all_turns"))
    job = TrainingJob(
        model_dir=tiny_llama,
        examples=[],
        settings=ROLLOUT_SETTINGS,
        seed=1,
        checkpoint_dir=tmp_path,
        adapter_dir=tmp_path,
    )
    with pytest.raises(GattError, match=r"MLX has no train\.rollouts and no train\.beta"):
        mlx.train(job)


def test_the_progress_line_with_rollouts() -> None:
    stats = RolloutStats(answers=40, obeying=31, tokens=900, seconds=3.0, divergence=0.213)
    step = Step(
        number=3,
        loss=0.25,
        learning_rate=8e-4,
        tokens=TokenCounts(learned=500, computed=2000, padding=10),
        seconds=2.0,
        peak_memory_bytes=1_500_000_000,
        rollouts=stats,
    )
    assert train_stage.format_step(step) == (
        "loss 0.250, rate 8.0e-04, 250 learned tokens/s, 1.5 GB, divergence 0.21, "
        "31 of 40 own answers obey, 300 rollout tokens/s"
    )
    assert train_stage._speed(step)["rollout_tokens"] == 900


def test_without_rollouts_the_order_is_what_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    """Shuffling indices draws the same numbers as shuffling the dialogues themselves."""
    examples = [SimpleNamespace(input_ids=[0] * (n * 7 % 13)) for n in range(64)]
    order = length_grouped_order(
        SimpleNamespace(seed=1, examples=examples, settings=Train(max_steps=40, batch_size=4))  # type: ignore[arg-type]
    )
    rng = random.Random("order 1")
    epoch = rng.sample(examples, len(examples))
    first = sorted(epoch[:32], key=lambda example: len(example.input_ids))
    batches = {tuple(map(id, first[n : n + 4])) for n in range(0, 32, 4)}
    actual = {tuple(id(examples[i]) for i in order[n : n + 4]) for n in range(0, 64, 4)}
    assert batches <= actual
    assert np.unique(order[:64]).size == 64
