"""Adherence under another condition: with another sampler, or in longer dialogues.

Base and tuned answer the dialogues of the evaluation once more, those that a program can check. The
difference from the main evaluation is paired by dialogue, so that it tells what the condition does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import GattError
from pipeline.evaluation.arms import Arm
from pipeline.evaluation.replies import generate_replies
from pipeline.evaluation.scores import ConditionRow, ConditionScores
from pipeline.evaluation.scoring.rows import replies_to, share
from pipeline.evaluation.statistics import paired_bootstrap
from pipeline.files import write_jsonl
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import is_judged
from pipeline.recipe import Recipe
from pipeline.records import SAMPLERS, Reply, SamplerName

_ARMS = ("base", "tuned")


class Condition(NamedTuple):
    """A sampler ("gatt" is that of the recipe) and the turns of a dialogue."""

    sampler: SamplerName
    turns: int

    @property
    def name(self) -> str:
        """Return the name of its files."""
        return f"{self.sampler}-{self.turns}"


def measure_condition(
    condition: Condition,
    arms: Sequence[Arm],
    dialogues: Sequence[AssignedDialogue],
    main: Sequence[Reply],
    recipe: Recipe,
    logs: Sequence[Path],
) -> ConditionScores:
    """Return the adherence of base and tuned; `logs` are those of `generate_replies`.

    `main` are the replies of the main evaluation to the `dialogues`. They begin longer dialogues
    with the same sampler.

    Raises:
        GattError: the condition is that of the main evaluation, or shorter, no program can check
            any of the instructions, or there are too few messages for so many turns.
    """
    settings = recipe.evaluate
    if condition.turns < settings.turns or condition == ("gatt", settings.turns):
        raise GattError(
            f"--turns {condition.turns} with the sampler {condition.sampler}: the evaluation has "
            f"{settings.turns} turns and measures that. Name another sampler, such as --sampler "
            "plain, or more turns."
        )
    checked = [d for d in dialogues if d.constraints(0) and not is_judged(d.constraints(0))]
    longer = _lengthened(checked, condition.turns)
    measured = [arm for arm in arms if arm.name in _ARMS]
    main = [reply for reply in replies_to(main, checked) if reply.arm in _ARMS]
    if condition.sampler == "gatt" and not logs[-1].exists():
        write_jsonl(logs[-1], main)
    sampler = SAMPLERS[condition.sampler]
    if condition.sampler == "gatt":
        sampler = sampler._replace(temperature=settings.temperature)
    longer_recipe = recipe.model_copy(
        update={"evaluate": settings.model_copy(update={"turns": condition.turns})}
    )
    replies = generate_replies(
        measured, {"evaluation": longer}, longer_recipe, logs, sampler=sampler
    )
    return ConditionScores(
        sampler=condition.sampler,
        values=sampler.values,
        turns=condition.turns,
        rows=compare_with_main(condition, replies, main),
    )


def _lengthened(dialogues: Sequence[AssignedDialogue], turns: int) -> list[AssignedDialogue]:
    """Return the dialogues with at least `turns` turns; short ones go on with those of others.

    Each keeps its own messages, repeated ones too: their replies are those of the main evaluation.
    """
    if not dialogues:
        raise GattError(
            "No program can check the instructions of this run, so that there is no adherence to "
            "measure. Add checks to them."
        )
    longer = [
        _prolonged(assigned, [*dialogues[n + 1 :], *dialogues[:n]], turns)
        for n, assigned in enumerate(dialogues)
    ]
    if any(len(assigned.dialogue.turns) < turns for assigned in longer):
        raise GattError(
            f"--turns {turns}: the {len(dialogues)} evaluation dialogues do not have so many "
            "different messages to be joined. Lower --turns, or raise evaluate.dialogues."
        )
    return longer


def _prolonged(
    assigned: AssignedDialogue, others: Sequence[AssignedDialogue], turns: int
) -> AssignedDialogue:
    """Return a dialogue that goes on up to `turns` turns with messages that it does not have."""
    own = assigned.dialogue.turns
    messages = dict.fromkeys(turn for other in others for turn in other.dialogue.turns)
    further = [message for message in messages if message not in own][: max(0, turns - len(own))]
    return replace(assigned, dialogue=replace(assigned.dialogue, turns=(*own, *further)))


def compare_with_main(
    condition: Condition, replies: Sequence[Reply], main: Sequence[Reply]
) -> tuple[ConditionRow, ...]:
    """Return the rows of a condition; its replies and those of the `main` evaluation are paired."""
    last = _last_turn(main)
    ends = [last] if condition.sampler != "gatt" else []
    if (longest := _last_turn(replies)) > last:
        ends.append(longest)
    rows = []
    for arm in _ARMS:
        before = _last_five([r for r in main if r.arm == arm], last)
        for end in ends:
            after = _last_five([r for r in replies if r.arm == arm], end)
            rows.append(
                ConditionRow(
                    arm=arm,
                    at=f"turns {max(1, end - 4)} to {end}",
                    **asdict(share(r.adherent for r in after)),
                    main=share(r.adherent for r in before),
                    difference=paired_bootstrap(before, after),
                )
            )
    return tuple(rows)


def _last_turn(replies: Sequence[Reply]) -> int:
    return max((r.turn for r in replies if r.finish != "context"), default=0)


def _last_five(replies: Sequence[Reply], end: int) -> list[Reply]:
    return [r for r in replies if end - 4 <= r.turn <= end and r.finish != "context"]
