"""The suites beyond the trained instructions, and the scores of their replies."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from pipeline.errors import GattError
from pipeline.evaluation.aggregate import compute_scores
from pipeline.evaluation.judge import balanced, question, verdict
from pipeline.evaluation.scores import Leakage, ReplyCounts, Scores
from pipeline.evaluation.scoring.leakage import measure_leakage
from pipeline.evaluation.suites import SuiteSettings, build_suites
from pipeline.files import write_json
from pipeline.gatt.assign import ConstraintPool, assign_evaluation, unseen_values
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import KINDS, compatible
from pipeline.gatt.rollout import RECALL_TURNS
from pipeline.recipe import Recipe
from pipeline.records import Constraint, Dialogue, Instruction, Reply
from pipeline.report.tables import format_cell, overview

POOL = (
    Constraint("opening", "Ahoy!"),
    Constraint("opening", "Hark!"),
    Constraint("closing", "So it goes."),
)
UNSEEN = (
    Constraint("opening", "Hark!"),
    Constraint("opening", "Well, well!"),
    Constraint("uppercase"),
)
DIALOGUES = [
    Dialogue(f"d{n}", "sea", tuple(f"What about {n}.{t}?" for t in range(20))) for n in range(4)
]
Suites = dict[str, list[AssignedDialogue]]


_SETTINGS = SuiteSettings(
    pool=ConstraintPool(POOL, ("opening", "hashtag")),
    trained=POOL,
    unseen=UNSEEN,
    turns=10,
    full_turns=20,
    seed=1,
)


def _suites(dialogues: list[Dialogue] = DIALOGUES) -> Suites:
    return build_suites(dialogues, _SETTINGS)


def _lengths(suite: list[AssignedDialogue]) -> set[int]:
    return {len(assigned.dialogue.turns) for assigned in suite}


def test_every_dialogue_of_every_suite_has_its_own_id() -> None:
    suites = _suites()
    ids = [assigned.dialogue.id for suite in suites.values() for assigned in suite]
    assert len(set(ids)) == len(ids)
    assert {name: _lengths(suite) for name, suite in suites.items()} == {
        "unseen_values": {20},
        "unseen": {10},
        "combined": {10},
        "change": {10},
        "stop": {10},
        "contradiction": {10},
        "plain": {10},
        "recall": {20},
        "single": {1},
    }


def test_what_is_trained_is_not_unseen() -> None:
    constraints = {c for assigned in _suites()["unseen"] for c in assigned.constraints(0)}
    assert constraints == {Constraint("opening", "Well, well!"), Constraint("uppercase")}


def test_the_instruction_changes_halfway_to_another() -> None:
    for assigned in _suites()["change"]:
        assert assigned.change_turn == 5
        assert assigned.constraints(4) != assigned.constraints(5)
        assert assigned.student_instructions[5].startswith("From now on: ")


def test_the_user_ends_the_instruction_or_contradicts_the_system_message() -> None:
    suites = _suites()
    for assigned in suites["stop"]:
        assert assigned.constraints(4) and not assigned.constraints(5)
    for assigned in suites["contradiction"]:
        assert assigned.in_system and assigned.constraints(5) == assigned.constraints(0)
        assert any(
            message["content"].endswith(assigned.contradiction)
            for message in assigned.student_prompt(["a"] * 9, "")
        )


def test_what_only_a_judge_can_see_is_not_changed_ended_or_contradicted() -> None:
    """The judge is asked about the instruction that holds, not about an earlier one."""
    style = Constraint("style", "talk like a pirate")
    suites = build_suites(DIALOGUES, replace(_SETTINGS, trained=(style, *POOL)))
    for name in ("change", "stop", "contradiction"):
        assert suites[name]
        assert not any(assigned.needs_judge(0) for assigned in suites[name])
        assert not any(assigned.needs_judge(9) for assigned in suites[name])


_MORE = replace(_SETTINGS, trained=(*POOL, Constraint("emoji")))


def test_two_and_three_instructions_at_once_are_compatible() -> None:
    suite = build_suites(DIALOGUES, _MORE)["combined"]
    groups = [assigned.constraints(0) for assigned in suite]
    assert [len(group) for group in groups[:4]] == [2, 3, 2, 3]
    for group in groups:
        assert all(compatible(*pair) for pair in combinations(group, 2))


def test_two_at_once_come_from_all_kinds_however_many_values_these_have() -> None:
    openings = [Constraint("opening", f"Ahoy {word}!") for word in "abcdefghijklmnopqrstuvwxyz"]
    trained = (*openings, Constraint("closing", "So it goes."), Constraint("emoji"))
    dialogues = [replace(DIALOGUES[0], id=f"d{n}") for n in range(6)]
    suite = build_suites(dialogues, replace(_SETTINGS, trained=trained))["combined"]
    pairs = [frozenset(c.kind for c in a.constraints(0)[:2]) for a in suite]
    assert len(set(pairs[:3])) == len(set(pairs[3:])) == 3
    values = {c.value for a in suite for c in a.constraints(0) if c.kind == "opening"}
    assert len(values) > 1


def test_where_no_third_instruction_is_compatible_there_are_two_at_once() -> None:
    groups = [assigned.constraints(0) for assigned in _suites()["combined"]]
    assert [len(group) for group in groups] == [2] * len(DIALOGUES)


def test_two_and_three_at_once_have_a_rate_each() -> None:
    two, three = build_suites(DIALOGUES, _MORE)["combined"][:2]
    replies = [_reply(three, 1, obeys=False), _reply(two, 1, obeys=True)]
    rows = compute_scores(replies, {"evaluation": [], "combined": [two, three]}, POOL).combined
    assert [(row.at, row.value) for row in rows] == [("two at once", 1.0), ("three at once", 0.0)]


def test_what_the_user_has_ended_is_counted_after_its_turn() -> None:
    stopping, contradicting = _suites()["stop"][0], _suites()["contradiction"][0]
    obedient = _OBEDIENT_TEXTS[stopping.constraints(0)[0].name]
    texts = [*[obedient] * 6, *["Yes."] * 4]
    suites = {"stop": [stopping], "contradiction": [contradicting]}
    replies = [
        replace(_reply(assigned, turn, obeys=True), text=text)
        for assigned in (stopping, contradicting)
        for turn, text in enumerate(texts, 1)
    ]
    scores = _scores(replies, suites)
    for event in (scores.stop["tuned"], scores.contradiction["tuned"]):
        assert (event.before.hits, event.before.n, event.after.hits, event.after.n) == (5, 5, 1, 5)


def test_single_questions_cover_every_kind_that_a_program_can_check() -> None:
    dialogues = [
        Dialogue(f"d{n}", "sea", ("What?",)) for n in range(Recipe().evaluate.suite_dialogues)
    ]
    kinds = {c.kind for assigned in _suites(dialogues)["single"] for c in assigned.constraints(0)}
    assert kinds == {name for name, kind in KINDS.items() if not kind.judged}


def test_a_recall_question_replaces_the_last_user_message() -> None:
    assigned = _suites()["recall"][0]
    assert {q.value for q in assigned.recall_questions}.issubset(
        re.findall(r"[A-Z]\w+ [A-Z]\w+|\w+", assigned.student_instructions[0])
    )
    with_question = assigned.with_question(4, assigned.recall_questions[0].question)
    messages = with_question.student_prompt(["a", "b", "c"], "")
    assert messages[-1]["content"] == "What is your name?"
    assert messages[:-1] == assigned.student_prompt(["a", "b", "c"], "")[:-1]


def test_no_dialogues_no_suites() -> None:
    assert not any(_suites([]).values())


def _reply(assigned: AssignedDialogue, turn: int, *, obeys: bool, arm: str = "tuned") -> Reply:
    return Reply(
        arm=arm,
        dialogue=assigned.dialogue.id,
        turn=turn,
        text="Words.",
        prompt_tokens=9,
        tokens=9,
        finish="stop",
        obeys=obeys,
        defect="",
    )


def _trained() -> list[AssignedDialogue]:
    instruction = Instruction("Begin.", "B.", (POOL[0],))
    return [AssignedDialogue(dialogue=d, instruction=instruction) for d in DIALOGUES]


def _replies(assigned: list[AssignedDialogue]) -> list[Reply]:
    """Every reply of the tuned arm obeys, and none of the base."""
    return [
        _reply(a, turn, obeys=arm == "tuned", arm=arm)
        for arm in ("base", "tuned")
        for a in assigned
        for turn in range(1, 21)
    ]


def _scores(replies: list[Reply], suites: Suites | None = None) -> Scores:
    """Return the scores of these replies and of those to the trained instructions."""
    trained = _trained()
    return compute_scores(
        [*_replies(trained), *replies], {"evaluation": trained, **(suites or {})}, POOL
    )


def test_the_scores_of_a_suite_do_not_mix_with_others() -> None:
    suites = _suites()
    alone = _scores([])
    replies = [_reply(a, turn, obeys=False) for a in suites["unseen"] for turn in range(1, 11)]
    both = _scores(replies, suites)
    assert replace(both, generalization=(), by_unseen=(), unseen_by_turn=()) == alone
    assert {(r.at, r.hits, r.n) for r in both.generalization} == {
        ("unseen value", 0, 20),
        ("unseen kind", 0, 20),
    }
    assert {r.at: r.group for r in both.by_unseen} == {
        "opening": "unseen value",
        "uppercase": "unseen kind",
    }


def test_adherence_by_family() -> None:
    instructions = [
        Instruction("Do.", "D.", (c,)) for c in (POOL[0], POOL[2], Constraint("persona", "Nemo"))
    ]
    assigned = [
        AssignedDialogue(dialogue=d, instruction=i)
        for d, i in zip(DIALOGUES, instructions, strict=False)
    ]
    replies = [
        _reply(a, turn, obeys=a is assigned[2], arm=arm)
        for arm in ("base", "tuned")
        for a in assigned
        for turn in range(1, 21)
    ]
    rows = compute_scores(replies, {"evaluation": assigned}, POOL).by_family
    assert [(r.at, r.hits, r.n) for r in rows if r.arm == "tuned"] == [
        ("phrase", 0, 40),
        ("persona", 20, 20),
    ]


def test_unfiltered_adherence_counts_replies_with_a_defect() -> None:
    trained = _trained()
    replies = [
        replace(r, obeys=True, defect="loop" if r.turn > 10 else "") for r in _replies(trained)
    ]
    scores = compute_scores(replies, {"evaluation": trained}, POOL)
    assert [row.value for row in scores.last_five] == [0, 0]
    assert [row.value for row in scores.last_five_unfiltered] == [1, 1]
    assert scores.replies["base"].no_answer == 40


def test_a_reply_whose_turn_1_has_left_the_context_is_only_counted_as_left_out() -> None:
    trained = _trained()
    replies = [
        replace(reply, obeys=reply.turn == 1, finish="length")
        if reply.turn <= 15
        else replace(reply, text="", obeys=False, defect="empty", finish="context")
        for reply in _replies(trained)
    ]
    scores = compute_scores(replies, {"evaluation": trained}, POOL)
    assert scores.replies["base"] == ReplyCounts(
        all=60, obey=4, no_answer=0, cut=60, left_out=20, unchecked=0
    )
    shares = {str(row[0]): format_cell(row[1]) for row in overview(scores, ["base"]).rows}
    assert shares["all turns: obey, valid answer or not"] == "7% (4 of 60)"
    assert shares["all turns: not a valid answer (loop, repeat, empty)"] == "0% (0 of 60)"
    assert shares["all turns: cut at the maximum length"] == "100% (60 of 60)"
    assert (
        shares["all turns: left out (turn 1 no longer in the context window)"] == "25% (20 of 80)"
    )


_OBEDIENT_TEXTS = {
    "opening: Ahoy!": "Ahoy! Yes.",
    "opening: Hark!": "Hark! Yes.",
    "closing: So it goes.": "Yes. So it goes.",
}


def _slow_switch(assigned: AssignedDialogue, last_old_turn: int) -> list[Reply]:
    """Return replies that obey the old instruction until `last_old_turn`, then the new one."""
    replies = []
    for turn in range(1, 11):
        constraint = assigned.constraints(0 if turn <= last_old_turn else 9)[0]
        obeys = constraint == assigned.constraints(turn - 1)[0]
        reply = _reply(assigned, turn, obeys=obeys)
        replies.append(replace(reply, text=_OBEDIENT_TEXTS[constraint.name]))
    return replies


def test_a_change_is_followed_turn_by_turn() -> None:
    first, second = _suites()["change"][:2]
    replies = [*_slow_switch(first, 5), *_slow_switch(second, 8)]
    change = _scores(replies, {"change": [first, second]}).change["tuned"]
    assert (change.change_turn, change.dialogues, change.never_switched) == (6, 2, 0)
    assert (change.before.hits, change.before.n) == (10, 10)
    assert (change.after.hits, change.old_after.hits, change.after.n) == (7, 3, 10)
    assert change.turns_to_switch == 1.5  # at once, and after three turns
    assert [row.old for row in change.by_turn] == [1] * 5 + [0.5] * 3 + [0] * 2


def test_a_dialogue_that_never_switches_is_counted() -> None:
    assigned = _suites()["change"][0]
    replies = _slow_switch(assigned, 10)
    change = _scores(replies, {"change": [assigned]}).change["tuned"]
    assert (change.never_switched, change.turns_to_switch) == (1, None)


def _recall_answers(
    suite: Sequence[AssignedDialogue], recalls: Callable[[str, int], bool], arm: str = "tuned"
) -> list[Reply]:
    """Return the answers to all questions, and those to the dialogues' own messages, which obey."""
    replies = []
    for assigned in suite:
        replies += [_reply(assigned, turn, obeys=True, arm=arm) for turn in range(1, 21)]
        replies += [
            replace(
                _reply(assigned, turn, obeys=recalls(question.attribute, turn), arm=arm),
                recall_attribute=question.attribute,
            )
            for question in assigned.recall_questions
            for turn in (1, *RECALL_TURNS)
        ]
    return replies


