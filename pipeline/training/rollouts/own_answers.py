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

    What the reminded base corrects is learned where it stands. Of the others one is replaced by the
    recorded answer, after the student's own history (DAgger): the last that fails, or if none does,
    the last. The rest is context. A replaced answer ends the dialogue.
    """
    labeled: list[LabeledAnswer] = []
    failed: list[LabeledAnswer] = []
    obeyed: list[LabeledAnswer] = []
    for turn in range(turns):
        recorded = _recorded(dialogue, turn, recipe)
        if turn not in own:
            labeled.append(recorded)
            continue
        answer, weight = own[turn], turn_weight(turn, len(dialogue.answers))
        taken = LabeledAnswer(
            text=answer.text,
            original=answer.text,
            weight=weight,
            has_end=answer.finish == "stop",
            first_tokens=recipe.train.rollout_first_tokens,
        )
        if answer.defect or lesson_of(dialogue, turn, rates) == "recorded":
            replaced = [*labeled, replace(recorded, weight=weight)]
            if answer.defect or not answer.obeys:
                failed = replaced
            else:
                obeyed = replaced
            taken = replace(taken, weight=0.0)
        labeled.append(taken)
    return failed or (labeled if labeled[-1].weight else obeyed)


def _recorded(dialogue: GhostDialogue, turn: int, recipe: Recipe) -> LabeledAnswer:
    """Return an answer of the teacher, learned as without rollouts."""
    return LabeledAnswer(
        text=dialogue.answers[turn],
        original=dialogue.originals[turn],
        unchanged_weight=recipe.train.unedited_weight if dialogue.is_edited else 1.0,
    )
