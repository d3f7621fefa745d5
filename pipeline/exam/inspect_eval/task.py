"""`inspect eval gatt/exam`: the task, which Inspect finds through the entry point in pyproject."""

from __future__ import annotations

from collections.abc import Sequence

from inspect_ai import Task, task
from inspect_ai._util.error import PrerequisiteError

from pipeline.errors import GattError
from pipeline.exam.arms import ONCE
from pipeline.exam.inspect_eval.dialogues import dialogue, samples_of
from pipeline.exam.inspect_eval.logs import log_metadata
from pipeline.exam.inspect_eval.options import (
    arms_of,
    of_gatt,
    settings_of,
    tasks_of,
    turns_of,
)
from pipeline.exam.inspect_eval.scoring import verdicts
from pipeline.exam.tasks import EXAM_VERSION


@task(name="gatt/exam")
@of_gatt
def exam(
    turns: int | str = 20,
    arms: str | Sequence[str] = ONCE,
    regimes: str | Sequence[str] = "",
    dialogues: int = 0,
    sampler: str = "plain",
    window: str = "drop",
    max_tokens: int = 256,
    seed: int = 1,
) -> Task:
    """Measure how long instructions hold: the persistence exam of gatt.

    Args:
        turns: 20, 50, another number, or "context": until the context is full.
        arms: once, every, every-K, depth-D, system or failed; several with commas.
        regimes: first, system, three, replaced, added, stopped, contradicted, long or attributes;
            several with commas, by default all.
        dialogues: of each regime; 0 takes all.
        sampler: plain (temperature 0.8, top-p 0.95), greedy, or gatt (temperature 0.7).
        window: drop, pin or refuse, when the context is full.
        max_tokens: of an answer; long ones: four times.
        seed: of the samplers, for other answers.
    """
    try:
        number = turns_of(turns)
        chosen = arms_of(arms)
        samples = samples_of(tasks_of(regimes, dialogues, number), chosen)
        settings = settings_of(sampler, window, max_tokens, seed)
        return Task(
            dataset=samples,
            solver=dialogue(turns, sampler, window, max_tokens, seed),
            scorer=verdicts(),
            version=EXAM_VERSION,
            metadata=log_metadata(chosen, number, settings),
        )
    except GattError as error:
        raise PrerequisiteError(str(error)) from None
