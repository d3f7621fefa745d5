"""The rows of a comparison: models and arms, their differences, and when training has paid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.evaluation.statistics import Difference, paired_bootstrap
from pipeline.exam.arms import ONCE
from pipeline.exam.machine import is_one_machine
from pipeline.exam.result import (
    BROKEN_FULL,
    KEPT_FULL,
    ArmResult,
    ExamResult,
    TurnCost,
    counted_replies,
)
from pipeline.records import Reply

MAX_CUT = 0.05
"""Share of cut answers above which an arm gets a warning."""
_TASK_FIELDS = ("name", "version", "sha256", "turns", "regimes", "dialogues")
_SETTINGS = ("max_tokens", "sampler", "seed")


@dataclass(frozen=True, slots=True)
class ExamRow:
    """One arm of one model; `label` names it among the others of the table."""

    result: ExamResult
    arm: ArmResult
    label: str

    @property
    def is_training_free(self) -> bool:
        """Return whether this is an arm that reminds a model whose training is not counted."""
        return self.arm.name != ONCE and self.result.model.training_minutes is None


def exam_rows(results: Sequence[ExamResult]) -> list[ExamRow]:
    """Return all arms of all results, in their order."""
    names = model_names(results)
    return [
        ExamRow(result, arm, f"{name}: {arm.name}" if len(results) > 1 else arm.name)
        for name, result in zip(names, results, strict=True)
        for arm in result.arms
    ]


def model_names(results: Sequence[ExamResult]) -> list[str]:
    """Return the names of the models; several of one with their window policy, or numbered."""
    names = [result.model.name for result in results]
    if _windows_differ(results):
        names = [
            f"{name} ({result.settings.window})" if names.count(name) > 1 else name
            for name, result in zip(names, results, strict=True)
        ]
    return [
        f"{name} ({names[: n + 1].count(name)})" if names.count(name) > 1 else name
        for n, name in enumerate(names)
    ]


def differences(rows: Sequence[ExamRow]) -> list[Difference | None]:
    """Return each row's adherence minus that of the first row, over the turns that both have."""
    return _differences([counted_replies(row.arm.dialogues) for row in rows])


def full_differences(rows: Sequence[ExamRow]) -> list[Difference | None]:
    """Return the same of the answers in a full context, where window policies can differ."""
    return _differences([counted_replies(row.arm.dialogues, full=True) for row in rows])


def _differences(replies: Sequence[Sequence[Reply]]) -> list[Difference | None]:
    first, *rest = replies
    others = [_difference(first, of_row) for of_row in rest]
    return [None, *(d if d.dialogues > 1 else None for d in others)]


def _difference(first: Sequence[Reply], other: Sequence[Reply]) -> Difference:
    """Return the difference over the turns that both have, as one may fill the context earlier."""
    common = {(r.dialogue, r.turn) for r in first} & {(r.dialogue, r.turn) for r in other}
    base, tuned = ([r for r in row if (r.dialogue, r.turn) in common] for row in (first, other))
    return paired_bootstrap(base, tuned)


def compares_windows(results: Sequence[ExamResult]) -> bool:
    """Return whether the results are of one model with several window policies."""
    return _windows_differ(results) and comparable(results)


def _windows_differ(results: Sequence[ExamResult]) -> bool:
    return len({result.settings.window for result in results}) > 1


def turns_to_pay(reminded: ArmResult, tuned: ArmResult, training_minutes: float) -> str:
    """Return from which turn on training was cheaper than a reminder, in time for kept answers.

    In n turns the tuned model gives `p n` kept answers, where p is the share that it keeps. The
    reminder needs `p n` times its own time for a kept answer to give as many.
    """
    if tuned.milliseconds_per_kept is None:
        return "never"
    if reminded.milliseconds_per_kept is None:
        return "1"  # the reminder never gives what the tuned model gives
    saved = tuned.adherence.value * (reminded.milliseconds_per_kept - tuned.milliseconds_per_kept)
    if saved <= 0:
        return "never"
    return f"{math.ceil(60_000 * training_minutes / saved):,}"


