"""Instructions in the user's own words: entries, files, checks, assignment, synthesis, scores."""

from __future__ import annotations

import errno
import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from support.cli import TINY_RECIPE, call_gatt, override_flags
from support.teachers import Teacher, serve

from pipeline.chat.conversation import Conversation, StandingInstruction
from pipeline.custom_instructions import with_distinct_names
from pipeline.data.dialogues import load_dialogues
from pipeline.data.instruction_files import count_skipped, read_instructions
from pipeline.errors import GattError
from pipeline.evaluation.aggregate import compute_scores
from pipeline.evaluation.rates import Rate
from pipeline.files import read_jsonl
from pipeline.gatt.acceptance import ACCEPTED
from pipeline.gatt.assign import ConstraintPool, Ratios, assign_evaluation, assign_training
from pipeline.gatt.assignment import AssignedDialogue, check_files, read_splits, write_splits
from pipeline.gatt.constraints import custom_checks
from pipeline.gatt.constraints.registry import KINDS, obeys, prepare, required_words
from pipeline.gatt.instructions import custom_instruction, prepare_checks
from pipeline.gatt.rollout import Rollout
from pipeline.gatt.synthesis import DISOBEYS_JUDGE, Judge, Synthesis
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe, recipe_toml
from pipeline.records import (
    Completion,
    Constraint,
    CustomInstruction,
    Dialogue,
    Message,
    Reply,
    Request,
    RunTasks,
    Task,
)
from pipeline.report.figures import adherence_curve
from pipeline.report.sections.headline import headline
from pipeline.report.tables import overview
from pipeline.run_dir import RunDir

DATA = Path(__file__).parent / "data"
PROMPTS = DATA / "system_prompts.toml"
ZIGGY = CustomInstruction(
    text="You are Ziggy, support agent of Acme. Never mention prices.",
    checks=(Constraint("not_regex", "[$€]"), Constraint("regex", "^Ziggy")),
    place="system",
)
BLUNT = CustomInstruction(text="Be blunt.")
RATIOS = Ratios(
    plain=0.1,
    recall=0.1,
    combine=0.2,
    short=0.3,
    system=0.2,
    contradict=0.5,
    change=0.3,
    stop=0.2,
    edited=0.9,
)
QUESTIONS = ("Why is the sea salt?", "Who measures the salt?")
SEA = "Ziggy says that the sea is salt because of rivers."
SALT = "Ziggy knows that sailors measure salt with a glass."


def _prompts() -> list[CustomInstruction]:
    """Return the hundred prompts; without checks of IFEval where these are not installed."""
    instructions = read_instructions(PROMPTS)
    try:
        prepare(Constraint("ifeval", "punctuation:no_comma"))
    except GattError:
        return [
            replace(i, checks=tuple(c for c in i.checks if c.kind != "ifeval"))
            for i in instructions
        ]
    return instructions


def _pool(text: str) -> Recipe:
    return load_recipe(None, (f"instructions.pool={text}",))


def _problem(text: str) -> str:
    with pytest.raises(GattError) as problem:
        _pool(text)
    return str(problem.value)


# Entries of a recipe


def test_every_form_of_a_check_is_read() -> None:
    text = (
        '[{kind = "bold"}, {text = " You are Ziggy. ", short = "Ziggy.", place = "system", '
        "checks = "
        '["uppercase", {kind = "opening", value = "Hi"}, {max_words = 9}, {regex = "^Z"}, '
        '{not_regex = "[$]"}, {rubric = "Is it Ziggy?"}, '
        '{ifeval = "length_constraints:number_words", '
        'arguments = {relation = "at least", num_words = 40}}]}]'
    )
    constraint, custom = _pool(text).instructions.pool
    assert constraint == Constraint("bold")
    assert custom == CustomInstruction(
        text="You are Ziggy.",
        short="Ziggy.",
        place="system",
        checks=(
            Constraint("uppercase"),
            Constraint("opening", "Hi"),
            Constraint("max_words", "9"),
            Constraint("regex", "^Z"),
            Constraint("not_regex", "[$]"),
            Constraint("rubric", "Is it Ziggy?"),
            Constraint(
                "ifeval",
                'length_constraints:number_words {"num_words": 40, "relation": "at least"}',
            ),
        ),
    )


