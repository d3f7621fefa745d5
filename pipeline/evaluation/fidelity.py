"""Reminder fidelity: how near a model that is told once comes to the base that is always reminded.

It needs neither a check nor a judge. The base that is reminded in every turn (ceiling) has
answered, and its own answers are scored token by token. Its predictions are the reference for those
of each model that is told once. All see the same earlier answers; only the reminders differ:

    fidelity = 1 - KL(reminded base‖model told once) / KL(reminded base‖base told once)

1 is a model that predicts as if it were reminded, 0 is no nearer than the base, and a model that is
further away is below 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from pipeline.console import progress
from pipeline.evaluation.arms import Arm
from pipeline.evaluation.divergence import (
    AnswerLogits,
    ChatPass,
    answer_logits,
    answer_passes,
    max_logits_bytes,
)
from pipeline.evaluation.replies import answers_of, with_weights
from pipeline.evaluation.scores import Fidelity
from pipeline.evaluation.scoring.fidelity import AnswerKl, summarize
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import is_judged
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama.model import LoadedModel
from pipeline.inference.logits import mean_kl
from pipeline.recipe import Recipe
from pipeline.records import Instruction, Message, Reply

_MIN_DIALOGUES = 8
"""Dialogues that are scored, if there are as many; more, if more instructions are unchecked."""
_MARGIN = 64
"""Further tokens of a context: markers of a thought that a prompt has, and the history not."""
WITH_PROMPT = ", with the prompt"
"""Ends the name of a model into which a prompt is baked and that has the prompt nevertheless."""


class Views(NamedTuple):
    """A chat as its models see it: with a `reminder` in every turn, and told `once`.

    `first_turn` (from 1) is the first one before whose answer they differ. Where the prompt is to
    be `baked`, the reminder is the prompt, and without it nothing is told; `elsewhere` has another
    system message, if the recipe has one.
    """

    dialogue: str
    instruction: str
    reminded: tuple[Message, ...]
    once: tuple[Message, ...]
    first_turn: int
    baked: bool
    elsewhere: tuple[Message, ...] = ()


class Reference(NamedTuple):
    """What the reminded base predicts for its `answers`, and the tokens of both views."""

    views: Views
    answers: list[AnswerLogits]
    reminded: list[ChatPass]
    once: list[ChatPass]
    elsewhere: list[ChatPass]

    @property
    def saved_tokens(self) -> int:
        """Return by how much the last prompt is shorter without reminders."""
        ends = (passes[-1].answers[-1].start for passes in (self.reminded, self.once))
        return next(ends) - next(ends)


def measure_fidelity(
    arms: Sequence[Arm],
    dialogues: Sequence[AssignedDialogue],
    replies: Sequence[Reply],
    recipe: Recipe,
) -> Fidelity | None:
    """Return the fidelity of each arm but the first, the base; None if there is nothing to score.

    `replies` has those of the ceiling. Servers are left out, and models with another vocabulary.
    """
    measured = [arm for arm in arms if arm.in_all_suites and arm.path]
    chosen = chosen_dialogues(dialogues)
    system = recipe.dialogues.system
    waiting = [views for d in chosen if (views := _views(d, replies, system))]
    kl: dict[str, list[AnswerKl]] = {}
    elsewhere: dict[str, list[AnswerKl]] = {}
    saved_tokens: list[int] = []
    with progress("evaluate: reminder fidelity", len(waiting)) as bar:
        while waiting:
            done = _score(measured, waiting, kl, elsewhere)
            waiting = waiting[len(done) :]
            saved_tokens += [reference.saved_tokens for reference in done]
            bar.advance(len(done))
    base = kl.pop(measured[0].name, [])
    if not base:
        return None
    base_elsewhere = elsewhere.pop(measured[0].name, [])
    return replace(
        summarize(base, kl),
        leaks=summarize(base_elsewhere, elsewhere).overall if base_elsewhere else (),
        saved_tokens=sum(saved_tokens) / len(saved_tokens),
        baked=any(dialogue.baked for dialogue in chosen),
    )


def chosen_dialogues(dialogues: Sequence[AssignedDialogue]) -> list[AssignedDialogue]:
    """Return one dialogue for each instruction that no program can check, and up to 8 in all."""
    unchecked: dict[Instruction | None, AssignedDialogue] = {}
    for dialogue in dialogues:
        if not dialogue.constraints(0) or is_judged(dialogue.constraints(0)):
            unchecked.setdefault(dialogue.instruction, dialogue)
    first = list(unchecked.values())
    others = [dialogue for dialogue in dialogues if dialogue not in first]
    return [*first, *others[: max(0, _MIN_DIALOGUES - len(first))]]


def _views(dialogue: AssignedDialogue, replies: Sequence[Reply], system: str) -> Views | None:
    """Return the views of the chat with the ceiling's answers; None if they do not differ."""
    answers = answers_of(dialogue, "ceiling", replies)
    for turn in range(1, len(answers) + 1):
        before = answers[: turn - 1]
        if dialogue.reminded_prompt(before, system) != dialogue.student_prompt(before, system):
            return Views(
                dialogue.dialogue.id,
                dialogue.name,
                dialogue.reminded_prompt(answers, system),
                dialogue.student_prompt(answers, system),
                first_turn=turn,
                baked=dialogue.baked,
                elsewhere=_elsewhere(dialogue, answers, system) if dialogue.baked else (),
            )
    return None


