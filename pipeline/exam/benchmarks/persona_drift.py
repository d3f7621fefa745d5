"""persona_drift (Li et al. 2024, arXiv 2402.10962): 100 system prompts, each with a probe.

The file is `hundred_system_prompts.py` of likenneth/persona_drift: lists of (system prompt, probe,
measure). It is parsed, never run: a run would download data. A measure is a function of an answer
with values from 0 to 1; those whose full value is what a check can tell become that check, and the
others (sentiment, word lists from the net) are left out and counted.

The authors let two models chat and ask the probe after each round, without a trace. Here the user
messages are those of the exam, so that every model gets the same ones.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.errors import GattError
from pipeline.exam.benchmarks.base import BenchmarkTask, TurnChecks
from pipeline.exam.tasks import exam_tasks
from pipeline.files import decode_text
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.records import Constraint, Dialogue, Instruction, RecallQuestion

_FORM = "hundred_system_prompts.py of likenneth/persona_drift"
_SUFFIX = "_system_prompts"
_TURNS = 9
"""Eight rounds, and the probe after the last."""


def read(path: Path) -> list[BenchmarkTask]:
    """Return a dialogue for each system prompt; their parts are the lists ("pattern", ...).

    Raises:
        GattError: the file has another form.
    """
    if not path.is_file():
        raise GattError(f"No file at {path}. Expected {_FORM}.")
    try:
        tree = ast.parse(decode_text(path.read_bytes(), path))
    except SyntaxError as error:
        raise GattError(f"{path}, line {error.lineno}: no Python. Expected {_FORM}.") from error
    tasks = [
        task
        for name, entries in _lists(tree)
        for number, entry in enumerate(entries, 1)
        for task in [_task(path, name.removesuffix(_SUFFIX), number, entry)]
    ]
    if not tasks:
        raise GattError(f"{path} has no list that is called ...{_SUFFIX}. Expected {_FORM}.")
    return tasks


def _lists(tree: ast.Module) -> Iterator[tuple[str, list[ast.expr]]]:
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.List(elts=entries)):
                if name.endswith(_SUFFIX):
                    yield name, entries


def _task(path: Path, part: str, number: int, entry: ast.expr) -> BenchmarkTask:
    match entry:
        case ast.Tuple(
            elts=[ast.Constant(str(prompt)), ast.Constant(str(probe)), ast.Lambda() as measure]
        ):
            return _probed(f"{part}-{number:02}", part, prompt, probe, _checks(measure))
        case _:
            raise GattError(
                f"{path}, line {entry.lineno}: expected (system prompt, probe, lambda), as in "
                f"{_FORM}."
            )


def _probed(name: str, part: str, prompt: str, probe: str, checks: TurnChecks) -> BenchmarkTask:
    (filler, *_) = exam_tasks(("first",), 1, _TURNS)
    question = RecallQuestion("probe", probe, "")
    assigned = AssignedDialogue(
        dialogue=Dialogue(name, part, filler.assigned.dialogue.turns),
        instruction=Instruction(prompt, prompt, (), (question,)),
        in_system=True,
    )
    return BenchmarkTask(
        regime=part,
        assigned=assigned,
        system="",
        first_counted=1,
        checks=dict.fromkeys(range(1, _TURNS + 1), checks),
        probed=True,
    )


def _checks(measure: ast.Lambda) -> TurnChecks:
    """Return the checks that hold exactly where the measure has its full value."""
    constraints = _constraints(measure.body)
    return TurnChecks(constraints, 1) if constraints else TurnChecks(unchecked=1)


def _constraints(node: ast.expr) -> tuple[Constraint, ...]:
    match node:
        case ast.BoolOp(op=ast.And(), values=values):
            parts = [_constraints(value) for value in values]
            return tuple(c for part in parts for c in part) if all(parts) else ()
        case ast.BoolOp(op=ast.Or(), values=values):
            patterns = [_contained(value) for value in values]
            return _alternatives(patterns)
        case ast.Compare(left=ast.Constant(str(text)), ops=[ast.NotIn()], comparators=[place]):
            pattern = _pattern(text, place)
            return (Constraint("not_regex", pattern),) if pattern else ()
        case ast.Compare(ops=[ast.In()]):
            return _alternatives([_contained(node)])
        case ast.Call(func=ast.Name(id="any"), args=[ast.GeneratorExp() as each]):
            return _any_of(each)
        case _:
            return _known(node)


def _alternatives(patterns: Sequence[str]) -> tuple[Constraint, ...]:
    return (Constraint("regex", "|".join(patterns)),) if all(patterns) else ()


def _contained(node: ast.expr) -> str:
    """Return the pattern of `"text" in x` or `"text" in x.lower()`, or ""."""
    match node:
        case ast.Compare(left=ast.Constant(str(text)), ops=[ast.In()], comparators=[place]):
            return _pattern(text, place)
        case _:
            return ""


def _pattern(text: str, place: ast.expr) -> str:
    match ast.unparse(place):
        case "x":
            return re.escape(text)
        case "x.lower()":
            return f"(?i:{re.escape(text)})"
        case _:
            return ""


def _any_of(each: ast.GeneratorExp) -> tuple[Constraint, ...]:
    """Return the check of `any(word in x.lower() for word in [...])`, or of its split words."""
    match each:
        case ast.GeneratorExp(
            elt=ast.Compare(left=ast.Name(), ops=[ast.In()], comparators=[place]),
            generators=[ast.comprehension(iter=ast.List(elts=items), ifs=[])],
        ):
            texts = [item.value for item in items if isinstance(item, ast.Constant)]
            if len(texts) < len(items):
                return ()
            words = "|".join(re.escape(str(text)) for text in texts)
            match ast.unparse(place):
                case "x.lower()":
                    return (Constraint("regex", f"(?i){words}"),)
                case "x.lower().split()":
                    return (Constraint("regex", rf"(?i)(?<!\S)(?:{words})(?!\S)"),)
    return ()


def _known(node: ast.expr) -> tuple[Constraint, ...]:
    """Return the checks of a measure that is known by its whole text.

    There are none if a list in it has more than literals.
    """
    source = ast.unparse(node)
    for pattern, make in _MEASURES.items():
        match = re.fullmatch(pattern, source)
        if match:
            try:
                return make(match)
            except (ValueError, SyntaxError):
                return ()
    return ()


def _listed(match: re.Match[str]) -> list[str]:
    return [str(word) for word in ast.literal_eval(match["list"])]


def _text(match: re.Match[str]) -> str:
    return str(ast.literal_eval(match["text"]))


def _can_be_hit(word: str) -> bool:
    """Return whether the measure can see a word: it looks for it among words in lowercase."""
    return word == word.lower() and len(word.split()) == 1


_LIST, _TEXT = r"(?P<list>\[.*\])", r"(?P<text>'[^']*'|\"[^\"]*\")"
_MEASURES: dict[str, Callable[[re.Match[str]], tuple[Constraint, ...]]] = {
    rf"fraction_starts_with\(x, {_TEXT}\)": lambda m: (
        Constraint("regex", rf"(?i)\A{re.escape(_text(m))}"),
    ),
    rf"1 / \(1 \+ x\.count\({_TEXT}\)\)": lambda m: (Constraint("not_regex", re.escape(_text(m))),),
    r"len\(split_into_sentences\(x\)\) == 1": lambda m: (Constraint("one_sentence"),),
    r"fraction_of_case_letters\(x, is_upper=True\)": lambda m: (Constraint("uppercase"),),
    r"fraction_of_case_letters\(x, is_upper=False\)": lambda m: (Constraint("lowercase"),),
    r"fraction_non_letter\(x\)": lambda m: (Constraint("not_regex", r"[^\W\d_]"),),
    r"fraction_digit\(x\)": lambda m: (Constraint("regex", r"\A\d+\Z"),),
    r"count_num_words\(x\)": lambda m: (Constraint("regex", r"\A\s*(?:\S+\s+){9}\S+\s*\Z"),),
    r"count_num_words_one\(x\)": lambda m: (Constraint("regex", r"\A\s*\S+\s*\Z"),),
    rf"x\.split\(\)\[0\] == {_TEXT}": lambda m: (
        Constraint("regex", rf"\A\s*{re.escape(_text(m))}(?!\S)"),
    ),
    rf"does_not_contain\(x, {_LIST}\)": lambda m: tuple(
        Constraint("forbidden", word) for word in _listed(m)
    ),
    rf"fraction_of_target_words_hit\(x, {_LIST}\)": lambda m: tuple(
        Constraint("keyword", word) for word in _listed(m) if all(map(_can_be_hit, _listed(m)))
    ),
    rf"1 - fraction_of_target_words_hit\(x, {_LIST}\)": lambda m: tuple(
        Constraint("forbidden", word) for word in _listed(m) if _can_be_hit(word)
    ),
    r"get_french_percentage\(x\)": lambda m: (Constraint("language", "French"),),
    r"is_valid_json_format\(x\)": lambda m: (
        Constraint("regex", r'\{"thought":.*, "response":.*\}'),
    ),
}
"""The checks of the measures of `_FORM` by their source, as `ast.unparse` writes it."""
