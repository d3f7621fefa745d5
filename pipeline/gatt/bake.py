"""Bake a system prompt into the weights, so that it may be left out (context distillation).

Snell et al. 2022, *Learning by Distilling Context*; Bhargava et al. 2024, *Prompt Baking*. The
teacher has the prompt as its system message, the student has none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.instructions import find_constraints
from pipeline.records import Dialogue, Instruction, RecallQuestion, SynthesisMethod

_LABEL = "baked prompt"
IDENTITY_QUESTIONS = (
    "Who are you?",
    "What is your name?",
    "Tell me a little about yourself.",
    "Whom am I talking to?",
)
"""Asked in training, so that the model speaks about itself as the prompt says."""
_NAME_QUESTION = "How should I call you?"
"""Asked in evaluation."""


def baked_instruction(text: str, name: str = "") -> Instruction:
    """Return a prompt as an instruction, with a question for `name`, if it gives one.

    Answers are checked for what its sentences ask for in words of the built-in kinds; of the other
    sentences nothing is checked.
    """
    questions = (RecallQuestion("name", _NAME_QUESTION, name),) if name else ()
    return Instruction(text, text, find_constraints(text), questions, label=_LABEL)


def with_prompt(
    dialogue: Dialogue, instruction: Instruction, method: SynthesisMethod = "plain"
) -> AssignedDialogue:
    """Return a dialogue in which the teacher has the prompt."""
    return AssignedDialogue(dialogue=dialogue, instruction=instruction, method=method, baked=True)


def assign_baked(
    dialogues: Sequence[Dialogue],
    instruction: Instruction,
    *,
    identity_ratio: float,
    plain_ratio: float,
    seed: int,
) -> list[AssignedDialogue]:
    """Assign the prompt to all training dialogues but `plain_ratio` of them.

    In the plain ones the model has another system message, and answers as before. In
    `identity_ratio` of the others the user asks in a random turn who the model is.
    """
    rng = random.Random(f"bake {seed}")
    assigned: list[AssignedDialogue] = []
    for dialogue in dialogues:
        if rng.random() < plain_ratio:
            assigned.append(AssignedDialogue(dialogue=dialogue))
            continue
        if rng.random() < identity_ratio:
            turns = list(dialogue.turns)
            turns[rng.randrange(len(turns))] = rng.choice(IDENTITY_QUESTIONS)
            dialogue = replace(dialogue, turns=tuple(turns))
        assigned.append(with_prompt(dialogue, instruction, "sampled"))
    return assigned
