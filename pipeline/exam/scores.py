"""From replies to the numbers of a result."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.evaluation.rates import Z_95, Rate, wilson
from pipeline.evaluation.rates import adherence as rates_by
from pipeline.evaluation.statistics import kaplan_meier, lifetimes, required_sample_size
from pipeline.exam.dialogue_run import ExamReply
from pipeline.exam.result import (
    BROKEN,
    BROKEN_FULL,
    KEPT,
    KEPT_FULL,
    UNMEASURED,
    ArmResult,
    DialogueVerdicts,
    RegimeScore,
    TurnCost,
    TurnScore,
    counted_replies,
    is_measured_from_turn_1,
    verdict_reply,
)
from pipeline.exam.tasks import ExamTask, ordered_regimes
from pipeline.gatt.rollout import ReplyKey
from pipeline.gatt.text import words
from pipeline.records import Reply

_LAST_TURNS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A reply with its verdict. `counts`: it is one of those that the numbers are about."""

    answer: ExamReply
    regime: str
    is_kept: bool | None
    counts: bool
    is_in_curve: bool
    ends_loops: bool

    @property
    def dialogue(self) -> str:
        """Return what the reply belongs to: an attribute is a dialogue of its own."""
        reply = self.answer.reply
        return f"{reply.dialogue} {reply.recall_attribute}".strip()

    @property
    def turn(self) -> int:
        return self.answer.reply.turn

    @property
    def is_inside(self) -> bool:
        """Return whether the reply counts, and all messages were in the context."""
        return self.counts and not self.answer.is_full

    @property
    def mark(self) -> str:
        if self.is_kept is None or (self.answer.reply.recall_attribute and not self.counts):
            return UNMEASURED
        if self.answer.dropped:
            return KEPT_FULL if self.is_kept else BROKEN_FULL
        return KEPT if self.is_kept else BROKEN


def score_arms(replies: Sequence[ExamReply], tasks: Sequence[ExamTask]) -> tuple[ArmResult, ...]:
    """Return the numbers of each arm, in the order in which the replies name them."""
    by_id = {task.id: task for task in tasks}
    arms: dict[str, list[ExamReply]] = {row.reply.arm: [] for row in replies}
    for row in sorted(replies, key=lambda r: ReplyKey.of(r.reply)):
        arms[row.reply.arm].append(row)
    return tuple(_score(name, rows, by_id) for name, rows in arms.items())


def clustered(replies: Sequence[Reply]) -> Rate:
    """Return the share of adherent replies, with an interval for replies in dialogues.

    It is Wilson's with the number of replies divided by the design effect (Kish 1965), because the
    replies of a dialogue are alike.
    """
    hits, size = sum(r.adherent for r in replies), required_sample_size(replies)
    return wilson(hits, len(replies), Z_95 * math.sqrt(size.design_effect) if size else Z_95)


def _score(name: str, answers: Sequence[ExamReply], by_id: dict[str, ExamTask]) -> ArmResult:
    last = max(answer.reply.turn for answer in answers)
    rows = [_row(answer, by_id[answer.reply.dialogue], last) for answer in answers]
    measured = [row for row in rows if row.answer.reply.finish != "context"]
    inside = [row for row in rows if row.is_inside]
    adherence, verdicts = _rate(inside), _verdicts(rows, by_id, last)
    reminder_tokens = _mean(row.answer.reminder_tokens for row in inside)
    milliseconds = 1000 * _mean(row.answer.seconds for row in measured)
    lives = lifetimes(counted_replies(verdicts, from_turn_1=True))
    return ArmResult(
        name=name,
        answers=len(measured),
        adherence=adherence,
        last_five=_rate(_last_turns(rows)),
        full_window=_rate([row for row in rows if row.counts and row.answer.dropped]),
        words=_mean_words(inside),
        cut=_share(measured, _is_cut),
        loops=_share(measured, lambda row: row.answer.reply.defect == "loop"),
        invalid=_share(measured, lambda row: bool(row.answer.reply.defect)),
        half_broken=kaplan_meier(lives.values()).median,
        prompt_tokens=_mean(row.answer.reply.prompt_tokens for row in measured),
        answer_tokens=_mean(row.answer.reply.tokens for row in measured),
        reminder_tokens=reminder_tokens,
        reminder_tokens_per_kept=_per_kept(reminder_tokens, adherence),
        seconds=round(sum(row.answer.seconds for row in rows), 3),
        milliseconds_per_answer=milliseconds,
        milliseconds_per_kept=_per_kept(milliseconds, adherence),
        regimes=_regimes(inside, ordered_regimes(task.regime for task in by_id.values())),
        by_turn=_by_turn(rows),
        dialogues=verdicts,
        cost_by_turn=_cost_by_turn(measured),
    )


