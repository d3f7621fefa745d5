"""The kinds of constraint: every check, edit and prefix test, alone and in pairs."""

from __future__ import annotations

import itertools
import random
import string
import subprocess
import sys
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.cli import call_gatt

from pipeline.errors import GattError
from pipeline.gatt.constraints.base import never
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

EVERY_CONSTRAINT = [
    Constraint(name, value) for name, kind in KINDS.items() for value in kind.values
]
EDITABLE = [c for c in EVERY_CONSTRAINT if editable((c,))]
PAIRS = [p for p in itertools.combinations(EDITABLE, 2) if compatible(*p)]


class Example(NamedTuple):
    """An answer that meets a constraint, and one that nearly does."""

    kind: str
    value: str
    good: str
    bad: str


class FailedPrefix(NamedTuple):
    """The beginning of an answer that no continuation can make pass."""

    kind: str
    value: str
    prefix: str


EXAMPLES = [
    Example("opening", "Ahoy!", "Ahoy! It is blue.", "It is blue. Ahoy!"),
    Example("closing", "Over and out.", "It is blue. Over and out.", "Over and out. It is blue."),
    Example("persona", "Napoleon", "Napoleon: March on.", "I am Napoleon."),
    Example("signature", "Ada", "It is blue.\n- Ada", "It is blue. - Ada"),
    Example("signature", "Ada", "It is blue.\n\n- Ada\n", "- Ada"),
    Example("hashtag", "goodtoknow", "It is blue. #goodtoknow", "#goodtoknow It is blue."),
    Example("postscript", "", "It is blue.\n\nP.S. So is the sea.", "It is blue. P.S."),
    Example("postscript", "", "It is blue. P.S. So is the sea.", "P.S. So is the sea."),
    Example("postscript", "", "It is blue.\nP. S.: Yes!", "It is.\nP.S. Yes.\nAnd so on."),
    Example("question", "", "Is it?", "It is."),
    Example("question", "", 'It is. "Or is it?"', "?"),
    Example("question", "", "Is it? 🙂", "Is it? Yes"),
    Example("question", "", "海为什么是咸的？", "是的。"),
    Example("forbidden", "海", "Blue.", "我爱大海。"),
    Example("exclamations", "", "是的！", "是的。"),
    Example("signature", "Mum's cat", "It is.\n**- Mum’s cat**", "It is.\n- Mum’s cats"),
    Example("bullet_list", "", "+ Yes.\n+ No.", "+Yes."),
    Example("one_sentence", "", "John F. Kennedy won.", "He won. So it is."),
    Example("initial", "S", "so it is.", "It is so."),
    Example("initial", "T", '"That is it."', "12 times."),
    Example("address", "my friend", "My friend, it is blue.", "It is blue, my friendly one."),
    Example("hobby", "tennis", "Like Tennis, it takes time.", "It takes time."),
    Example("hobby", "chess", "Think of chess-players.", "The chessboard is blue."),
    Example("keyword", "river", "The River is wide.", "The riverbank is wide."),
    Example("forbidden", "very", "It is everything.", "Very well."),
    Example("forbidden", "but", "Butter is good.", "Good, but dear"),
    Example("no_letter", "z", "It is blue.", "Zebras are not."),
    Example("style", "talk like a pirate", "Aye, it be blue.", " \n"),
    Example("number", "", "It has 4 legs.", "It has four legs."),
    Example("no_digits", "", "It has four legs.", "It is 4 m² large."),
    Example("no_digits", "", "Half of it.", "It is 5 m."),
    Example(
        "language",
        "French",
        "Le ciel est bleu parce que la lumière se disperse.",
        "The sky is blue because light is scattered.",
    ),
    Example(
        "language",
        "Spanish",
        "El cielo es azul por la luz del sol.",
        "Le ciel est bleu à cause de la lumière.",
    ),
    Example(
        "language", "German", "DER HIMMEL IST HEUTE SEHR BLAU.", "The heavens are very blue today."
    ),
    Example("language", "English", "The sky is blue today.", "Ja."),
    Example("uppercase", "", "YES, IT IS 1ª.", "Yes, it is."),
    Example("uppercase", "", "ÇA VA.", "1, 2, 3."),
    Example("lowercase", "", "yes, it is.", "Yes, it is."),
    Example("lowercase", "", "ça va.", "1, 2, 3."),
    Example("title_case", "", "It Is The 3rd Well-known Écluse.", "It Is the Third."),
    Example("title_case", "", '"Don\'t," She Said.', "1, 2, 3."),
    Example("no_commas", "", "Yes it is.", "Yes, it is."),
    Example("no_commas", "", "It is 1.5 m.", "是、也是。"),
    Example("no_exclamation", "", "Yes.", "Yes!"),
    Example("no_questions", "", "Yes.", "Is it?"),
    Example("exclamations", "", "Yes! It is 3.5 m! Dr. No says so!", "Yes! It is."),
    Example("exclamations", "", '"Yes!" 🎉', "Yes! It is"),
    Example("emoji", "", "It is ❤️.", "It is :-)"),
    Example("emoji", "", "It is 👍🏽.", "It is ♪ © ✓ →."),
    Example("no_emoji", "", "It is ♪ © ✓ → 1.", "It is 1️⃣."),
    Example("bold", "", "It is **very blue**.", "It is ** blue **."),
    Example("bold", "", "**Yes.**", "It is *blue* ****."),
    Example("max_words", "3", "Yes, it is.", "Yes, it is so."),
    Example("max_words", "1", "İstanbul.", "Yes, Istanbul."),
    Example("min_words", "4", "Yes, it is so.", "Yes, it's so."),
    Example("one_sentence", "", "It is, e.g. by Dr. No, 3.5 m.", "It is. It was."),
    Example("one_sentence", "", "It is so", "Title\nIt is."),
    Example("max_sentences", "2", "Yes. It is.", "Yes. It is. So."),
    Example("sentences", "2", 'He said "Go." I went', "Yes. It is. So."),
    Example("sentences", "2", "Yes! ... It is?!", "It is."),
    Example("lines", "2", "Yes.\n\nIt is.", "Yes."),
    Example("paragraphs", "2", "Yes.\nIt is.\n \nSo.", "Yes.\nIt is."),
    Example("one_paragraph", "", "Yes. It is.\n", "Yes.\nIt is."),
    Example("numbered_list", "", "1. Yes.\n\n2) It is.\n", "Points:\n1. Yes."),
    Example("numbered_list", "", "1. Yes.", "1. Yes.\n3. It is."),
    Example("bullet_list", "", "* Yes.\n* It is.", "- Yes.\nIt is."),
    Example("block_quote", "", "> Yes.\n>\n> It is.", "> Yes.\nIt is."),
    Example("heading", "Answer", "# Answer\n\nIt is.", "# Answers\n\nIt is."),
    Example("heading", "Answer", "\n# Answer  \nIt is.", "# Answer"),
    Example("quotes", "", '"Yes."', '"Yes." he said'),
    Example("quotes", "", "“Yes.”", '"Yes." he said. "It is."'),
    Example("brackets", "parentheses", "(Yes (it is).)", "(Yes) (it is)"),
    Example("brackets", "square brackets", "[Yes.]", "(Yes.)"),
    Example("brackets", "curly braces", "{Yes.}", "{}"),
    Example("code_block", "", "```text\nYes.\n```", "```\nYes.\n```\nIt is."),
    Example("json", "answer", ' {"answer": "Yes."}\n', '{"answer": "Yes.", "more": 1}'),
    Example("json", "answer", '{"answer": "\\u00e9"}', '{"answer": ["Yes."]}'),
    Example("json", "reply", '{"reply": "Yes."}', '{"answer": "Yes."}'),
]