def cost_points(arm: ArmResult, size: int) -> dict[float, float]:
    """Return the milliseconds per generated token of `size` turns each, by their mean turn."""
    groups: dict[int, list[TurnCost]] = {}
    for cost in arm.cost_by_turn:
        groups.setdefault((cost.turn - 1) // size, []).append(cost)
    points = {}
    for group in groups.values():
        milliseconds = sum(c.tokens * c.milliseconds_per_token for c in group)
        middle = sum(c.turn for c in group) / len(group)
        points[middle] = milliseconds / sum(c.tokens for c in group)
    return points


def cost_in(arm: ArmResult, turn: int) -> float | None:
    """Return the milliseconds per generated token in `turn`; None if there are none."""
    costs = (c.milliseconds_per_token for c in arm.cost_by_turn if c.turn == turn)
    return next(costs, None)


def warnings_about(results: Sequence[ExamResult]) -> list[str]:
    """Return what a reader has to know about the numbers, and why some cannot be compared."""
    warnings = [*_differing(results), *_mixed(results)]
    for row in exam_rows(results):
        if row.arm.cut.hits > MAX_CUT * row.arm.cut.n:
            warnings.append(
                f"{row.label}: {row.arm.cut.value:.0%} of the answers were cut at "
                f"{row.result.settings.max_tokens} tokens or within their thoughts, so that they "
                "cannot show their ending. Raise --max-tokens; thoughts have a limit of their own."
            )
        warnings += _never_full(row)
    for model, result in zip(model_names(results), results, strict=True):
        if result.exam.unchecked:
            warnings.append(
                f"{model}: {result.exam.unchecked} of the {result.exam.criteria} "
                f"criteria of {result.exam.name} are not checked: they need a judge or the "
                "authors' own measure. A turn with no others is not counted."
            )
        if not result.exam.complete:
            warnings.append(
                f"{model}: not the whole exam (dialogues: {result.exam.dialogues}; "
                f"{_length(result)}), so this is no result to cite."
            )
        if empty := _empty_regimes(result):
            warnings.append(
                f"{model}: no answer counts in {', '.join(empty)}: its dialogues end "
                "before, or do not fit in the context."
            )
        notes = ", ".join(f"{name}: {change}" for name, change in result.notes.items())
        if notes:
            warnings.append(f"{model}: {notes}.")
    return warnings


def _mixed(results: Sequence[ExamResult]) -> list[str]:
    """Return warnings about what may differ in results that are compared, or within one."""
    warnings = []
    if len({result.settings.context for result in results}) > 1:
        warnings.append("The contexts differ in size: answers count while all messages are in it.")
    if not is_one_machine(*(result.machine for result in results)):
        warnings.append("The times were taken on different machines.")
    versions = {version for result in results for version in result.gatt.split(", ")}
    if len(versions) > 1:
        listed = ", ".join(sorted(versions))
        warnings.append(
            f"The answers are of different versions of gatt ({listed}), whose checks may differ."
        )
    if len({bool(result.model.server) for result in results}) > 1:
        warnings.append(
            "A server gets temperature and top-p only: the rest of the sampler is its own."
        )
    return warnings


def _never_full(row: ExamRow) -> list[str]:
    """Return a warning about dialogues that were to fill the context and did not.

    After "refuse" there is no mark that tells.
    """
    if row.result.exam.turns or row.result.settings.window == "refuse":
        return []
    dialogues = [d for d in row.arm.dialogues if not d.attribute]
    short = [d for d in dialogues if not {KEPT_FULL, BROKEN_FULL} & set(d.marks)]
    if not short:
        return []
    turns = max(len(d.marks) for d in short)
    return [
        f"{row.label}: {len(short)} of {len(dialogues)} dialogues ended after {turns} turns at "
        "most, before the context was full."
    ]


def _empty_regimes(result: ExamResult) -> list[str]:
    """Return the regimes of the exam in which an arm has no counted answer."""
    if result.exam.criteria:
        return []  # of a benchmark, parts may have nothing that a program can check
    measured = [{score.regime for score in arm.regimes} for arm in result.arms]
    return [name for name in result.exam.regimes if any(name not in of_arm for of_arm in measured)]


def comparable(results: Sequence[ExamResult]) -> bool:
    """Return whether all results are of the same exam with the same settings."""
    return not _differing(results)


def _differing(results: Sequence[ExamResult]) -> list[str]:
    """Return a warning for each setting that makes results those of different tasks."""
    names = [f"exam.{name}" for name in _TASK_FIELDS]
    names += [f"settings.{name}" for name in _SETTINGS]
    warnings = []
    for name in names:
        section, field = name.split(".")
        values = {repr(getattr(getattr(result, section), field)) for result in results}
        if len(values) > 1:
            shown = " and ".join(sorted(values))
            warnings.append(f"{field} differs ({shown}): no differences are computed.")
    if _windows_differ(results) and len({_model_identity(result) for result in results}) > 1:
        warnings.append("Models and window policies differ: no differences are computed.")
    if len({result.settings.sampler for result in results}) == 1:
        warnings += _differing_samplers(results)
    return warnings


def _model_identity(result: ExamResult) -> tuple[str, ...]:
    model = result.model
    return model.name, model.sha256, model.adapter_sha256, model.server


def _differing_samplers(results: Sequence[ExamResult]) -> list[str]:
    """Return a warning for each value of the sampler that two results give in another way.

    What one does not give is a server's own, but the temperature is a part of every sampler.
    """
    warnings = []
    if len({"temperature" in result.sampler for result in results}) > 1:
        warnings.append("temperature is not known of all: no differences are computed.")
    for name in dict.fromkeys(name for result in results for name in result.sampler):
        values = {result.sampler[name] for result in results if name in result.sampler}
        if len(values) > 1:
            shown = " and ".join(f"{value:g}" for value in sorted(values))
            warnings.append(f"{name} differs ({shown}): no differences are computed.")
    return warnings


def _length(result: ExamResult) -> str:
    return f"{result.exam.turns} turns" if result.exam.turns else "until the context is full"
