"""Synthesis: the teacher answers the training dialogues turn by turn.

There are two ways to an answer that obeys. *Sampled*: the instruction stands in every user
message, and candidates are drawn until one passes its check. *Edited*: the teacher answers
without the instruction, and an exact edit makes the answer pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from pipeline.gatt.acceptance import (
    ACCEPTED,
    MAX_COPIES,
    CandidateKey,
    cannot_be_accepted,
    judge_candidate,
)
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.seeds import derive_seed
from pipeline.gatt.text import has_sentences, words
from pipeline.recipe import Recipe
from pipeline.records import (
    Answer,
    Completion,
    Message,
    Request,
    RunTasks,
    SynthesizedDialogue,
    Task,
)

_PILOTS = 6
"""Sampled dialogues that try an instruction: if no first turn is accepted, the rest is skipped."""
_VERDICT_TOKENS = 4
"""Tokens of a judge's verdict."""
DISOBEYS_JUDGE = "disobeys (judge)"
"""The verdict on a candidate that would be accepted, but for the judge."""


class Judge(NamedTuple):
    """A model that judges sampled answers which no program can check.

    `question` makes the chat of a criterion, the user's message and the answer; `verdict` reads
    what the judge says to it.
    """

    run: RunTasks
    question: Callable[[str, str, str], tuple[Message, ...]]
    verdict: Callable[[str], bool | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question(Request):
    """A request that the judge answers, not the teacher."""


class Synthesis:
    """All candidates so far, and the rules by which more are sampled.

    Candidates of an earlier attempt (`recorded`) are not sampled again; `record` receives the
    new ones.
    """

    def __init__(
        self,
        recipe: Recipe,
        record: Callable[[Answer], None],
        recorded: Iterable[Answer] = (),
        judge: Judge | None = None,
    ) -> None:
        self._judge = judge
        self._recipe, self._settings, self._record = recipe, recipe.synthesize, record
        self.answers = {CandidateKey(a.dialogue, a.turn, a.candidate): a for a in recorded}
        self._accepted: dict[str, list[Answer]] = {}

    def accepted(self, assigned: AssignedDialogue) -> list[Answer]:
        """Return the answers of a dialogue in the order of its turns."""
        return self._accepted.get(assigned.dialogue.id, [])

    def run(self, run_tasks: RunTasks, dialogues: Iterable[AssignedDialogue]) -> dict[str, int]:
        """Answer the dialogues, and return the instructions that were given up.

        The result counts the pilot dialogues of each. The pilots run first, so that what is given
        up does not depend on the order in which parallel dialogues finish.
        """
        if self._judge:
            run_tasks = _by_turns(run_tasks, self._judge.run)
        sampled: Counter[str] = Counter()
        pilots: list[AssignedDialogue] = []
        rest: list[AssignedDialogue] = []
        for assigned in dialogues:
            if assigned.method == "sampled":
                sampled[assigned.name] += 1
            is_pilot = assigned.method != "sampled" or sampled[assigned.name] <= _PILOTS
            (pilots if is_pilot else rest).append(assigned)
        run_tasks(map(self._answer, pilots))
        followed = {d.name for d in pilots if d.method == "sampled" and self.accepted(d)}
        run_tasks(self._answer(d) for d in rest if d.name in followed)
        return {
            name: min(count, _PILOTS)
            for name, count in sampled.most_common()
            if name not in followed
        }

    def _answer(self, assigned: AssignedDialogue) -> Task:
        """Answer one dialogue; it ends before the first turn without an accepted candidate."""
        accepted = self._accepted[assigned.dialogue.id] = []
        for turn in range(len(assigned.dialogue.turns)):
            messages = self._teacher_prompt(assigned, accepted)
            for candidate in range(self._settings.candidates):
                key = CandidateKey(assigned.dialogue.id, turn, candidate)
                if key not in self.answers:
                    completion = yield self._request(assigned, key, messages)
                    answer = judge_candidate(
                        assigned,
                        key,
                        completion,
                        accepted,
                        max_sentences=self._settings.max_sentences,
                    )
                    if self._judge and self._needs_judge(assigned, answer):
                        completion = yield self._question(self._judge, assigned, answer)
                        if not self._judge.verdict(completion.text):
                            answer = replace(answer, verdict=DISOBEYS_JUDGE)
                    self.answers[key] = answer
                    self._record(answer)
                if self.answers[key].verdict == ACCEPTED:
                    accepted.append(self.answers[key])
                    break
            else:
                return

    def _request(
        self, assigned: AssignedDialogue, key: CandidateKey, messages: tuple[Message, ...]
    ) -> Request:
        settings = self._settings
        stop_when: Callable[[str], bool]
        if assigned.method == "sampled":
            stop_when = partial(cannot_be_accepted, assigned.constraints(key.turn))
        else:
            stop_when = partial(has_sentences, count=settings.max_sentences)
        return Request(
            messages=messages,
            seed=derive_seed(self._recipe.seed, *key),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            stop_when=stop_when,
            max_thought_tokens=settings.max_thought_tokens,
        )

    def _needs_judge(self, assigned: AssignedDialogue, answer: Answer) -> bool:
        is_sampled = assigned.method == "sampled"
        return is_sampled and answer.verdict == ACCEPTED and assigned.needs_judge(answer.turn)

    def _question(self, judge: Judge, assigned: AssignedDialogue, answer: Answer) -> Request:
        turn = answer.turn
        return _Question(
            messages=judge.question(
                assigned.criterion(turn), assigned.dialogue.turns[turn], answer.text
            ),
            seed=0,
            max_tokens=_VERDICT_TOKENS,
            temperature=0.0,
            max_thought_tokens=self._settings.max_thought_tokens,
        )

    def _teacher_prompt(
        self, assigned: AssignedDialogue, accepted: list[Answer]
    ) -> tuple[Message, ...]:
        # An edited dialogue continues from the teacher's own words, a sampled one from the answers.
        answers = [a.text if assigned.method == "sampled" else a.raw for a in accepted]
        return assigned.teacher_prompt(answers, self._recipe.dialogues.system)

    def remove_common(self, dialogues: Iterable[AssignedDialogue]) -> int:
        """Remove answers whose words the corpus has `MAX_COPIES` times, and return their number.

        A dialogue ends before such an answer: the turns after it are removed, too.
        """
        copies: Counter[frozenset[str]] = Counter()
        removed = 0
        for assigned in dialogues:
            answers = self.accepted(assigned)
            for turn, answer in enumerate(answers):
                is_fixed = assigned.is_fixed(answer.turn, answer.raw)
                if is_fixed or answer.turn in assigned.exact_answers:
                    continue
                answer_words = frozenset(words(answer.raw))
                copies[answer_words] += 1
                if copies[answer_words] > MAX_COPIES:
                    removed += len(answers) - turn
                    del answers[turn:]
        return removed

    def synthesized(self, assigned: AssignedDialogue, teacher: str) -> SynthesizedDialogue:
        """Return the ghosted dialogue up to its last answer, for training."""
        answers = self.accepted(assigned)
        texts = [a.text for a in answers]
        messages = assigned.student_prompt(texts, self._recipe.dialogues.system)
        return {
            "messages": _up_to_last_answer(messages),
            "asked": _up_to_last_answer(self._teacher_prompt(assigned, answers)),
            "dialogue": assigned.dialogue.id,
            "instruction": assigned.name,
            "way": assigned.method,
            "teacher": teacher,
            "seed": self._recipe.seed,
            "verdicts": [self._verdicts(assigned, turn) for turn in range(len(answers))],
        }

    def _verdicts(self, assigned: AssignedDialogue, turn: int) -> list[str]:
        numbers = range(self._settings.candidates)
        keys = [CandidateKey(assigned.dialogue.id, turn, candidate) for candidate in numbers]
        return [self.answers[key].verdict for key in keys if key in self.answers]


_Step = tuple[Task, Request | None]
"""A task, and what it asks next; None at its end."""


def _by_turns(teacher: RunTasks, judge: RunTasks) -> RunTasks:
    """Return a function that runs tasks with two models, each of which answers many at a time."""

    def run(tasks: Iterable[Task]) -> None:
        steps: list[_Step] = [(task, next(task, None)) for task in tasks]
        while steps:
            questions: list[_Step] = []
            teacher([_taught(task, request, questions) for task, request in steps])
            steps = []
            judge([_judged(task, request, steps) for task, request in questions if request])

    return run


def _taught(task: Task, request: Request | None, questions: list[_Step]) -> Task:
    """Run a task up to its next question for the judge."""
    while request and not isinstance(request, _Question):
        request = _send(task, (yield request))
    if request:
        questions.append((task, request))


def _judged(task: Task, request: Request, steps: list[_Step]) -> Task:
    steps.append((task, _send(task, (yield request))))


def _send(task: Task, completion: Completion) -> Request | None:
    """Continue a task; None at its end."""
    try:
        return task.send(completion)
    except StopIteration:
        return None


def _up_to_last_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return a chat without the user message of a turn that no candidate answered well."""
    return messages[:-1] if messages[-1]["role"] == "user" else messages
