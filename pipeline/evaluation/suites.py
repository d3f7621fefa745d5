"""What is measured beside the instructions that were trained: each suite is a list of dialogues with an instruction.

`unseen`: instructions that training has not. `change`: another instruction takes over half-way, which the paper leaves open.
`plain`: none at all, where nothing that was trained must show. `recall`: attributes are set and asked for later (Table 30 of
the paper). `single`: one question with one instruction, as in IFEval (Zhou et al. 2023), to see what training has damaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.gatt.constraints.registry import KINDS
from pipeline.gatt.instructions import render_instruction
from pipeline.records import Assignment, Constraint, Dialogue, Instruction, RecallQuestion

Suite = list[tuple[Dialogue, Assignment]]

PROBED_TURNS = (2, 4, 6, 20)
"""The turns of Table 30."""
PAPER_RECALL = {"without GAtt": (1.0, 0.1, 0.0, 0.0), "with GAtt": (1.0, 1.0, 1.0, 1.0)}
"""Its figures: the share of attributes that human evaluators found recalled in these turns."""


def probed_turns(turns: int) -> list[int]:
    """The turns of a dialogue of so many in which attributes are asked for: those of Table 30, and the last."""
    return sorted({turn for turn in PROBED_TURNS if turn <= turns} | {turns})


_SINGLE = 7
"""Kinds for which each dialogue's first question is asked: all of them with the recipe's six dialogues."""
_FIGURES = ("Napoleon", "Marie Curie", "Sherlock Holmes", "Cleopatra", "Robin Hood", "Mozart")
_HOBBIES = ("tennis", "chess", "gardening", "photography", "fishing", "painting")


def suites(
    dialogues: Sequence[Dialogue],
    pool: Sequence[Constraint],
    unseen: Sequence[Constraint],
    turns: int,
    recall_turns: int,
) -> tuple[dict[str, Instruction], dict[str, Suite]]:
    """The further suites over `dialogues`, each cut to `turns` (for recall to `recall_turns`), and their instructions by id.

    `unseen` is without what `pool` trains. Names of dialogues get the suite's name behind them, so that no reply is
    taken for another's.
    """
    strange = [c for c in unseen if c not in pool]
    made = {i.id: i for i in (render_instruction((c,)) for c in (*pool, *strange, *_every_kind()))}
    set_up = [_attributes(n) for n in range(len(dialogues))]
    made |= {i.id: i for i in set_up}
    told = [render_instruction((c,)).id for c in pool]
    found: dict[str, Suite] = {
        "unseen": [
            (d, _told(render_instruction((strange[n % len(strange)],))))
            for n, d in enumerate(dialogues)
        ]
        if strange
        else [],
        "change": [(d, _changing(told, n, turns)) for n, d in enumerate(dialogues)]
        if len(told) > 1 < turns
        else [],
        "plain": [(d, Assignment("", None, "plain")) for d in dialogues],
        "recall": [(d, _told(i)) for d, i in zip(dialogues, set_up, strict=True)],
        "single": [
            (Dialogue(f"{d.id}.{c.kind}", d.topic, d.turns), _told(render_instruction((c,))))
            for n, c in enumerate(_every_kind()[: _SINGLE * len(dialogues)])
            for d in [dialogues[n % len(dialogues)]]
        ],
    }
    lengths = {"recall": recall_turns, "single": 1}
    return made, {
        name: [_named(name, lengths.get(name, turns), *row) for row in suite]
        for name, suite in found.items()
    }


def _every_kind() -> list[Constraint]:
    return [Constraint(name, kind.values[0]) for name, kind in KINDS.items() if not kind.judged]


def _attributes(n: int) -> Instruction:
    """A figure and a hobby, and the two questions of the paper's example."""
    figure, hobby = _FIGURES[n % len(_FIGURES)], _HOBBIES[n % len(_HOBBIES)]
    recall_questions = (
        RecallQuestion("name", "What is your name?", figure),
        RecallQuestion("hobby", "What is your favourite hobby?", hobby),
    )
    return Instruction(
        f"{figure}, {hobby}",
        f"You are {figure} and you love {hobby}.",
        f"{figure}, {hobby}.",
        (),
        recall_questions,
    )


def _told(instruction: Instruction) -> Assignment:
    return Assignment("", instruction.id, "plain")


def _changing(told: Sequence[str], n: int, turns: int) -> Assignment:
    """The n-th instruction, and from the middle on the one that is half the pool further (of another kind, if there are some)."""
    then = (n + max(1, len(told) // 2)) % len(told)
    return Assignment(
        "", told[n % len(told)], "plain", next_instruction=told[then], change_turn=turns // 2
    )


def _named(
    suite: str, turns: int, dialogue: Dialogue, pairing: Assignment
) -> tuple[Dialogue, Assignment]:
    cut = Dialogue(f"{dialogue.id}~{suite}", dialogue.topic, dialogue.turns[:turns])
    return cut, replace(pairing, dialogue=cut.id)
