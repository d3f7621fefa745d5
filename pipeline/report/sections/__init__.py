"""The sections of a report, in their order; each is a function of the results of a run.

A function returns None where nothing was measured for its section.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.report.page import ReportSection
from pipeline.report.results import RunResults
from pipeline.report.sections import adherence, effects, recall, run

SECTIONS: Sequence[Callable[[RunResults], ReportSection | None]] = (
    adherence.several_turns,
    adherence.other_conditions,
    recall.recall,
    adherence.first_broken_answer,
    adherence.by_instruction,
    adherence.generalization,
    adherence.change,
    effects.reminder_fidelity,
    effects.leakage_and_damage,
    adherence.single_turn,
    effects.judge,
    effects.attention,
    run.training_data,
    run.training,
    run.export,
    run.facts,
)