def _elsewhere(
    dialogue: AssignedDialogue, answers: Sequence[str], system: str
) -> tuple[Message, ...]:
    """Return the chat with the system message that the baked prompt must not show under."""
    plain = replace(dialogue, instruction=None, baked=False)
    return plain.student_prompt(answers, system) if system else ()


def _context(base: LoadedModel, chats: Sequence[Views]) -> int:
    """Return the tokens of a context in which every view of the chats fits."""
    views = (v for chat in chats for v in (chat.reminded, chat.once, chat.elsewhere) if v)
    return max(len(base.tokenize(base.template.render(view))) for view in views) + _MARGIN


def _score(
    arms: Sequence[Arm],
    chats: Sequence[Views],
    kl: dict[str, list[AnswerKl]],
    elsewhere: dict[str, list[AnswerKl]],
) -> list[Reference]:
    """Add the divergences in the first chats, as many as fit into memory, and return these.

    A model into which the prompt is baked is measured with the prompt, too, and `elsewhere`: under
    another system message.
    """
    references: list[Reference] = []
    vocabulary: list[str] = []
    context = 0
    for arm, weights in with_weights(arms):
        assert weights
        context = context or _context(weights, chats)
        with BatchEngine(weights, 1, context, adapter=arm.adapter) as engine:
            if arm is arms[0]:
                references, vocabulary = _references(engine, chats), engine.vocabulary
            if engine.vocabulary != vocabulary:
                continue
            for r in references:
                kl.setdefault(arm.name, []).extend(_divergences(engine, r, r.once))
                if r.elsewhere:
                    other = _divergences(engine, r, r.elsewhere)
                    elsewhere.setdefault(arm.name, []).extend(other)
                if r.views.baked and arm is not arms[0]:
                    with_prompt = kl.setdefault(f"{arm.name}{WITH_PROMPT}", [])
                    with_prompt.extend(_divergences(engine, r, r.reminded))
    return references


def _references(base: BatchEngine, chats: Sequence[Views]) -> list[Reference]:
    """Return what the reminded base predicts in the first of the `chats`, at least in one."""
    references: list[Reference] = []
    room = max_logits_bytes()
    for views in chats:
        reminded = answer_passes(base, views.reminded)
        answers = list(islice(answer_logits(base, reminded), views.first_turn - 1, None))
        once, elsewhere = (
            answer_passes(base, view) if view else [] for view in (views.once, views.elsewhere)
        )
        references.append(Reference(views, answers, reminded, once, elsewhere))
        room -= sum(answer.values.nbytes for answer in answers)
        if room <= 0:
            break
    return references


def _divergences(
    model: BatchEngine, reference: Reference, passes: Sequence[ChatPass]
) -> list[AnswerKl]:
    """Return the divergences of a model in one of the views by answer; empty answers have none."""
    views = reference.views
    predicted = islice(answer_logits(model, passes), views.first_turn - 1, None)
    pairs = enumerate(zip(reference.answers, predicted, strict=True), views.first_turn)
    return [
        AnswerKl(
            views.dialogue,
            views.instruction,
            turn,
            len(expected.tokens),
            mean_kl(expected.values, actual.values) * len(expected.tokens),
        )
        for turn, (expected, actual) in pairs
        if expected.tokens
    ]
