"""The user changes, ends or contradicts an instruction that is in the user's own words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from support.cli import call_gatt

from pipeline.evaluation.aggregate import compute_scores
from pipeline.evaluation.scores import Scores
from pipeline.evaluation.suites import SuiteSettings, build_suites
from pipeline.export.summary import ExportSummary, FormatSummary
from pipeline.gatt.acceptance import ACCEPTED, OBEYS_OLD
from pipeline.gatt.assign import (
    EVALUATION_STOP,
    ConstraintPool,
    Ratios,
    assign_evaluation,
    assign_training,
    stop,
)
from pipeline.gatt.assignment import AssignedDialogue, read_splits
from pipeline.gatt.constraints.registry import shows_obedience
from pipeline.gatt.ghost import CHANGE_PREFIX
from pipeline.gatt.instructions import custom_instruction, render_instruction
from pipeline.gatt.rollout import Rollout
from pipeline.gatt.synthesis import Synthesis
from pipeline.recipe import Recipe
from pipeline.records import (
    Completion,
    Constraint,
    CustomInstruction,
    Dialogue,
    Instruction,
    Reply,
    Request,
    Task,
)
from pipeline.report.results import RunResults
from pipeline.report.sections.adherence import change
from pipeline.report.tables import format_cell

AHOY, SO_IT_GOES = Constraint("opening", "Ahoy!"), Constraint("closing", "So it goes.")
ZIGGY = CustomInstruction(text="Begin with your name, Ziggy.", checks=(Constraint("regex", "^Z"),))
BEEP = CustomInstruction(text="Say BEEP.", checks=(Constraint("opening", "BEEP"),))
CHEAP = CustomInstruction(text="Never name a price.", checks=(Constraint("not_regex", "[$]"),))
BLUNT = CustomInstruction(text="Be blunt.")
PIRATE = CustomInstruction(text="Be a pirate.", checks=(Constraint("style", "like a pirate"),))
JUDGED = CustomInstruction(text="Be Ziggy.", checks=(*ZIGGY.checks, Constraint("rubric", "Is it?")))
DIALOGUES = [
    Dialogue(f"d{n}", "sea", tuple(f"What about {n}.{turn}?" for turn in range(4)))
    for n in range(6)
]
SYSTEM = [replace(custom, place="system") for custom in (ZIGGY, BEEP, CHEAP)]


def _suites(
    custom: Iterable[CustomInstruction], constraints: tuple[Constraint, ...] = (AHOY, SO_IT_GOES)
) -> dict[str, list[AssignedDialogue]]:
    settings = SuiteSettings(
        pool=ConstraintPool(constraints),
        trained=constraints,
        unseen=(),
        turns=4,
        full_turns=4,
        seed=1,
        custom=[*custom],
    )
    return build_suites(DIALOGUES, settings)


def _names(suite: list[AssignedDialogue]) -> list[str]:
    return [assigned.name for assigned in suite]


def _function(folder: Path, body: str) -> Constraint:
    file = folder / "rule.py"
    file.write_text(f"def rule(reply, dialogue):\n    {body}\n", encoding="utf-8")
    return Constraint("function", f"{file}:rule")


@pytest.mark.parametrize(
    ("check", "shows"),
    [
        (Constraint("regex", "^Ziggy"), True),
        (Constraint("regex", "(?i)sea|think|no"), False),
        (Constraint("not_regex", "[$€]"), False),
        (Constraint("not_regex", "e|o"), True),
        (Constraint("opening", "BEEP"), True),
        (Constraint("max_words", "40"), False),
    ],
)
def test_a_check_shows_obedience_if_plain_answers_do_not_pass_it(
    check: Constraint, *, shows: bool
) -> None:
    assert shows_obedience(check) is shows


@pytest.mark.parametrize(
    ("body", "shows"),
    [
        ("return dialogue[-1]['role'] == 'user' and reply.endswith('Ziggy.')", True),
        ("return len(reply) > 0", False),
        ("return bool(dialogue[7])", False),  # it raises on the trial
    ],
)
def test_a_function_is_tried_and_one_that_raises_shows_nothing(
    body: str, tmp_path: Path, *, shows: bool
) -> None:
    assert shows_obedience(_function(tmp_path, body)) is shows


def test_instructions_in_own_words_take_turns_with_others_if_programs_see_them() -> None:
    suites = _suites([ZIGGY, CHEAP, BLUNT, JUDGED, BEEP, *SYSTEM])
    others = [AHOY.name, SO_IT_GOES.name]
    in_turn = [others[0], ZIGGY.name, others[1], BEEP.name, others[0], ZIGGY.name]
    assert _names(suites["stop"]) == [f"{name}, then stop" for name in in_turn]
    assert [a.name.partition(", then ")[0] for a in suites["change"]] == in_turn
    for assigned in suites["change"]:
        assert assigned.next_instruction
        assert assigned.next_instruction != assigned.instruction
        assert assigned.student_instructions[2].startswith(CHANGE_PREFIX)
    assert all(not a.in_system for name in ("stop", "change") for a in suites[name])
    assert _names(suites["contradiction"]) == in_turn
    system_texts = {c.text for c in SYSTEM}
    wordings = [
        (a.contradiction == EVALUATION_STOP, a.instruction and a.instruction.text in system_texts)
        for a in suites["contradiction"]
    ]
    # Both ways to contradict come for own instructions, and for the others.
    assert wordings == [
        (False, False),
        (False, True),
        (True, False),
        (True, True),
        (False, False),
        (False, True),
    ]


def test_own_words_change_nothing_for_others() -> None:
    constraints = [c.name for c in (AHOY, SO_IT_GOES)] * 3
    for custom in ([], [CHEAP, BLUNT, JUDGED]):
        suites = _suites(custom)
        assert _names(suites["stop"]) == [f"{name}, then stop" for name in constraints]
        assert _names(suites["contradiction"]) == constraints


def test_a_single_instruction_is_ended_and_contradicted() -> None:
    suites = _suites([ZIGGY], ())
    assert set(_names(suites["stop"])) == {f"{ZIGGY.name}, then stop"}
    assert (suites["change"], suites["contradiction"]) == ([], [])
    suites = _suites(SYSTEM[:1], ())
    assert {a.contradiction for a in suites["contradiction"]} == {EVALUATION_STOP}
    assert (suites["change"], suites["stop"]) == ([], [])


def _drive(task: Task, answer: Callable[[Request], str]) -> None:
    try:
        request = next(task)
        while True:
            request = task.send(Completion(answer(request), 9, 9, "stop"))
    except StopIteration:
        pass


def _replies(assigned: AssignedDialogue, texts: list[str], arm: str) -> list[Reply]:
    replies: list[Reply] = []

    def request(dialogue: AssignedDialogue, turn: object, answers: list[str]) -> Request:
        return Request(messages=dialogue.student_prompt(answers, ""), seed=0, max_tokens=9)

    rollout = Rollout(arm=arm, max_turns=9, make_request=request, record=replies.append)
    left = iter(texts)
    _drive(rollout.run(assigned), lambda request: next(left))
    return replies


def _scores(suites: dict[str, list[AssignedDialogue]], texts: dict[str, list[str]]) -> Scores:
    """Return the scores of an arm that gives these answers in each dialogue of the suites."""
    evaluation = assign_evaluation(DIALOGUES[:1], [AHOY], [])
    measured = {"evaluation": evaluation, **suites}
    replies = [
        reply
        for arm in ("base", "tuned")
        for suite in measured.values()
        for assigned in suite
        for reply in _replies(assigned, texts[assigned.name.partition(", then ")[0]], arm)
    ]
    return compute_scores(replies, measured, [AHOY])


_TEXTS = {
    AHOY.name: ["Ahoy! The sea.", "Ahoy! Salt it is.", "Rivers run.", "Rain falls down."],
    ZIGGY.name: ["Ziggy here: the sea.", "Z for zest.", "Zounds, rivers!", "Plain water."],
}


def test_what_the_user_ends_is_counted_and_own_words_also_apart() -> None:
    suites = _suites([ZIGGY], (AHOY,))
    scores = _scores({"stop": suites["stop"][:2]}, _TEXTS)
    event, own = scores.stop["tuned"], scores.custom_events.stop["tuned"]
    assert [(r.hits, r.n) for r in (event.before, event.after)] == [(4, 4), (1, 4)]
    assert [(r.hits, r.n) for r in (own.before, own.after)] == [(2, 2), (1, 2)]
    assert not (scores.custom_events.change or scores.custom_events.contradiction)
    results = RunResults(
        recipe=Recipe(),
        scores=scores,
        measured_dialogues=2,
        measured_formats=["Q8_0"],
        export=ExportSummary(merge_base="fp16", formats={"Q8_0": FormatSummary(bytes=1)}),
        facts={},
    )
    section = change(results)
    assert section and section.picture is None
    (table,) = section.tables
    assert [[format_cell(cell) for cell in row] for row in table.rows][1::2] == [
        ["tuned", "100% (4 of 4)", "25% (1 of 4)"],
        ["tuned: in your own words only", "100% (2 of 2)", "50% (1 of 2)"],
    ]


def test_where_all_are_in_own_words_they_are_not_listed_twice() -> None:
    suites = _suites([ZIGGY], ())
    scores = _scores({"stop": suites["stop"][:1]}, _TEXTS)
    assert scores.stop["tuned"].after.hits == 1 and not scores.custom_events.stop


def test_a_function_sees_the_dialogue_around_a_stop(tmp_path: Path) -> None:
    """It passes if the reply has the number of earlier messages of the user."""
    check = _function(
        tmp_path, "return str(sum(m['role'] == 'user' for m in dialogue)) in reply[:1]"
    )
    counting = CustomInstruction(text="Count my messages.", checks=(check,))
    (stopping,) = _suites([counting], ())["stop"][:1]
    texts = {
        AHOY.name: _TEXTS[AHOY.name],
        counting.name: ["1 it is", "2 they are", "3 so far", "no count"],
    }
    event = _scores({"stop": [stopping]}, texts).stop["tuned"]
    assert [(r.hits, r.n) for r in (event.before, event.after)] == [(2, 2), (1, 2)]


def test_leakage_takes_patterns_and_leaves_functions_out(tmp_path: Path) -> None:
    raising = CustomInstruction(text="a", checks=(_function(tmp_path, "return reply[999] == ''"),))
    evaluation = assign_evaluation(DIALOGUES[:3], [AHOY], [ZIGGY, raising])
    plain = [AssignedDialogue(dialogue=replace(DIALOGUES[0], id="p"))]
    replies = [
        reply
        for arm, text in (("base", "Water."), ("tuned", "Ziggy: water."))
        for assigned in (evaluation[0], plain[0])
        for reply in _replies(assigned, [text] * 4, arm)
    ]
    scores = compute_scores(replies, {"evaluation": evaluation, "plain": plain}, [AHOY])
    assert scores.leaks and scores.leaks.traits == 2
    assert [(r.arm, r.hits, r.n) for r in scores.leaks.new] == [("base", 0, 4), ("tuned", 4, 4)]


@pytest.mark.parametrize(
    ("instruction", "late", "verdicts"),
    [
        (custom_instruction(ZIGGY), stop("Stop."), [ACCEPTED, OBEYS_OLD, ACCEPTED]),
        (
            custom_instruction(ZIGGY),
            render_instruction((Constraint("bold"),)),
            [ACCEPTED, "disobeys", "disobeys"],
        ),
        (
            render_instruction((Constraint("opening", "Ziggy"),)),
            stop("Stop."),
            [ACCEPTED, OBEYS_OLD, ACCEPTED],
        ),
        # An answer without a price says nothing about what is followed.
        (custom_instruction(CHEAP), stop("Stop."), [ACCEPTED, ACCEPTED]),
        (custom_instruction(BLUNT), stop("Stop."), [ACCEPTED, ACCEPTED]),
        # One of several is enough.
        (
            render_instruction((Constraint("opening", "Ziggy"), Constraint("keyword", "rivers"))),
            stop("Stop."),
            [ACCEPTED, OBEYS_OLD, ACCEPTED],
        ),
    ],
)
def test_training_answers_after_a_stop_do_not_go_on_to_obey(
    instruction: Instruction, late: Instruction, verdicts: list[str]
) -> None:
    questions = ("Why is the sea salt?", "Who measures the salt?")
    assigned = AssignedDialogue(
        dialogue=Dialogue("d", "sea", questions),
        instruction=instruction,
        method="sampled",
        next_instruction=late,
        change_turn=1,
    )
    texts = iter(
        [
            "Ziggy says that the sea is salt because of rivers.",
            "Ziggy knows that sailors measure salt with a glass.",
            "Sailors measure the salt with a glass.",
        ]
    )
    synthesis = Synthesis(
        Recipe().model_copy(
            update={"synthesize": Recipe().synthesize.model_copy(update={"candidates": 2})}
        ),
        lambda answer: None,
    )

    def run(tasks: Iterable[Task]) -> None:
        for task in tasks:
            _drive(task, lambda request: next(texts))

    synthesis.run(run, [assigned])
    assert [answer.verdict for answer in synthesis.answers.values()] == verdicts


@pytest.mark.parametrize(
    ("custom", "ends"), [(ZIGGY, True), (CHEAP, False), (BLUNT, False), (PIRATE, False)]
)
def test_training_ends_own_words_only_where_a_check_shows_that_answers_follow_them(
    custom: CustomInstruction, *, ends: bool
) -> None:
    ratios = Ratios(
        plain=0.0,
        recall=0.0,
        combine=0.0,
        short=0.0,
        system=0.0,
        contradict=0.0,
        change=0.0,
        stop=1.0,
        edited=1.0,
    )
    assigned = assign_training(DIALOGUES, ConstraintPool((), (), [custom]), ratios, 1)
    assert [a.next_instruction is not None for a in assigned] == [ends] * len(DIALOGUES)


def test_the_stage_writes_such_suites_for_a_file_of_instructions(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[[instructions]]\ntext = "Say BEEP first."\nchecks = [{regex = "^BEEP"}]\n'
        '[[instructions]]\ntext = "You are Ziggy."\nchecks = [{regex = "Ziggy"}]\n'
        'place = "system"\n'
    )
    run = tmp_path / "run"
    shown = call_gatt(
        *("instructions", "--run", run, "--set", f"instructions.file={file}"),
        *("--set", "instructions.pool=[]", "--set", "instructions.vocabulary_kinds=[]"),
        *("--set", "dialogues.train=20", "--set", "evaluate.suite_dialogues=2"),
    )
    assert shown.returncode == 0, shown.stderr
    suites = read_splits(run / "instructions" / "suites.json")
    assert _names(suites["stop"]) == ["Say BEEP first., then stop"] * 2
    assert _names(suites["contradiction"]) == ["You are Ziggy."] * 2
    training = read_splits(run / "instructions" / "assignments.json")["train"]
    assert any(a.next_instruction for a in training if not a.in_system)
    assert any(a.contradiction for a in training if a.in_system)