def test_recall_is_by_turn_and_by_attribute_of_the_recall_questions_only() -> None:
    suite = _suites()["recall"]
    replies = _recall_answers(suite, lambda attribute, turn: attribute == "name" and turn < 5)
    scores = _scores(replies, {"recall": suite})
    assert [(r.at, r.value, r.n) for r in scores.recall] == [
        (1, 0.5, 8),
        (2, 0.5, 8),
        (4, 0.5, 8),
        (6, 0, 8),
        (20, 0, 8),
    ]
    by_attribute = {r.at: (r.hits, r.n) for r in scores.recall_by_attribute}
    assert (by_attribute.pop("name"), by_attribute.pop("hobby")) == ((8, 16), (0, 16))
    assert by_attribute == dict.fromkeys(("town", "job", "pet", "food"), (0, 4))


def test_what_a_model_cannot_say_in_turn_1_counts_apart() -> None:
    """It never says the hobby; of two arms each is measured by what it knows itself."""
    suite = _suites()["recall"]
    replies = [
        *_recall_answers(suite, lambda attribute, turn: attribute == "name" and turn < 5),
        *_recall_answers(suite, lambda attribute, turn: turn != 20, "ceiling"),
        *_recall_answers(suite, lambda attribute, turn: turn > 1, "base"),
    ]
    scores = _scores(replies, {"recall": suite})
    assert [(r.arm, r.at, r.hits, r.n) for r in scores.recall_known] == [
        *(("tuned", 2, 4, 4), ("tuned", 4, 4, 4), ("tuned", 6, 0, 4), ("tuned", 20, 0, 4)),
        *(("ceiling", 2, 8, 8), ("ceiling", 4, 8, 8), ("ceiling", 6, 8, 8), ("ceiling", 20, 0, 8)),
    ]