def test_a_saved_recipe_is_read_back(tmp_path: Path) -> None:
    instructions = Recipe().instructions.model_copy(
        update={"pool": (Constraint("bold"), ZIGGY, *_prompts()), "file": "more.toml"}
    )
    recipe = Recipe(instructions=instructions)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_toml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert recipe.instructions.custom[0] == ZIGGY
    assert recipe.instructions.constraints == (Constraint("bold"),)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ('{text = "a", checks = [{regex = "("}]}', r"pool\.1: regex = '\('.*unterminated"),
        ('{text = "a", checks = [{kind = "not_regex", value = "*"}]}', "nothing to repeat"),
        ('{checks = ["bold"]}', "there is no text"),
        ('{text = "  "}', "there is no text"),
        ("{text = 3}", "text = 3; expected a text"),
        ('"Be blunt."', 'expected a table: {text = "Be blunt."}'),
        ('{text = "a", check = []}', "unknown key 'check'. Did you mean 'checks'"),
        ('{text = "a", place = "user"}', 'expected "first"'),
        ('{text = "a", checks = "bold"}', "expected a list"),
        ('{text = "a", checks = [{regex = "a", not_regex = "b"}]}', "expected one kind"),
        ('{text = "a", checks = [{uppercase = true}]}', "the check uppercase has the value True"),
        ('{text = "a", checks = [{function = "polite"}]}', 'expected "module:function"'),
        ('{text = "a", checks = [{regex = "a", arguments = {n = 1}}]}', "next to ifeval"),
        (
            '{text = "a", checks = [{ifeval = "a:b", arguments = {day = 2026-01-02}}]}',
            "arguments: Object of type .ate is not JSON serializable. Expected texts",
        ),
        ('{kind = "opening", worth = "Hi"}', "unknown key 'worth' next to kind"),
        ("{}", "there is no text"),
    ],
)
def test_a_wrong_entry_is_one_line_that_names_it(entry: str, problem: str) -> None:
    line = _problem(f'[{{kind = "bold"}}, {entry}]')
    assert "instructions.pool.1: " in line and "\n" not in line
    with pytest.raises(GattError, match=problem.replace("{text", r"\{text")):
        _pool(f'[{{kind = "bold"}}, {entry}]')


def test_a_function_is_looked_for_next_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "tone.py").write_text("def polite(reply, dialogue): return True\n")
    recipe = tmp_path / "my.toml"
    recipe.write_text(
        "[instructions]\n"
        'pool = [{text = "a", checks = [{function = "rules.tone:polite"}, '
        '{function = "json:loads"}]}]\n'
    )
    checks = load_recipe(recipe).instructions.custom[0].checks
    assert checks[0].value == f"{(tmp_path / 'rules' / 'tone.py').resolve()}:polite"
    assert checks[1].value == "json:loads"
    saved = tmp_path / "runs" / "recipe.toml"
    saved.parent.mkdir()
    saved.write_text(recipe_toml(load_recipe(recipe)))
    assert load_recipe(saved).instructions.custom[0].checks == checks


def test_a_package_next_to_the_recipe_is_loaded(tmp_path: Path) -> None:
    package = tmp_path / "manners"
    package.mkdir()
    (package / "rules.py").write_text("WORD = 'please'\n")
    (package / "__init__.py").write_text(
        "from .rules import WORD\ndef polite(reply, dialogue): return WORD in reply\n"
    )
    recipe = tmp_path / "my.toml"
    recipe.write_text(
        '[instructions]\npool = [{text = "a", checks = [{function = "manners:polite"}]}]\n'
    )
    (check,) = load_recipe(recipe).instructions.custom[0].checks
    assert check.value == f"{(package / '__init__.py').resolve()}:polite"
    assert obeys((check,), "Yes, please.") and not obeys((check,), "Yes.")


def test_a_name_that_is_taken_is_numbered() -> None:
    labels = ["a (2)", "a", "a", "bold", "a"]
    texts = [CustomInstruction(text=f"{n}", label=label) for n, label in enumerate(labels)]
    names = [c.name for c in with_distinct_names(texts, KINDS)]
    assert names == ["a (2)", "a", "a (3)", "bold (2)", "a (4)"]


def test_equal_names_are_numbered_and_equal_instructions_merged() -> None:
    long = "You are a helpful assistant who loves tea and {}."
    texts = [long.format("cats"), long.format("dogs"), long.format("cats"), "Be brief."]
    named = with_distinct_names([CustomInstruction(text=text) for text in texts])
    assert [c.text for c in named] == [texts[0], texts[1], texts[3]]
    assert [c.name for c in named] == [
        "You are a helpful assistant who loves...",
        "You are a helpful assistant who loves... (2)",
        "Be brief.",
    ]


# Files


def test_every_form_of_a_file_is_read(tmp_path: Path) -> None:
    toml, jsonl, array, lines = (tmp_path / f"i.{s}" for s in ("toml", "jsonl", "json", "txt"))
    toml.write_text('[[instructions]]\ntext = "Be blunt."\n[[instructions]]\ntext = "Be kind."\n')
    rows = ['{"text": "Be blunt."}', '"Be kind."']
    jsonl.write_text("\n\n".join(rows))
    array.write_text(f"[{', '.join(rows)}]")
    lines.write_bytes("\ufeffBe blunt.\r\n\r\n  Be kind.  \r\n".encode())
    for file in (toml, jsonl, array, lines):
        assert [(i.text, i.place) for i in read_instructions(file)] == [
            ("Be blunt.", "first"),
            ("Be kind.", "first"),
        ]


def test_a_text_is_cut_at_line_breaks_only_and_may_have_comments(tmp_path: Path) -> None:
    file = tmp_path / "i.txt"
    lines = "# Tone\rBe\u2028blunt.\n#1: be\x0bkind.\r\n \n"
    file.write_bytes(lines.encode())
    assert [i.text for i in read_instructions(file)] == ["Be\u2028blunt.", "#1: be\x0bkind."]


