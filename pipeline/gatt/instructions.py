"""Which dialogue gets which instruction: wording, combination, shortening (paper, section 3.3)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

from pipeline.errors import GattError
from pipeline.gatt.constraints.registry import KINDS, compatible, editable, kind_of
from pipeline.records import Assignment, Constraint, Dialogue, Instruction, SynthesisMethod


def render_instruction(constraints: tuple[Constraint, ...], wording: int = 0) -> Instruction:
    """The instruction that asks for all of `constraints`, in the given wording of each."""
    texts = [
        k.wordings[wording % len(k.wordings)].format(v=c.value)
        for c in constraints
        for k in [kind_of(c)]
    ]
    shorts = [kind_of(c).short.format(v=c.value) for c in constraints]
    name = "+".join(f"{c.kind}={c.value}" for c in constraints)
    return Instruction(
        f"{name}#{wording}",
        " ".join(map(_sentence, texts)),
        " ".join(map(_sentence, shorts)),
        constraints,
    )


def _sentence(text: str) -> str:
    return text if text[-1] in ".!?" else text + "."


def parse_instruction(text: str) -> tuple[Constraint, ...]:
    """The constraints that `render_instruction` words as `text`, in any wording or shortened; none where they are not all known.

    Where a wording can be read in two ways, that with the shortest values is taken. Kinds that only a judge can check count
    as not known.
    """
    return min(_readings(text.strip().replace("“", '"').replace("”", '"')), key=_said, default=())


def _said(constraints: tuple[Constraint, ...]) -> int:
    return sum(len(c.value) for c in constraints)


def _readings(text: str) -> Iterator[tuple[Constraint, ...]]:
    yield from ((c,) for c in _single(text))
    for gap in re.finditer(r"(?<=[.!?\"])\s+", text):
        rest = (
            []
            if not (first := _single(text[: gap.start()]))
            else list(_readings(text[gap.end() :]))
        )
        yield from ((c, *more) for c in first for more in rest)


def _single(text: str) -> list[Constraint]:
    found = []
    for name, wording in _wordings():
        if match := wording.fullmatch(text):
            constraint = Constraint(name, match.groupdict().get("v", ""))
            with suppress(
                GattError
            ):  # a value that the kind does not take: another reading may be the right one
                kind_of(constraint)
                found.append(constraint)
    return found


@cache
def _wordings() -> list[tuple[str, re.Pattern[str]]]:
    """Every wording of a kind with a check, as a pattern whose group "v" is the value."""
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


def table_of_kinds() -> str:
    """The kinds as a table. "edited": an answer can be edited to obey; "sampled": answers are drawn until one obeys."""
    examples = [Constraint(name, kind.values[0]) for name, kind in KINDS.items()]
    rows = [("kind", "family", "way", "example")] + [
        (
            c.kind,
            kind_of(c).family,
            "edited" if editable((c,)) else "sampled",
            render_instruction((c,)).text,
        )
        for c in examples
    ]
    return "\n".join(f"{name:14} {family:9} {way:8} {text}" for name, family, way, text in rows)


@dataclass(frozen=True, slots=True)
class Ratios:
    """Of all training dialogues: `plain` ones have no instruction, `system` ones have it in the system message, and in
    `change` ones it changes half-way. Of the instructions: those that `combine` two constraints, and those that are
    shown `short`. Of those that can be obeyed by an edit: the `edited` ones.
    """

    plain: float
    system: float
    change_turn: float
    combine: float
    short: float
    edited: float


def assign_training(
    dialogues: Sequence[Dialogue], pool: Sequence[Constraint], shares: Ratios, seed: int
) -> tuple[dict[str, Instruction], list[Assignment]]:
    """Give every dialogue an instruction, or none, evenly over the pool; the same seed gives the same pairs."""
    rng, harder = random.Random(f"pair {seed}"), random.Random(f"harder {seed}")
    made: dict[str, Instruction] = {}
    pairs: list[Assignment] = []
    turn = 0
    for dialogue in dialogues:
        if rng.random() < shares.plain:
            pairs.append(Assignment(dialogue.id, None, "plain"))
            continue
        chosen: tuple[Constraint, ...] = (pool[turn % len(pool)],)
        turn += 1
        partners = [c for c in pool if compatible(chosen[0], c)]
        if partners and rng.random() < shares.combine:
            chosen = (*chosen, rng.choice(partners))
        instruction = render_instruction(chosen, rng.randrange(3))
        made[instruction.id] = instruction
        method: SynthesisMethod = (
            "edited" if editable(chosen) and rng.random() < shares.edited else "sampled"
        )
        pair = Assignment(dialogue.id, instruction.id, method, rng.random() < shares.short)
        others = [c for c in pool if editable((c,)) == editable(chosen) and c not in chosen]
        which = harder.random()
        if which < shares.change_turn and others and len(dialogue.turns) > 1:
            then = render_instruction((harder.choice(others),), harder.randrange(3))
            made[then.id] = then
            pair = replace(pair, next_instruction=then.id, change_turn=len(dialogue.turns) // 2)
        elif shares.change_turn <= which < shares.change_turn + shares.system:
            pair = replace(pair, in_system=True)
        pairs.append(pair)
    return made, pairs


def assign_evaluation(
    dialogues: Sequence[Dialogue], pool: Sequence[Constraint]
) -> tuple[dict[str, Instruction], list[Assignment]]:
    """One constraint of the pool for each dialogue, in turn, in its full wording."""
    made = {i.id: i for i in (render_instruction((c,)) for c in pool)}
    ids = list(made)
    return made, [Assignment(d.id, ids[n % len(ids)], "plain") for n, d in enumerate(dialogues)]
