"""Flip rates: how often the instruction in every turn turns a failing answer into one that obeys.

They decide what corrects own answers: the base that reads the instruction in every turn (OPSA,
arXiv 2605.15239), or the recorded answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from pipeline.gatt.quality import find_defect
from pipeline.training.rollouts.dialogues import GhostDialogue

Lesson = Literal["teacher", "recorded"]
"""What corrects own answers: the reminded base, or the answers that synthesis has recorded."""

_DIALOGUES_EACH = 4
"""Dialogues that an instruction is tried in."""
_TEACHES = 0.5
"""From this rate on the reminded base is the better teacher."""
_LESSONS: Mapping[Lesson, str] = {
    "teacher": "corrected by the base that reads the instruction in every turn",
    "recorded": "corrected by the recorded answers, as that base seldom obeys either",
}


class FlipRate(NamedTuple):
    """Answers of the student that fail, of `answers`, and those of them that the reminder turns.

    `reminded` counts all answers of the reminded base that obey.
    """

    answers: int = 0
    failing: int = 0
    flipped: int = 0
    reminded: int = 0

    @property
    def rate(self) -> float:
        """Return the fraction of failing answers that are turned, or of reminded ones that obey."""
        return self.flipped / self.failing if self.failing else self.reminded / max(1, self.answers)

    def plus(self, *, student_obeys: bool, reminded_obeys: bool) -> FlipRate:
        """Return the rate with another pair of answers."""
        fails = not student_obeys
        return FlipRate(
            self.answers + 1,
            self.failing + fails,
            self.flipped + (fails and reminded_obeys),
            self.reminded + reminded_obeys,
        )


FlipRates = Mapping[str, FlipRate]
"""Flip rates by what is checked (see `GhostDialogue.verdicts`)."""


class Trial(NamedTuple):
    """The turn (from 0) of a dialogue in which the reminder is tried."""

    dialogue: GhostDialogue
    turn: int

    @property
    def history(self) -> Sequence[str]:
        """Return the answers before the turn, unedited: most of them have failed, too."""
        return self.dialogue.originals[: self.turn]


def choose_trials(dialogues: Iterable[GhostDialogue]) -> list[Trial]:
    """Return a few dialogues for each check, in the last of their turns that has one."""
    counts: dict[str, int] = {}
    trials: list[Trial] = []
    for dialogue in dialogues:
        checked = [n for n in range(len(dialogue.answers)) if dialogue.checks(n)]
        if not checked:
            continue
        names = dialogue.checks(checked[-1])
        if min(counts.get(name, 0) for name in names) < _DIALOGUES_EACH:
            trials.append(Trial(dialogue, checked[-1]))
            counts |= {name: counts.get(name, 0) + 1 for name in names}
    return trials


def measure(trials: Sequence[Trial], student: Sequence[str], reminded: Sequence[str]) -> FlipRates:
    """Return the flip rates from the answers to each trial."""
    rates: dict[str, FlipRate] = {}
    for trial, own, other in zip(trials, student, reminded, strict=True):
        reminded_verdicts = _verdicts(trial, other)
        for name, student_obeys in _verdicts(trial, own).items():
            rates[name] = rates.get(name, FlipRate()).plus(
                student_obeys=student_obeys, reminded_obeys=reminded_verdicts[name]
            )
    return rates


def _verdicts(trial: Trial, text: str) -> dict[str, bool]:
    """Return which checks an answer passes: none of them if it is a loop or empty."""
    verdicts = trial.dialogue.verdicts(trial.turn, text, trial.history)
    defect = find_defect(text, (), trial.dialogue.assigned.required_words)
    return {name: passes and not defect for name, passes in verdicts.items()}


def lesson_of(dialogue: GhostDialogue, turn: int, rates: FlipRates) -> Lesson:
    """Return what the own answer of `turn` (from 0) learns from.

    Where no program can check it, the reminded base teaches.
    """
    rate = min((rates[name].rate for name in dialogue.checks(turn) if name in rates), default=1.0)
    return "teacher" if rate >= _TEACHES else "recorded"


def describe(dialogues: Sequence[GhostDialogue], rates: FlipRates) -> list[str]:
    """Return the rates, and what follows from them, as lines for the user."""
    counts = (f"{name} {rate.flipped}/{rate.failing}" for name, rate in sorted(rates.items()))
    lines = [
        f"train: failing answers that the reminder turns: {', '.join(counts) or 'none checked'}"
    ]
    lessons: dict[Lesson, set[str]] = {"teacher": set(), "recorded": set()}
    for dialogue in dialogues:
        for turn in range(len(dialogue.answers)):
            names = list(dialogue.checks(turn))
            if len(names) == 1:  # combinations are many, and their parts say enough
                lessons[lesson_of(dialogue, turn, rates)].add(names[0])
    lines += [
        f"train: {text}: {', '.join(sorted(lessons[lesson]))}"
        for lesson, text in _LESSONS.items()
        if lessons[lesson]
    ]
    return lines