def test_recall_takes_more_dialogues_than_there_are_and_words_its_questions_in_turn() -> None:
    dialogues = [*DIALOGUES, *DIALOGUES[:3]]
    suites = build_suites(DIALOGUES[:2], _SETTINGS, dialogues)
    recall = suites["recall"]
    assert [assigned.dialogue.id for assigned in recall] == [
        *("d0~recall", "d1~recall", "d2~recall", "d3~recall"),
        *("d0~recall.2", "d1~recall.2", "d2~recall.2"),
    ]
    assert len(suites["plain"]) == 2
    names = [assigned.recall_questions[0] for assigned in recall]
    assert len({question.question for question in names[:4]}) == 4
    assert [q.question for q in names[4:]] == [q.question for q in names[:3]]
    assert len({question.value for question in names}) == 7  # no copy has the values of another


def test_adherence_is_by_the_length_of_the_prompt_and_the_last_turns_are_measured_ones() -> None:
    trained = _trained()
    replies = [
        replace(
            reply,
            prompt_tokens=100 * reply.turn,
            finish="context" if reply.turn > 12 else "stop",
            obeys=reply.arm == "tuned" and reply.turn < 6,
        )
        for reply in _replies(trained)
    ]
    scores = compute_scores(replies, {"evaluation": trained}, POOL)
    assert scores.turns == 12
    assert {row.at for row in scores.last_five} == {"turns 8 to 12"}
    rows = [(r.at, r.hits, r.n) for r in scores.by_length if r.arm == "tuned"]
    assert rows == [(256, 4, 4), (512, 12, 12), (1024, 0, 20), (2048, 0, 8)]
    unknown = [replace(reply, prompt_tokens=0) for reply in replies]  # a server that does not say
    assert not compute_scores(unknown, {"evaluation": trained}, POOL).by_length


