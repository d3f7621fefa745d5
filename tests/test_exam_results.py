"""A result of the exam as others read it: its schema, and what a reader is warned about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.exam import OPTIONS, SETTINGS

from pipeline.errors import GattError
from pipeline.exam.dialogue_run import ExamReply
from pipeline.exam.inspect_eval.logs import _exam_set, read_log
from pipeline.exam.report.page import headline, write_page
from pipeline.exam.report.rows import (
    comparable,
    differences,
    exam_rows,
    model_names,
    warnings_about,
)
from pipeline.exam.report.tables import facts_table, main_table, terminal_table
from pipeline.exam.result import (
    ExaminedModel,
    ExamResult,
    ExamSet,
    TurnCost,
    json_schema,
    read_result,
    sampler_values,
)
from pipeline.exam.scores import score_arms
from pipeline.exam.settings import WindowPolicy
from pipeline.exam.tasks import EXAM_NAME, ExamTask, exam_tasks, frozen_exam
from pipeline.files import write_json
from pipeline.records import Reply
from pipeline.stages.exam import _questions

_LOCAL = ExaminedModel(
    name="m", sha256="0" * 64, adapter_sha256="", server="", training_minutes=1.0
)
_SERVED = replace(
    _LOCAL, name="s", sha256="", server="http://127.0.0.1:1/v1", training_minutes=None
)


def _answers(
    tasks: Sequence[ExamTask], dropped: Sequence[int], broken_from: int = 99
) -> list[ExamReply]:
    """Return an answer for each turn of each task; they are kept before turn `broken_from`."""
    replies = [
        Reply(
            arm="once",
            dialogue=task.id,
            turn=turn,
            text="Ahoy.",
            prompt_tokens=20,
            tokens=0,
            finish="stop",
            obeys=turn < broken_from,
            defect="",
        )
        for task in tasks
        for turn in range(1, len(dropped) + 1)
    ]
    return [
        ExamReply(reply=r, dropped=dropped[r.turn - 1], reminder_tokens=0, seconds=0.1)
        for r in replies
    ]


def _result(
    *,
    regime: str = "first",
    turns: int = 3,
    dropped: Sequence[int] = (0, 0, 0),
    broken_from: int = 99,
    **fields: Any,
) -> ExamResult:
    """Return the result of two dialogues; `dropped` is by turn."""
    tasks = exam_tasks((regime,), 2, len(dropped))
    rows = _answers(tasks, dropped, broken_from)
    exam = ExamSet(
        **frozen_exam()._asdict(), turns=turns, regimes=(regime,), dialogues=2, complete=True
    )
    result = ExamResult(
        format=1,
        gatt="1",
        exam=exam,
        model=_LOCAL,
        settings=SETTINGS,
        sampler=sampler_values("plain", is_server=False),
        machine="this",
        date="2026-01-01",
        notes={},
        replies_sha256="",
        arms=score_arms(rows, tasks),
    )
    return replace(result, **fields)


def test_a_result_is_valid_by_the_schema(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    file = tmp_path / "m.json"
    for result in (_result(), _result(dropped=(1, 1, 1)), _result(model=_SERVED)):
        write_json(file, result)
        stored = json.loads(file.read_text(encoding="utf-8"))
        # Where nothing was measured there is no number, such as the share in a full context.
        assert None in (
            stored["arms"][0]["full_window"]["value"],
            stored["arms"][0]["adherence"]["value"],
        )
        jsonschema.validate(stored, json_schema())
        assert repr(read_result(file).arms) == repr(result.arms)
    del stored["arms"][0]["adherence"]["n"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(stored, json_schema())


def test_a_result_of_a_later_format_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "m.json", _result(format=2, gatt="9.9"))
    with pytest.raises(GattError, match=r"version 2 of the format, written by gatt 9\.9"):
        read_result(tmp_path / "m.json")
    (tmp_path / "m.json").write_text('{"format": 2, "gatt": "9.9", "models": []}')
    with pytest.raises(GattError, match=r"version 2 of the format, written by gatt 9\.9"):
        read_result(tmp_path / "m.json")


def test_a_log_is_complete_if_every_arm_has_all_dialogues() -> None:
    samples: Any = [
        SimpleNamespace(
            metadata={"arm": arm, "dialogue": task.id, "regime": task.regime},
            store={"replies": ["a reply"]},
        )
        for arm in ("once", "every")
        for task in exam_tasks((), 0, 1)
    ]
    about = {"set": frozen_exam()._asdict(), "arms": ["once", "every"], "turns": 20}
    assert _exam_set(about, samples, ()).complete
    assert not _exam_set(about, samples[:-1], ()).complete  # as `--limit` leaves it
    about["turns"] = 0
    (task,) = exam_tasks(("first",), 1, 12)
    for full_turns in (9, 10):
        dropped = [*[0] * (12 - full_turns), *[1] * full_turns]
        result = _exam_set(about, samples, _answers([task], dropped))
        assert result.complete == (full_turns == 10)


def test_a_log_of_another_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = frozen_exam()._replace(version=7, sha256="f" * 64)
    about = {"gatt": "9.9", "set": other._asdict(), "arms": [], "turns": 3}
    about["settings"] = asdict(SETTINGS)
    name = {"model": "mockllm/model", "model_base_url": None, "created": "2026-01-01"}
    log = SimpleNamespace(
        eval=SimpleNamespace(metadata={EXAM_NAME: about}, **name), status="success", samples=[]
    )
    monkeypatch.setattr("pipeline.exam.inspect_eval.logs._open", lambda _: log)
    with pytest.raises(GattError, match=r"version 7 \(SHA-256 f{16}\).*by gatt 9\.9; .*version 1"):
        read_log(Path("x.eval"))


def test_a_set_of_which_all_dialogues_are_named_is_complete() -> None:
    options = replace(OPTIONS, regimes=(), dialogues=24)  # as many as the largest regime has
    assert _questions(options, 20, None, 4096).is_complete
    assert not _questions(options, 8, None, 4096).is_complete
    assert not _questions(replace(options, dialogues=23), 20, None, 4096).is_complete
    assert not _questions(replace(options, regimes=("first",)), 20, None, 4096).is_complete


def test_the_sampler_of_a_result_is_what_was_asked_for() -> None:
    assert sampler_values("greedy", is_server=True) == {"temperature": 0.0}
    assert sampler_values("plain", is_server=True) == {"temperature": 0.8, "top_p": 0.95}
    assert sampler_values("plain", is_server=True, refused={"top_p": "left out"}) == {
        "temperature": 0.8
    }
    assert sampler_values("gatt", is_server=False)["dry_multiplier"] == 0.8
    assert "dry_multiplier" not in sampler_values("gatt", is_server=True)


def test_a_server_has_a_sampler_of_its_own() -> None:
    local = _result()
    served = _result(model=_SERVED, sampler=sampler_values("plain", is_server=True))
    alone = facts_table([served])
    (sampler,) = [row[1] for row in alone.rows if row[0] == "sampler"]
    assert sampler == "plain (temperature 0.8, top_p 0.95, the rest is the server's own)"
    warnings = warnings_about([local, served])
    assert any("the rest of the sampler is its own" in text for text in warnings)
    assert comparable([local, served])
    assert not any("sampler" in text for text in warnings_about([local, local]))


def test_samplers_of_one_name_are_compared_by_their_values() -> None:
    results = [_result(), _result(sampler={"temperature": 1.0, "top_k": 40.0})]
    assert "temperature differs (0.8 and 1): no differences are computed." in warnings_about(
        results
    )
    assert not comparable(results)
    assert not any("top_k" in text for text in warnings_about(results))


def test_a_sampler_that_is_not_known_is_not_taken_for_equal() -> None:
    unknown = _result(model=_SERVED, sampler={}, notes={"sampler": "what x takes is not known"})
    warnings = warnings_about([_result(), unknown])
    assert "temperature is not known of all: no differences are computed." in warnings
    assert not comparable([_result(), unknown])
    (sampler,) = [row[1] for row in facts_table([unknown]).rows if row[0] == "sampler"]
    assert sampler == "plain (the server's own)"


def _windows(*names: WindowPolicy, **fields: Any) -> list[ExamResult]:
    settings = [replace(SETTINGS, window=name) for name in names]
    return [_result(dropped=(0, 0, 1), settings=s, **fields) for s in settings]


def test_window_policies_of_one_model_are_compared() -> None:
    results = _windows("drop", "pin")
    assert model_names(results) == ["m (drop)", "m (pin)"]
    assert comparable(results)
    columns, rows = terminal_table(results)
    cells = dict(zip(columns, rows[1], strict=True))
    assert (cells["model"], cells["vs first row"]) == ("m (pin)", "+0 (+0 to +0)")
    assert cells["full vs first row"] == "+0 (+0 to +0)"
    assert "points above the first row, context full (95 %)" in main_table(results).columns
    assert model_names(_windows("drop", "pin", "pin")) == ["m (drop)", "m (pin) (1)", "m (pin) (2)"]
    same = _windows("drop", "drop")
    assert model_names(same) == ["m (1)", "m (2)"]
    assert "full vs first row" not in terminal_table(same)[0]


def test_window_policies_of_different_models_are_not_compared() -> None:
    results = [*_windows("drop"), *_windows("pin", model=_SERVED)]
    assert not comparable(results)
    warning = "Models and window policies differ: no differences are computed."
    assert warning in warnings_about(results)


def test_differences_are_over_the_turns_that_both_rows_have() -> None:
    verbose = _result(dropped=(*[0] * 13, *[1] * 37))  # in a full context from turn 14 on
    brief = _result(dropped=[0] * 50, broken_from=14)
    _, difference = differences(exam_rows([verbose, brief]))
    assert difference is not None
    assert (difference.difference, difference.low, difference.high) == (0, 0, 0)
    last_five = [result.arms[0].last_five for result in (verbose, brief)]
    assert [(rate.hits, rate.n) for rate in last_five] == [(0, 0), (0, 10)]


def test_a_seed_of_0_is_a_fact() -> None:
    facts = facts_table([_result(settings=replace(SETTINGS, seed=0))])
    assert ["seed", 0] in facts.rows


def test_training_pays_only_against_times_of_one_machine() -> None:
    base = _result(model=replace(_LOCAL, name="b", training_minutes=None))
    (arm,) = base.arms
    base = replace(base, arms=(arm, replace(arm, name="every")))
    (row, *_), column = terminal_table([base, _result()])[1], "m pays from turn"
    assert column in terminal_table([base, _result()])[0] and row[-1] == ""
    other = replace(base, machine="another")
    assert column not in terminal_table([other, _result()])[0]
    assert column not in main_table([other, _result()]).columns
    assert "The times were taken on different machines." in warnings_about([other, _result()])
    mixed = "this; another"
    several = [replace(base, machine=mixed), _result(machine=mixed)]
    assert column not in terminal_table(several)[0]
    assert "The times were taken on different machines." in warnings_about(several)


def test_models_of_one_name_are_told_apart_wherever_they_are_named() -> None:
    base = _result(model=replace(_LOCAL, name="b", training_minutes=None))
    (arm,) = base.arms
    base = replace(base, arms=(arm, replace(arm, name="every")))
    partial = _result(exam=replace(base.exam, complete=False))
    results = [base, partial, partial]
    columns = terminal_table(results)[0]
    assert [name for name in columns if "pays" in name] == [
        "m (1) pays from turn",
        "m (2) pays from turn",
    ]
    assert "told once: b 100%, m (1) 100%, m (2) 100%" in headline(results)
    assert [text[:21] for text in warnings_about(results)] == [
        "m (1): not the whole ",
        "m (2): not the whole ",
    ]


def test_without_a_dialogue_from_turn_1_nothing_is_stated_about_it(tmp_path: Path) -> None:
    result = _result(regime="system")
    (arm,) = result.arms
    assert not arm.by_turn
    costs = tuple(TurnCost(turn=n, tokens=9, milliseconds_per_token=1) for n in (1, 2, 3))
    result = replace(result, arms=(replace(arm, cost_by_turn=costs),))
    (row,) = main_table([result]).rows
    column = main_table([result]).columns.index("half of the dialogues broken by turn")
    assert row[column] is None
    write_page([result], tmp_path / "exam.html")
    page = (tmp_path / "exam.html").read_text(encoding="utf-8")
    assert "Cost by turn" in page and not (tmp_path / "figures" / "adherence.svg").exists()
    assert not list((tmp_path / "tables").glob("by_turn*"))
    for text in ("No instruction has a check", "arms are shown", "Until the first broken answer"):
        assert text not in page


def test_the_page_of_a_benchmark_does_not_describe_the_exam(tmp_path: Path) -> None:
    result = _result()
    benchmark = replace(result.exam, name="multi-if", criteria=9)
    write_page([replace(result, exam=benchmark)], tmp_path / "exam.html")
    page = (tmp_path / "exam.html").read_text(encoding="utf-8").split("<h2>Regimes")[0]
    assert "Answers that pass all checks of their turn" in page
    for text in ("first message", "instruction is given", "from turn 2"):
        assert text not in page


def test_other_versions_may_have_other_checks() -> None:
    warnings = warnings_about([_result(), _result(gatt="2")])
    assert any("different versions of gatt (1, 2)" in text for text in warnings)
    assert warnings_about([_result(), _result()]) == []
    (warning,) = warnings_about([_result(gatt="1.0, 2.0")])
    assert "different versions of gatt (1.0, 2.0)" in warning


def test_a_context_that_was_never_full_is_no_full_context() -> None:
    full = _result(turns=0, dropped=(0, 0, 1))
    assert warnings_about([full]) == []
    (warning,) = warnings_about([_result(turns=0)])
    assert "once: 2 of 2 dialogues ended after 3 turns at most" in warning
    refused = replace(full.settings, window="refuse")
    assert warnings_about([_result(turns=0, settings=refused)]) == []


def test_a_regime_without_a_counted_answer_is_named() -> None:
    # The instruction is replaced in turn 7 or later.
    (warning,) = warnings_about([_result(regime="replaced")])
    assert "m: no answer counts in replaced" in warning
    assert warnings_about([_result(regime="replaced", dropped=(0,) * 12)]) == []
    (warning,) = warnings_about([_result(dropped=(1, 1, 1))])
    assert "m: no answer counts in first" in warning
