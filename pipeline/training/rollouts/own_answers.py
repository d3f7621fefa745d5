"""The student's own answers, as logged, and how each answer of such a dialogue is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.gatt.quality import find_defect
from pipeline.recipe import Recipe
from pipeline.records import OMIT_EMPTY, Completion, FinishReason
from pipeline.training.rollouts.dialogues import GhostDialogue
from pipeline.training.rollouts.flip_rate import FlipRates, lesson_of
from pipeline.training.rollouts.labels import LabeledAnswer
from pipeline.training.rollouts.schedules import turn_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnAnswer:
    """An answer of the student; turns are counted from 0.

    `step` counts the steps before the rollout, `position` is the dialogue's in the order of
    training. `obeys` is None if no program can tell. `defect` is why it is no valid answer (see
    `find_defect`), or "".
    """

    step: int
    position: int
    dialogue: str
    turn: int
    text: str
    tokens: int
    finish: FinishReason
    obeys: bool | None
    defect: str = field(default="", metadata=OMIT_EMPTY)

    @property
    def ends_dialogue(self) -> bool:
        """Whether nothing can be asked after this answer."""
        return bool(self.defect) or self.finish == "context"


def check(
    dialogue: GhostDialogue, turn: int, completion: Completion, history: Sequence[str]
) -> tuple[bool | None, str]:
    """Return whether the student's answer of `turn` obeys (None: unknown), and its defect or ""."""
    text = completion.text.strip()
    defect = find_defect(text, history, dialogue.assigned.required_words)
    if completion.finish == "thinking":
        defect = "unfinished thoughts"
    verdicts = dialogue.verdicts(turn, text, history)
    return all(verdicts.values()) and not defect if verdicts else None, defect


def label_dialogue(
    dialogue: GhostDialogue,
    turns: int,
    own: Mapping[int, OwnAnswer],
    rates: FlipRates,
    recipe: Recipe,
) -> list[LabeledAnswer]:
    """Return the first `turns` answers, the student's `own` ones by turn, and how they are learned.

    Own answers stand in the history as they are, so a corrected one can only be the last: the
    dialogue ends with the last answer that needs a correction, and those before it are context.
    """
    labeled: list[LabeledAnswer] = []
    corrected: list[LabeledAnswer] = []
    for turn in range(turns):
        if turn not in own:
            labeled.append(_recorded(dialogue, turn, recipe))
            continue
        answer, history = own[turn], [previous.text for previous in labeled]
        lesson = lesson_of(dialogue, turn, rates)
        weight = turn_weight(turn, len(dialogue.answers))
        taken = LabeledAnswer(
            text=answer.text,
            original=answer.text,
            weight=weight,
            has_end=answer.finish == "stop",
            first_tokens=recipe.train.rollout_first_tokens,
        )
        if answer.defect or (lesson == "edit" and not answer.obeys):
            correction = replace(_corrected(dialogue, answer, history, recipe), weight=weight)
            corrected = [*labeled, correction]
            taken = replace(taken, weight=0.0)
        elif lesson == "edit":
            # The base would talk the student out of what it rightly does.
            weight_kept = recipe.train.unedited_weight
            taken = replace(taken, unchanged_weight=weight_kept, distilled=False)
        labeled.append(taken)
    return corrected or labeled


def _recorded(dialogue: GhostDialogue, turn: int, recipe: Recipe) -> LabeledAnswer:
    """Return an answer of the teacher, learned as without rollouts."""
    return LabeledAnswer(
        text=dialogue.answers[turn],
        original=dialogue.originals[turn],
        unchanged_weight=recipe.train.unedited_weight if dialogue.is_edited else 1.0,
    )


def _corrected(
    dialogue: GhostDialogue, answer: OwnAnswer, history: Sequence[str], recipe: Recipe
) -> LabeledAnswer:
    """Return the student's answer, edited, or the teacher's where no edit helps (DAgger).

    An answer that follows a part of the instruction is not cut, as the cut would not know that part
    from the rest. What the edit leaves is learned as it is: the base does not follow it.
    """
    text, shows_part = None, dialogue.shows_part(answer.turn, answer.text, history)
    if not answer.defect and (answer.finish == "stop" or not shows_part):
        limit = 0 if shows_part else recipe.synthesize.max_sentences
        text = dialogue.corrected(answer.turn, answer.text, history, limit)
    if text is None:
        return _recorded(dialogue, answer.turn, recipe)
    return LabeledAnswer(
        text=text,
        original=answer.text,
        unchanged_weight=recipe.train.unedited_weight,
        distilled=not shows_part,
    )