def test_json_lines_may_be_utf_16(tmp_path: Path) -> None:
    file = tmp_path / "i.jsonl"
    file.write_bytes('{"text": "Sei höflich."}\r\n"Be\u2028kind."\n'.encode("utf-16"))
    assert [i.text for i in read_instructions(file)] == ["Sei höflich.", "Be\u2028kind."]


def test_a_folder_has_one_system_prompt_in_each_file(tmp_path: Path) -> None:
    (tmp_path / "old.txt").mkdir()
    (tmp_path / "b.md").write_text("# Role\n\nYou are B.\n")
    (tmp_path / "a.TXT").write_text("You are A.")
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / ".hidden.txt").write_text("no")
    assert [(i.text, i.place) for i in read_instructions(tmp_path)] == [
        ("You are A.", "system"),
        ("# Role\n\nYou are B.", "system"),
    ]
    assert read_instructions(tmp_path / "b.md")[0].place == "system"
    assert count_skipped(tmp_path) == 2  # notes.json and the folder
    assert count_skipped(tmp_path / "b.md") == 0


def test_what_is_left_out_of_a_folder_is_one_line(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "a.txt").write_text("You are A.")
    (prompts / "notes.json").write_text("{}")
    flags = [*override_flags(), "--set", f"instructions.file={prompts}"]
    done = call_gatt("instructions", "--run", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"1 entries of {prompts} are not read") == 1


def test_a_prompt_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    (tmp_path / "a.txt").write_text("You are A.")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(GattError, match=r"cannot read .*a\.txt \(Permission denied\)"):
        read_instructions(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("i.toml", b"", "holds no instruction"),
        ("i.txt", b"\n \n", "holds no instruction"),
        ("i.toml", b"[[instructions]]\nchecks = []\n", "instruction 1: there is no text"),
        ("i.toml", b'[[instruction]]\ntext = "a"\n', "has the keys instruction"),
        ("i.toml", b"[[", "not valid TOML"),
        (
            "i.toml",
            b'[[instructions]]\ntext = "a"\nchecks = [{regex = "("}]\n',
            "instruction 1: reg",
        ),
        ("i.jsonl", b'{"text": "a"}\n{"text": ""}\n', "line 2: there is no text"),
        ("i.jsonl", b"[1]\n", "line 1: .* is no instruction"),
        ("i.jsonl", b"Be blunt.\n", "line 1: not a line of JSON"),
        ("i.json", b'{"text": "a"}', "not a list"),
        ("i.md", b"", "there is no text"),
        ("i.txt", b"d\xe9", "not UTF-8"),
        ("i.YAML", b"- Be blunt.\n", "has a form that is not read"),
        ("i.csv", b"Be blunt.\n", "has a form that is not read"),
        ("i.jsonl", b"[" * 100_000, "line 1: not a line of JSON"),
        ("i.json", b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(GattError, match=problem) as error:
        read_instructions(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_an_empty_folder_and_an_empty_prompt(tmp_path: Path) -> None:
    with pytest.raises(GattError, match=r"instructions\.file: cannot read .*none\.txt"):
        read_instructions(tmp_path / "none.txt")
    with pytest.raises(GattError, match="holds no instruction"):
        read_instructions(tmp_path)
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(GattError, match=r"a\.txt is empty"):
        read_instructions(tmp_path)


# Checks


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("regex", "^Ziggy:", "Ziggy: yes", "yes, Ziggy: no"),
        ("regex", r"(?m)^Confidence: [1-5]$", "Yes.\nConfidence: 4", "Confidence: 7"),
        ("not_regex", "(?i)price", "It is free.", "The PRICE is high."),
        ("not_regex", "x", "y", "  "),
        ("not_regex", "\n", "One line.", "Two\nlines."),
        ("regex", " ", "Two words.", "One"),
    ],
)
def test_patterns(kind: str, value: str, good: str, bad: str) -> None:
    constraint = Constraint(kind, value)
    assert obeys((constraint,), good) and not obeys((constraint,), bad)


def test_an_odd_pattern_prints_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert obeys((Constraint("regex", "[[a]+b"),), "[ab")
        assert _pool('[{text = "a", checks = [{regex = "[[c]"}]}]').instructions.custom
    with pytest.raises(GattError, match="needs a value"):
        obeys((Constraint("regex", ""),), "a")


def _function(folder: Path, body: str, signature: str = "reply, dialogue") -> Constraint:
    """Return the check of a function of its own file, as a loaded module stays loaded."""
    file = folder / "rule.py"
    file.write_text(f"def rule({signature}):\n    {body}\n", encoding="utf-8")
    return Constraint("function", f"{file}:rule")


def test_a_function_gets_the_reply_and_the_dialogue(tmp_path: Path) -> None:
    check = _function(tmp_path, "return dialogue[-1]['content'].split()[0] in reply")
    dialogue: list[Message] = [{"role": "user", "content": "Salt is old."}]
    assert obeys((check,), "Salt, yes.", dialogue)
    assert not obeys((check,), "Yes.", dialogue)
    assert not obeys((_function(tmp_path, "raise ValueError"),), "  ", dialogue)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return 1 / 0", r"rule raised ZeroDivisionError \(division by zero\) on the reply 'Hi'"),
        ("raise SystemExit", "raised SystemExit on the reply 'Hi'"),
        ("pass", "returned None on the reply 'Hi'; expected True or False"),
    ],
)
def test_a_function_that_fails_is_one_line(tmp_path: Path, body: str, problem: str) -> None:
    with pytest.raises(GattError, match=problem) as error:
        obeys((_function(tmp_path, body),), "Hi")
    assert "what is done is not lost" in str(error.value) and "\n" not in str(error.value)


