"""The kinds of instruction: every check, edit and early stop, alone and in pairs."""

from __future__ import annotations

import itertools
import random
import string
import subprocess
import sys

import pytest
from conftest import Gatt
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import GattError
from pipeline.gatt.constraints.registry import (
    EDIT_ORDER,
    INCOMPATIBLE_SLOTS,
    KINDS,
    compatible,
    edit,
    editable,
    kind_of,
    obeys,
    prefix_fails,
)
from pipeline.gatt.instructions import render_instruction
from pipeline.gatt.text import words
from pipeline.records import Constraint

EVERY = [Constraint(name, value) for name, kind in KINDS.items() for value in kind.values]
EDITABLE = [c for c in EVERY if editable((c,))]
PAIRS = [p for p in itertools.combinations(EDITABLE, 2) if compatible(*p)]

# Kind, value, an answer that obeys, and one that nearly does.
EXAMPLES = [
    ("opening", "Ahoy!", "Ahoy! It is blue.", "It is blue. Ahoy!"),
    ("closing", "Over and out.", "It is blue. Over and out.", "Over and out. It is blue."),
    ("persona", "Napoleon", "Napoleon: March on.", "I am Napoleon."),
    ("signature", "Ada", "It is blue.\n- Ada", "It is blue. - Ada"),
    ("signature", "Ada", "It is blue.\n\n- Ada\n", "- Ada"),
    ("hashtag", "goodtoknow", "It is blue. #goodtoknow", "#goodtoknow It is blue."),
    ("postscript", "", "It is blue.\n\nP.S. So is the sea.", "It is blue. P.S."),
    ("postscript", "", "It is blue. P.S. So is the sea.", "P.S. So is the sea."),
    ("postscript", "", "It is blue.\nP. S.: Yes!", "It is.\nP.S. Yes.\nAnd so on."),
    ("question", "", "Is it?", "It is."),
    ("question", "", 'It is. "Or is it?"', "?"),
    ("question", "", "Is it? 🙂", "Is it? Yes"),
    ("initial", "S", "so it is.", "It is so."),
    ("initial", "T", '"That is it."', "12 times."),
    ("address", "my friend", "My friend, it is blue.", "It is blue, my friendly one."),
    ("hobby", "tennis", "Like Tennis, it takes time.", "It takes time."),
    ("hobby", "chess", "Think of chess-players.", "The chessboard is blue."),
    ("keyword", "river", "The River is wide.", "The riverbank is wide."),
    ("forbidden", "very", "It is everything.", "Very well."),
    ("forbidden", "but", "Butter is good.", "Good, but dear"),
    ("no_letter", "z", "It is blue.", "Zebras are not."),
    ("style", "talk like a pirate", "Aye, it be blue.", " \n"),
    ("number", "", "It has 4 legs.", "It has four legs."),
    ("no_digits", "", "It has four legs.", "It is 4 m² large."),
    ("no_digits", "", "Half of it.", "It is 5 m."),
    (
        "language",
        "French",
        "Le ciel est bleu parce que la lumière se disperse.",
        "The sky is blue because light is scattered.",
    ),
    (
        "language",
        "Spanish",
        "El cielo es azul por la luz del sol.",
        "Le ciel est bleu à cause de la lumière.",
    ),
    ("language", "German", "DER HIMMEL IST HEUTE SEHR BLAU.", "The heavens are very blue today."),
    ("language", "English", "The sky is blue today.", "Ja."),
    ("uppercase", "", "YES, IT IS 1ª.", "Yes, it is."),
    ("uppercase", "", "ÇA VA.", "1, 2, 3."),
    ("lowercase", "", "yes, it is.", "Yes, it is."),
    ("lowercase", "", "ça va.", "1, 2, 3."),
    ("title_case", "", "It Is The 3rd Well-known Écluse.", "It Is the Third."),
    ("title_case", "", '"Don\'t," She Said.', "1, 2, 3."),
    ("no_commas", "", "Yes it is.", "Yes, it is."),
    ("no_commas", "", "It is 1.5 m.", "是、也是。"),
    ("no_exclamation", "", "Yes.", "Yes!"),
    ("no_questions", "", "Yes.", "Is it?"),
    ("exclamations", "", "Yes! It is 3.5 m! Dr. No says so!", "Yes! It is."),
    ("exclamations", "", '"Yes!" 🎉', "Yes! It is"),
    ("emoji", "", "It is ❤️.", "It is :-)"),
    ("emoji", "", "It is 👍🏽.", "It is ♪ © ✓ →."),
    ("no_emoji", "", "It is ♪ © ✓ → 1.", "It is 1️⃣."),
    ("bold", "", "It is **very blue**.", "It is ** blue **."),
    ("bold", "", "**Yes.**", "It is *blue* ****."),
    ("max_words", "3", "Yes, it is.", "Yes, it is so."),
    ("max_words", "1", "İstanbul.", "Yes, Istanbul."),
    ("min_words", "4", "Yes, it is so.", "Yes, it's so."),
    ("one_sentence", "", "It is, e.g. by Dr. No, 3.5 m.", "It is. It was."),
    ("one_sentence", "", "It is so", "Title\nIt is."),
    ("max_sentences", "2", "Yes. It is.", "Yes. It is. So."),
    ("sentences", "2", 'He said "Go." I went', "Yes. It is. So."),
    ("sentences", "2", "Yes! ... It is?!", "It is."),
    ("lines", "2", "Yes.\n\nIt is.", "Yes."),
    ("paragraphs", "2", "Yes.\nIt is.\n \nSo.", "Yes.\nIt is."),
    ("one_paragraph", "", "Yes. It is.\n", "Yes.\nIt is."),
    ("numbered_list", "", "1. Yes.\n\n2) It is.\n", "Points:\n1. Yes."),
    ("numbered_list", "", "1. Yes.", "1. Yes.\n3. It is."),
    ("bullet_list", "", "* Yes.\n* It is.", "- Yes.\nIt is."),
    ("block_quote", "", "> Yes.\n>\n> It is.", "> Yes.\nIt is."),
    ("heading", "Answer", "# Answer\n\nIt is.", "# Answers\n\nIt is."),
    ("heading", "Answer", "\n# Answer  \nIt is.", "# Answer"),
    ("quotes", "", '"Yes."', '"Yes." he said'),
    ("quotes", "", "“Yes.”", '"Yes." he said. "It is."'),
    ("brackets", "parentheses", "(Yes (it is).)", "(Yes) (it is)"),
    ("brackets", "square brackets", "[Yes.]", "(Yes.)"),
    ("brackets", "curly braces", "{Yes.}", "{}"),
    ("code_block", "", "```text\nYes.\n```", "```\nYes.\n```\nIt is."),
    ("json", "answer", ' {"answer": "Yes."}\n', '{"answer": "Yes.", "more": 1}'),
    ("json", "answer", '{"answer": "\\u00e9"}', '{"answer": ["Yes."]}'),
    ("json", "reply", '{"reply": "Yes."}', '{"answer": "Yes."}'),
]