FAILED_PREFIXES = [
    FailedPrefix("opening", "Ahoy!", "Ahoi"),
    FailedPrefix("persona", "Napoleon", "Napoleon,"),
    FailedPrefix("initial", "S", '"The'),
    FailedPrefix("heading", "Answer", "# An "),
    FailedPrefix("forbidden", "very", "It is very,"),
    FailedPrefix("no_letter", "z", "It is a z"),
    FailedPrefix("no_digits", "", "It is 4"),
    FailedPrefix("uppercase", "", "Y e"),
    FailedPrefix("lowercase", "", "Y"),
    FailedPrefix("title_case", "", "It i"),
    FailedPrefix("no_commas", "", "Yes,"),
    FailedPrefix("no_exclamation", "", "Yes!"),
    FailedPrefix("no_questions", "", "Is it?"),
    FailedPrefix("exclamations", "", "It is. S"),
    FailedPrefix("no_emoji", "", "🙂"),
    FailedPrefix("max_words", "2", "Yes it is"),
    FailedPrefix("one_sentence", "", "It is. S"),
    FailedPrefix("max_sentences", "2", "It is. It was. S"),
    FailedPrefix("sentences", "2", "It is. It was. S"),
    FailedPrefix("lines", "2", "It\nis\nso"),
    FailedPrefix("paragraphs", "2", "It\n\nis\n\nso"),
    FailedPrefix("one_paragraph", "", "It\ni"),
    FailedPrefix("numbered_list", "", "1. It is.\nS"),
    FailedPrefix("bullet_list", "", "I"),
    FailedPrefix("block_quote", "", "> It\nis"),
    FailedPrefix("quotes", "", '"It" is'),
    FailedPrefix("brackets", "parentheses", "(It) i"),
    FailedPrefix("code_block", "", "`It"),
    FailedPrefix("json", "answer", "{a"),
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


# Texts that `edit` accepts: a few words, the first of which is not a number.
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
        assert kind.edit is None or kind.slot in (*EDIT_ORDER, "json"), name
    slots = {kind.slot for kind in KINDS.values()}
    assert set(INCOMPATIBLE_SLOTS) | set(itertools.chain(*INCOMPATIBLE_SLOTS.values())) <= slots


def test_every_kind_has_examples() -> None:
    assert {example.kind for example in EXAMPLES} == set(KINDS)
    with_prefix_test = {name for name, kind in KINDS.items() if kind.prefix_fails is not never}
    assert {failed.kind for failed in FAILED_PREFIXES} == with_prefix_test


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e.kind}={e.value}")
def test_checks(example: Example) -> None:
    constraints = (Constraint(example.kind, example.value),)
    assert obeys(constraints, example.good)
    assert not obeys(constraints, example.bad)
    prefixes = [example.good[:end] for end in range(len(example.good) + 1)]
    assert not any(prefix_fails(constraints, prefix) for prefix in prefixes)


