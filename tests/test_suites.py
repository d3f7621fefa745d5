"""The suites beside the trained instructions, and the figures that are made of their replies."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipeline.evaluation.judge_prompts import balanced, question, verdict
from pipeline.evaluation.scores import scores
from pipeline.evaluation.suites import PROBED_TURNS, probed_turns, suites
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import KINDS
from pipeline.recipe import Recipe
from pipeline.records import Constraint, Dialogue, Instruction, Reply

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


def _suites(dialogues: list[Dialogue] = DIALOGUES) -> dict[str, list[AssignedDialogue]]:
    made, found = suites(dialogues, POOL, UNSEEN, 10, 20)
    return {
        name: [
            AssignedDialogue(
                d,
                made.get(p.instruction or ""),
                p.method,
                next_instruction=made.get(p.next_instruction or ""),
                change_turn=p.change_turn,
            )
            for d, p in suite
        ]
        for name, suite in found.items()
    }


def test_every_dialogue_of_every_suite_has_a_name_of_its_own() -> None:
    found = _suites()
    names = [p.dialogue.id for suite in found.values() for p in suite]
    assert len(set(names)) == len(names)
    assert list(found) == ["unseen", "change", "plain", "recall", "single"]
    assert {len(p.dialogue.turns) for p in found["unseen"] + found["change"] + found["plain"]} == {
        10
    }
    assert {len(p.dialogue.turns) for p in found["recall"]} == {20}
    assert {len(p.dialogue.turns) for p in found["single"]} == {1}


def test_what_is_trained_is_not_unseen() -> None:
    asked = {c for p in _suites()["unseen"] for c in p.constraints(0)}
    assert asked == {Constraint("opening", "Well, well!"), Constraint("uppercase")}


def test_the_instruction_changes_half_way_to_another() -> None:
    for pair in _suites()["change"]:
        assert pair.change_turn == 5
        assert pair.constraints(4) != pair.constraints(5)
        assert pair.student_instructions[5].startswith("From now on: ")


def test_single_questions_cover_every_kind_that_a_program_can_check() -> None:
    six = [Dialogue(f"d{n}", "sea", ("What?",)) for n in range(Recipe().evaluate.suite_dialogues)]
    asked = {c.kind for p in _suites(six)["single"] for c in p.constraints(0)}
    assert asked == {name for name, kind in KINDS.items() if not kind.judged}


def test_attributes_are_asked_for_in_the_turns_of_the_paper() -> None:
    assert probed_turns(20) == list(PROBED_TURNS)
    assert probed_turns(5) == [2, 4, 5]
    pair = _suites()["recall"][0]
    assert pair.student_instructions[0] == "You are Napoleon and you love tennis."
    with_question = pair.with_question(4, pair.recall_questions[0].question)
    messages = with_question.student_prompt(["a", "b", "c"], "")
    assert messages[-1]["content"] == "What is your name?"
    assert messages[:-1] == pair.student_prompt(["a", "b", "c"], "")[:-1]


def test_no_dialogues_no_suites() -> None:
    _, found = suites([], POOL, UNSEEN, 10, 20)
    assert not any(found.values())


def _reply(
    arm: str,
    pair: AssignedDialogue,
    turn: int,
    obeys: bool,
    text: str = "Words.",
    probe: str = "",
    flaw: str = "",
) -> Reply:
    return Reply(arm, pair.dialogue.id, turn, text, 9, 9, "stop", obeys, flaw, probe)


def _main() -> list[AssignedDialogue]:
    told = Instruction("i", "Begin.", "B.", (POOL[0],))
    return [AssignedDialogue(d, told, "plain") for d in DIALOGUES]


def _replies(pairs: list[AssignedDialogue]) -> list[Reply]:
    return [
        _reply(arm, p, t, arm == "tuned")
        for arm in ("base", "tuned")
        for p in pairs
        for t in range(1, 21)
    ]


def test_the_figures_of_a_suite_are_kept_from_those_of_the_others() -> None:
    found = _suites()
    main = _main()
    replies = _replies(main)
    alone = scores(replies, {"evaluate": main}, POOL)
    replies += [_reply("tuned", p, t, False) for p in found["unseen"] for t in range(1, 11)]
    both = scores(replies, {"evaluate": main, **found}, POOL)
    assert all(both[key] == alone[key] for key in alone if key not in ("required_sample_size",)), (
        both
    )
    assert {(r["at"], r["hits"], r["n"]) for r in both["generalization"]} == {
        ("unseen value", 0, 20),
        ("unseen kind", 0, 20),
    }
    assert {r["at"]: r["group"] for r in both["by_unseen"]} == {
        "opening: Well, well!": "unseen value",
        "uppercase": "unseen kind",
    }


def test_adherence_by_family() -> None:
    told = [
        Instruction(c.kind, "Do.", "D.", (c,))
        for c in (POOL[0], POOL[2], Constraint("persona", "Nemo"))
    ]
    pairs = [AssignedDialogue(d, i, "plain") for d, i in zip(DIALOGUES, told, strict=False)]
    replies = [
        _reply(arm, p, t, p is pairs[2])
        for arm in ("base", "tuned")
        for p in pairs
        for t in range(1, 21)
    ]
    found = scores(replies, {"evaluate": pairs}, POOL)["by_family"]
    assert [(r["at"], r["hits"], r["n"]) for r in found if r["arm"] == "tuned"] == [
        ("phrase", 0, 40),
        ("persona", 20, 20),
    ]


def test_raw_adherence_counts_what_is_no_answer() -> None:
    main = _main()
    replies = [replace(r, obeys=True, defect="loop" if r.turn > 10 else "") for r in _replies(main)]
    found = scores(replies, {"evaluate": main}, POOL)
    assert [row["value"] for row in found["last_five"]] == [0, 0]
    assert [row["value"] for row in found["last_five_unfiltered"]] == [1, 1]


def test_a_change_is_followed_turn_by_turn() -> None:
    pairs = _suites()["change"][:2]
    texts = {
        "opening: Ahoy!": "Ahoy! Yes.",
        "opening: Hark!": "Hark! Yes.",
        "closing: So it goes.": "Yes. So it goes.",
    }
    slow = {
        pairs[0].dialogue.id: 5,
        pairs[1].dialogue.id: 8,
    }  # the last turn in which the old instruction is kept
    replies = []
    for pair in pairs:
        for turn in range(1, 11):
            kept = pair.constraints(0 if turn <= slow[pair.dialogue.id] else 9)[0]
            obeys = kept == pair.constraints(turn - 1)[0]
            replies.append(_reply("tuned", pair, turn, obeys, texts[kept.name]))
    main = _main()
    found = scores([*_replies(main), *replies], {"evaluate": main, "change": pairs}, POOL)[
        "change"
    ]["tuned"]
    assert (found["at"], found["dialogues"], found["never"]) == (6, 2, 0)
    assert (found["before"]["hits"], found["before"]["n"]) == (10, 10)
    assert (found["after"]["hits"], found["old_after"]["hits"], found["after"]["n"]) == (7, 3, 10)
    assert found["turns_to_switch"] == 1.5  # at once, and after three turns
    assert [row["old"] for row in found["by_turn"]] == [1] * 5 + [0.5] * 3 + [0] * 2


def test_a_dialogue_that_never_switches_is_counted() -> None:
    pair = _suites()["change"][0]
    main = _main()
    replies = [
        *_replies(main),
        *(_reply("tuned", pair, t, t <= 5, "Ahoy! Yes.") for t in range(1, 11)),
    ]
    found = scores(replies, {"evaluate": main, "change": [pair]}, POOL)["change"]["tuned"]
    assert (found["never"], found["turns_to_switch"]) == (1, None)


def test_recall_is_by_turn_and_by_attribute_of_the_probes_alone() -> None:
    pairs = _suites()["recall"]
    main = _main()
    replies = _replies(main)
    for pair in pairs:
        replies += [_reply("tuned", pair, t, True) for t in range(1, 21)]
        for ask in pair.recall_questions:
            known = ask.attribute == "name"
            replies += [
                _reply("tuned", pair, t, known and t < 5, probe=ask.attribute) for t in PROBED_TURNS
            ]
    found = scores(replies, {"evaluate": main, "recall": pairs}, POOL)
    assert [(r["at"], r["value"], r["n"]) for r in found["recall"]] == [
        (2, 0.5, 8),
        (4, 0.5, 8),
        (6, 0, 8),
        (20, 0, 8),
    ]
    assert [(r["at"], r["hits"]) for r in found["recall_by_attribute"]] == [
        ("name", 8),
        ("hobby", 0),
    ]


def test_a_leak_is_any_trained_trait_where_none_was_asked_for() -> None:
    pairs = _suites()["plain"][:1]
    main = _main()
    said = ["Ahoy! Yes.", "Yes. So it goes.", "Hark! Yes. So it goes.", "Yes.", "WELL, WELL!"]
    replies = [
        *_replies(main),
        *(_reply("tuned", pairs[0], n + 1, True, text) for n, text in enumerate(said)),
    ]
    found = scores(replies, {"evaluate": main, "plain": pairs}, POOL)
    assert [(r["hits"], r["n"]) for r in found["leakage"]] == [(3, 5)]
    assert found["leaked"]["tuned"] == {
        "opening: Ahoy!": 1,
        "closing: So it goes.": 2,
        "opening: Hark!": 1,
    }


def test_replies_whose_first_turn_had_left_the_window_count_nowhere() -> None:
    pair = _suites()["change"][0]
    main = _main()
    gone = [
        Reply("tuned", pair.dialogue.id, t, "", 9, 0, "context", False, "empty")
        for t in range(6, 11)
    ]
    replies = [
        *_replies(main),
        *(_reply("tuned", pair, t, True, "Ahoy! Yes.") for t in range(1, 6)),
        *gone,
    ]
    found = scores(replies, {"evaluate": main, "change": [pair]}, POOL)["change"]["tuned"]
    assert (found["before"]["hits"], found["after"]["n"], found["dialogues"]) == (5, 0, 0)
    assert math.isnan(found["after"]["value"])


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Yes.", True),
        ("no, it does not", False),
        ("**Yes**", True),
        ("Perhaps yes", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_first_word(said: str, meant: bool | None) -> None:
    assert verdict(said) is meant


def test_a_judge_is_asked_about_one_reply_and_tried_on_as_many_good_as_bad_ones() -> None:
    (message,) = question("Always bow.", "Why?", "I bow.")
    assert all(text in message["content"] for text in ("Always bow.", "Why?", "I bow."))
    tried = balanced(list(range(50)), [-1, -2, -3], 40)
    assert sorted(tried)[:3] == [-3, -2, -1]
    assert len(tried) == 6
    assert balanced(range(50), range(-50, 0), 40) == balanced(range(50), range(-50, 0), 40)
