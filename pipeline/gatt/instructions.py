"""Instructions: render constraints as text, and parse that text back (paper, section 3.3)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache

from pipeline.errors import GattError
from pipeline.gatt.constraints.registry import KINDS, editable, kind_of, prepare
from pipeline.records import Constraint, CustomInstruction, Instruction

_GAP = re.compile(r"(?<=[.!?\"”])\s+")
_BULLET = re.compile(r"\s*([-*•]|\d+[.)])\s+")
_FIELD = re.compile(r"languages?:.*", re.IGNORECASE)
"""A field of a character card: "Language: French" says what the character speaks."""
_CONDITION = re.compile(
    r"(?!(?:for|in|on) (?:all|any|each|every|your)\b)"
    r"(?:after|during|for|if|in|on|unless|when|while)\b.*:",
    re.IGNORECASE,
)
"""A line whose items hold in some answers only."""
_LONGEST_WORDING = 3
"""Sentences of a wording, counted with those in a quoted value."""


def render_instruction(constraints: tuple[Constraint, ...], wording: int = 0) -> Instruction:
    """Return the instruction that asks for all `constraints`, in the given wording of each."""
    full, short = [], []
    for constraint in constraints:
        kind = kind_of(constraint)
        template = kind.wordings[wording % len(kind.wordings)]
        full.append(_sentence(template.format(v=constraint.value)))
        short.append(_sentence(kind.short.format(v=constraint.value)))
    return Instruction(" ".join(full), " ".join(short), constraints)


def custom_instruction(custom: CustomInstruction) -> Instruction:
    """Return an instruction in the user's own words; without a short wording both are the same."""
    return Instruction(custom.text, custom.short or custom.text, custom.checks, label=custom.name)


def instruction_of(entry: Constraint | CustomInstruction) -> Instruction:
    """Return the instruction of an entry of the pool."""
    if isinstance(entry, Constraint):
        return render_instruction((entry,))
    return custom_instruction(entry)


def prepare_checks(custom: Iterable[CustomInstruction]) -> None:
    """Make the checks of instructions ready.

    Raises:
        GattError: as `registry.prepare`; the message names the instruction.
    """
    for instruction in custom:
        for check in instruction.checks:
            try:
                prepare(check)
            except GattError as error:
                raise GattError(f"The instruction {instruction.name!r}: {error}") from error


def _sentence(text: str) -> str:
    return text if text[-1] in ".!?" else text + "."


def parse_instruction(text: str) -> tuple[Constraint, ...]:
    """Return the constraints that `render_instruction` renders as `text`, or none.

    Any wording is recognized, also the shortened one. Of several readings, the one with the
    shortest values is returned. Kinds that only a judge can check are not recognized.
    """
    readings = _readings(text.strip().replace("“", '"').replace("”", '"'))
    return min(readings, key=_value_length, default=())


def find_constraints(text: str) -> tuple[Constraint, ...]:
    """Return the constraints of a prompt's sentences that `parse_instruction` reads, each once.

    All other sentences are passed over, so are fields of a card, and items under a condition.
    """
    constraints: dict[Constraint, None] = {}
    for line in _unconditional_lines(text):
        sentences = _GAP.split(line)
        while sentences:
            sizes = () if _FIELD.fullmatch(sentences[0]) else range(1, _LONGEST_WORDING + 1)
            beginnings = [sentences[:size] for size in sizes]
            readings = ((len(b), parse_instruction(" ".join(b))) for b in beginnings)
            size, reading = next((r for r in readings if r[1]), (1, ()))
            sentences = sentences[size:]
            if not (sentences and sentences[0].startswith("or ")):  # one value of several
                constraints |= dict.fromkeys(reading)
    return tuple(constraints)


def _unconditional_lines(text: str) -> Iterator[str]:
    """Yield the lines that may hold for every answer, without their bullets.

    Items below a condition do not; those of a condition that is an item itself are indented.
    """
    indent_of_items: int | None = None
    for line in filter(str.strip, text.splitlines()):
        item, is_item = _BULLET.sub("", line, count=1).strip(), _BULLET.match(line) is not None
        indent = len(line) - len(line.lstrip())
        if indent_of_items is not None and is_item and indent >= indent_of_items:
            continue
        is_condition = _CONDITION.fullmatch(item) is not None
        indent_of_items = indent + is_item if is_condition else None
        if not is_condition:
            yield item


def _value_length(constraints: tuple[Constraint, ...]) -> int:
    return sum(len(c.value) for c in constraints)


def _readings(text: str) -> Iterator[tuple[Constraint, ...]]:
    """Yield every way to read `text` as one constraint, or as several after each other."""
    for constraint in _single_readings(text):
        yield (constraint,)
    for gap in _GAP.finditer(text):
        if first := _single_readings(text[: gap.start()]):
            for rest in list(_readings(text[gap.end() :])):
                yield from ((constraint, *rest) for constraint in first)


def _single_readings(text: str) -> list[Constraint]:
    readings = []
    for name, wording in _wordings():
        if match := wording.fullmatch(text):
            constraint = Constraint(name, match.groupdict().get("v", ""))
            # Where the kind does not accept the value, another wording may be the right one.
            with suppress(GattError):
                kind_of(constraint)
                if _is_one_value(constraint):
                    readings.append(constraint)
    return readings


def _is_one_value(constraint: Constraint) -> bool:
    """Return whether a value that was read from a sentence is one, and not several or a remark."""
    if constraint.kind == "initial":
        return re.fullmatch(r"\w{1,3}", constraint.value) is not None
    if constraint.kind == "hashtag":
        return not re.search(r"\s", constraint.value)
    return '"' not in constraint.value


@cache
def _wordings() -> list[tuple[str, re.Pattern[str]]]:
    """Return every wording of the kinds with a check, as a pattern whose group "v" is the value."""
    return [
        (name, re.compile(_pattern(wording), re.IGNORECASE))
        for name, kind in KINDS.items()
        if not kind.judged
        for wording in (*kind.wordings, kind.short)
    ]


def _pattern(wording: str) -> str:
    first, *more = map(re.escape, wording.rstrip(".").split("{v}"))
    value = [r"(?P<v>.+?)", *[r"(?P=v)"] * (len(more) - 1)]
    return first + "".join(v + part for v, part in zip(value, more, strict=False)) + r"\.?"


def kinds_table() -> list[tuple[str, str, str, str]]:
    """Return kind, family, method and an example of every kind of instruction.

    "edited": an answer can be edited to obey; "sampled": answers are sampled until one obeys.
    """
    examples = [Constraint(name, kind.values[0]) for name, kind in KINDS.items()]
    return [
        (
            constraint.kind,
            kind_of(constraint).family,
            "edited" if editable((constraint,)) else "sampled",
            render_instruction((constraint,)).text,
        )
        for constraint in examples
    ]