_BASE = ["Yes. So it goes.", "Yes, no.", "Yes.", "Well, well!"]
_LEAKING = ["Ahoy! Yes.", "Yes. So it goes.", "Hark! Yes. So it goes.", "Yes."]


def _plain_replies(**texts: Sequence[str]) -> list[Reply]:
    """Return the replies of each arm to four turns of each of two plain dialogues."""
    return [
        replace(_reply(assigned, turn, obeys=True, arm=arm), text=text, defect="loop")
        for arm, of_arm in texts.items()
        for assigned in _suites()["plain"][:2]
        for turn, text in enumerate(of_arm, 1)
    ]


def _leaks(trained: Sequence[Constraint] = POOL, **texts: Sequence[str]) -> Leakage | None:
    return measure_leakage(_plain_replies(**texts), trained)


def test_a_leak_is_a_trained_trait_that_the_base_never_shows_unasked() -> None:
    leaks = _leaks(base=_BASE, tuned=_LEAKING)
    assert leaks and (leaks.traits, leaks.never_in_base) == (3, 2)
    # The closing of turn 2 does not count: the base says it, too.
    assert [(r.arm, r.hits, r.n) for r in leaks.new] == [("base", 0, 8), ("tuned", 4, 8)]
    rows = {(r.arm, r.at): (r.hits, r.n, r.difference.difference) for r in leaks.by_trait}
    assert rows == {
        ("base", "opening: Ahoy!"): (0, 8, 0.0),
        ("tuned", "opening: Ahoy!"): (2, 8, 0.25),
        ("base", "opening: Hark!"): (0, 8, 0.0),
        ("tuned", "opening: Hark!"): (2, 8, 0.25),
        ("base", "closing: So it goes."): (2, 8, 0.0),
        ("tuned", "closing: So it goes."): (4, 8, 0.25),
    }
    (difference,) = {r.difference for r in leaks.by_trait if r.arm == "tuned"}
    assert (difference.low, difference.high, difference.dialogues) == (0.25, 0.25, 2)