def _row(answer: ExamReply, task: ExamTask, last: int) -> _Row:
    reply, is_kept = answer.reply, task.is_kept(answer.reply)
    counts = task.counts(
        reply.turn, last, recall=bool(reply.recall_attribute), is_full=answer.is_full
    )
    counts = counts and is_kept is not None
    is_in_curve = is_measured_from_turn_1(task.regime, task.first_counted)
    return _Row(
        answer=answer,
        regime=task.regime,
        is_kept=is_kept,
        counts=counts,
        is_in_curve=is_in_curve,
        ends_loops=task.ends_loops,
    )


def _rate(rows: Sequence[_Row]) -> Rate:
    return clustered([verdict_reply(r.dialogue, r.turn, is_kept=bool(r.is_kept)) for r in rows])


def _last_turns(rows: Sequence[_Row]) -> list[_Row]:
    """Return those inside the context of the last five turns of each dialogue, if there are any."""
    last: dict[str, int] = {}
    for row in rows:
        dialogue = row.answer.reply.dialogue
        last[dialogue] = max(row.turn, last.get(dialogue, 0))
    inside = [row for row in rows if row.is_inside]
    return [row for row in inside if row.turn > last[row.answer.reply.dialogue] - _LAST_TURNS]


def _verdicts(
    rows: Sequence[_Row], by_id: dict[str, ExamTask], last: int
) -> tuple[DialogueVerdicts, ...]:
    marks: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        key = (row.answer.reply.dialogue, row.answer.reply.recall_attribute)
        marks.setdefault(key, [UNMEASURED] * last)[row.turn - 1] = row.mark
    return tuple(
        DialogueVerdicts(
            id=dialogue,
            regime=by_id[dialogue].regime,
            attribute=attribute,
            first_counted=by_id[dialogue].first_counted,
            marks="".join(of_dialogue),
        )
        for (dialogue, attribute), of_dialogue in marks.items()
        if set(of_dialogue) != {UNMEASURED}
    )


def _regimes(inside: Sequence[_Row], names: Sequence[str]) -> tuple[RegimeScore, ...]:
    of_regimes = {name: [row for row in inside if row.regime == name] for name in names}
    return tuple(
        RegimeScore(
            regime=regime, adherence=_rate(rows), words=_mean_words(rows), cut=_share(rows, _is_cut)
        )
        for regime, rows in of_regimes.items()
        if rows
    )


def _by_turn(rows: Sequence[_Row]) -> tuple[TurnScore, ...]:
    first = [r for r in rows if r.is_in_curve and r.is_kept is not None and not r.answer.is_full]
    verdicts = [verdict_reply(r.dialogue, r.turn, is_kept=bool(r.is_kept)) for r in first]
    return tuple(
        TurnScore(
            turn=turn, adherence=rate, words=_mean_words([r for r in first if r.turn == turn])
        )
        for turn, rate in sorted(rates_by(verdicts, lambda reply: reply.turn).items())
    )


def _cost_by_turn(measured: Sequence[_Row]) -> tuple[TurnCost, ...]:
    tokens: Counter[int] = Counter()
    seconds: dict[int, float] = defaultdict(float)
    for row in measured:
        tokens[row.turn] += row.answer.reply.tokens
        seconds[row.turn] += row.answer.seconds
    return tuple(
        TurnCost(turn=turn, tokens=n, milliseconds_per_token=1000 * seconds[turn] / n)
        for turn, n in sorted(tokens.items())
        if n
    )


def _is_cut(row: _Row) -> bool:
    """Return whether a limit has cut an answer that might have had a proper ending.

    Where a task ends loops, one is ended in any case.
    """
    reply = row.answer.reply
    is_ended_loop = row.ends_loops and reply.defect == "loop"
    return reply.finish in ("length", "thinking") and not is_ended_loop


def _share(rows: Sequence[_Row], is_hit: Callable[[_Row], bool]) -> Rate:
    return wilson(sum(map(is_hit, rows)), len(rows))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return fmean(listed) if listed else math.nan


def _mean_words(rows: Sequence[_Row]) -> float:
    return _mean(len(words(row.answer.reply.text)) for row in rows)


def _per_kept(cost: float, rate: Rate) -> float | None:
    """Return a cost per answer as one per kept answer; None if no answer was kept."""
    return cost / rate.value if rate.hits and not math.isnan(cost) else None