def test_a_function_that_cannot_be_used_is_refused_beforehand(tmp_path: Path) -> None:
    one_argument = _function(tmp_path, "return True", signature="reply")
    with pytest.raises(GattError, match="does not take two arguments"):
        prepare(one_argument)
    with pytest.raises(GattError, match=r"has no function 'rul'\. Did you mean 'rule'"):
        prepare(Constraint("function", one_argument.value[:-1]))
    with pytest.raises(GattError, match="Cannot import 'no_such_module'"):
        prepare(Constraint("function", "no_such_module:rule"))
    (tmp_path / "broken.py").write_text("def rule(:\n")
    with pytest.raises(GattError, match=r"Cannot import .*broken\.py.*SyntaxError"):
        prepare(Constraint("function", f"{tmp_path / 'broken.py'}:rule"))
    with pytest.raises(GattError, match="The instruction 'a': Unknown kind of instruction 'shout'"):
        prepare_checks([CustomInstruction(text="a", checks=(Constraint("shout"),))])


def test_verifiers_of_ifeval() -> None:
    pytest.importorskip("if_verifiable")
    check = Constraint(
        "ifeval", 'length_constraints:number_words {"num_words": 4, "relation": "at least"}'
    )
    prepare(check)
    assert obeys((check,), "one two three four") and not obeys((check,), "one two three")
    assert obeys((Constraint("ifeval", "startend:quotation"),), '"Yes."')
    for value, problem in (
        ("length_constraints:number_words", "has the arguments none; expected num_words, relation"),
        ("length_constraints:number_wrds", "Did you mean 'length_constraints:number_words'"),
        ('punctuation:no_comma {"a": 1}', "has the arguments a; expected none"),
        ("punctuation:no_comma {", "arguments that are not a table"),
        (check.value.replace("at least", "over"), "does not accept"),
    ):
        with pytest.raises(GattError, match=problem):
            prepare(Constraint("ifeval", value))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ('length_constraints:number_words {"num_words": -1, "relation": "at least"}', "num_words"),
        ('length_constraints:number_words {"num_words": null, "relation": "at least"}', "= null"),
        ('keywords:existence {"keywords": []}', r"does not accept keywords = \[\]: it would use"),
        ('keywords:existence {"keywords": "sea"}', r'keywords = "sea": it would use \["a", "e"'),
        ('keywords:forbidden_words {"forbidden_words": "sea"}', 'forbidden_words = "sea"'),
        ('detectable_format:number_bullet_lists {"num_bullets": -2}', "num_bullets = -2"),
    ],
)
def test_an_argument_that_a_verifier_would_replace_is_refused(value: str, problem: str) -> None:
    pytest.importorskip("if_verifiable")
    with pytest.raises(GattError, match=problem):
        prepare(Constraint("ifeval", value))


