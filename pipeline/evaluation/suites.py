"""Suites that measure more than the trained instructions; each is a list of assigned dialogues.

`unseen`: instructions that are not trained. `change`: another instruction replaces the first
halfway, which the paper leaves open. `plain`: no instruction, where no trained trait may show.
`recall`: attributes are set in turn 1 and asked for later (Table 30 of the paper). `single`: one
question with one instruction, as in IFEval (Zhou et al. 2023), to see what training has degraded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import KINDS
from pipeline.gatt.instructions import assign_evaluation, render_instruction
from pipeline.records import Constraint, Dialogue, Instruction, RecallQuestion

PAPER_RECALL = {"without GAtt": (1.0, 0.1, 0.0, 0.0), "with GAtt": (1.0, 1.0, 1.0, 1.0)}
"""Table 30: the share of attributes recalled in each of `RECALL_TURNS`, judged by people."""
_SINGLE = 7
"""Kinds for each dialogue's first question; the recipe's six dialogues cover all kinds."""
_FIGURES = ("Napoleon", "Marie Curie", "Sherlock Holmes", "Cleopatra", "Robin Hood", "Mozart")
_HOBBIES = ("tennis", "chess", "gardening", "photography", "fishing", "painting")


def build_suites(
    dialogues: Sequence[Dialogue],
    pool: Sequence[Constraint],
    unseen: Sequence[Constraint],
    turns: int,
    recall_turns: int,
) -> dict[str, list[AssignedDialogue]]:
    """Return the further suites over `dialogues`, each cut to `turns` (recall: `recall_turns`).

    Of `unseen`, what `pool` trains is left out. The ids of dialogues end with the suite's name, so
    that replies of different suites have different keys.
    """
    new = [c for c in unseen if c not in pool]
    suites = {
        "unseen": assign_evaluation(dialogues, new),
        "change": _changing(dialogues, pool, turns) if len(pool) > 1 < turns else [],
        "plain": [AssignedDialogue(dialogue=dialogue) for dialogue in dialogues],
        "recall": [
            AssignedDialogue(dialogue=dialogue, instruction=_attributes(n))
            for n, dialogue in enumerate(dialogues)
        ],
        "single": _single(dialogues),
    }
    lengths = {"recall": recall_turns, "single": 1}
    return {
        name: [_named(name, lengths.get(name, turns), assigned) for assigned in suite]
        for name, suite in suites.items()
    }


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


def _attributes(n: int) -> Instruction:
    """Return the instruction of the paper's example with the n-th figure and hobby."""
    figure, hobby = _FIGURES[n % len(_FIGURES)], _HOBBIES[n % len(_HOBBIES)]
    recall_questions = (
        RecallQuestion("name", "What is your name?", figure),
        RecallQuestion("hobby", "What is your favourite hobby?", hobby),
    )
    return Instruction(
        f"You are {figure} and you love {hobby}.",
        f"{figure}, {hobby}.",
        (),
        recall_questions,
    )


def _changing(
    dialogues: Sequence[Dialogue], pool: Sequence[Constraint], turns: int
) -> list[AssignedDialogue]:
    """Return dialogues whose instruction changes halfway.

    The next one is half the pool further, which is of another kind if there are several.
    """
    size = len(pool)
    return [
        AssignedDialogue(
            dialogue=dialogue,
            instruction=render_instruction((pool[n % size],)),
            next_instruction=render_instruction((pool[(n + max(1, size // 2)) % size],)),
            change_turn=turns // 2,
        )
        for n, dialogue in enumerate(dialogues)
    ]


def _named(suite: str, turns: int, assigned: AssignedDialogue) -> AssignedDialogue:
    dialogue = assigned.dialogue
    cut = replace(dialogue, id=f"{dialogue.id}~{suite}", turns=dialogue.turns[:turns])
    return replace(assigned, dialogue=cut)
