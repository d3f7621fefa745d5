"""Rollouts: every few steps the model in training answers turns of the dialogues that come next.

Its answers are logged, so that a run that was cut off goes on with the same ones.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.console import log
from pipeline.files import JsonlLog
from pipeline.gatt.seeds import derive_seed
from pipeline.inference.generator import context_for, thought_room
from pipeline.recipe import Recipe
from pipeline.records import Completion, Message, Request, Task
from pipeline.training.examples import TrainingExample, render_chat
from pipeline.training.rollouts.dialogues import GhostDialogue, up_to_last_answer
from pipeline.training.rollouts.flip_rate import (
    FlipRate,
    FlipRates,
    choose_trials,
    describe,
    measure,
)
from pipeline.training.rollouts.labels import LabeledAnswer, label_answers
from pipeline.training.rollouts.own_answers import OwnAnswer, check, label_dialogue
from pipeline.training.rollouts.schedules import own_turns
from pipeline.training.validation import AdaptableBase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SaveAdapter = Callable[[Path], object]
"""Writes the present adapter to a folder, in PEFT's format."""
_FLIP_RATES = "flip_rates"
"""Key of the line of the log that has them."""


class RolloutStats(NamedTuple):
    """Checked own answers of the last rollout, and those that obey.

    `tokens` and `seconds` are those of all rollouts so far. `divergence` is the mean over the
    distilled tokens of the last step.
    """

    answers: int = 0
    obeying: int = 0
    tokens: int = 0
    seconds: float = 0.0
    divergence: float = 0.0


class _Plan(NamedTuple):
    """What the student answers: `own` turns of the dialogue at a position, of its first `turns`."""

    step: int
    position: int
    dialogue: GhostDialogue
    turns: int
    own: Sequence[int]

    def key(self, turn: int) -> tuple[int, int, int]:
        """Return what identifies the own answer of `turn`."""
        return self.step, self.position, turn