# A beginning after which nothing helps, for each kind that can tell.
LOST = [
    ("opening", "Ahoy!", "Ahoi"),
    ("persona", "Napoleon", "Napoleon,"),
    ("initial", "S", '"The'),
    ("heading", "Answer", "# An "),
    ("forbidden", "very", "It is very,"),
    ("no_letter", "z", "It is a z"),
    ("no_digits", "", "It is 4"),
    ("uppercase", "", "Y e"),
    ("lowercase", "", "Y"),
    ("title_case", "", "It i"),
    ("no_commas", "", "Yes,"),
    ("no_exclamation", "", "Yes!"),
    ("no_questions", "", "Is it?"),
    ("exclamations", "", "It is. S"),
    ("no_emoji", "", "🙂"),
    ("max_words", "2", "Yes it is"),
    ("one_sentence", "", "It is. S"),
    ("max_sentences", "2", "It is. It was. S"),
    ("sentences", "2", "It is. It was. S"),
    ("lines", "2", "It\nis\nso"),
    ("paragraphs", "2", "It\n\nis\n\nso"),
    ("one_paragraph", "", "It\ni"),
    ("numbered_list", "", "1. It is.\nS"),
    ("bullet_list", "", "I"),
    ("block_quote", "", "> It\nis"),
    ("quotes", "", '"It" is'),
    ("brackets", "parentheses", "(It) i"),
    ("code_block", "", "`It"),
    ("json", "answer", "{a"),
]