@pytest.mark.parametrize("failed", FAILED_PREFIXES, ids=lambda f: f"{f.kind}={f.value}")
def test_a_prefix_that_cannot_pass_is_noticed(failed: FailedPrefix) -> None:
    constraints = (Constraint(failed.kind, failed.value),)
    assert prefix_fails(constraints, failed.prefix)
    assert not prefix_fails(constraints, "")


@pytest.mark.parametrize("constraint", EVERY_CONSTRAINT, ids=lambda c: c.name)
def test_an_empty_answer_obeys_nothing(constraint: Constraint) -> None:
    assert not obeys((constraint,), "")
    assert not obeys((constraint,), " \n")


@settings(deadline=None, max_examples=100)
@given(text=ANSWER)
def test_an_edited_answer_passes_and_so_do_its_prefixes(text: str) -> None:
    for constraint in EDITABLE:
        edited = edit((constraint,), text)
        assert obeys((constraint,), edited), (constraint, edited)
        for end in range(len(edited) + 1):
            assert not prefix_fails((constraint,), edited[:end]), (constraint, edited[:end])


@pytest.mark.parametrize(
    ("value", "text", "expected"),
    [
        ("my friend", "It is blue.", "My friend, it is blue."),
        ("my friend", "it is blue.", "my friend, it is blue."),
        ("Amir", "Java is an island.", "Amir, Java is an island."),
        ("Amir", "I think so.", "Amir, I think so."),
        ("Amir", "You're right, and so is he.", "Amir, you're right, and so is he."),
        ("Amir", "1. Rivers.\n2. Rain.", "1. Amir, Rivers.\n2. Rain."),
        ("Amir", '"The sea."', 'Amir, "The sea."'),
    ],
)
def test_a_form_of_address_stands_in_front(value: str, text: str, expected: str) -> None:
    assert edit((Constraint("address", value),), text) == expected


