"""Assign instructions to dialogues, for training and for evaluation (paper, section 3.3)."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, cycle, islice, zip_longest
from typing import NamedTuple

from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import (
    compatible,
    editable,
    is_judged,
    shows_obedience,
)
from pipeline.gatt.ghost import CHANGE_PREFIX
from pipeline.gatt.instructions import custom_instruction, instruction_of, render_instruction
from pipeline.gatt.vocabulary.attributes import training_attributes
from pipeline.gatt.vocabulary.values import draw_value, without_words
from pipeline.records import Constraint, CustomInstruction, Dialogue, Instruction

_STOPS = (
    "You no longer need to do that.",
    "Forget what I asked for at the beginning and answer normally.",
    "You can stop that now.",
    "From now on, answer without it again.",
    "That is enough; please answer as usual.",
)
"""How training ends an instruction; `EVALUATION_STOP` is another wording."""
EVALUATION_STOP = "You no longer have to follow my instruction."
"""How evaluation ends an instruction."""
_MAX_COMBINED = 3
"""Constraints that an instruction combines at most."""
_MAX_ATTRIBUTES = 3
"""Attributes that an instruction sets at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Fractions of training dialogues: each of those that the field's comment names."""

    plain: float  # of all dialogues: no instruction
    recall: float  # of the others: attributes are set, and asked for later
    combine: float  # of the instructed ones: two or three constraints
    short: float  # of the instructed ones: the shortened wording
    system: float  # of the instructed ones: the instruction is in the system message
    contradict: float  # of those in the system message: the user contradicts it
    change: float  # of the instructed ones: another instruction replaces the first
    stop: float  # of the instructed ones: the user ends the instruction
    edited: float  # of those that an edit can satisfy: edited, not sampled


PoolEntry = Constraint | CustomInstruction


class ConstraintPool(NamedTuple):
    """What is trained: constraints, kinds whose values `draw_value` draws, and custom instructions.

    The latter are in the user's own words. `vocabulary_ratio` is the share of what is drawn.
    """

    constraints: Sequence[Constraint]
    vocabulary_kinds: Sequence[str] = ()
    custom: Sequence[CustomInstruction] = ()
    vocabulary_ratio: float = 0.5

    @property
    def listed(self) -> Sequence[PoolEntry]:
        """Return everything that is not drawn from the vocabulary."""
        return [*self.custom, *self.constraints]

    def draw(self, rng: random.Random) -> PoolEntry:
        """Return anything."""
        if self.vocabulary_kinds and (not self.listed or rng.random() < self.vocabulary_ratio):
            kind = rng.choice(self.vocabulary_kinds)
            return Constraint(kind, draw_value(kind, "train", rng))
        return rng.choice(self.listed)

    def in_turn(self, rng: random.Random) -> Iterator[PoolEntry]:
        """Yield entries without end: `vocabulary_ratio` of them drawn, the others in turn."""
        kinds, listed = cycle(self.vocabulary_kinds), cycle(self.listed)
        ratio = self.vocabulary_ratio if self.listed else 1.0
        due = 0.5
        while True:
            due += ratio if self.vocabulary_kinds else 0.0
            if due >= 1:
                due -= 1
                kind = next(kinds)
                yield Constraint(kind, draw_value(kind, "train", rng))
            else:
                yield next(listed)


def assign_training(
    dialogues: Sequence[Dialogue], pool: ConstraintPool, ratios: Ratios, seed: int
) -> list[AssignedDialogue]:
    """Assign an instruction, or none, to every dialogue, evenly over the pool.

    Every custom instruction gets a dialogue, if there are enough. The assignments are equal for
    equal seeds.
    """
    return _TrainingDraw(pool, ratios, seed).assign(dialogues)


