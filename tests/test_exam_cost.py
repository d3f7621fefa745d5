"""What the exam's answers cost by turn: each answer's share of the time, and the curve."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from support.exam import SETTINGS

from pipeline.exam.dialogue_run import ExamReply, SharedTime
from pipeline.exam.report.page import write_page
from pipeline.exam.report.rows import cost_in, cost_points
from pipeline.exam.result import ArmResult, ExaminedModel, ExamResult, ExamSet
from pipeline.exam.scores import score_arms
from pipeline.exam.tasks import exam_tasks, frozen_exam
from pipeline.records import SAMPLERS, FinishReason, Reply


def test_each_moment_is_divided_among_the_answers_that_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    shared = SharedTime()
    first = shared.start()
    now += 1
    second = shared.start()
    now += 2
    assert shared.end(first) == 1 + 2 / 2
    now += 4
    assert shared.end(second) == 2 / 2 + 4
    now += 50  # nothing runs
    third = shared.start()
    now += 3
    assert shared.end(third) == 3


def _arm(turns: int, seconds_at_end: float) -> ArmResult:
    """Return an arm of two dialogues whose answers cost more from turn to turn."""

    def reply(dialogue: str, turn: int, finish: FinishReason = "stop") -> ExamReply:
        answer = Reply(
            arm="once",
            dialogue=dialogue,
            turn=turn,
            text="Ahoy.",
            prompt_tokens=20 * turn,
            tokens=10 if finish == "stop" else 0,
            finish=finish,
            obeys=True,
            defect="",
        )
        seconds = 0.1 + (seconds_at_end - 0.1) * (turn - 1) / (turns - 1)
        return ExamReply(reply=answer, dropped=0, reminder_tokens=0, seconds=seconds)

    tasks = exam_tasks(("first",), 2, turns)
    rows = [reply(task.id, turn) for task in tasks for turn in range(1, turns + 1)]
    rows.append(reply(tasks[0].id, turns + 1, "context"))
    (arm,) = score_arms(rows, tasks)
    return arm


def _result(arm: ArmResult) -> ExamResult:
    return ExamResult(
        format=1,
        gatt="0",
        exam=ExamSet(
            **frozen_exam()._asdict(), turns=50, regimes=("first",), dialogues=2, complete=False
        ),
        model=ExaminedModel(
            name="m", sha256="", adapter_sha256="", server="", training_minutes=None
        ),
        settings=replace(SETTINGS, context=8192),
        sampler=SAMPLERS["plain"].values,
        machine="",
        date="",
        notes={},
        replies_sha256="",
        arms=(arm,),
    )


def test_a_token_costs_the_time_of_its_turn() -> None:
    arm = _arm(50, 0.3)
    assert [cost.turn for cost in arm.cost_by_turn] == list(range(1, 51))  # not the refused one
    assert arm.cost_by_turn[0].tokens == 20
    assert cost_in(arm, 1) == pytest.approx(10)
    assert cost_in(arm, 50) == pytest.approx(30)
    assert cost_in(arm, 51) is None
    points = cost_points(arm, 2)
    assert len(points) == 25
    assert points[1.5] == pytest.approx((cost_in(arm, 1) or 0) / 2 + (cost_in(arm, 2) or 0) / 2)


def test_the_page_draws_the_cost_by_turn(tmp_path: Path) -> None:
    write_page([_result(_arm(50, 0.3))], tmp_path / "exam.html")
    page = (tmp_path / "exam.html").read_text(encoding="utf-8")
    assert "Cost by turn" in page
    assert "ms per generated token" in (tmp_path / "figures" / "cost.svg").read_text()
    with (tmp_path / "tables" / "cost.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["arm"], row["last turn"], row["times"]) == ("once", "50", "2.88")


def test_a_result_without_costs_has_no_such_section(tmp_path: Path) -> None:
    arm = replace(_arm(3, 0.3), cost_by_turn=())
    write_page([_result(arm)], tmp_path / "exam.html")
    assert "Cost by turn" not in (tmp_path / "exam.html").read_text(encoding="utf-8")