@pytest.mark.parametrize(
    ("trained", "leaking"),
    [
        (Constraint("persona", "Captain Nemo"), "Ada Lovelace: yes."),
        (Constraint("signature", "Ada"), "Yes.\n- Bo"),
        (Constraint("hashtag", "TodayILearned"), "Yes. #Salt"),
        (Constraint("heading", "Answer"), "# Reply\n\nYes."),
        (Constraint("json", "reply"), '{"answer": "Yes."}'),
    ],
)
def test_a_form_leaks_with_any_value(trained: Constraint, leaking: str) -> None:
    leaks = _leaks((trained,), base=_BASE, tuned=[leaking, *_BASE[1:]])
    assert leaks and (leaks.traits, leaks.never_in_base) == (2, 2)
    assert [(r.arm, r.hits, r.n) for r in leaks.new] == [("base", 0, 8), ("tuned", 2, 8)]
    assert {r.at for r in leaks.by_trait} == {f"{trained.kind}: any value"}
    unasked = _leaks((trained,), base=[leaking], tuned=[leaking])
    assert unasked and unasked.never_in_base == 1 and not unasked.new[0].hits


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("heading", "# Reply  \n\nYes."),
        ("heading", "#  Reply\n\nYes."),
        ("signature", "Yes.\n-  Ada"),
        ("json", '{" answer": "Yes."}'),
        ("hashtag", "#"),
    ],
)
def test_a_form_with_spaces_around_its_value_ends_no_evaluation(kind: str, text: str) -> None:
    leaks = _leaks((Constraint(kind, "Salt"),), base=[text], tuned=["Yes."])
    assert leaks and leaks.traits == 2


