"""Suites that measure more than the trained instructions; each is a list of assigned dialogues.

`unseen_values`: trained kinds with values that are held out. `unseen`: the recipe's instructions
that are not trained. `combined`: two or three trained constraints at once. `change`: another
instruction replaces the first halfway, which the paper leaves open. `stop`: the user ends it
halfway. `contradiction`: the user contradicts the system message halfway. In these three,
instructions in the user's own words take turns with the others, if a plain answer does not pass
their checks. `plain`: no instruction, where no trained trait may show. `recall`: attributes are set
in turn 1 and asked for later (Table 30 of the paper). `single`: one question with one instruction,
as in IFEval (Zhou et al. 2023), to see what training has degraded.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, zip_longest
from typing import NamedTuple

from pipeline.gatt.assign import (
    EVALUATION_STOP,
    ConstraintPool,
    PoolEntry,
    assign_evaluation,
    spread,
    stop,
    unseen_values,
)
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.bake import with_prompt
from pipeline.gatt.constraints.registry import KINDS, compatible, is_judged, shows_obedience
from pipeline.gatt.ghost import CHANGE_PREFIX
from pipeline.gatt.instructions import instruction_of, render_instruction
from pipeline.gatt.text import words
from pipeline.gatt.vocabulary.attributes import evaluation_attributes
from pipeline.records import Constraint, CustomInstruction, Dialogue, Instruction

PAPER_RECALL = {"without GAtt": (1.0, 0.1, 0.0, 0.0), "with GAtt": (1.0, 1.0, 1.0, 1.0)}
"""Table 30: the share of attributes recalled in each of `RECALL_TURNS`, judged by people."""
PAPER_ATTRIBUTES = ("name", "hobby")
"""The attributes of Table 30."""
_FURTHER_ATTRIBUTES = ("town", "job", "pet", "food", "color")
"""One of these is asked for in each dialogue, too; the last one is never trained."""
_SINGLE = 7
"""Kinds for each dialogue's first question; the recipe's six dialogues cover all kinds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteSettings:
    """What the suites are built from: `trained` has the constraints of training, each once.

    `custom` are the instructions of training in the user's own words. Dialogues are cut to `turns`,
    those of recall and of unseen values to `full_turns`.
    """

    pool: ConstraintPool
    trained: Sequence[Constraint]
    unseen: Sequence[Constraint]
    turns: int
    full_turns: int
    seed: int
    custom: Sequence[CustomInstruction] = ()


def build_suites(
    dialogues: Sequence[Dialogue],
    settings: SuiteSettings,
    recall: Sequence[Dialogue] | None = None,
    further: Sequence[Dialogue] = (),
) -> dict[str, list[AssignedDialogue]]:
    """Return the further suites over `dialogues`, and that of recall over `recall`, if given.

    Where there are more kinds that are not trained, or with new values, than `dialogues`, some of
    `further` are added, so that each is measured. No new value has a word of a trained one.

    Of `settings.unseen`, what is trained is left out. The ids of dialogues end with the suite's
    name, so that replies of different suites have different keys. `recall` may have a dialogue
    several times; each gets other attributes.
    """
    kinds, trained = settings.pool.vocabulary_kinds, set(map(_folded, settings.trained))
    avoided = {word for constraint in settings.trained for word in words(constraint.value)}
    new_values = unseen_values(kinds, max(len(dialogues), len(kinds)), settings.seed, avoided)
    new = [c for c in settings.unseen if _folded(c) not in trained]
    shown = spread([c for c in settings.trained if shows_obedience(c)])
    # Where a plain answer obeys as well, nothing can be seen of what the user has ended. A judge
    # is only asked about the instruction that holds.
    visible = [c for c in shown if not is_judged((c,))]
    entries = {
        place: _in_turn(visible, [c for c in settings.custom if c.place == place and _shows(c)])
        for place in ("first", "system")
    }
    suites = {
        "unseen_values": _each(new_values, dialogues, further),
        "unseen": _each(new, dialogues, further),
        "combined": _combined(dialogues, shown),
        "change": _changing(dialogues, entries["first"], settings.turns),
        "stop": _stopping(dialogues, entries["first"], settings.turns),
        "contradiction": _contradicting(dialogues, entries["system"], settings.turns),
        "plain": [AssignedDialogue(dialogue=dialogue) for dialogue in dialogues],
        "recall": _recall(dialogues if recall is None else recall, settings.seed, avoided),
        "single": _single(dialogues),
    }
    full = settings.full_turns
    lengths = {"recall": full, "unseen_values": full, "single": 1}
    return {
        name: _named(name, lengths.get(name, settings.turns), suite)
        for name, suite in suites.items()
    }