class Rollouts:
    """The dialogues of a run, and what the model in training has answered to them.

    `lengths` are the tokens of the dialogues' chats. `prepare` has to be called before `examples`,
    both in the main process only.
    """

    def __init__(
        self,
        dialogues: Sequence[GhostDialogue],
        lengths: Sequence[int],
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.stats = RolloutStats()
        self._dialogues, self._recipe, self._tokenizer = dialogues, recipe, tokenizer
        self._answers: dict[tuple[int, int, int], OwnAnswer] = {}
        self._rates: FlipRates = {}
        self._base: AdaptableBase | None = None
        self._log: JsonlLog | None = None
        self._turns = max(len(dialogue.answers) for dialogue in dialogues)
        self._reminders = max(d.assigned.further_tokens(self._turns) for d in dialogues)
        self.max_tokens = self._longest(lengths)

    def _longest(self, lengths: Sequence[int]) -> int:
        """Return the tokens that no chat of an example exceeds.

        Own answers may be longer than the teacher's, whose chat has reminders.
        """
        settings, longest = self._recipe.train, 0
        for dialogue, length in zip(self._dialogues, lengths, strict=True):
            chat = up_to_last_answer(dialogue.teacher_chat(dialogue.answers))
            reminders = max(0, len(render_chat(self._tokenizer, chat).ids) - length)
            answers = 1 if settings.rollouts == "prefix" else len(dialogue.answers)
            grown = length + answers * self._recipe.synthesize.max_tokens
            longest = max(longest, min(grown, settings.max_length) + reminders)
        return longest

    def prepare(self, base: AdaptableBase, log_file: Path, adapter: Path | None = None) -> None:
        """Read the log of an earlier attempt, and print the flip rates, measured if need be.

        `adapter` is what training starts from; None is the base itself.

        Raises:
            GattError: the log cannot be read.
        """
        self._base, self._log = base, JsonlLog(log_file)
        for record in self._log.records:
            if rates := record.get(_FLIP_RATES):
                self._rates = {name: FlipRate(*counts) for name, counts in rates.items()}
            else:
                self._add(OwnAnswer(**record))
        if not self._rates:
            self._rates = self._measure_flip_rates(adapter)
            self._log.append({_FLIP_RATES: self._rates})
        for line in describe(self._dialogues, self._rates):
            log(line)

    def close(self) -> None:
        """Close the log."""
        if self._log:
            self._log.close()

    def examples(
        self, step: int, indices: Mapping[int, int], save_adapter: SaveAdapter
    ) -> dict[int, TrainingExample]:
        """Roll out with the adapter after `step` steps; return examples by position.

        `indices` has the dialogue at each position in the order of training. Where the student
        answers nothing, there is no example.
        """
        plans = [
            plan
            for position, index in indices.items()
            if index < len(self._dialogues) and (plan := self._plan(step, position, index)).own
        ]
        # A task that yields nothing has all of its answers in the log.
        if any(next(self._answer(plan), None) for plan in plans):
            with tempfile.TemporaryDirectory() as folder:
                start = time.monotonic()
                save_adapter(Path(folder))
                self._run([self._answer(plan) for plan in plans], Path(folder))
                seconds = self.stats.seconds + time.monotonic() - start
            self.stats = self.stats._replace(seconds=seconds)
        answers = [a for plan in plans for a in self._own(plan).values()]
        checked = [answer.obeys for answer in answers if answer.obeys is not None]
        self.stats = self.stats._replace(answers=len(checked), obeying=sum(checked))
        examples = {plan.position: self._example(plan) for plan in plans}
        return {position: example for position, example in examples.items() if example}

    def _plan(self, step: int, position: int, index: int) -> _Plan:
        """Draw the turns that the student answers."""
        settings, dialogue = self._recipe.train, self._dialogues[index]
        rng = random.Random(f"rollout {self._recipe.seed} {step} {position}")
        progress = (step + settings.rollout_steps / 2) / settings.max_steps
        own = own_turns(settings.rollouts, len(dialogue.answers), progress, rng)
        turns = own[0] + 1 if settings.rollouts == "prefix" else len(dialogue.answers)
        return _Plan(step, position, dialogue, turns, own)

    def _answer(self, plan: _Plan) -> Task:
        """Answer the own turns of a dialogue, in the history that they make."""
        history: list[str] = []
        for turn in range(max(plan.own) + 1):
            text = plan.dialogue.answers[turn]
            if turn in plan.own:
                if plan.key(turn) not in self._answers:
                    seed = derive_seed(self._recipe.seed, "rollout", *plan.key(turn))
                    completion = yield self._request(plan.dialogue.student_chat(history), seed)
                    self._record(plan, turn, completion, history)
                answer = self._answers[plan.key(turn)]
                if answer.ends_dialogue:
                    return
                text = answer.text
            history.append(text)

    def _request(self, chat: tuple[Message, ...], seed: int) -> Request:
        settings = self._recipe.synthesize
        return Request(
            messages=chat,
            seed=seed,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            max_thought_tokens=settings.max_thought_tokens,
        )

    def _record(
        self, plan: _Plan, turn: int, completion: Completion, history: Sequence[str]
    ) -> None:
        obeys, defect = check(plan.dialogue, turn, completion, history)
        answer = OwnAnswer(
            step=plan.step,
            position=plan.position,
            dialogue=plan.dialogue.assigned.dialogue.id,
            turn=turn,
            text=completion.text.strip(),
            tokens=completion.tokens,
            finish=completion.finish,
            obeys=obeys,
            defect=defect,
        )
        self._add(answer)
        self.stats = self.stats._replace(tokens=self.stats.tokens + completion.tokens)
        if self._log:
            self._log.append(answer)

    def _add(self, answer: OwnAnswer) -> None:
        self._answers[answer.step, answer.position, answer.turn] = answer

    def _run(self, tasks: Sequence[Task], adapter: Path | None) -> None:
        """Run tasks with the base, and an adapter if there is one."""
        if self._base is None:
            raise RuntimeError("`prepare` was not called")
        settings = self._recipe.synthesize
        context = context_for(self._turns, settings.max_tokens) + self._reminders
        context += thought_room(self._base.file, settings.max_thought_tokens)
        with self._base.engine(adapter, len(tasks), context) as engine:
            engine.run(tasks)

    def _own(self, plan: _Plan) -> dict[int, OwnAnswer]:
        """Return the student's answers by turn, without one that did not fit in the context."""
        answers = {turn: self._answers.get(plan.key(turn)) for turn in plan.own}
        return {n: a for n, a in answers.items() if a and a.finish != "context"}

    def _example(self, plan: _Plan) -> TrainingExample | None:
        """Return the dialogue with the student's answers, or None if none of them is learned."""
        own = self._own(plan)
        last = max((n for n, a in own.items() if a.ends_dialogue), default=plan.turns - 1)
        missing = min((n for n in plan.own if n <= last and n not in own), default=last + 1)
        labeled = label_dialogue(plan.dialogue, missing, own, self._rates, self._recipe)
        limit = self._recipe.train.max_length
        while labeled and any(n in own and a.weight for n, a in enumerate(labeled)):
            example = self._labeled(plan.dialogue, labeled)
            longest = max(len(example.input_ids), len(example.teacher_ids))
            if len(example.input_ids) <= limit and longest <= self.max_tokens:
                return example
            labeled = labeled[:-1]
        return None

    def _labeled(
        self, dialogue: GhostDialogue, labeled: Sequence[LabeledAnswer]
    ) -> TrainingExample:
        texts = [answer.text for answer in labeled]
        student = up_to_last_answer(dialogue.student_chat(texts))
        teacher = up_to_last_answer(dialogue.teacher_chat(texts))
        return label_answers(self._tokenizer, student, teacher, labeled)

    def _measure_flip_rates(self, adapter: Path | None) -> FlipRates:
        """Answer a few turns as the student, and as the base with the instruction in every turn."""
        trials = choose_trials(self._dialogues)
        texts: tuple[dict[int, str], dict[int, str]] = ({}, {})

        def task(number: int, *, reminded: bool) -> Task:
            dialogue, turn = trials[number]
            make_chat = dialogue.teacher_chat if reminded else dialogue.student_chat
            chat = make_chat(trials[number].history)
            seed = derive_seed(self._recipe.seed, "flip", dialogue.assigned.dialogue.id, turn)
            completion = yield self._request(chat, seed)
            texts[reminded][number] = completion.text.strip()

        numbers = range(len(trials))
        if trials:
            self._run([task(n, reminded=False) for n in numbers], adapter)
            self._run([task(n, reminded=True) for n in numbers], None)
        student, teacher = ([answers[n] for n in numbers] for answers in texts)
        return measure(trials, student, teacher)