SIGNS = " \n,.!?;:'\"-*#>`()[]{}“”’…1230🙂👍️éßñÉΣσЖ_/\\"
TEXT = st.text(alphabet=string.ascii_letters + SIGNS, max_size=40)
START = st.sampled_from(
    [
        "It",
        "So",
        '"It',
        "(It",
        "- It",
        "1. It",
        "# It",
        "**It**",
        "...it",
        "  It",
        "Dr. It",
        "é",
        "ΑΣ",
    ]
)
PIECE = (
    st.sampled_from(
        ["it", "is", "etc.", "Dr.", "e.g.", "3.", "**now**", "well-known", "(so)", "🙂"]
    )
    | TEXT
)
GAPS = st.lists(
    st.sampled_from([" ", " ", ". ", "! ", "? ", ", ", "\n", "\n\n"]), min_size=1, max_size=4
)


def _join(start: str, pieces: list[str], gaps: list[str]) -> str:
    return start + "".join(
        gap + piece for gap, piece in zip(itertools.cycle(gaps), pieces, strict=False)
    )


# What `edit` is given: a few words, the first of which is a word and no number.
ANSWER = st.builds(_join, START, st.lists(PIECE, min_size=2, max_size=9), GAPS).filter(
    lambda text: len(words(text)) >= 3
)


def test_every_kind_is_complete() -> None:
    assert len(KINDS) >= 28
    for name, kind in KINDS.items():
        assert len(set(kind.wordings)) >= (2 if name == "persona" else 3), name
        takes_value = kind.values != ("",)
        assert all(("{v}" in text) == takes_value for text in (*kind.wordings, kind.short)), name
        assert len(kind.short) < max(map(len, kind.wordings)), name
        assert kind.apply is None or kind.slot in (*EDIT_ORDER, "json"), name
    slots = {kind.slot for kind in KINDS.values()}
    assert set(INCOMPATIBLE_SLOTS) | set(itertools.chain(*INCOMPATIBLE_SLOTS.values())) <= slots


def test_every_kind_has_examples() -> None:
    assert {name for name, *_ in EXAMPLES} == set(KINDS)
    assert {name for name, *_ in LOST} == {
        name for name, kind in KINDS.items() if kind.prefix_fails.__name__ != "never"
    }


@pytest.mark.parametrize(("name", "value", "good", "bad"), EXAMPLES)
def test_checks(name: str, value: str, good: str, bad: str) -> None:
    asked = (Constraint(name, value),)
    assert obeys(asked, good)
    assert not obeys(asked, bad)
    assert not any(prefix_fails(asked, good[:cut]) for cut in range(len(good) + 1))


@pytest.mark.parametrize(("name", "value", "lost"), LOST)
def test_a_lost_beginning_is_noticed(name: str, value: str, lost: str) -> None:
    asked = (Constraint(name, value),)
    assert prefix_fails(asked, lost)
    assert not prefix_fails(asked, "")


@pytest.mark.parametrize("constraint", EVERY, ids=lambda c: c.name)
def test_an_empty_answer_obeys_nothing(constraint: Constraint) -> None:
    assert not obeys((constraint,), "")
    assert not obeys((constraint,), " \n")


@settings(deadline=None, max_examples=100)
@given(text=ANSWER)
def test_an_edited_answer_obeys_and_no_beginning_of_it_is_hopeless(text: str) -> None:
    for constraint in EDITABLE:
        edited = edit((constraint,), text)
        assert obeys((constraint,), edited), (constraint, edited)
        for cut in range(len(edited) + 1):
            assert not prefix_fails((constraint,), edited[:cut]), (constraint, edited[:cut])


@settings(deadline=None, max_examples=200)
@given(text=ANSWER)
def test_two_edits_leave_both_obeyed(text: str) -> None:
    for one, other in PAIRS:
        for pair in ((one, other), (other, one)):
            edited = edit(pair, text)
            assert obeys(pair, edited), (pair, edited)