def test_a_reply_on_which_a_verifier_raises_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the one of "format:quote_unquote" does on a reply without a letter."""

    class Verifier:
        def __init__(self, name: str) -> None:
            pass

        def get_instruction_args_keys(self) -> list[str]:
            return []

        def get_instruction_args(self) -> None:
            return None

        def build_description(self) -> str:
            return ""

        def check_following(self, value: str) -> bool:
            return value.strip("0123456789.")[-1] == "e"

    monkeypatch.setattr(custom_checks, "_verifiers", lambda module: {"a:no_letter": Verifier})
    check = Constraint("ifeval", "a:no_letter")
    assert [obeys((check,), text) for text in ("one", "42.", "7.", "two")] == [
        True,
        False,
        False,
        False,
    ]
    assert capsys.readouterr().err.count("ifeval = a:no_letter raised IndexError") == 1
    with pytest.raises(GattError, match=r"raised IndexError .* on the reply '42\.'"):
        custom_checks.verifier_passes(check.value, "42.")


def test_an_argument_of_another_type_is_refused_before_the_first_reply() -> None:
    pytest.importorskip("if_verifiable")
    with pytest.raises(GattError, match=r"\[1, 2\].* raised TypeError .*one short answer"):
        prepare(Constraint("ifeval", 'keywords:existence {"keywords": [1, 2]}'))


def test_an_argument_that_a_verifier_only_rewrites_is_taken() -> None:
    pytest.importorskip("if_verifiable")
    prepare(Constraint("ifeval", 'keywords:existence {"keywords": ["sea", "Salt", "air"]}'))
    letter = {"letter": "E", "let_frequency": 2, "let_relation": "at least"}
    prepare(Constraint("ifeval", f"keywords:letter_frequency {json.dumps(letter)}"))


def test_before_ifbench_is_loaded_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules: list[str] = []

    def verifiers(module: str) -> dict[str, object]:
        modules.append(module)
        return {}

    monkeypatch.setattr(custom_checks, "_verifiers", verifiers)
    with pytest.raises(GattError, match="No instruction of IFEval or IFBench"):
        prepare(Constraint("ifeval", "count:no_such"))
    assert [m.split(".")[1] for m in modules] == ["ifeval", "ifbench"]
    assert "count:no_such: not of IFEval. Loading IFBench" in capsys.readouterr().err


def test_verifiers_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "if_verifiable", None)
    monkeypatch.setitem(sys.modules, "if_verifiable.ifeval.instructions_registry", None)
    with pytest.raises(GattError, match=r"not installed.*pip install if-verifiable"):
        prepare(Constraint("ifeval", "keywords:none {}"))


def test_values_of_custom_checks_are_content() -> None:
    constraints = [Constraint("regex", "^Ziggy"), Constraint("opening", "Ahoy!")]
    assert required_words(constraints) == "Ahoy!"
    assert not {"regex", "function", "rubric"} & KINDS.keys()


def test_a_chat_is_checked_with_its_dialogue(tmp_path: Path) -> None:
    check = _function(tmp_path, "return len(dialogue) == 3 and 'Be odd.' in dialogue[0]['content']")
    chat = Conversation("", StandingInstruction("Be odd.", (check,)))
    chat = chat.with_turn("One?", ("The one.",)).with_turn("Two?", ("The two.",))
    assert [chat.verdict(0, number).mark for number in (1, 2)] == ["✗", "✓"]
    judged = Conversation("", StandingInstruction("Be odd.", (Constraint("rubric", "Odd?"),)))
    assert judged.with_turn("One?", ("The one.",)).verdict(0, 1).mark is None


# Assignment


def _dialogues(count: int, turns: int = 6) -> list[Dialogue]:
    return [
        replace(d, id=f"{d.id}.{n}", turns=d.turns[:turns])
        for n, d in enumerate(load_dialogues("seed")[:count])
    ]


def test_every_custom_instruction_is_trained_as_it_is() -> None:
    custom = with_distinct_names(_prompts())
    pool = ConstraintPool(Recipe().instructions.constraints, ("opening",), custom)
    training = assign_training(_dialogues(130), pool, RATIOS, seed=1)
    assert training == assign_training(_dialogues(130), pool, RATIOS, seed=1)
    places = {c.text: c.place == "system" for c in custom}
    given = [a for a in training if a.is_custom and a.instruction]
    assert {a.instruction.text for a in given if a.instruction} == places.keys()
    for assigned in given:
        assert assigned.instruction
        text = assigned.instruction.text
        assert (assigned.method, assigned.in_system) == ("sampled", places[text])
        student = assigned.student_prompt(["a"] * 5, "Be brief.")
        wording = assigned.instruction.short if assigned.shortened else text
        first = student[0 if assigned.in_system else 1]["content"]
        assert wording in first
        assert all(text in m["content"] for m in assigned.teacher_prompt([], "")[:1])
    assert any(a.next_instruction for a in given) and any(a.contradiction for a in given)
    replaced = [a.next_instruction for a in training if a.next_instruction]
    assert all(not places.get(i.text) for i in replaced)


def test_custom_instructions_change_nothing_for_others() -> None:
    pool = ConstraintPool(Recipe().instructions.constraints, ("opening",))
    assert not any(a.is_custom for a in assign_training(_dialogues(40), pool, RATIOS, seed=1))


def test_every_custom_instruction_is_measured() -> None:
    custom = with_distinct_names(_prompts())
    dialogues = _dialogues(24)
    constraints = [Constraint("bold"), Constraint("emoji")]
    evaluation = assign_evaluation(dialogues, constraints, custom)
    names = [a.name for a in evaluation]
    assert {c.name for c in custom} | {"bold", "emoji"} == set(names)
    assert len({a.dialogue.id for a in evaluation}) == len(evaluation) == 102
    few = assign_evaluation(dialogues, constraints, custom[:3])
    assert [a.name for a in few[:5]] == [
        "bold",
        custom[0].name,
        "emoji",
        *[c.name for c in custom[1:3]],
    ]
    assert len(few) == 24


def test_a_copy_of_a_dialogue_does_not_take_the_id_of_another_one() -> None:
    dialogues = [Dialogue(name, "", QUESTIONS) for name in ("1", "1.2", "1.3")]
    evaluation = assign_evaluation(dialogues, [], with_distinct_names(_prompts())[:6])
    ids = [a.dialogue.id for a in evaluation]
    assert ids == ["1", "1.2", "1.3", "1.2.2", "1.3.2", "1.2.3"]


def test_the_stage_assigns_a_hundred_prompts(tmp_path: Path) -> None:
    pytest.importorskip("if_verifiable")
    run = tmp_path / "run"
    shown = call_gatt(
        *("instructions", "--run", run, "--set", f"instructions.file={PROMPTS}"),
        *("--set", "instructions.pool=[]", "--set", "instructions.vocabulary_kinds=[]"),
        *("--set", "evaluate.judge=smollm2-135m"),
    )
    assert shown.returncode == 0, shown.stderr
    splits = read_splits(run / "instructions" / "assignments.json")
    assert len({a.name for a in splits["evaluation"]}) == 100
    assert not any(a.needs_judge(0) for a in splits["validation"])
    line = next(
        line for line in shown.stdout.splitlines() if "asks" in line or "local paper" in line
    )
    assert "prompt_checks.py:asks_once" in line
    assert [f.name for f in check_files(run / "instructions" / "assignments.json")] == [
        "prompt_checks.py"
    ]


@pytest.mark.parametrize(
    ("pool", "problem"),
    [
        ('[{text = "a", checks = ["shout"]}]', "The instruction 'a': Unknown kind .*'shout'"),
        ('[{text = "a", checks = [{function = "no_module:f"}]}]', "Cannot import 'no_module'"),
        ('[{text = "a", checks = [{rubric = "Good?"}]}]', r"No program can check.*evaluate\.judge"),
        ('[{kind = "regex", value = "a"}]', "is a check, and no instruction"),
        ('[{text = "a", checks = [{max_words = "few"}]}]', "expects a whole number"),
    ],
)
def test_the_stage_refuses_checks_that_cannot_be_made(
    tmp_path: Path, pool: str, problem: str
) -> None:
    shown = call_gatt("instructions", "--run", tmp_path / "r", "--set", f"instructions.pool={pool}")
    assert shown.returncode == 1
    assert len(shown.stderr.strip().splitlines()) <= 2  # "Overridden: ..." comes first
    with pytest.raises(GattError, match=problem):
        raise GattError(shown.stderr)


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ('instructions.pool=[{text = "Be blunt."}]', "Give the instructions checks"),
        ("dialogues.validation=0", r"Raise dialogues\.validation, or set"),
        ("instructions.bake={prompt}", "write one as in `gatt instructions --kinds`"),
    ],
)
def test_early_stopping_without_checks_is_refused_before_the_synthesis(
    override: str, advice: str, tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("You are a pirate.")
    overrides = ("instructions.vocabulary_kinds=[]", override.replace("{prompt}", str(prompt)))
    flags = override_flags((*TINY_RECIPE, *overrides, "train.early_stop_adherence=0.9"))
    done = call_gatt("instructions", "--run", tmp_path / "run", *flags)
    assert done.returncode == 1
    with pytest.raises(GattError, match=f"early_stop_adherence needs validation.*{advice}"):
        raise GattError(done.stderr)


def test_each_stage_that_a_function_decides_about_runs_again_if_it_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    rule = tmp_path / "manners.py"
    rule.write_text("def polite(reply, dialogue): return True\n")
    overrides = (
        *TINY_RECIPE,
        'instructions.pool=[{text = "Be polite.", checks = [{function = "manners:polite"}]}]',
        "train.early_stop_adherence=0.9",
    )
    run = RunDir(tmp_path / "run")
    assert call_gatt("instructions", "--run", run.path, *override_flags(overrides)).returncode == 0
    recipe = load_recipe(None, overrides)
    for name in ("instructions", "synthesize", "train", "evaluate"):
        assert rule in import_module(f"pipeline.stages.{name}").inputs(recipe, run), name
    rule.write_text("def polite(reply, dialogue): return 'please' in reply\n")
    again = call_gatt("instructions", "--run", run.path, *override_flags(overrides)).stderr
    assert "instructions: runs again, because this has changed: manners.py" in again


# Synthesis


def _answering(texts: Sequence[str]) -> RunTasks:
    """Return a teacher that gives these answers in turn, and then the last one."""
    given = iter(texts)

    def run(tasks: object) -> None:
        for task in tasks:  # type: ignore[attr-defined]
            _drive(task)

    def _drive(task: Task) -> None:
        try:
            next(task)
            while True:
                text = next(given, texts[-1])
                task.send(Completion(text, 9, 9, "stop"))
        except StopIteration:
            pass

    return run


def _synthesized(
    custom: CustomInstruction, texts: Sequence[str], judge: Judge | None = None
) -> list[tuple[str, str]]:
    """Return text and verdict of every candidate of a dialogue."""
    assigned = AssignedDialogue(
        dialogue=Dialogue("d", "sea", QUESTIONS),
        instruction=custom_instruction(custom),
        method="sampled",
        in_system=custom.place == "system",
    )
    synthesis = Synthesis(Recipe(), lambda answer: None, judge=judge)
    synthesis.run(_answering(texts), [assigned])
    return [(a.text, a.verdict) for a in synthesis.answers.values()]


def test_the_answers_of_a_teacher_are_checked() -> None:
    price = "Ziggy sells salt of the sea for $3 a bag."
    assert _synthesized(ZIGGY, [price, SEA, SALT]) == [
        (price, "disobeys"),
        (SEA, ACCEPTED),
        (SALT, ACCEPTED),
    ]


def test_without_a_check_good_answers_are_taken() -> None:
    loop = "no no no no no no no no no no no no"
    refusal = "I would rather be blunt."
    french = "La mer est salée parce que les rivières y portent des minéraux."
    assert [verdict for _, verdict in _synthesized(BLUNT, [loop, refusal, french])] == [
        "loop",
        ACCEPTED,
        ACCEPTED,
    ]


def test_a_judge_decides_what_no_program_can_check() -> None:
    questions: list[tuple[str, str, str]] = []

    def question(criterion: str, user: str, reply: str) -> tuple[Message, ...]:
        questions.append((criterion, user, reply))
        return ({"role": "user", "content": reply},)

    judge = Judge(_answering(["no", "yes"]), question, lambda text: text == "yes")
    second = "Ziggy tells you that rivers carry the salt."
    assert _synthesized(BLUNT, [SEA, second, SALT], judge) == [
        (SEA, DISOBEYS_JUDGE),
        (second, ACCEPTED),
        (SALT, ACCEPTED),
    ]
    assert questions == [
        ("Be blunt.", QUESTIONS[0], SEA),
        ("Be blunt.", QUESTIONS[0], second),
        ("Be blunt.", QUESTIONS[1], SALT),
    ]
    questions.clear()
    assert {v for _, v in _synthesized(ZIGGY, [SEA, SALT], judge)} == {ACCEPTED} and not questions
    rubric = replace(BLUNT, checks=(Constraint("rubric", "Is it blunt?"),))
    _synthesized(rubric, [SEA, SALT], judge)
    assert questions[0][0] == "Is it blunt?"


LAWYER = CustomInstruction(
    text='Whatever I ask, reply only: "Ask my lawyer."',
    checks=(Constraint("regex", r"^Ask my lawyer\.$"),),
)


def test_a_reply_that_the_instruction_quotes_is_no_repeat() -> None:
    fixed = "Ask my lawyer."
    assert _synthesized(LAWYER, [fixed, fixed]) == [(fixed, ACCEPTED)] * 2
    (assigned,) = assign_evaluation([Dialogue("a", "sea", QUESTIONS)], [], [LAWYER])
    assert [(r.obeys, r.defect) for r in _replies(assigned, [fixed, fixed], "base")] == [
        (True, ""),
        (True, ""),
    ]
    for custom, reply in (
        (ZIGGY, SEA),
        (CustomInstruction(text='Begin every answer with "Good news:".'), "Good news:"),
        (CustomInstruction(text='Never answer "I do not know."'), "I do not know."),
    ):
        (assigned,) = assign_evaluation([Dialogue("a", "sea", QUESTIONS)], [], [custom])
        assert [r.defect for r in _replies(assigned, [reply] * 2, "base")] == ["", "repeat"]


def test_fixed_replies_are_not_too_common() -> None:
    dialogues = [
        AssignedDialogue(
            dialogue=Dialogue(f"d{n}", "sea", QUESTIONS),
            instruction=custom_instruction(LAWYER),
            method="sampled",
        )
        for n in range(3)
    ]
    synthesis = Synthesis(Recipe(), lambda answer: None)
    synthesis.run(_answering(["Ask my lawyer."] * 6), dialogues)
    assert [len(synthesis.accepted(assigned)) for assigned in dialogues] == [2, 2, 2]
    assert synthesis.remove_common(dialogues) == 0


def test_an_instruction_without_room_for_an_answer_is_one_line(tmp_path: Path) -> None:
    words = " ".join(f"Rule {n}: be kind." for n in range(200))
    (tmp_path / "long.txt").write_text(words)
    failed = call_gatt(
        *("instructions", "--run", tmp_path / "run"),
        *("--set", f"instructions.file={tmp_path / 'long.txt'}"),
    )
    assert failed.returncode == 1
    assert re.search(
        r"The instruction 'Rule 0.* has \d+ tokens; train.max_length = 1024 has room for 924 of "
        r"them.* set train.max_length to \d+ or more",
        failed.stderr,
    ), failed.stderr


def test_prompts_go_through_synthesis_and_a_raising_function_loses_nothing(
    tmp_path: Path,
) -> None:
    """A teacher on a server answers; the function raises once, and is then corrected."""
    rule = tmp_path / "rule.py"
    rule.write_text("def ok(reply, dialogue):\n    return bool(reply[9999])\n")
    recipe = tmp_path / "my.toml"
    pool = [
        {"text": "Be blunt.", "checks": [{"function": "rule:ok"}]},
        {"text": "You are Ziggy.", "place": "system"},
        {"text": "Never say no.", "checks": [{"not_regex": "(?i)\\bno\\b"}]},
    ]
    rows = "\n".join(json.dumps(row, ensure_ascii=False) for row in pool)
    (tmp_path / "mine.jsonl").write_text(rows)
    run = tmp_path / "run"
    with serve(Teacher()) as server:
        recipe.write_text(
            f"[instructions]\nfile = {json.dumps(str(tmp_path / 'mine.jsonl'))}\npool = []\n"
            "vocabulary_kinds = []\nrecall_ratio = 0.0\n"
            "[dialogues]\ntrain = 8\nturns = 2\nvalidation = 1\n"
            f'[synthesize]\nteacher = "{server.url}/v1"\nmax_parallel = 1\n'
            "[evaluate]\ndialogues = 3\nturns = 3\nsuite_dialogues = 1\n"
        )
        assert call_gatt("instructions", recipe, "--run", run).returncode == 0
        failed = call_gatt("synthesize", recipe, "--run", run)
        assert failed.returncode == 1
        assert "rule.py:ok raised IndexError" in failed.stderr
        assert "Traceback" not in failed.stderr
        before = [row for _, row in read_jsonl(run / "synthesize" / "answers.jsonl")]
        rule.write_text("def ok(reply, dialogue):\n    return dialogue[-1]['role'] == 'user'\n")
        finished = call_gatt("synthesize", recipe, "--run", run)
        assert finished.returncode == 0, finished.stderr
    after = [row for _, row in read_jsonl(run / "synthesize" / "answers.jsonl")]
    assert after[: len(before)] == before and len(after) > len(before)
    names = {row["instruction"] for _, row in read_jsonl(run / "synthesize" / "dialogues.jsonl")}
    assert any("You are Ziggy." in name for name in names) and any("blunt" in n for n in names)


# Evaluation


def _replies(assigned: AssignedDialogue, texts: Sequence[str], arm: str) -> list[Reply]:
    replies: list[Reply] = []

    def request(dialogue: AssignedDialogue, turn: object, answers: list[str]) -> Request:
        return Request(messages=dialogue.student_prompt(answers, ""), seed=0, max_tokens=9)

    rollout = Rollout(arm=arm, max_turns=9, make_request=request, record=replies.append)
    _answering(texts)([rollout.run(assigned)])
    return replies


def test_what_nothing_checks_is_in_no_rate() -> None:
    checked, unchecked = assign_evaluation(
        [Dialogue("a", "sea", QUESTIONS), Dialogue("b", "sea", QUESTIONS)], [], [ZIGGY, BLUNT]
    )
    replies = [
        reply
        for arm, texts in (("base", ["It costs $3.", SALT]), ("tuned", [SEA, SALT]))
        for assigned in (checked, unchecked)
        for reply in _replies(assigned, texts, arm)
    ]
    assert [r.obeys for r in replies] == [False, True, None, None, True, True, None, None]
    scores = compute_scores(replies, {"evaluation": [checked, unchecked]}, ())
    assert [(r.arm, r.at, r.hits, r.n) for r in scores.by_instruction] == [
        ("base", ZIGGY.name, 1, 2),
        ("tuned", ZIGGY.name, 2, 2),
    ]
    assert {(r.at, r.n) for r in scores.by_family} == {("custom", 2)}
    assert scores.unchecked == ("Be blunt.",)
    assert (scores.replies["tuned"].all, scores.replies["tuned"].unchecked) == (4, 2)
    obey = next(row for row in overview(scores, ["base", "tuned"]).rows if "obey" in str(row[0]))
    rates = [(cell.hits, cell.n) for cell in obey if isinstance(cell, Rate)]
    assert rates == [(1, 2), (2, 2)]


def test_a_run_in_which_nothing_is_checked_has_no_rates() -> None:
    (assigned,) = assign_evaluation([Dialogue("a", "sea", QUESTIONS)], [], [BLUNT])
    replies = [r for arm in ("base", "tuned") for r in _replies(assigned, [SEA, SALT], arm)]
    scores = compute_scores(replies, {"evaluation": [assigned]}, ())
    assert (scores.last_five, scores.by_turn, scores.survival) == ((), (), {})
    assert scores.unchecked == ("Be blunt.",) and scores.turns == 2
    labels = [row[0] for row in overview(scores, ["base", "tuned"]).rows]
    assert len(labels) == 4 and all(str(label).startswith("all turns") for label in labels)
    assert headline(scores) == "No instruction has a check."
    assert "No instruction has a check." in adherence_curve((), scores.turns).standalone_svg


def test_assignments_with_custom_instructions_are_read_back(tmp_path: Path) -> None:
    assigned = assign_evaluation([Dialogue("a", "sea", QUESTIONS)], [], [ZIGGY])
    write_splits(tmp_path / "splits.json", {"train": assigned})
    assert read_splits(tmp_path / "splits.json")["train"] == assigned
    assert check_files(tmp_path / "splits.json") == []
    assert check_files(tmp_path / "none.json") == []


@pytest.mark.parametrize(
    ("checks", "verdict", "obeyed"),
    [
        ((), True, [True, True]),
        ((), None, [False, False]),
        ((Constraint("rubric", "Blunt?"), Constraint("regex", "Ziggy says")), True, [True, False]),
        ((Constraint("rubric", "Blunt?"),), False, [False, False]),
    ],
)
def test_a_verdict_counts_together_with_the_checks_of_programs(
    checks: tuple[Constraint, ...],
    verdict: bool | None,
    obeyed: list[bool],
) -> None:
    custom = replace(BLUNT, checks=checks)
    (assigned,) = assign_evaluation([Dialogue("a", "sea", QUESTIONS)], [], [custom])
    assert assigned.needs_judge(0)
    replies = _replies(assigned, [SEA, SALT], "tuned")
    assert [assigned.with_verdict(r, verdict=verdict).obeys for r in replies] == obeyed