def test_no_edit_raises_on_a_text_without_a_word() -> None:
    for constraint in EDITABLE:
        for text in ("...", "?!", "🙂!"):
            edit((constraint,), text)


@settings(deadline=None, max_examples=200)
@given(text=ANSWER)
@example(text="It it ß.a")
@example(text="It. A\nA. 3.. it. it")
@example(text="It 今天很好。我们去公园吧！**好吗？**「是」。")
@example(text="It आज मौसम बहुत अच्छा है। हम पार्क चलें! क्या?")
def test_two_edits_pass_both_checks(text: str) -> None:
    for first, second in PAIRS:
        for pair in ((first, second), (second, first)):
            edited = edit(pair, text)
            assert obeys(pair, edited), (pair, edited)


@settings(deadline=None, max_examples=300)
@given(start=ANSWER | TEXT, end=ANSWER | TEXT)
def test_no_continuation_of_a_failed_prefix_passes(start: str, end: str) -> None:
    for constraint in EVERY_CONSTRAINT:
        if prefix_fails((constraint,), start):
            assert not obeys((constraint,), start + end), constraint


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=())))
def test_no_check_raises(text: str) -> None:
    for constraint in EVERY_CONSTRAINT:
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
def test_no_check_raises_on_extreme_texts(text: str) -> None:
    for constraint in EVERY_CONSTRAINT:
        obeys((constraint,), text)
        prefix_fails((constraint,), text)


@pytest.mark.slow
def test_no_check_raises_on_a_hundred_thousand_texts() -> None:
    """Texts of up to 24 signs of all Unicode; many from its beginning, where most checks look."""
    rng = random.Random(20)
    for _ in range(100_000):
        text = "".join(
            chr(rng.randrange(rng.choice((128, 0x2100, sys.maxunicode + 1))))
            for _ in range(rng.randrange(25))
        )
        for constraint in EVERY_CONSTRAINT:
            obeys((constraint,), text)
            prefix_fails((constraint,), text)


def test_compatible_is_symmetrical() -> None:
    for first, second in itertools.product(EVERY_CONSTRAINT, EVERY_CONSTRAINT):
        assert compatible(first, second) == compatible(second, first)


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
def test_incompatible_constraints(pair: str) -> None:
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
def test_compatible_constraints(pair: str) -> None:
    assert compatible(*_parse(pair))


def _parse(pair: str) -> list[Constraint]:
    return [Constraint(*part.split("=")) for part in pair.split(" + ")]


@pytest.mark.parametrize(
    ("name", "value", "message"),
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
def test_a_wrong_value_is_named(name: str, value: str, message: str) -> None:
    with pytest.raises(GattError, match=message):
        kind_of(Constraint(name, value))


def test_a_constraint_without_an_edit_is_refused() -> None:
    with pytest.raises(ValueError, match="hobby"):
        edit((Constraint("hobby", "chess"),), "It is so.")


def test_the_language_library_is_loaded_on_first_use() -> None:
    code = "import sys, pipeline.gatt.constraints.registry; sys.exit('py3langid' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_kinds_are_listed() -> None:
    listed = call_gatt("instructions", "--kinds")
    assert (listed.returncode, listed.stderr) == (0, "")
    header, *rows = listed.stdout.splitlines()
    assert header.split() == ["kind", "family", "method", "example"]
    assert [row.split()[0] for row in rows] == list(KINDS)
    for row, (name, kind) in zip(rows, KINDS.items(), strict=True):
        example = Constraint(name, kind.values[0])
        assert row.endswith(render_instruction((example,)).text)
        assert row.split()[1:3] == [kind.family, "edited" if editable((example,)) else "sampled"]