def build_baked_suites(
    dialogues: Sequence[Dialogue],
    recalled: Instruction | None,
    recall: Sequence[Dialogue],
    *,
    turns: int,
    full_turns: int,
    plain: bool,
) -> dict[str, list[AssignedDialogue]]:
    """Return the further suites for a baked prompt: which name the model gives, and what was lost.

    `recalled` is the prompt with a question about the name, if it has one; the dialogues of
    `recall` ask it. `plain` adds dialogues with another system message.
    """
    suites = {
        "plain": [AssignedDialogue(dialogue=d) for d in dialogues] if plain else [],
        "recall": [with_prompt(d, recalled) for d in recall] if recalled else [],
        "single": _single(dialogues),
    }
    lengths = {"plain": turns, "recall": full_turns, "single": 1}
    return {name: _named(name, lengths[name], suite) for name, suite in suites.items()}


def _single(dialogues: Sequence[Dialogue]) -> list[AssignedDialogue]:
    """Return each dialogue's first question once for each of `_SINGLE` kinds."""
    kinds = _every_kind()[: _SINGLE * len(dialogues)]
    return [
        AssignedDialogue(
            dialogue=replace(dialogue, id=f"{dialogue.id}.{constraint.kind}"),
            instruction=render_instruction((constraint,)),
        )
        for constraint, dialogue in zip(kinds, cycle(dialogues), strict=False)
    ]


def _every_kind() -> list[Constraint]:
    return [Constraint(name, kind.values[0]) for name, kind in KINDS.items() if not kind.judged]


def _folded(constraint: Constraint) -> tuple[str, str]:
    return constraint.kind, constraint.value.casefold()


def _each(
    constraints: Sequence[Constraint], dialogues: Sequence[Dialogue], further: Sequence[Dialogue]
) -> list[AssignedDialogue]:
    """Assign the constraints, to as many dialogues as they have kinds where that is more."""
    kinds = {constraint.kind for constraint in constraints}
    if not (kinds and dialogues):
        return []
    size = max(len(dialogues), len(kinds))
    return assign_evaluation([*dialogues, *further][:size], constraints)


def _recall(
    dialogues: Sequence[Dialogue], seed: int, avoided: Collection[str]
) -> list[AssignedDialogue]:
    """Return dialogues with the paper's attributes and a further one, in wordings by turns."""
    return [
        AssignedDialogue(
            dialogue=dialogue,
            instruction=evaluation_attributes(
                (*PAPER_ATTRIBUTES, _FURTHER_ATTRIBUTES[n % len(_FURTHER_ATTRIBUTES)]),
                seed=f"recall {seed} {n}",
                wording=n,
                avoided=avoided,
            ),
        )
        for n, dialogue in enumerate(dialogues)
    ]


def _combined(
    dialogues: Sequence[Dialogue], constraints: Sequence[Constraint]
) -> list[AssignedDialogue]:
    """Return dialogues with two and, every other one, three compatible constraints.

    Pairs of kinds come in turn, however many values each has. There are none where no two are
    compatible, and only two where no third is.
    """
    by_kinds: dict[tuple[str, str], list[tuple[Constraint, Constraint]]] = {}
    for n, first in enumerate(constraints):
        for second in constraints[n + 1 :]:
            if compatible(first, second):
                low, high = sorted((first.kind, second.kind))
                by_kinds.setdefault((low, high), []).append((first, second))
    rng = random.Random("combined")
    kinds = list(by_kinds)
    rng.shuffle(kinds)
    pairs = (rng.choice(by_kinds[pair]) for pair in cycle(kinds))
    return [
        AssignedDialogue(
            dialogue=dialogue,
            instruction=render_instruction(
                _with_third(pair, constraints, rng) if number % 2 else pair
            ),
        )
        for number, (dialogue, pair) in enumerate(zip(dialogues, pairs, strict=False))
    ]


