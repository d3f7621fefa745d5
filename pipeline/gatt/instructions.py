"""Instructions: their wordings, and their assignment to dialogues (paper, section 3.3)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle

from pipeline.errors import GattError
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import KINDS, compatible, editable, kind_of
from pipeline.records import Constraint, Dialogue, Instruction


def render_instruction(constraints: tuple[Constraint, ...], wording: int = 0) -> Instruction:
    """Return the instruction that asks for all `constraints`, in the given wording of each."""
    full, short = [], []
    for constraint in constraints:
        kind = kind_of(constraint)
        template = kind.wordings[wording % len(kind.wordings)]
        full.append(_sentence(template.format(v=constraint.value)))
        short.append(_sentence(kind.short.format(v=constraint.value)))
    return Instruction(" ".join(full), " ".join(short), constraints)


def _sentence(text: str) -> str:
    return text if text[-1] in ".!?" else text + "."


def parse_instruction(text: str) -> tuple[Constraint, ...]:
    """Return the constraints that `render_instruction` renders as `text`, or none.

    Any wording is recognized, also the shortened one. Of several readings, the one with the
    shortest values is returned. Kinds that only a judge can check are not recognized.
    """
    readings = _readings(text.strip().replace("“", '"').replace("”", '"'))
    return min(readings, key=_value_length, default=())


def _value_length(constraints: tuple[Constraint, ...]) -> int:
    return sum(len(c.value) for c in constraints)


def _readings(text: str) -> Iterator[tuple[Constraint, ...]]:
    """Yield every way to read `text` as one constraint, or as several after each other."""
    for constraint in _single_readings(text):
        yield (constraint,)
    for gap in re.finditer(r"(?<=[.!?\"])\s+", text):
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
                readings.append(constraint)
    return readings


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Fractions of training dialogues: each of those that the field's comment names."""

    plain: float  # of all dialogues: no instruction
    combine: float  # of the instructed ones: two constraints
    short: float  # of the instructed ones: the shortened wording
    system: float  # of the instructed ones: the instruction is in the system message
    change: float  # of the instructed ones: another instruction replaces the first halfway
    edited: float  # of those that an edit can satisfy: edited, not sampled


def assign_training(
    dialogues: Sequence[Dialogue], pool: Sequence[Constraint], ratios: Ratios, seed: int
) -> list[AssignedDialogue]:
    """Assign an instruction, or none, to every dialogue, evenly over the pool.

    The assignments are equal for equal seeds.
    """
    rng, changes = random.Random(f"pair {seed}"), random.Random(f"harder {seed}")
    pool_turns = cycle(pool)
    assigned: list[AssignedDialogue] = []
    for dialogue in dialogues:
        if rng.random() < ratios.plain:
            assigned.append(AssignedDialogue(dialogue=dialogue))
        else:
            chosen = _combine(next(pool_turns), pool, ratios, rng)
            row = _with_instruction(dialogue, chosen, ratios, rng)
            assigned.append(_with_change(row, chosen, pool, ratios, changes))
    return assigned


def _combine(
    constraint: Constraint, pool: Sequence[Constraint], ratios: Ratios, rng: random.Random
) -> tuple[Constraint, ...]:
    """Return `constraint`, in `ratios.combine` of the cases with a compatible one."""
    partners = [c for c in pool if compatible(constraint, c)]
    if partners and rng.random() < ratios.combine:
        return constraint, rng.choice(partners)
    return (constraint,)


def _with_instruction(
    dialogue: Dialogue, constraints: tuple[Constraint, ...], ratios: Ratios, rng: random.Random
) -> AssignedDialogue:
    """Draw wording, method and shortening. The order of the draws decides them: keep it."""
    instruction = render_instruction(constraints, rng.randrange(3))
    edited = editable(constraints) and rng.random() < ratios.edited
    return AssignedDialogue(
        dialogue=dialogue,
        instruction=instruction,
        method="edited" if edited else "sampled",
        shortened=rng.random() < ratios.short,
    )


def _with_change(
    assigned: AssignedDialogue,
    constraints: tuple[Constraint, ...],
    pool: Sequence[Constraint],
    ratios: Ratios,
    rng: random.Random,
) -> AssignedDialogue:
    """Let the instruction change halfway, or move it to the system message, or do neither.

    The next instruction is obtained by the same method: editable constraints stay editable.
    """
    turns = len(assigned.dialogue.turns)
    candidates = [
        c for c in pool if editable((c,)) == editable(constraints) and c not in constraints
    ]
    draw = rng.random()
    if draw < ratios.change and candidates and turns > 1:
        next_instruction = render_instruction((rng.choice(candidates),), rng.randrange(3))
        return replace(assigned, next_instruction=next_instruction, change_turn=turns // 2)
    if ratios.change <= draw < ratios.change + ratios.system:
        return replace(assigned, in_system=True)
    return assigned


def assign_evaluation(
    dialogues: Sequence[Dialogue], pool: Sequence[Constraint]
) -> list[AssignedDialogue]:
    """Assign the constraints of the pool in turn, one to each dialogue, in their full wording."""
    instructions = [render_instruction((constraint,)) for constraint in dict.fromkeys(pool)]
    return [
        AssignedDialogue(dialogue=dialogue, instruction=instruction)
        for dialogue, instruction in zip(dialogues, cycle(instructions), strict=False)
    ]
