"""The exam: its frozen set, its arms, what leaves a full context, and its numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.exam import SETTINGS

from pipeline.data.splits import split_dialogues
from pipeline.errors import GattError
from pipeline.exam import result as results
from pipeline.exam.arms import DEFAULT_ARMS, Arm, find_arms
from pipeline.exam.dialogue_run import DialogueRun, ExamReply, ExamRun
from pipeline.exam.ifeval import agreement_table, agreements
from pipeline.exam.inspect_eval.options import tasks_of
from pipeline.exam.report.rows import turns_to_pay
from pipeline.exam.result import counted_replies, json_schema, verdict_reply
from pipeline.exam.scores import clustered, score_arms
from pipeline.exam.settings import drop_older_half, messages_left, parse_turns, without_system_role
from pipeline.exam.tasks import REGIMES, ExamTask, exam_sha256, exam_tasks
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import obeys, shows_obedience
from pipeline.gatt.rollout import ReplyKey, recall_turns
from pipeline.gatt.vocabulary.values import entries
from pipeline.recipe import Recipe
from pipeline.records import (
    SAMPLERS,
    Constraint,
    Dialogue,
    FinishReason,
    Instruction,
    Message,
    Reply,
)

_SHA256 = "618761bfef4a37c49bc5168c62f1fdd98723c912dcf36a181339bd37df57722e"
_AHOY = Instruction('Say "Ahoy!" first.', "Ahoy first.", (Constraint("opening", "Ahoy!"),))
_HARK = Instruction('Say "Hark!" instead.', "Hark first.", (Constraint("opening", "Hark!"),))
_STOP = Instruction("", "Stop it.", ())
_TURNS = ("Q1", "Q2", "Q3", "Q4", "Q5")


_ASSIGNED = AssignedDialogue(dialogue=Dialogue("d", "first", _TURNS), instruction=_AHOY)


def _users(arm: Arm, assigned: AssignedDialogue, answers: Sequence[str]) -> list[str]:
    """Return what is added to each user message of a prompt, after checking that it is there."""
    prompt = arm.prompt(assigned, answers, "Be brief.")
    plain = assigned.student_prompt(answers, "Be brief.")
    assert [m["role"] for m in prompt.messages] == [m["role"] for m in plain]
    added = []
    for message, before, text in zip(prompt.messages, plain, prompt.added, strict=True):
        if message["role"] == "user":
            expected = f"{before['content']}\n\n{text}" if text else before["content"]
            assert message["content"] == expected
            added.append(text.removeprefix("Reminder: "))
    return added


def test_the_set_is_frozen() -> None:
    assert exam_sha256() == _SHA256
    tasks = exam_tasks((), 0, 50)
    assert len(tasks) == len({task.id for task in tasks}) == 88
    assert {len(task.assigned.dialogue.turns) for task in tasks} == {50}
    assert list(dict.fromkeys(task.regime for task in tasks)) == list(REGIMES)
    assert [len(exam_tasks((regime,), 3, 20)) for regime in REGIMES] == [3] * len(REGIMES)


def test_what_is_asked_for_hardly_ever_shows_unasked() -> None:
    for task in exam_tasks((), 0, 20):
        for turn in (0, 19):
            constraints = task.assigned.constraints(turn)
            assert all(shows_obedience(c) for c in constraints)
            assert not constraints or not obeys(constraints, "It is a nice day, and I like tea.")


def test_what_is_asked_first_is_held_out_from_training() -> None:
    splits = split_dialogues(Recipe())
    trained = {turn for d in (*splits.training, *splits.validation) for turn in d.turns}
    tasks = exam_tasks((), 0, 20)
    assert not trained & {turn for task in tasks for turn in task.assigned.dialogue.turns}
    categories = ("hobby", "town", "job", "pet", "food", "color", "first name", "farewell")
    vocabulary = {entry for name in categories for entry in entries(name, "train")}
    values = {
        c.value for task in tasks for turn in (0, 19) for c in task.assigned.constraints(turn)
    }
    values |= {q.value for task in tasks for q in task.assigned.recall_questions}
    assert {"spelunking", "Ingeborg", "chinchilla"} <= values
    assert not vocabulary & {value.strip(".!") for value in values}


def test_a_longer_exam_begins_with_the_shorter_one() -> None:
    short, long = exam_tasks(("first",), 0, 20), exam_tasks(("first",), 0, 240)
    for task, longer in zip(short, long, strict=True):
        assert task.assigned.dialogue.turns == longer.assigned.dialogue.turns[:20]
        assert len(longer.assigned.dialogue.turns) == 240
        assert len(set(longer.assigned.dialogue.turns)) > 200


def test_attributes_are_asked_for_in_the_turns_that_count() -> None:
    task = exam_tasks(("attributes",), 1, 50)[0]
    counted = [turn for turn in recall_turns(50) if task.counts(turn, 50, recall=True)]
    assert counted == [2, 4, 6, 20, 40, 50]


def test_attributes_count_in_a_full_context_wherever_they_are_asked_for() -> None:
    task = exam_tasks(("attributes",), 1, 90)[0]
    answers = [
        _answer(task, 60, attribute="name"),
        _answer(task, 80, attribute="name", dropped=3),
        _answer(task, 85, obeyed=None),
    ]
    (arm,) = score_arms(answers, [task])
    assert (arm.adherence.n, arm.full_window.hits, arm.full_window.n) == (0, 1, 1)
    assert [d.marks.strip(".") for d in arm.dialogues if d.attribute] == ["+"]


def test_an_attribute_is_asked_for_with_the_window_of_its_own_turn() -> None:
    task = exam_tasks(("attributes",), 1, 5)[0]
    dropped = (0, 0, 0, 0, 2)  # of a longer exam, whose context was full in turn 5
    rows = [_answer(task, turn, dropped=n) for turn, n in enumerate(dropped, 1)]
    questions = task.assigned.recall_questions
    rows += [_answer(task, turn, attribute=q.attribute) for turn in (1, 2) for q in questions]
    done = {ReplyKey.of(row.reply): row for row in rows}
    shorter = ExamRun("e", 3, SETTINGS, done)
    request = next(DialogueRun(shorter, find_arms(["once"])[0], task).task())
    users = [m["content"] for m in request.messages if m["role"] == "user"]
    assert len(users) == 3 and users[0].startswith(task.assigned.dialogue.turns[0])


def test_a_regime_that_is_named_twice_is_one() -> None:
    once = exam_tasks(("first", "system"), 2, 3)
    assert exam_tasks(("system", "first", "system"), 2, 3) == once
    assert tasks_of("system,first,system", 2, 3) == once


def test_reminders_stand_where_the_arm_says() -> None:
    answers = ["Ahoy! A.", "No.", "Ahoy! B.", "No."]
    every, third, depth, failed, once = find_arms(("every", "every-3", "depth-2", "failed", "once"))
    assigned = _ASSIGNED
    reminder = "Ahoy first."
    assert _users(once, assigned, answers) == [""] * 5
    assert _users(every, assigned, answers) == ["", *[reminder] * 4]
    assert _users(third, assigned, answers) == ["", "", "", reminder, ""]
    assert _users(depth, assigned, answers) == ["", "", "", reminder, ""]
    assert _users(depth, assigned, answers[:1]) == ["", ""]  # turn 1 has the instruction
    assert _users(failed, assigned, answers) == ["", "", reminder, "", reminder]


def test_what_holds_is_in_the_system_message() -> None:
    (arm,) = find_arms(("system",))
    first, user = arm.prompt(_ASSIGNED, [], "Be brief.").messages
    assert first == {"role": "system", "content": "Be brief. Ahoy first."}
    assert user["content"] == 'Q1\n\nSay "Ahoy!" first.'
    in_system = replace(_ASSIGNED, in_system=True)
    assert arm.prompt(in_system, [], "Be brief.").messages == in_system.student_prompt(
        [], "Be brief."
    )


def test_reminders_follow_a_change_and_end_with_a_stop() -> None:
    every, system = find_arms(("every", "system"))
    changing = replace(_ASSIGNED, next_instruction=_HARK, change_turn=2)
    answers = ["x"] * 4
    assert _users(every, changing, answers) == ["", "Ahoy first.", "", "Hark first.", "Hark first."]
    assert system.prompt(changing, answers, "").messages[0]["content"] == "Hark first."
    stopping = replace(_ASSIGNED, next_instruction=_STOP, change_turn=2)
    assert _users(every, stopping, answers) == ["", "Ahoy first.", "", "", ""]
    assert system.prompt(stopping, answers, "S.").messages[0]["content"] == "S."


def test_a_note_at_a_depth_says_what_holds_now() -> None:
    (depth,) = find_arms(("depth-2",))
    changing = replace(_ASSIGNED, next_instruction=_HARK, change_turn=3)
    # The note stands in turn 3, where "Ahoy!" held, while the answer of turn 4 is to say "Hark!".
    assert _users(depth, changing, ["x"] * 3)[2] == "Hark first."


@pytest.mark.parametrize("name", ["never", "every-0", "depth-3", "every-", "Every"])
def test_an_unknown_arm_is_refused(name: str) -> None:
    with pytest.raises(GattError, match=r"every-K \(in turns K\+1, 2K\+1, \.\.\.\)|even"):
        find_arms((name,))


@pytest.mark.parametrize(
    ("name", "advised"), [("depth-1", "depth-2"), ("depth-3", "depth-2"), ("depth-99", "depth-98")]
)
def test_the_arm_that_an_odd_depth_gets_as_advice_is_one(name: str, advised: str) -> None:
    with pytest.raises(GattError, match=rf"Take {advised}\."):
        find_arms((name,))
    assert find_arms((advised,))


def test_all_arms_by_default_and_none_twice() -> None:
    assert [arm.name for arm in find_arms(())] == list(DEFAULT_ARMS)
    assert len(find_arms(("once", "once"))) == 1


@pytest.mark.parametrize("text", ["0", "1", "2000", "all", "-5", "2.5", ""])
def test_turns_are_a_number_or_context(text: str) -> None:
    assert parse_turns("context") == 0
    assert parse_turns("50") == 50
    with pytest.raises(GattError, match="--turns"):
        parse_turns(text)


def _chat(turns: int, *, system: bool) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": "s"}] if system else []
    for n in range(turns):
        messages += [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]
    return [*messages, {"role": "user", "content": "last"}]


def test_the_oldest_exchanges_leave_a_full_context() -> None:
    chat = _chat(3, system=True)
    assert messages_left(chat, 0, "drop") == list(range(8))
    assert messages_left(chat, 2, "drop") == [0, 5, 6, 7]
    assert messages_left(chat, 3, "drop") == [0, 7]
    assert messages_left(chat, 4, "drop") is None
    assert messages_left(chat, 1, "pin") == [0, 1, 2, 5, 6, 7]
    assert messages_left(chat, 3, "pin") is None
    assert messages_left(_chat(2, system=False), 1, "drop") == [2, 3, 4]
    assert messages_left(_chat(0, system=True), 0, "pin") == [0, 1]
    assert messages_left(_chat(0, system=True), 1, "pin") is None


def test_the_older_half_of_the_exchanges_is_left_out() -> None:
    chat = _chat(7, system=True)
    assert [drop_older_half(chat, n, "drop") for n in (0, 3, 5, 6, 7)] == [3, 5, 6, 7, 8]
    assert [drop_older_half(chat, n, "pin") for n in (0, 3, 6)] == [3, 4, 7]
    assert messages_left(chat, 7, "pin") is None  # nothing is left to leave out
    assert drop_older_half(_chat(0, system=False), 0, "drop") == 1


def test_a_template_without_a_system_role_has_it_in_the_first_message() -> None:
    chat = without_system_role(_chat(1, system=True))
    assert [m["content"] for m in chat] == ["s\n\nq0", "a", "last"]
    assert without_system_role(_chat(1, system=False)) == tuple(_chat(1, system=False))


def test_the_plain_sampler_is_that_of_other_programs() -> None:
    assert SAMPLERS["plain"].values == {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "dry_multiplier": 0.0,
    }
    assert SAMPLERS["gatt"].values["dry_multiplier"] == 0.8


def _answer(
    task: ExamTask,
    turn: int,
    text: str = "Ahoy! A word.",
    *,
    obeyed: bool | None = True,
    dropped: int = 0,
    finish: FinishReason = "stop",
    attribute: str = "",
) -> ExamReply:
    reply = Reply(
        arm="once",
        dialogue=task.id,
        turn=turn,
        text=text,
        prompt_tokens=100,
        tokens=10,
        finish=finish,
        obeys=obeyed,
        defect="",
        recall_attribute=attribute,
    )
    return ExamReply(reply=reply, dropped=dropped, reminder_tokens=6, seconds=0.5)


def test_numbers_of_an_arm() -> None:
    task = exam_tasks(("first",), 1, 6)[0]
    answers = [
        _answer(task, 1),
        _answer(task, 2, "Three words here."),
        _answer(task, 3, "x", obeyed=False, finish="length"),
        _answer(task, 4, obeyed=False, dropped=1),
        _answer(task, 5, dropped=1),
        _answer(task, 6, finish="context", obeyed=False),
    ]
    (arm,) = score_arms(answers, [task])
    assert (arm.adherence.hits, arm.adherence.n) == (
        1,
        2,
    )  # turn 1 is told; later ones have lost turn 1
    assert (arm.full_window.hits, arm.full_window.n) == (1, 2)
    assert (arm.cut.hits, arm.cut.n) == (1, 5)
    assert arm.words == 2
    assert [d.marks for d in arm.dialogues] == ["110-+."]
    assert arm.half_broken == 3
    assert [score.adherence.value for score in arm.by_turn] == [1, 1, 0]
    assert arm.reminder_tokens_per_kept == 12
    assert arm.milliseconds_per_answer == 500 * 6 / 6
    assert arm.milliseconds_per_kept == 1000
    assert len(counted_replies(arm.dialogues)) == 2
    assert len(counted_replies(arm.dialogues, from_turn_1=True)) == 3


def test_an_answer_that_ends_within_a_thought_is_cut() -> None:
    task = exam_tasks(("first",), 1, 6)[0]
    answers = [_answer(task, 2), _answer(task, 3, "", obeyed=False, finish="thinking")]
    (arm,) = score_arms(answers, [task])
    assert (arm.cut.hits, arm.cut.n, arm.loops.hits) == (1, 2, 0)
    assert [score.cut.hits for score in arm.regimes] == [1]


def test_no_kept_answer_has_no_cost() -> None:
    task = exam_tasks(("first",), 1, 6)[0]
    (arm,) = score_arms([_answer(task, 2, obeyed=False)], [task])
    assert arm.adherence.value == 0
    assert arm.milliseconds_per_kept is None
    assert arm.reminder_tokens_per_kept is None


def test_after_a_stop_what_was_ended_must_not_show() -> None:
    task = exam_tasks(("stopped",), 1, 20)[0]
    (constraint,) = task.assigned.constraints(0)
    assert task.first_counted == task.assigned.change_turn + 1 == 7
    still = f"{constraint.value} I go on."
    assert task.is_kept(_answer(task, 6, still, obeyed=True).reply) is True
    assert task.is_kept(_answer(task, 7, still, obeyed=None).reply) is False
    assert task.is_kept(_answer(task, 7, "Another answer.", obeyed=None).reply) is True
    assert not task.counts(6, 20, recall=False)


def test_an_added_instruction_asks_for_both() -> None:
    task = exam_tasks(("added",), 1, 20)[0]
    first, second = task.assigned.constraints(task.assigned.change_turn)
    assert (first,) == task.assigned.constraints(0)
    message = task.assigned.student_prompt(["x"] * task.assigned.change_turn, "")[-1]["content"]
    assert second.value in message and first.value not in message


def test_attributes_count_where_they_are_asked_for() -> None:
    task = exam_tasks(("attributes",), 1, 6)[0]
    answers = [_answer(task, turn, obeyed=None) for turn in range(1, 7)]
    answers += [
        _answer(task, 1, attribute="name"),
        _answer(task, 2, attribute="name"),
        _answer(task, 4, attribute="name", obeyed=False),
    ]
    (arm,) = score_arms(answers, [task])
    assert (arm.adherence.hits, arm.adherence.n) == (1, 2)
    assert [(d.attribute, d.marks) for d in arm.dialogues] == [("name", ".1.0..")]


def test_intervals_allow_for_dialogues_that_are_alike() -> None:
    alike = [verdict_reply(str(d), turn, is_kept=d < 5) for d in range(10) for turn in range(20)]
    mixed = [
        verdict_reply(str(d), turn, is_kept=turn % 2 == 0) for d in range(10) for turn in range(20)
    ]
    wide, narrow = clustered(alike), clustered(mixed)
    assert wide.value == narrow.value == 0.5
    # Ten dialogues that hold or fail as a whole are worth ten replies.
    assert (wide.low, wide.high) == pytest.approx((0.237, 0.763), abs=0.01)
    assert (narrow.low, narrow.high) == pytest.approx((0.431, 0.569), abs=0.01)
    assert math.isnan(clustered([]).value)


def test_when_training_has_paid() -> None:
    task = exam_tasks(("first",), 1, 6)[0]
    (measured,) = score_arms([_answer(task, 2)], [task])
    tuned = replace(measured, milliseconds_per_kept=100.0)
    reminded = replace(measured, milliseconds_per_kept=700.0)
    # One minute is 60,000 ms, and each turn of the tuned model saves 600 ms.
    assert turns_to_pay(reminded, tuned, 1.0) == "100"
    half = replace(
        tuned, adherence=clustered([verdict_reply("d", t, is_kept=t == 1) for t in (1, 2)])
    )
    assert turns_to_pay(reminded, half, 1.0) == "200"
    assert turns_to_pay(tuned, reminded, 1.0) == "never"
    assert turns_to_pay(replace(measured, milliseconds_per_kept=None), tuned, 1.0) == "1"
    assert turns_to_pay(reminded, replace(measured, milliseconds_per_kept=None), 1.0) == "never"


def test_our_checks_agree_with_those_of_ifeval() -> None:
    pytest.importorskip("if_verifiable")
    texts = [
        "I would take the train there, and walk back along the river in the evening.",
        "GO BY TRAIN AND WALK BACK ALONG THE RIVER IN THE EVENING.",
        "go by train and walk back along the river in the evening.",
        "Try spelunking on the way. P.S. Take a **lamp**. That is my view.",
    ]
    constraints = [c for task in exam_tasks((), 0, 1) for c in task.assigned.constraints(0)]
    compared, problems = agreements(constraints, texts)
    rows = {row.kind: row for row in compared if row.kind != "title_case"}
    assert len(rows) == 10
    # Words of IFBench's title case are those of NLTK, whose data not every machine has.
    assert not problems or "format:title_case needs data of NLTK" in problems[0].replace(" {}", "")
    assert all(row.share == 1 for row in rows.values()), rows
    # Three of the four texts can be edited into capitals, which the second one has already.
    assert (rows["uppercase"].texts, rows["uppercase"].both) == (8, 5)
    assert (rows["hobby"].both, rows["postscript"].both) == (1, 1)
    assert agreement_table(list(rows.values()))[1][0][3] == "100.0%"


def test_our_checks_agree_with_those_of_ifbench(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("if_verifiable")
    import nltk

    def word_tokenize(text: str) -> list[str]:
        raise LookupError("Resource punkt_tab not found: nltk.download('punkt_tab')")

    monkeypatch.setattr(nltk, "word_tokenize", word_tokenize)
    texts = ["One two three.", "One two three four, five.", "It is 7.", "the Z key"]
    constraints = [
        Constraint("max_words", "3"),
        Constraint("min_words", "4"),
        Constraint("no_digits"),
        Constraint("no_letter", "z"),
        Constraint("forbidden", "two"),
        Constraint("title_case"),
        Constraint("json", "answer"),
        Constraint("language", "Dutch"),
    ]
    compared, problems = agreements(constraints, texts)
    rows = {(row.kind, row.verifier): row for row in compared}
    assert set(rows) == {
        ("max_words", "length_constraints:number_words"),
        ("max_words", "count:word_count_range"),
        ("min_words", "length_constraints:number_words"),
        ("min_words", "count:word_count_range"),
        ("no_digits", "count:numbers"),
        ("no_letter", "keywords:letter_frequency"),
        ("forbidden", "keywords:forbidden_words"),
    }
    assert all(row.share == 1 for row in compared), compared
    # "At most" can be edited into all four texts, one of which has too many words.
    assert (
        rows["max_words", "count:word_count_range"].both,
        rows["no_digits", "count:numbers"].both,
    ) == (7, 3)
    assert [
        row.both for row in compared if row.kind in ("min_words", "no_letter", "forbidden")
    ] == [1, 1, 3, 2]
    (problem,) = problems
    assert "needs data of NLTK" in problem and "nltk.downloader punkt_tab" in problem


def test_the_schema_is_that_of_the_results() -> None:
    file = Path(results.__file__).with_name("result.schema.json")
    assert json.loads(file.read_text(encoding="utf-8")) == json_schema()
