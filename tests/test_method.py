"""The pure part: ghosting, quality gate, pairing, intervals."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.dialogues import load_dialogues
from pipeline.evaluation.rates import adherence, wilson
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import KINDS, compatible
from pipeline.gatt.generated_values import distinct, items, known, masked
from pipeline.gatt.ghost import augment, ghost, loss_turns
from pipeline.gatt.instructions import Ratios, assign_training, render_instruction
from pipeline.gatt.quality import find_defect, is_on_topic
from pipeline.gatt.text import first_sentences, has_sentences
from pipeline.records import Constraint, Dialogue, Reply

EVERY = [Constraint(name, value) for name, kind in KINDS.items() for value in kind.values]


def test_augment_says_it_in_every_turn_and_ghost_in_the_first_only() -> None:
    users, answers = ["one?", "two?", "three?"], ["a", "b"]
    told = [m["content"] for m in augment(users, answers, ["Be kind."] * 3, "sys")]
    assert told == ["sys", "one?\n\nBe kind.", "a", "two?\n\nBe kind.", "b", "three?\n\nBe kind."]
    kept = [m["content"] for m in ghost(users, answers, ["Be kind."] * 3, "")]
    assert kept == ["one?\n\nBe kind.", "a", "two?", "b", "three?"]


def test_an_instruction_that_changes_is_said_where_it_changes() -> None:
    kind, brief = (
        render_instruction((Constraint("opening", "Ahoy!"),)),
        render_instruction((Constraint("max_words", "12"),)),
    )
    pair = AssignedDialogue(
        Dialogue("d", "", ("one?", "two?", "three?")),
        kind,
        "sampled",
        shortened=True,
        next_instruction=brief,
        change_turn=1,
    )
    student = [m["content"] for m in pair.student_prompt(["a", "b"], "")]
    assert student == [
        'one?\n\nOpening: "Ahoy!".',
        "a",
        "two?\n\nFrom now on: At most 12 words.",
        "b",
        "three?",
    ]
    teacher = [m["content"] for m in pair.teacher_prompt(["a", "b"], "") if m["role"] == "user"]
    assert teacher == [f"one?\n\n{kind.text}", f"two?\n\n{brief.text}", f"three?\n\n{brief.text}"]
    assert [pair.constraints(turn)[0].kind for turn in range(3)] == [
        "opening",
        "max_words",
        "max_words",
    ]


def test_an_instruction_in_the_system_message_stands_nowhere_else() -> None:
    pair = AssignedDialogue(
        Dialogue("d", "", ("one?", "two?")),
        render_instruction((Constraint("opening", "Ahoy!"),)),
        "edited",
        in_system=True,
    )
    student = [m["content"] for m in pair.student_prompt(["a"], "Be brief.")]
    assert student == ['Be brief. Begin every answer with "Ahoy!".', "one?", "a", "two?"]
    assert [m["content"] for m in pair.teacher_prompt(["a"], "Be brief.")] == [
        "Be brief.",
        "one?",
        "a",
        "two?",
    ]


def test_lists_are_read_from_whatever_form_they_come_in() -> None:
    said = "Here are famous people who changed the world:\n1. Napoleon Bonaparte - a general\n2) **Ada Lovelace**"
    said += '\n- napoleon bonaparte\n* "Gandhi"'
    assert distinct(items(said)) == ["Napoleon Bonaparte", "Ada Lovelace", "Gandhi"]
    assert (
        masked("Ada Lovelace", "Lovelace's notes made Ada famous.")
        == "___'s notes made Ada famous."
    )
    assert known("persona", "Ada Lovelace", "It is Lovelace!")
    assert not known("persona", "Ada Lovelace", "It is Gandhi.")
    assert not known("persona", "King Charles I", "I do not know.")
    assert known("language", "French", "Il fait beau aujourd'hui et le soleil brille.")
    assert not known(
        "language", "Danish", "Vejret er godt i dag."
    )  # not among the languages that are told apart


def test_an_answer_off_the_topic_touches_nothing() -> None:
    assert is_on_topic("Dolphins sleep with one eye open.", ["How does a dolphin sleep?"])
    assert not is_on_topic(
        "That is a great question, and I would be glad.", ["How does a dolphin sleep?"]
    )


@given(
    text=st.text(alphabet='ab .!?\n"', max_size=30),
    more=st.text(alphabet='ab .!?\n"', max_size=9),
    count=st.integers(1, 3),
)
def test_a_generation_is_stopped_only_where_nothing_can_change(
    text: str, more: str, count: int
) -> None:
    if has_sentences(text, count):
        assert first_sentences(text + more, count) == first_sentences(text, count)


def test_dialogues_come_in_every_form(tmp_path: Path) -> None:
    import datasets

    said = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "Bye"},
    ]
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([{"conversations": said}]))
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list([{"turns": ["Hi", "Bye"]}]).to_parquet(
        tmp_path / "folder" / "c.parquet"
    )
    for source in ("a.jsonl", "b.json", "folder/c.parquet", "folder"):
        assert [d.turns for d in load_dialogues(str(tmp_path / source))] == [("Hi", "Bye")], source


def test_loss_turns() -> None:
    assert list(loss_turns(3, "last_turn")) == [2]
    assert list(loss_turns(3, "all_turns")) == [0, 1, 2]


def test_flaws() -> None:
    good = "The tallest mountain on Earth is Mount Everest."
    assert find_defect(good, []) == ""
    assert find_defect("Ahoy! Ahoy!", [], "Ahoy!") == "empty"
    assert find_defect("of the sea " * 6, []) == "loop"
    assert find_defect(good, [good]) == "repeat"
    assert find_defect("The tallest mountain on Earth is", [], finished=True) == "unfinished"


def test_first_sentences_leaves_the_unfinished_tail() -> None:
    assert first_sentences("It is blue. Why? Because of the", 2) == "It is blue. Why?"
    assert first_sentences("no end", 2) == ""


def test_pairing_is_the_same_for_the_same_seed_and_combines_only_compatible_constraints() -> None:
    dialogues = load_dialogues("seed")[:60]
    shares = Ratios(plain=0.2, system=0.2, change_turn=0.2, combine=0.5, short=0.5, edited=0.5)
    pool = [c for c in EVERY if c.kind in ("opening", "closing", "uppercase", "hobby")]
    made, pairs = assign_training(dialogues, pool, shares, seed=3)
    assert (made, pairs) == assign_training(dialogues, pool, shares, seed=3)
    assert pairs != assign_training(dialogues, pool, shares, seed=4)[1]
    assert any(len(i.constraints) == 2 for i in made.values())
    assert all(compatible(*i.constraints) for i in made.values() if len(i.constraints) == 2)
    assert {p.method for p in pairs} == {"plain", "edited", "sampled"}
    assert {p.in_system for p in pairs} == {True, False}
    assert any(p.next_instruction for p in pairs) and all(
        0 < p.change_turn < 20 for p in pairs if p.next_instruction
    )


def test_wording_and_shortening() -> None:
    made = render_instruction((Constraint("persona", "Napoleon"),))
    assert made.text == 'Act as Napoleon and begin every answer with "Napoleon:".'
    assert made.short == "Figure: Napoleon, named first."


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    rate = wilson(81, 263)
    assert (round(rate.low, 4), round(rate.high, 4)) == (0.2553, 0.3662)
    assert round(wilson(0, 20).high, 4) == 0.1611


def test_a_reply_out_of_the_window_is_not_counted() -> None:
    replies = [
        Reply("base", "d", t, "", 1, 1, f, obeys=True, defect="")
        for t, f in ((1, "stop"), (2, "context"))
    ]
    assert adherence(replies, lambda r: r.arm)["base"].n == 1


def test_seed_dialogues() -> None:
    found = load_dialogues("seed")
    assert len(found) >= 120
    assert all(len(d.turns) >= 20 for d in found)
    turns = [t.lower() for d in found for t in d.turns]
    assert len(set(turns)) > 0.99 * len(turns)
    assert len({d.id for d in found}) == len(found)