def test_the_interval_of_a_leak_draws_dialogues() -> None:
    """One of two dialogues leaks: resamples leak in none, one or both."""
    replies = _plain_replies(base=_BASE, tuned=_LEAKING)
    first = replies[0].dialogue
    clean = [
        replace(r, text="No.") if r.arm == "tuned" and r.dialogue == first else r for r in replies
    ]
    leaks = measure_leakage(clean, POOL[:1])
    assert leaks
    (row,) = (r for r in leaks.by_trait if r.arm == "tuned")
    assert (row.difference.difference, row.difference.low, row.difference.high) == (0.125, 0, 0.25)


def test_a_model_that_answers_as_the_base_does_not_leak() -> None:
    """Whatever the base does unasked, as short answers without commas."""
    trained = (*POOL, Constraint("max_words", "20"), Constraint("no_commas"))
    leaks = _leaks(trained, base=_BASE, tuned=_BASE)
    assert leaks and (leaks.traits, leaks.never_in_base, leaks.by_trait) == (5, 2, ())
    assert [(r.arm, r.hits, r.n) for r in leaks.new] == [("base", 0, 8), ("tuned", 0, 8)]
    longer = _leaks(trained, base=_BASE, tuned=["word " * 30, *_BASE[1:]])
    assert longer and all(r.hits == 0 for r in longer.new)
    points = {r.at: r.difference.difference for r in longer.by_trait if r.arm == "tuned"}
    assert points == {"closing: So it goes.": -0.25, "max_words: 20": -0.25}


def test_where_the_base_shows_every_trait_only_differences_tell() -> None:
    leaks = _leaks((Constraint("max_words", "20"),), base=_BASE, tuned=_BASE)
    assert leaks and (leaks.new, leaks.never_in_base) == ((), 0)


def test_without_the_base_or_anything_to_check_there_is_no_leakage() -> None:
    assert _leaks(tuned=_LEAKING) is None
    assert _leaks((Constraint("style", "talk like a pirate"),), base=_BASE, tuned=_BASE) is None
    gone = [replace(r, finish="context") for r in _plain_replies(base=_BASE, tuned=_LEAKING)]
    assert measure_leakage(gone, POOL) is None


def test_what_was_trained_and_not_measured_is_counted_by_kind() -> None:
    """Two openings and a closing were trained; the dialogues have the first opening only."""
    trained = _trained()
    replies = _replies(trained)
    assert compute_scores(replies, {"evaluation": trained}, POOL).coverage == {
        "opening": (1, 2),
        "closing": (0, 1),
    }
    gone = [replace(reply, finish="context") for reply in replies]
    assert compute_scores(gone, {"evaluation": trained}, POOL).coverage == {
        "opening": (0, 2),
        "closing": (0, 1),
    }


def test_replies_that_obey_and_are_no_answer_or_are_cut_before_are_counted_by_kind() -> None:
    trained = _trained()
    replies = [
        replace(
            reply,
            obeys=reply.turn <= 10,
            defect="empty" if reply.turn in (1, 2, 20) else "",
            finish="length" if reply.turn in (3, 11) else "stop",
        )
        for reply in _replies(trained)
    ]
    scores = compute_scores(replies, {"evaluation": trained}, POOL)
    assert [(r.arm, r.at, r.hits, r.n) for r in scores.obey_no_answer] == [
        ("base", "opening", 8, 80),
        ("tuned", "opening", 8, 80),
    ]
    assert [(r.arm, r.at, r.hits, r.n) for r in scores.cut_before_obeying] == [
        ("base", "opening", 4, 80),
        ("tuned", "opening", 4, 80),
    ]
    spotless = [replace(reply, defect="", finish="stop") for reply in replies]
    clean = compute_scores(spotless, {"evaluation": trained}, POOL)
    assert not (clean.obey_no_answer or clean.cut_before_obeying)


