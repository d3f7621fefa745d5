"""Synthesis with a scripted teacher: verdicts, early stops, pilots, resumption, removal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from pipeline.gatt.acceptance import (
    ACCEPTED,
    AcceptanceRow,
    CandidateKey,
    by_kind,
    cannot_be_accepted,
    judge_candidate,
    measure_acceptance,
)
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.instructions import render_instruction
from pipeline.gatt.synthesis import Synthesis
from pipeline.recipe import Recipe
from pipeline.records import (
    Answer,
    Completion,
    Constraint,
    Dialogue,
    FinishReason,
    Request,
    SynthesisMethod,
    Task,
)
from pipeline.stages.synthesize import _settled

AHOY = Constraint("opening", "Ahoy!")
QUESTIONS = ("Why is the sea salt?", "Who measures the salt?")
SEA = "The sea is salt because rivers carry minerals into it."
SALT = "People measure the salt with a hydrometer on a ship."


def _assigned(
    method: SynthesisMethod = "edited", name: str = "d", constraint: Constraint = AHOY
) -> AssignedDialogue:
    instruction = None if method == "plain" else render_instruction((constraint,))
    return AssignedDialogue(
        dialogue=Dialogue(name, "sea", QUESTIONS), instruction=instruction, method=method
    )


class Teacher:
    """Answers each request with `reply(number)`, and counts the requests."""

    def __init__(self, reply: Callable[[int], str]) -> None:
        self.requests: list[Request] = []
        self._reply = reply

    def run(self, tasks: Iterable[Task]) -> None:
        """Run the tasks one after another."""
        for task in tasks:
            try:
                request = next(task)
                while True:
                    self.requests.append(request)
                    text = self._reply(len(self.requests) - 1)
                    request = task.send(Completion(text, 9, 9, "stop"))
            except StopIteration:
                pass


def _judge(
    text: str,
    method: SynthesisMethod = "sampled",
    finish: FinishReason = "stop",
    accepted: tuple[Answer, ...] = (),
    constraint: Constraint = AHOY,
) -> Answer:
    return judge_candidate(
        _assigned(method, constraint=constraint),
        CandidateKey("d", len(accepted), 0),
        Completion(text, 9, 9, finish),
        accepted,
        max_sentences=1,
    )


@pytest.mark.parametrize(
    ("text", "finish", "verdict"),
    [
        (f"Ahoy! {SEA}", "stop", ACCEPTED),
        (SEA, "stop", "disobeys"),
        ("The", "stop_when", "disobeys"),
        ("the sea of salt is " * 4, "stop_when", "loop"),
        ("Ahoy!\n1. The sea is salt.\n2. Rivers.\n3. The sea is salt.", "stop", "loop"),
        ("Ahoy!\n1. The sea is salt.\n2. Rivers carry salt.\n-\n-", "stop", ACCEPTED),
        ("Ahoy!\nThe sea is salt.\nAhoy!\nThe sea is salt.", "stop", ACCEPTED),
        ("Ahoy!\n- The sea.\n- The sea.\n- The", "stop_when", "loop"),
        ("Ahoy!", "stop", "empty"),
        ("Ahoy! What a great question that was.", "stop", "off topic"),
        (f"Ahoy! {SEA[:30]}", "length", "unfinished"),
        ("", "context", "context"),
    ],
)
def test_verdicts_on_sampled_answers(text: str, finish: FinishReason, verdict: str) -> None:
    answer = _judge(text, finish=finish)
    assert (answer.verdict, answer.text) == (verdict, text.strip())


def test_an_edited_answer_is_cut_and_edited() -> None:
    answer = _judge(f"{SEA} And there is", "edited")
    assert (answer.raw, answer.text, answer.verdict) == (SEA, f"Ahoy! {SEA}", ACCEPTED)
    assert _judge("The sea is", "edited").verdict == "empty"


def test_an_exact_answer_counts_as_edited_also_where_the_teacher_wrote_no_sentence() -> None:
    assigned = replace(_assigned("edited"), exact_answers={0: "Your name is Ada."})
    answer = judge_candidate(
        assigned, CandidateKey("d", 0, 0), Completion("Chloe", 9, 9, "stop"), (), max_sentences=1
    )
    assert (answer.raw, answer.text) == ("Chloe", "Your name is Ada.")


@pytest.mark.parametrize("text", ["...", "?!", "🙂!"])
def test_an_answer_without_a_word_is_rejected_and_not_edited(text: str) -> None:
    answer = _judge(text, "edited", constraint=Constraint("bold"))
    assert (answer.text, answer.verdict) == (text, "empty")


@pytest.mark.parametrize(
    ("question", "text", "edited", "off_topic"),
    [
        (
            *("海为什么是咸的？", "因为河流把矿物质带到海里，所以海水是咸的。海里还有"),
            *("Ahoy! 因为河流把矿物质带到海里，所以海水是咸的。", "这是一个很好的问题。"),
        ),
        (
            *("なぜ海は塩辛いですか？", "海の水は川のミネラルで塩辛いです。そして"),
            *("Ahoy! 海の水は川のミネラルで塩辛いです。", "それはとてもよいしつもんです。"),
        ),
        (
            *("समुद्र खारा क्यों है?", "नदियाँ समुद्र में खनिज लाती हैं। और"),
            *("Ahoy! नदियाँ समुद्र में खनिज लाती हैं।", "यह बहुत अच्छा प्रश्न था।"),
        ),
        (
            *("لماذا البحر مالح؟", "هل تعلم أن الأنهار تحمل المعادن إلى البحر؟ نعم"),
            *("Ahoy! هل تعلم أن الأنهار تحمل المعادن إلى البحر؟", "هذا سؤال جيد جدا."),
        ),
    ],
    ids=["Chinese", "Japanese", "Hindi", "Arabic"],
)
def test_answers_in_other_scripts_are_cut_and_compared(
    question: str, text: str, edited: str, off_topic: str
) -> None:
    def judge(text: str, accepted: tuple[Answer, ...] = ()) -> Answer:
        return judge_candidate(
            replace(_assigned(), dialogue=Dialogue("d", "sea", (question, question))),
            CandidateKey("d", len(accepted), 0),
            Completion(text, 9, 9, "stop"),
            accepted,
            max_sentences=1,
        )

    answer = judge(text)
    assert (answer.text, answer.verdict) == (edited, ACCEPTED)
    assert judge(text, (answer,)).verdict == "repeat"
    assert judge(off_topic).verdict == "off topic"


def test_a_similar_answer_is_a_repeat() -> None:
    first = _judge(SEA, "edited")
    again = _judge("The sea is salt because rivers carry salt into it.", "edited", "stop", (first,))
    assert again.verdict == "repeat"


def test_an_answer_in_another_language_has_no_topic() -> None:
    text = "La mer est salée parce que les rivières y portent des minéraux."
    assert _judge(text, constraint=Constraint("language", "French")).verdict == ACCEPTED


def test_progress_counts_the_turns_that_a_rejected_dialogue_no_longer_has() -> None:
    answer = replace(_judge(f"Ahoy! {SEA}"), turn=1, candidate=2)
    assert _settled(answer, turns=4, candidates=3) == 1
    rejected = replace(answer, verdict="disobeys")
    assert _settled(rejected, turns=4, candidates=3) == 3
    assert _settled(rejected, turns=4, candidates=4) == 0


def test_sampling_is_aborted_if_nothing_can_be_accepted() -> None:
    assert cannot_be_accepted((AHOY,), "The")
    assert cannot_be_accepted((AHOY,), "Ahoy! " + "the sea is very salt " * 4 + "No")
    assert not cannot_be_accepted((AHOY,), "Aho")
    assert cannot_be_accepted((AHOY,), "Ahoy!\n- The sea.\n- The sea.\n")
    assert not cannot_be_accepted((AHOY,), "Ahoy!\n- The sea.\n- The sea.")


def test_edited_dialogues_continue_from_the_words_of_the_teacher() -> None:
    teacher = Teacher([SEA, SALT].__getitem__)
    synthesis = Synthesis(Recipe(), record=lambda answer: None)
    assigned = _assigned()
    assert synthesis.run(teacher.run, [assigned]) == {}
    assert [a.text for a in synthesis.accepted(assigned)] == [f"Ahoy! {SEA}", f"Ahoy! {SALT}"]
    contents = [m["content"] for m in teacher.requests[1].messages]
    assert contents[1:] == [QUESTIONS[0], SEA, QUESTIONS[1]]
    row = synthesis.synthesized(assigned, "teacher")
    assert list(row) == [
        *("messages", "asked", "dialogue", "instruction", "way", "teacher", "seed", "verdicts"),
    ]
    assert [m["content"] for m in row["asked"]][1:] == [QUESTIONS[0], SEA, QUESTIONS[1], SALT]
    assert [m["content"] for m in row["messages"]][1:] == [
        f'{QUESTIONS[0]}\n\nBegin every answer with "Ahoy!".',
        f"Ahoy! {SEA}",
        QUESTIONS[1],
        f"Ahoy! {SALT}",
    ]
    assert row["verdicts"] == [[ACCEPTED], [ACCEPTED]]


def test_a_dialogue_ends_before_a_turn_without_an_accepted_answer() -> None:
    teacher = Teacher(lambda number: SEA if number == 0 else "")
    synthesis = Synthesis(Recipe(), record=lambda answer: None)
    assigned = _assigned("plain")
    synthesis.run(teacher.run, [assigned])
    assert len(teacher.requests) == 1 + Recipe().synthesize.candidates
    assert len({request.seed for request in teacher.requests}) == len(teacher.requests)
    row = synthesis.synthesized(assigned, "teacher")
    assert [m["content"] for m in row["messages"]][1:] == [QUESTIONS[0], SEA]


def test_an_instruction_that_no_pilot_follows_is_given_up() -> None:
    dialogues = [_assigned("sampled", f"d{n}") for n in range(9)]
    dialogues += [_assigned("edited", "edited")]
    teacher = Teacher(lambda number: SEA)
    synthesis = Synthesis(Recipe(), record=lambda answer: None)
    assert synthesis.run(teacher.run, dialogues) == {"opening: Ahoy!": 6}
    assert {key.dialogue for key in synthesis.answers} == {*(f"d{n}" for n in range(6)), "edited"}


def test_recorded_candidates_are_not_sampled_again() -> None:
    recorded: list[Answer] = []
    dialogues = [_assigned(name="a"), _assigned("plain", "b")]
    answer = [SEA, SALT, SEA, SALT].__getitem__
    first = Synthesis(Recipe(), recorded.append)
    first.run(Teacher(answer).run, dialogues)
    assert len(recorded) == 4
    teacher = Teacher(lambda number: answer(number + 3))
    second = Synthesis(Recipe(), lambda answer: None, recorded[:3])
    second.run(teacher.run, dialogues)
    assert len(teacher.requests) == 1
    assert second.answers == first.answers


def test_answers_that_the_corpus_has_too_often_are_removed() -> None:
    dialogues = [_assigned("plain", f"d{n}") for n in range(5)]
    teacher = Teacher(lambda number: (SEA, SALT)[number % 2])
    synthesis = Synthesis(Recipe(), record=lambda answer: None)
    synthesis.run(teacher.run, dialogues)
    assert synthesis.remove_common(dialogues) == 4
    assert [len(synthesis.accepted(d)) for d in dialogues] == [2, 2, 2, 0, 0]


def test_acceptance_is_measured_by_instruction_and_method() -> None:
    dialogues = [_assigned(name="a"), _assigned("plain", "b")]
    teacher = Teacher([SEA, "", SALT, SEA, SALT].__getitem__)
    synthesis = Synthesis(Recipe(), record=lambda answer: None)
    synthesis.run(teacher.run, dialogues)
    acceptance = measure_acceptance(dialogues, synthesis.answers.values(), too_common=1)
    edited = AcceptanceRow(
        instruction="opening: Ahoy!",
        method="edited",
        candidates=3,
        accepted=2,
        rejected={"empty": 1},
        words=11.0,
        example=f"Ahoy! {SEA}",
        kind="opening",
    )
    assert acceptance.rows[1] == edited
    assert [(row.instruction, row.accepted) for row in acceptance.rows] == [
        *(("none", 2), ("opening: Ahoy!", 2)),
    ]
    assert acceptance.too_common == 1


def test_acceptance_is_summed_by_kind() -> None:
    rows = [
        AcceptanceRow(
            instruction=f"opening: {name}",
            method="edited",
            candidates=candidates,
            accepted=accepted,
            rejected={"empty": candidates - accepted},
            words=words,
            example=name,
            kind="opening",
        )
        for name, candidates, accepted, words in (("Hark!", 4, 3, 8.0), ("Psst!", 5, 1, 4.0))
    ]
    (total,) = by_kind(rows)
    assert (total.instruction, total.method) == ("opening", "edited")
    assert (total.candidates, total.accepted, total.rejected) == (9, 4, {"empty": 5})
    assert total.words == 7.0
    (empty,) = by_kind([replace(rows[0], accepted=0, words=None, rejected={"empty": 4})])
    assert empty.words is None