class _TrainingDraw:
    """The random draws of training; the order of the draws decides them."""

    def __init__(self, pool: ConstraintPool, ratios: Ratios, seed: int) -> None:
        self._pool, self._ratios = pool, ratios
        self._rng = random.Random(f"pair {seed}")
        self._in_turn = pool.in_turn(self._rng)

    def assign(self, dialogues: Sequence[Dialogue]) -> list[AssignedDialogue]:
        assigned = [self._assign(dialogue) for dialogue in dialogues]
        present = {a.instruction for a in assigned}
        others = [n for n, a in enumerate(assigned) if not a.is_custom]
        for custom in self._pool.custom:
            if others and custom_instruction(custom) not in present:
                number = others.pop()
                assigned[number] = self._with_custom(dialogues[number], custom)
        return assigned

    def _assign(self, dialogue: Dialogue) -> AssignedDialogue:
        if self._happens(self._ratios.plain):
            return AssignedDialogue(dialogue=dialogue)
        if len(dialogue.turns) > 1 and self._happens(self._ratios.recall):
            return self._with_attributes(dialogue)
        return self._with_instruction(dialogue)

    def _happens(self, ratio: float) -> bool:
        return self._rng.random() < ratio

    def _with_attributes(self, dialogue: Dialogue) -> AssignedDialogue:
        """Set attributes in turn 1, and put a question about each in place of a later turn."""
        turns = list(dialogue.turns)
        count = self._rng.randint(1, min(_MAX_ATTRIBUTES, len(turns) - 1))
        instruction, questions = training_attributes(count, self._rng)
        positions = sorted(self._rng.sample(range(1, len(turns)), count))
        by_position = dict(zip(positions, self._rng.sample(questions, count), strict=True))
        for position, pair in by_position.items():
            turns[position] = pair.question
        return AssignedDialogue(
            dialogue=replace(dialogue, turns=tuple(turns)),
            instruction=instruction,
            method="edited",
            in_system=self._happens(self._ratios.system),
            exact_answers={position: pair.answer for position, pair in by_position.items()},
        )

    def _with_instruction(self, dialogue: Dialogue) -> AssignedDialogue:
        entry = next(self._in_turn)
        if isinstance(entry, CustomInstruction):
            return self._with_custom(dialogue, entry)
        constraints = self._combined(entry)
        edited = editable(constraints) and self._happens(self._ratios.edited)
        assigned = AssignedDialogue(
            dialogue=dialogue,
            instruction=render_instruction(constraints, self._rng.randrange(3)),
            method="edited" if edited else "sampled",
            shortened=self._happens(self._ratios.short),
            in_system=self._happens(self._ratios.system),
            change_turn=self._rng.randrange(1, max(2, len(dialogue.turns))),
        )
        return self._with_event(assigned) if len(dialogue.turns) > 1 else assigned

    def _with_custom(self, dialogue: Dialogue, custom: CustomInstruction) -> AssignedDialogue:
        """Give an instruction as it is: no edit can meet all that a text may ask for."""
        assigned = AssignedDialogue(
            dialogue=dialogue,
            instruction=custom_instruction(custom),
            method="sampled",
            shortened=bool(custom.short) and self._happens(self._ratios.short),
            in_system=custom.place == "system",
            change_turn=self._rng.randrange(1, max(2, len(dialogue.turns))),
        )
        return self._with_event(assigned) if len(dialogue.turns) > 1 else assigned

    def _combined(self, first: Constraint) -> tuple[Constraint, ...]:
        """Return `first`, in `ratios.combine` of the cases with one or two compatible ones."""
        chosen = [first]
        if self._happens(self._ratios.combine):
            count = self._rng.randint(2, _MAX_COMBINED)
            # A draw that does not combine is left out; the pool may have none that does.
            for candidate in self._candidates(4 * count):
                if isinstance(candidate, CustomInstruction):
                    continue
                if len(chosen) < count and all(compatible(candidate, c) for c in chosen):
                    chosen.append(candidate)
        return tuple(chosen)

    def _candidates(self, count: int) -> Iterator[PoolEntry]:
        return (self._pool.draw(self._rng) for _ in range(count))

    def _with_event(self, assigned: AssignedDialogue) -> AssignedDialogue:
        """Let the user replace, end or contradict the instruction, or do none of these.

        What the user says against an instruction in the system message does not hold. The next
        instruction is obtained by the same method: editable constraints stay editable. The user's
        own words are replaced or ended only where a check shows whether an answer still follows
        them: a teacher that has followed them goes on.
        """
        ratios = self._ratios
        if assigned.in_system:
            if self._happens(ratios.contradict):
                return replace(assigned, contradiction=self._contradiction(assigned))
            return assigned
        draw = self._rng.random()
        checks = [c for c in assigned.constraints(0) if not is_judged((c,))]
        if assigned.is_custom and not any(map(shows_obedience, checks)):
            return assigned
        if draw < ratios.change:
            return replace(assigned, next_instruction=self._other_instruction(assigned))
        if draw < ratios.change + ratios.stop:
            return replace(assigned, next_instruction=stop(self._rng.choice(_STOPS)))
        return assigned

    def _contradiction(self, assigned: AssignedDialogue) -> str:
        other = self._other_instruction(assigned)
        if other is None or self._rng.random() < 0.5:
            return self._rng.choice(_STOPS)
        return f"{CHANGE_PREFIX}{other.text}"

    def _other_instruction(self, assigned: AssignedDialogue) -> Instruction | None:
        """Return an instruction with another constraint, or None if the pool has no other."""
        present = assigned.constraints(0)
        for candidate in self._candidates(20):
            if isinstance(candidate, CustomInstruction):
                if _may_replace(candidate, assigned):
                    return custom_instruction(candidate)
            elif assigned.is_custom or (
                candidate not in present and editable((candidate,)) == editable(present)
            ):
                # The third wording says "From now on" itself.
                return render_instruction((candidate,), self._rng.randrange(2))
        return None


