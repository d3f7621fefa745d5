"""Options and settings of a small exam, to be changed with `dataclasses.replace`."""

from __future__ import annotations

from pipeline.exam.settings import ExamSettings
from pipeline.stages.exam import ExamOptions

OPTIONS = ExamOptions(
    turns="3",
    arms=("once",),
    regimes=("first",),
    dialogues=2,
    sampler="greedy",
    window="drop",
    max_tokens=16,
    context=0,
    training_minutes=None,
    max_parallel=0,
    seed=1,
    quick=False,
)
SETTINGS = ExamSettings(
    max_tokens=64,
    max_thought_tokens=0,
    context=4096,
    window="drop",
    sampler="plain",
    seed=1,
    system_role=True,
)