@settings(deadline=None, max_examples=300)
@given(start=ANSWER | TEXT, end=ANSWER | TEXT)
def test_a_hopeless_beginning_cannot_be_saved(start: str, end: str) -> None:
    for constraint in EVERY:
        if prefix_fails((constraint,), start):
            assert not obeys((constraint,), start + end), constraint


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=())))
def test_no_check_raises(text: str) -> None:
    for constraint in EVERY:
        obeys((constraint,), text)
        prefix_fails((constraint,), text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000,
        "{" * 10_000,
        '{"answer": ' * 5_000,
        '{"answer": 1' + "0" * 5_000,
        "." * 10_000,
        "\ud800",
    ],
)
def test_no_check_raises_on_the_extreme(text: str) -> None:
    for constraint in EVERY:
        obeys((constraint,), text)
        prefix_fails((constraint,), text)


@pytest.mark.slow
def test_no_check_raises_on_a_hundred_thousand_texts() -> None:
    """Of up to 24 signs out of all that Unicode has, half of them from the start, where most of the checks look."""
    rng = random.Random(20)
    for _ in range(100_000):
        text = "".join(
            chr(rng.randrange(rng.choice((128, 0x2100, sys.maxunicode + 1))))
            for _ in range(rng.randrange(25))
        )
        for constraint in EVERY:
            obeys((constraint,), text)
            prefix_fails((constraint,), text)


def test_compatible_is_symmetrical() -> None:
    for one, other in itertools.product(EVERY, EVERY):
        assert compatible(one, other) == compatible(other, one)


@pytest.mark.parametrize(
    "pair",
    [
        "max_words=12 + numbered_list",
        "json=answer + opening=Ahoy!",
        "quotes + closing=So it goes.",
        "uppercase + opening=Ahoy!",
        "no_commas + opening=Well, well!",
        "emoji + no_emoji",
        "no_digits + numbered_list",
        "forbidden=chess + hobby=chess",
        "language=French + keyword=river",
        "no_questions + question",
        "no_exclamation + exclamations",
        "opening=A + persona=B",
        "no_letter=s + initial=S",
        "title_case + address=my friend",
        "max_words=12 + min_words=20",
        "code_block + bold",
    ],
)
def test_what_cannot_be_shown_together_is_kept_apart(pair: str) -> None:
    assert not compatible(*_parse(pair))


@pytest.mark.parametrize(
    "pair",
    [
        "uppercase + opening=AHOY!",
        "no_commas + opening=Ahoy!",
        "language=French + persona=Napoleon",
        "emoji + quotes",
        "opening=Ahoy! + closing=So it goes.",
        "forbidden=very + hobby=chess",
        "json=answer + hobby=chess",
    ],
)
def test_what_can_be_shown_together_may_meet(pair: str) -> None:
    assert compatible(*_parse(pair))


def _parse(pair: str) -> list[Constraint]:
    return [Constraint(*part.split("=")) for part in pair.split(" + ")]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("max_words", "few", "whole number"),
        ("max_words", "0", "whole number"),
        ("lines", "３", "whole number"),
        ("min_words", "9" * 5000, "whole number"),
        ("opening", "", "needs a value"),
        ("keyword", " ", "needs a value"),
        ("uppercase", "yes", "takes no value"),
        ("language", "Klingon", "one of French"),
        ("brackets", "()", "one of parentheses"),
        ("haiku", "", "Unknown kind"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str, says: str) -> None:
    with pytest.raises(GattError, match=says):
        kind_of(Constraint(name, value))


def test_only_constraints_that_are_edits_are_edited() -> None:
    with pytest.raises(ValueError, match="hobby"):
        edit((Constraint("hobby", "chess"),), "It is so.")


def test_the_library_of_languages_is_loaded_only_when_it_is_asked() -> None:
    code = "import sys, pipeline.gatt.kinds; sys.exit('py3langid' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_kinds_are_listed(gatt: Gatt) -> None:
    listed = gatt("instructions", "--kinds")
    assert (listed.returncode, listed.stderr) == (0, "")
    header, *rows = listed.stdout.splitlines()
    assert header.split() == ["kind", "family", "way", "example"]
    assert [row.split()[0] for row in rows] == list(KINDS)
    for row, (name, kind) in zip(rows, KINDS.items(), strict=True):
        example = Constraint(name, kind.values[0])
        assert row.endswith(render_instruction((example,)).text)
        assert row.split()[1:3] == [kind.family, "edited" if editable((example,)) else "sampled"]