def _may_replace(custom: CustomInstruction, assigned: AssignedDialogue) -> bool:
    """Return whether a user could say `custom` halfway; its answers have to be sampled."""
    assert assigned.instruction
    is_other = custom.text != assigned.instruction.text
    return is_other and assigned.method == "sampled" and custom.place == "first"


def stop(wording: str) -> Instruction:
    """Return the instruction that only ends another one, in the words of the user."""
    return Instruction("", wording, ())


def trained_constraints(training: Sequence[AssignedDialogue]) -> list[Constraint]:
    """Return the constraints of training in the order of their first use, each once."""
    return list(dict.fromkeys(c for d in training for c in d.constraints(0)))


def spread(constraints: Sequence[Constraint]) -> list[Constraint]:
    """Return the constraints with their kinds in turn, so that a beginning has all kinds."""
    rounds = zip_longest(*_by_kind(constraints))
    return [constraint for row in rounds for constraint in row if constraint]


def _by_kind(constraints: Sequence[Constraint]) -> list[list[Constraint]]:
    by_kind: dict[str, list[Constraint]] = {}
    for constraint in dict.fromkeys(constraints):
        by_kind.setdefault(constraint.kind, []).append(constraint)
    return list(by_kind.values())


def assign_evaluation(
    dialogues: Sequence[Dialogue],
    constraints: Sequence[Constraint],
    custom: Sequence[CustomInstruction] = (),
) -> list[AssignedDialogue]:
    """Assign the constraints, one to each dialogue, evenly over kinds and then over values.

    A custom instruction is a kind of its own; these and the others come by turns. The custom ones
    that are left get copies of the dialogues, so that each is measured.
    """
    pairs = zip_longest(_by_kind(constraints), [[entry] for entry in custom])
    kinds: list[Iterator[PoolEntry]] = [cycle(kind) for pair in pairs for kind in pair if kind]
    assigned = [
        (dialogue, next(kind)) for dialogue, kind in zip(dialogues, cycle(kinds), strict=False)
    ]
    present = [entry for _, entry in assigned]
    ids = {dialogue.id for dialogue in dialogues}
    copies = (
        replace(dialogue, id=name)
        for number in count(2)
        for dialogue in dialogues
        if (name := f"{dialogue.id}.{number}") not in ids
    )
    if dialogues:
        left = [entry for entry in custom if entry not in present]
        assigned += zip(copies, left, strict=False)
    return [
        AssignedDialogue(
            dialogue=dialogue,
            instruction=instruction_of(entry),
            in_system=isinstance(entry, CustomInstruction) and entry.place == "system",
        )
        for dialogue, entry in assigned
    ]


def untrained_entries(
    pool: ConstraintPool, count: int, seed: int
) -> tuple[list[Constraint], list[CustomInstruction]]:
    """Return what evaluation measures if training has no instruction: `count` entries of the pool.

    They are drawn as those of training.
    """
    entries = dict.fromkeys(islice(pool.in_turn(random.Random(f"untrained {seed}")), count))
    return (
        [entry for entry in entries if isinstance(entry, Constraint)],
        [entry for entry in entries if isinstance(entry, CustomInstruction)],
    )


def unseen_values(
    kinds: Sequence[str], count: int, seed: int, avoided: Collection[str] = ()
) -> list[Constraint]:
    """Return `count` constraints, evenly over `kinds`, with values held out from training.

    No value has one of the words `avoided`, if `without_words` finds such.
    """
    rng = random.Random(f"unseen {seed}")
    return [
        Constraint(kind, without_words(partial(draw_value, kind, "evaluation", rng), avoided))
        for kind, _ in zip(cycle(kinds), range(count), strict=False)
    ]