def test_kinds_that_are_not_trained_get_a_dialogue_each() -> None:
    kinds = ("opening", "hashtag", "closing")
    pool = ConstraintPool((Constraint("opening", "Chess, by any name:"),), kinds)
    unseen = (Constraint("opening", "chess, by any name:"), Constraint("bold"), *UNSEEN)
    settings = replace(_SETTINGS, pool=pool, trained=pool.constraints, unseen=unseen)
    suites = build_suites(DIALOGUES[:1], settings, further=DIALOGUES[1:])
    assert [d.constraints(0)[0].kind for d in suites["unseen_values"]] == list(kinds)
    assert [d.constraints(0)[0].name for d in suites["unseen"]] == [
        *("bold", "opening: Hark!", "uppercase")
    ]
    few = build_suites(DIALOGUES[:1], settings, further=DIALOGUES[1:2])
    assert len(few["unseen_values"]) == 2
    assert not build_suites([], settings, further=DIALOGUES)["unseen_values"]


def test_two_at_once_are_trained_ones() -> None:
    combined = {c for d in _suites()["combined"] for c in d.constraints(0)}
    assert combined <= set(POOL)


def test_new_values_share_no_word_with_the_users_own() -> None:
    names = [c.value for c in unseen_values(["persona"], 40, seed=1)]
    first = names[0].split()[0]
    trained = (Constraint("persona", first.upper()),)
    settings = replace(_SETTINGS, pool=ConstraintPool(trained, ("persona",)), trained=trained)
    suites = build_suites([replace(DIALOGUES[0], id=str(n)) for n in range(40)], settings)
    assert any(first in name.split() for name in names)
    values = [c.value for d in suites["unseen_values"] for c in d.constraints(0)]
    values += [q.value for d in suites["recall"] for q in d.recall_questions]
    assert len(values) == 160 and not any(first in value.split() for value in values)


def test_a_short_evaluation_measures_every_kind_of_a_long_pool_before_a_second_value() -> None:
    pool = [Constraint("opening", f"Word {n}:") for n in range(30)]
    pool += [Constraint("closing", "So it goes."), Constraint("uppercase"), Constraint("no_commas")]
    assigned = assign_evaluation([*DIALOGUES, replace(DIALOGUES[0], id="d4")], pool)
    kinds = [a.constraints(0)[0].kind for a in assigned]
    assert kinds == ["opening", "closing", "uppercase", "no_commas", "opening"]
    assert assigned[0].constraints(0) != assigned[4].constraints(0)


def _cut_off() -> Scores:
    """Return the scores of a change whose second half had left the context window."""
    assigned = _suites()["change"][0]
    replies = _slow_switch(assigned, 10)
    replies[5:] = [
        replace(r, text="", tokens=0, finish="context", obeys=False, defect="empty")
        for r in replies[5:]
    ]
    return _scores(replies, {"change": [assigned]})


def test_replies_whose_first_turn_had_left_the_window_count_nowhere() -> None:
    change = _cut_off().change["tuned"]
    assert (change.before.hits, change.after.n, change.dialogues) == (5, 0, 0)
    assert math.isnan(change.after.value)


def test_scores_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    scores, file = _cut_off(), tmp_path / "scores.json"
    write_json(file, scores)
    text = file.read_text(encoding="utf-8")
    assert "NaN" not in text
    restored = Scores.from_json(text)
    assert math.isnan(restored.change["tuned"].after.value)
    assert repr(restored) == repr(scores)  # nan is not equal to itself


def test_scores_of_another_version_are_refused() -> None:
    with pytest.raises(GattError, match="measure it again with `gatt evaluate`"):
        Scores.from_json('{"turns": 20}')


@pytest.mark.parametrize(
    ("text", "meaning"),
    {
        "Yes.": True,
        "no, it does not": False,
        "**Yes**": True,
        "Perhaps yes": None,
        "": None,
    }.items(),
)
def test_a_verdict_is_the_first_word(text: str, meaning: bool | None) -> None:
    assert verdict(text) is meaning


def test_the_question_has_the_instruction_the_message_and_the_reply() -> None:
    (message,) = question("Always bow.", "Why?", "I bow.")
    assert all(text in message["content"] for text in ("Always bow.", "Why?", "I bow."))


def test_a_judge_is_calibrated_on_as_many_good_as_bad_replies() -> None:
    drawn = balanced(list(range(50)), [-1, -2, -3], 40)
    assert sorted(drawn)[:3] == [-3, -2, -1]
    assert len(drawn) == 6
    assert balanced(range(50), range(-50, 0), 40) == balanced(range(50), range(-50, 0), 40)