def _with_third(
    pair: tuple[Constraint, ...], constraints: Sequence[Constraint], rng: random.Random
) -> tuple[Constraint, ...]:
    """Return `pair` with one of the constraints that are compatible with both, if there is any."""
    thirds = [c for c in constraints if all(compatible(c, other) for other in pair)]
    if not thirds:
        return pair
    kind = rng.choice(list(dict.fromkeys(c.kind for c in thirds)))
    return (*pair, rng.choice([c for c in thirds if c.kind == kind]))


def _shows(custom: CustomInstruction) -> bool:
    """Return whether programs can see that the instruction is followed."""
    return not is_judged(custom.checks) and any(map(shows_obedience, custom.checks))


def _in_turn(
    constraints: Sequence[Constraint], custom: Sequence[CustomInstruction]
) -> list[PoolEntry]:
    pairs = zip_longest(constraints, custom)
    return [entry for pair in pairs for entry in pair if entry]


class _Event(NamedTuple):
    """A dialogue, its instruction, another one for halfway, and its number among those like it."""

    dialogue: Dialogue
    instruction: Instruction
    other: Instruction | None
    number: int


def _events(
    dialogues: Sequence[Dialogue], entries: Sequence[PoolEntry], turns: int
) -> list[_Event]:
    """Return an event for each dialogue, half of the entries apart; none without a later turn."""
    if turns < 2 or not entries:
        return []
    instructions, size = [instruction_of(entry) for entry in entries], len(entries)
    numbers: Counter[bool] = Counter()
    events = []
    for n, dialogue in enumerate(dialogues):
        other = instructions[(n + max(1, size // 2)) % size] if size > 1 else None
        is_custom = isinstance(entries[n % size], CustomInstruction)
        events.append(_Event(dialogue, instructions[n % size], other, numbers[is_custom]))
        numbers[is_custom] += 1
    return events


def _changing(
    dialogues: Sequence[Dialogue], entries: Sequence[PoolEntry], turns: int
) -> list[AssignedDialogue]:
    """Return dialogues whose instruction changes halfway."""
    return [
        AssignedDialogue(
            dialogue=event.dialogue,
            instruction=event.instruction,
            next_instruction=event.other,
            change_turn=turns // 2,
        )
        for event in _events(dialogues, entries, turns)
        if event.other
    ]


def _stopping(
    dialogues: Sequence[Dialogue], entries: Sequence[PoolEntry], turns: int
) -> list[AssignedDialogue]:
    """Return dialogues whose instruction the user ends halfway."""
    return [
        AssignedDialogue(
            dialogue=event.dialogue,
            instruction=event.instruction,
            next_instruction=stop(EVALUATION_STOP),
            change_turn=turns // 2,
        )
        for event in _events(dialogues, entries, turns)
    ]


def _contradicting(
    dialogues: Sequence[Dialogue], entries: Sequence[PoolEntry], turns: int
) -> list[AssignedDialogue]:
    """Return dialogues in which the user halfway ends or replaces what the system message says."""
    return [
        AssignedDialogue(
            dialogue=event.dialogue,
            instruction=event.instruction,
            in_system=True,
            contradiction=EVALUATION_STOP
            if event.number % 2 or not event.other
            else CHANGE_PREFIX + event.other.text,
            change_turn=turns // 2,
        )
        for event in _events(dialogues, entries, turns)
    ]


def _named(suite: str, turns: int, dialogues: Sequence[AssignedDialogue]) -> list[AssignedDialogue]:
    """Return the dialogues of a suite, cut to `turns`, with ids of their own."""
    copies: Counter[str] = Counter()
    named = []
    for assigned in dialogues:
        dialogue = assigned.dialogue
        copies[dialogue.id] += 1
        copy = copies[dialogue.id]
        name = f"{dialogue.id}~{suite}" + (f".{copy}" if copy > 1 else "")
        cut = replace(dialogue, id=name, turns=dialogue.turns[:turns])
        named.append(replace(assigned, dialogue=cut))
    return named
