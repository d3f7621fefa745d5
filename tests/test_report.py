"""The report: page, Markdown, tables and figures as files, and the page in a browser."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from support.browser import chromium, needs_chromium
from support.golden import Golden

from pipeline.evaluation.aggregate import compute_scores
from pipeline.evaluation.attention import AttentionMap
from pipeline.evaluation.rates import wilson
from pipeline.evaluation.scores import (
    ChangeScores,
    ChangeTurn,
    ConditionRow,
    ConditionScores,
    Degradation,
    Fidelity,
    Judgment,
    RateRow,
    Scores,
    UnseenRow,
)
from pipeline.evaluation.scoring.fidelity import AnswerKl, summarize
from pipeline.evaluation.statistics import Difference
from pipeline.evaluation.suites import SuiteSettings, build_suites
from pipeline.export.summary import ExportSummary, FormatSummary, MergeBase, MergeTrial
from pipeline.files import write_json, write_jsonl
from pipeline.gatt.acceptance import SEVERAL, Acceptance, AcceptanceRow
from pipeline.gatt.assign import ConstraintPool, assign_evaluation
from pipeline.gatt.assignment import AssignedDialogue, Splits, write_splits
from pipeline.recipe import Evaluate, Recipe
from pipeline.records import (
    SAMPLERS,
    Constraint,
    CustomInstruction,
    Dialogue,
    FinishReason,
    Reply,
)
from pipeline.report.axes import turn_ticks
from pipeline.report.facts import file_facts
from pipeline.report.figures import adherence_curve, change_curve, fidelity_curve, mean_rates
from pipeline.report.results import read_results
from pipeline.report.sections.adherence import by_instruction, generalization
from pipeline.report.sections.headline import headline
from pipeline.report.styles import arm_label
from pipeline.report.tables import Table, format_cell, markdown, sort_key
from pipeline.run import _settings, run_stage
from pipeline.run_dir import RunDir
from pipeline.stages import report, train
from pipeline.stages.report import report_page, run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_POOL = (
    Constraint("opening", "Ahoy!"),
    Constraint("closing", "So it goes."),
    Constraint("persona", "Captain Nemo"),
)
_HOSTILE = '<script>document.title = "broken"</script> & "שלום" ' + "x" * 400


class Reports(NamedTuple):
    """Two finished runs: one with every suite, one with many models and no further suite."""

    full: RunDir
    bare: RunDir


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    full = _evaluated_run(tmp_path_factory.mktemp("full"), ["rival"], with_suites=True)
    rivals = [f"rival {number}" for number in range(1, 6)]
    bare = _evaluated_run(tmp_path_factory.mktemp("bare"), rivals, with_suites=False)
    _measure_the_rest(full)
    for run_dir in (full, bare):
        run(_recipe(run_dir), run_dir)
    return Reports(full, bare)


@pytest.fixture(scope="module")
def full(reports: Reports) -> RunDir:
    return reports.full


@pytest.fixture(scope="module")
def bare(reports: Reports) -> RunDir:
    return reports.bare


def _recipe(run_dir: RunDir) -> Recipe:
    return Recipe(model=str(run_dir.path / "my-model.gguf"), evaluate=Evaluate(dialogues=4))


def _evaluated_run(folder: Path, rivals: Sequence[str], *, with_suites: bool) -> RunDir:
    """Write a run with invented replies; its scores are those of the replies."""
    run_dir = RunDir(folder)
    splits = _splits()
    write_splits(run_dir.assignments, {"train": [], "evaluation": splits["evaluation"]})
    measured = splits if with_suites else {"evaluation": splits["evaluation"]}
    shares = {"base": 0.2, "tuned": 0.8, **dict.fromkeys(rivals, 0.5)}
    replies = [
        reply
        for arm, share in shares.items()
        for dialogues in measured.values()
        for reply in _replies(arm, dialogues, share)
    ]
    for name in ("evaluation", *(["recall"] if with_suites else [])):
        replies += _replies("ceiling", splits[name], 0.9)
    write_jsonl(run_dir.replies, replies)
    write_json(run_dir.scores, compute_scores(replies, measured, _POOL))
    write_jsonl(run_dir.examples, [{"teacher": "my-teacher"}])
    write_json(run_dir.acceptance, _acceptance())
    file = FormatSummary(bytes=145_000_000, retained={"attn_q": 0.85}, kl_trained=0.3)
    trials: dict[MergeBase, MergeTrial] = {
        "fp16": MergeTrial(0.25, 1.5),
        "nf4": MergeTrial(0.0, 1.75),
    }
    write_json(
        run_dir.exported,
        ExportSummary(merge_base="fp16", formats={"Q8_0": file}, merge_trials=trials),
    )
    for model in (run_dir.tuned("Q8_0"), folder / "my-model.gguf"):
        model.write_bytes(b"GGUF")
    return run_dir


def _splits() -> Splits:
    """Return four evaluation dialogues in which the instruction changes, and every suite."""
    dialogues = [
        Dialogue(f"d{n}", "sea", tuple(f"What of {n}.{turn}, <b>sir</b>?" for turn in range(20)))
        for n in range(4)
    ]
    unseen = (Constraint("uppercase"), Constraint("opening", "Well, well!"))
    pool = ConstraintPool(_POOL)
    settings = SuiteSettings(
        pool=pool, trained=_POOL, unseen=unseen, turns=10, full_turns=20, seed=1
    )
    suites = build_suites(dialogues, settings)
    evaluation = [
        replace(changing, dialogue=dialogue)
        for dialogue, changing in zip(dialogues, suites["change"], strict=True)
    ]
    return {"evaluation": evaluation, **suites}


def _replies(arm: str, dialogues: Sequence[AssignedDialogue], share: float) -> Iterator[Reply]:
    """Yield replies that obey, and recall, in about the first `share` of the turns."""
    for number, assigned in enumerate(dialogues):
        turns = len(assigned.dialogue.turns)
        for turn in range(1, turns + 1):
            obeys = turn <= share * (turns - number % 3)
            leaks = arm == "tuned" and obeys and assigned.instruction is None
            reply = Reply(
                arm=arm,
                dialogue=assigned.dialogue.id,
                turn=turn,
                text=f"Ahoy! {_HOSTILE}{' So it goes.' if leaks else ''}",
                prompt_tokens=9,
                tokens=9,
                finish="stop",
                obeys=obeys,
                defect="" if obeys or turn % 4 else "loop",
            )
            yield reply
            if turn in (1, 2, 4, 6, 20):
                for question in assigned.recall_questions:
                    knows = arm != "base" or question.attribute != "hobby"
                    yield replace(
                        reply,
                        text="Me.",
                        obeys=obeys and knows,
                        defect="",
                        recall_attribute=question.attribute,
                    )


def _acceptance() -> Acceptance:
    row = AcceptanceRow(
        instruction="opening: Ahoy!",
        method="edited",
        candidates=9,
        accepted=7,
        words=21,
        rejected={"loop": 2},
        example=f"Ahoy! {_HOSTILE}",
    )
    return Acceptance([row], too_common=0, answers=1043, edited=0)


def _measure_the_rest(run_dir: RunDir) -> None:
    """Add what replies alone do not give: damage, verdicts, attention, losses."""
    scores = replace(
        _scores(run_dir),
        primary="recall",
        degradation=Degradation(90, {"base": 3.0, "tuned": 3.3}, {"base": 0.0, "tuned": 0.1}),
        judge=Judgment("big", wilson(7, 10), reliable=False, scores=()),
        fidelity=_fidelity(),
    )
    write_json(run_dir.scores, scores)
    attention = AttentionMap([[0.5, 1.0], [0.2, 0.4]], [1, 2], (0, 1), [0.5, 0.1])
    write_json(run_dir.attention, {"base": attention, "tuned": attention})
    write_json(run_dir.losses, [2.0, 1.5, 1.2])


def _fidelity() -> Fidelity:
    """Return a fidelity of 75 % in turn 2, and of -25 % in turn 3."""
    base = [AnswerKl(name, f"say {name}", turn, 10, 4.0) for name in "ab" for turn in (2, 3)]
    tuned = [answer._replace(kl=1.0 if answer.turn == 2 else 5.0) for answer in base]
    return summarize(base, {"tuned": tuned, "rival": base})


def _scores(run_dir: RunDir) -> Scores:
    return Scores.from_json(run_dir.scores.read_text(encoding="utf-8"))


def _page(run_dir: RunDir) -> str:
    return (run_dir.report / "report.html").read_text(encoding="utf-8")


def _csv(run_dir: RunDir, name: str) -> list[dict[str, str]]:
    with (run_dir.report / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _svg(run_dir: RunDir, name: str) -> str:
    return (run_dir.report / "figures" / f"{name}.svg").read_text(encoding="utf-8")


def test_markdown_of_a_run(full: RunDir, golden: Golden) -> None:
    golden("report.md", (full.report / "report.md").read_text(encoding="utf-8"))


def test_page_has_every_section_and_leaves_out_what_was_not_measured(
    full: RunDir, bare: RunDir
) -> None:
    always = [
        "Over several turns",
        "How long until the first broken answer",
        "By kind",
        "Side by side",
        "Training data",
        "Export",
        "The run",
    ]
    assert set(re.findall("<h2>(.*?)</h2>", _page(full))) == {
        *always,
        "Recall",
        "New values, new kinds, several at once",
        "When the instruction changes",
        "Reminder fidelity",
        "Leakage and damage",
        "One question, one instruction",
        "The judge",
        "What the answers attend to",
        "Training",
    }
    assert re.findall("<h2>(.*?)</h2>", _page(bare)) == always
    assert "its verdicts are not reliable" in _page(full)


def test_large_numbers_have_no_exponent() -> None:
    numbers = [0.12345, 9999.4, 9999.6, 30421.7, -30421.7, float("nan")]
    texts = ["0.1235", "9999", "10000", "30422", "-30422", ""]
    assert [format_cell(number) for number in numbers] == texts


def test_headline_is_about_the_chosen_figure(full: RunDir, bare: RunDir) -> None:
    assert "<h1>Asked in turn 20, the tuned model recalls what turn 1 says in 0% of" in _page(full)
    assert "<h1>In turns 16 to 20, the tuned model keeps" in _page(bare)
    scores = _scores(full)
    unseen = headline(replace(scores, primary="unseen"))
    assert unseen.startswith("The tuned model keeps instructions that were not trained in 72% of")
    after_first = headline(replace(scores, primary="after_first"))
    assert after_first.startswith("In turns 2 to 20, the tuned model keeps its instruction in")


def test_headline_without_the_chosen_figure_says_so(bare: RunDir) -> None:
    scores = _scores(bare)
    assert headline(replace(scores, primary="recall")).startswith(
        "The figure chosen to open this report (recall) was not measured. In turns 16 to 20"
    )
    nothing = tuple(
        RateRow(arm=arm, at="turns 1 to 2", **asdict(wilson(0, 0))) for arm in ("base", "tuned")
    )
    assert "keeps its instruction in an unknown share of the answers" in headline(
        replace(scores, last_five=nothing)
    )


def test_recall_of_what_is_known_is_next_to_the_papers(full: RunDir) -> None:
    rows = _csv(full, "recall")
    assert [row["turn"] for row in rows] == ["2", "4", "6", "20"]
    assert [row["paper, without GAtt"] for row in rows] == ["100%", "10%", "0%", "0%"]
    assert [row["paper, with GAtt"] for row in rows] == ["100%"] * 4
    assert [float(row["tuned"]) for row in rows] == [1, 1, 1, 0]
    assert [row["tuned n"] for row in rows] == ["8"] * 4
    assert [float(row["ceiling"]) for row in rows] == [1, 1, 1, 0]
    # The base never knows the hobby: half of its answers count in the other table only.
    assert [row["base n"] for row in rows] == ["4"] * 4
    everything = _csv(full, "recall_all")
    assert [row["turn"] for row in everything] == ["1", "2", "4", "6", "20"]
    assert [row["base n"] for row in everything] == ["8"] * 5
    assert [float(row["base"]) for row in everything] == [0.5, 0.5, 0.25, 0, 0]
    note = "In turn 1 they give: base 4 of 8, tuned 8 of 8, rival 8 of 8, ceiling 8 of 8."
    assert note in _page(full)
    svg = _svg(full, "recall")
    for text in ("base", "GAtt-tuned", "paper, with GAtt", "paper, without GAtt"):
        assert f">{text}<" in svg


def test_recall_of_an_earlier_version_has_one_table(full: RunDir, tmp_path: Path) -> None:
    shutil.copytree(full.path, tmp_path, dirs_exist_ok=True)
    run_dir = RunDir(tmp_path)
    scores = _scores(full)
    later = tuple(row for row in scores.recall if row.at != 1)
    write_json(run_dir.scores, replace(scores, recall=later, recall_known=()))
    shutil.rmtree(run_dir.report)
    run(_recipe(run_dir), run_dir)
    rows = _csv(run_dir, "recall")
    assert [row["base n"] for row in rows] == ["8"] * 4
    assert rows[1]["paper, without GAtt"] == "10%"
    assert not (run_dir.report / "tables" / "recall_all.csv").exists()


def test_first_line_is_the_model_the_teacher_and_the_edits(full: RunDir, tmp_path: Path) -> None:
    line = (
        "Model: my-model.gguf. Teacher: my-teacher. Edited answers in the training data: 0 of 1043."
    )
    markdown = (full.report / "report.md").read_text(encoding="utf-8")
    assert markdown.startswith(f"{line}\n\n**Asked in turn 20")
    body = _page(full).partition("<body>")[2]
    assert body.index(line) < body.index("<h1>")
    shutil.copytree(full.path, tmp_path, dirs_exist_ok=True)
    run_dir = RunDir(tmp_path)
    write_json(run_dir.acceptance, {"rows": [], "too_common": 0})  # of an earlier version
    run(_recipe(run_dir), run_dir)
    markdown = (run_dir.report / "report.md").read_text(encoding="utf-8")
    assert markdown.startswith("Model: my-model.gguf. Teacher: my-teacher.\n")


def test_the_report_says_that_the_recipe_has_changed_since_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = _evaluated_run(tmp_path, [], with_suites=False)
    recipe, warnings = _recipe(run_dir), list[str]()
    settings = _settings(train, recipe)
    run_dir.claim("train", settings, [])
    run_dir.finish("train", settings, [], 60.0)
    monkeypatch.setattr(report, "run", lambda *of: warnings.append(read_results(*of).warning))
    edited = recipe.train.model_copy(update={"max_steps": 9999})
    for each in (recipe, recipe.model_copy(update={"train": edited})):
        run_stage("report", each, run_dir)
    before, after = warnings
    assert "The recipe has changed" not in before
    assert "The recipe has changed since `gatt train`, so the settings shown" in after


def test_the_hashes_of_inputs_with_one_name_are_all_shown(tmp_path: Path) -> None:
    run_dir, file = RunDir(tmp_path), tmp_path / "dialogues.jsonl"
    for stage, text in (("instructions", "mine"), ("train", "the run's"), ("export", "the run's")):
        file.write_text(text)
        run_dir.claim(stage, "", [file])
        run_dir.finish(stage, "", [file], 1.0)
    facts = file_facts(_recipe(run_dir), run_dir)
    key = "sha256 of dialogues.jsonl"
    assert list(facts) == [key, f"{key} (train)", f"{key} (export)"]
    assert facts[key] != facts[f"{key} (train)"] == facts[f"{key} (export)"]


def test_lengths_of_prompts_are_a_table_beside_the_length_of_training(tmp_path: Path) -> None:
    run_dir = _evaluated_run(tmp_path, [], with_suites=False)
    row = RateRow(arm="base", at=2048, **asdict(wilson(1, 4)))
    short = replace(row, at=512, hits=3)
    write_json(run_dir.scores, replace(_scores(run_dir), by_length=(row, short)))
    run(_recipe(run_dir), run_dir)
    rows = _csv(run_dir, "by_length")
    assert [row["tokens of the prompt, up to"] for row in rows] == ["512", "2048"]
    assert [row["base hits"] for row in rows] == ["3", "1"]
    assert "Training dialogues have up to 1024 (train.max_length)." in _page(run_dir)


@pytest.mark.parametrize(
    "name",
    [
        "by_turn",
        "by_instruction",
        "generalization",
        "single_by_kind",
        "recall_by_attribute",
    ],
)
def test_tables_hold_the_numbers_of_the_scores(full: RunDir, name: str) -> None:
    rows = {next(iter(row.values())): row for row in _csv(full, name)}
    rates: Sequence[RateRow] = getattr(_scores(full), name)
    assert rates
    for rate in rates:
        row = rows[str(rate.at)]
        assert float(row[rate.arm]) == rate.value
        assert (int(row[f"{rate.arm} hits"]), int(row[f"{rate.arm} n"])) == (rate.hits, rate.n)


def test_leakage_is_compared_with_the_base(full: RunDir) -> None:
    leaks = _scores(full).leaks
    assert leaks
    (new,) = _csv(full, "leakage")
    for rate in leaks.new:
        assert (int(new[f"{rate.arm} hits"]), int(new[f"{rate.arm} n"])) == (rate.hits, rate.n)
    (row,) = _csv(full, "leakage_by_trait")
    assert row["trained trait"] == "closing: So it goes."
    assert (row["base hits"], row["tuned hits"], row["rival hits"]) == ("0", new["tuned hits"], "0")
    difference = next(r.difference for r in leaks.by_trait if r.arm == "tuned")
    assert row["tuned: points from the base"] == (
        f"{100 * difference.difference:+.0f} "
        f"({100 * difference.low:+.0f} to {100 * difference.high:+.0f})"
    )
    assert row["rival: points from the base"] == "+0 (+0 to +0)"
    page = _page(full)
    assert "Of 4 trained traits the base never shows 3 unasked in these dialogues." in page
    assert "All models show the other 3 equally often." in page


def test_the_report_says_what_was_not_measured(full: RunDir, bare: RunDir) -> None:
    """Four dialogues have two openings, a closing and a persona of the pool by turns."""
    assert "Measured: " not in _page(full)
    scores = replace(_scores(bare), coverage={"opening": (1, 3), "persona": (0, 1), "json": (1, 1)})
    results = replace(read_results(_recipe(bare), bare), scores=scores)
    section = by_instruction(results)
    assert section
    assert section.notes == [
        "Measured: 2 of the 5 trained constraints, of 2 of 3 kinds; nothing of the kinds persona. "
        "Raise evaluate.dialogues to measure more."
    ]


def test_the_first_chart_has_what_was_not_trained_and_says_what_the_base_is(
    full: RunDir, bare: RunDir
) -> None:
    page = report_page(read_results(_recipe(full), full))
    assert page.chart
    labels = re.findall(">([^<>]+)</text>", page.chart.standalone_svg)
    text = " ".join(labels)
    for arm in ("base", "tuned", "ceiling", "tuned, unseen values", "tuned, unseen kinds"):
        assert arm_label(arm) in text, labels
    assert page.caption.endswith(
        "Base: the model before training; ceiling: the base, reminded in every turn. Curves "
        "without another name are of trained instructions."
    )
    results = read_results(_recipe(bare), bare)
    counts = results.scores.replies
    replies = {**counts, "base": replace(counts["base"], cut=30)}
    cut = replace(results, scores=replace(results.scores, replies=replies))
    assert "30 of 80 replies of the base are cut at 64 tokens" in report_page(cut).caption


def test_new_values_have_a_row_for_the_last_five_turns(full: RunDir) -> None:
    results = read_results(_recipe(full), full)
    by_turn = [
        UnseenRow(group="unseen value", arm="tuned", at=turn, **asdict(wilson(turn > 16, 2)))
        for turn in range(1, 21)
    ]
    scores = replace(results.scores, turns=20, unseen_by_turn=tuple(by_turn))
    section = generalization(replace(results, scores=scores))
    assert section
    (row,) = [r for r in section.tables[0].rows if r[0] == "unseen value, turns 16 to 20"]
    rate = row[[*section.tables[0].columns].index("tuned")]
    assert isinstance(rate, RateRow) and (rate.hits, rate.n) == (4, 10)
    ended = [replace(row, at=int(row.at) - 2) for row in by_turn]
    of_18 = generalization(replace(results, scores=replace(scores, unseen_by_turn=tuple(ended))))
    assert of_18 and not any("turns 16" in str(r[0]) for r in of_18.tables[0].rows)
    short = generalization(replace(results, scores=replace(scores, turns=5)))
    assert short and not any("turns" in str(r[0]) for r in short.tables[0].rows)


def test_without_a_check_of_what_is_trained_there_is_no_first_chart(full: RunDir) -> None:
    results = read_results(_recipe(full), full)
    unchecked = replace(results, scores=replace(results.scores, by_turn=()))
    assert results.scores.unseen_by_turn and report_page(unchecked).chart is None


def test_the_report_says_which_kinds_have_no_training_answer(bare: RunDir) -> None:
    def row(kind: str, accepted: int) -> AcceptanceRow:
        return AcceptanceRow(
            instruction=kind,
            method="sampled",
            candidates=9,
            accepted=accepted,
            rejected={},
            words=None,
            example="",
            kind=kind,
        )

    rows = [row("heading", 0), row("json", 0), row("json", 2), row(SEVERAL, 0), row("none", 0)]
    results = replace(read_results(_recipe(bare), bare), acceptance=Acceptance(rows, 0))
    section = by_instruction(results)
    assert section
    assert section.notes[0] == (
        "No answer of the teacher that follows one of these alone was accepted, so they were "
        "hardly trained: heading."
    )


def test_the_report_says_why_a_kind_loses_its_replies(bare: RunDir) -> None:
    def row(arm: str, at: str, hits: int) -> RateRow:
        return RateRow(arm=arm, at=at, **asdict(wilson(hits, 24)))

    scores = replace(
        _scores(bare),
        coverage={},
        obey_no_answer=(row("base", "closing", 24), row("tuned", "closing", 23)),
        cut_before_obeying=(row("base", "signature", 12), row("base", "opening", 4)),
    )
    section = by_instruction(replace(read_results(_recipe(bare), bare), scores=scores))
    assert section
    assert section.notes == [
        "Obeyed, and no valid answer (a loop, a repeat, or nothing but what was asked for): "
        "closing: base 24 of 24, tuned 23 of 24.",
        "Cut at the maximum length before they obeyed; raise evaluate.max_tokens: "
        "signature: base 12 of 24.",
    ]


def test_rate_and_number_share_a_column_of_the_csv(full: RunDir) -> None:
    strict, *_, distinct = _csv(full, "overview")
    scores = _scores(full)
    for rate in scores.last_five:
        assert float(strict[rate.arm]) == rate.value
    assert float(distinct["tuned"]) == scores.distinct_2["tuned"]
    assert distinct["tuned n"] == ""


def test_numbers_behind_the_figures_are_files(full: RunDir) -> None:
    scores = _scores(full)
    steps = [step.value for survival in scores.survival.values() for step in survival.steps]
    assert [float(row["value"]) for row in _csv(full, "survival_by_turn")] == steps
    new = [row.new for change in scores.change.values() for row in change.by_turn]
    assert [float(row["new"]) for row in _csv(full, "change_by_turn")] == new
    losses = [(row["step"], row["loss"]) for row in _csv(full, "loss")]
    assert losses == [("1", "2.0"), ("2", "1.5"), ("3", "1.2")]


@pytest.mark.parametrize(
    "name", ["adherence", "recall", "survival", "change", "fidelity", "attention", "loss"]
)
def test_figures_are_files_with_dark_text_on_white(full: RunDir, name: str) -> None:
    png = full.report / "figures" / f"{name}.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    svg = _svg(full, name)
    assert re.match(r'<svg [^>]*>\s*<rect [^>]*fill="#fff"', svg)
    assert "currentColor" not in svg


def test_adherence_figure_names_its_lines_and_counts_dialogues(full: RunDir) -> None:
    svg = _svg(full, "adherence")
    for text in ("base", "GAtt-tuned", "rival", "base, reminded every turn"):
        assert f">{text}<" in svg
    assert "turn (2 to 4 dialogues; " in svg


def test_figures_show_seven_models_and_tables_all(bare: RunDir) -> None:
    for name in ("adherence", "survival"):
        svg = _svg(bare, name)
        assert all(arm in svg for arm in ("base", "GAtt-tuned", "rival 1", "rival 4"))
        assert "rival 5" not in svg
    assert "Figures show 7 of 8 models, tables all." in _page(bare)
    columns = _csv(bare, "by_instruction")[0].keys()
    assert {"rival 5", "rival 5 hits", "ceiling"} <= columns


def test_shared_report_does_not_show_where_the_model_is(full: RunDir, bare: RunDir) -> None:
    for run_dir in (full, bare):
        for name in ("report.html", "report.md", "report.json"):
            text = (run_dir.report / name).read_text(encoding="utf-8")
            assert "my-model.gguf" in text
            assert str(run_dir.path) not in text


def test_replies_are_shown_as_text(full: RunDir) -> None:
    page = _page(full)
    assert _HOSTILE not in page
    assert page.count("<script>") == 1
    assert "What of 0.0, &lt;b&gt;sir&lt;/b&gt;?" in page


def test_ids_are_unique_in_the_page(full: RunDir) -> None:
    ids = re.findall(r'\sid="([^"]+)"', _page(full))
    assert len(ids) == len(set(ids)) > 40


def test_an_arm_has_one_color_in_all_figures() -> None:
    """`change` lacks the other formats of the tuned model, which come before other models."""
    arms = ["base", "tuned", "tuned, Q4_K_M", "rival"]
    half = wilson(1, 2)
    rows = [RateRow(arm=arm, at=turn, **asdict(half)) for arm in arms for turn in (1, 2)]
    change = ChangeScores(
        change_turn=1,
        before=half,
        after=half,
        old_after=half,
        dialogues=2,
        never_switched=0,
        turns_to_switch=None,
        by_turn=(ChangeTurn(turn=1, old=0.5, new=0.5, n=2),),
    )
    pictures = (
        adherence_curve(rows, 2),
        change_curve({arm: change for arm in arms if "," not in arm}, arms),
    )
    colors = [re.findall(r"fill: (#\w+)[^>]*>rival<", picture.wide_svg) for picture in pictures]
    assert colors[0] == colors[1]
    assert len(colors[0]) == 1


@pytest.mark.parametrize(
    ("turns", "ticks"),
    [
        (1, [1]),
        (10, list(range(1, 11))),
        (20, [1, 5, 10, 15, 20]),
        (60, [1, 10, 20, 30, 40, 50, 60]),
        (120, [1, 20, 40, 60, 80, 100, 120]),
        (2500, [1, *range(250, 2501, 250)]),
    ],
)
def test_turns_on_an_axis_are_round_and_few(turns: int, ticks: list[int]) -> None:
    assert turn_ticks(turns) == ticks


def test_points_of_long_dialogues_are_means_with_the_interval_of_their_dialogues() -> None:
    rows = [
        RateRow(arm="base", at=turn, **asdict(wilson(hits, n)))
        for turn, hits, n in ((3, 0, 4), (1, 10, 10), (2, 5, 10), (4, 1, 2))
    ]
    assert [(at, r.value, r.n) for at, r in mean_rates(rows, 1).items()] == [
        *((1, 1.0, 10), (2, 0.5, 10), (3, 0.0, 4), (4, 0.5, 2))
    ]
    first, second = mean_rates(rows, 2).items()
    assert (first[0], first[1].value, second[0]) == (1.5, 0.75, 3.5)
    assert (first[1].low, first[1].high) == (wilson(8, 10).low, wilson(8, 10).high)
    assert second[1].value == pytest.approx(1 / 6)  # of 6 answers, not the mean of the two rates


def test_adherence_of_60_turns_has_few_points_and_says_so() -> None:
    rows = [
        RateRow(arm=arm, at=turn, **asdict(wilson(turn % 3, 24)))
        for arm, turns in (("base", 60), ("ceiling", 40))
        for turn in range(1, turns + 1)
    ]
    svg = adherence_curve(rows, 60).wide_svg
    assert "turn (24 dialogues; means of 3 turns; " in svg
    assert "means of" not in adherence_curve(rows, 40).wide_svg
    positions = re.findall(r'<text[^>]* x="([\d.]+)"[^>]*>base', svg)
    assert len(positions) == 2
    assert len(set(positions)) == 1  # names stand right of all lines, one below the other


def test_markdown_keeps_a_row_in_a_line() -> None:
    table = Table("t", ["a|b", "c"], [["x\ny", None], ["p | q", wilson(1, 2)]])
    assert (
        markdown(table) == "| a\\|b | c |\n| --- | --- |\n| x y |  |\n| p \\| q | 50% (1 of 2) |\n"
    )


def test_percentages_sort_as_numbers_and_empty_cells_as_nothing() -> None:
    cells = ("+10.0%", "9%", wilson(0, 0), None, float("nan"), "99% up", 3)
    assert [sort_key(cell) for cell in cells] == [10.0, 9.0, "", "", "", "99% up", 3]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def _open(
    browser: Browser, run_dir: RunDir, *, width: int = 1100, color_scheme: str = "light"
) -> Page:
    """Open the report in a new tab; every request but that for the page is an error."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if color_scheme == "dark" else "light",
    )
    page = context.new_page()
    page.add_init_script(
        "window.problems = []; for (const name of ['error', 'securitypolicyviolation'])"
        "addEventListener(name, e => problems.push(e.message || e.blockedURI), true)"
    )
    page.goto((run_dir.report / "report.html").as_uri())
    return page


_VISIBLE_FIGURES = (
    "[...document.querySelectorAll('svg')].filter(svg => svg.checkVisibility())"
    ".map(svg => [svg.parentElement.className, svg.getBoundingClientRect().height > 100])"
)


@needs_chromium
def test_page_shows_its_figures_and_requests_nothing(full: RunDir, browser: Browser) -> None:
    page = _open(browser, full)
    requested = page.evaluate(
        "performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length"
    )
    assert (page.evaluate("problems"), requested) == ([], 0)
    assert page.evaluate(_VISIBLE_FIGURES) == [["wide", True]] * 7


@needs_chromium
def test_a_click_sorts_a_table_by_its_numbers(full: RunDir, browser: Browser) -> None:
    page = _open(browser, full)
    table = page.locator("#by_instruction")
    values: dict[str, list[float]] = {}
    for _ in range(2):
        table.locator("th button").nth(2).click()
        order = table.locator("th").nth(2).get_attribute("aria-sort")
        values[str(order)] = table.evaluate(
            "table => [...table.tBodies[0].rows].map(row => Number(row.cells[2].dataset.key))"
        )
    assert list(values) == ["descending", "ascending"]
    assert values["descending"] == sorted(values["descending"], reverse=True)
    assert values["ascending"] == sorted(values["ascending"])
    assert len(set(values["ascending"])) > 1


@needs_chromium
def test_names_are_sorted_from_a_to_z_first(full: RunDir, browser: Browser) -> None:
    table = _open(browser, full).locator("#single_by_kind")
    table.evaluate("table => table.querySelector('th button').click()")
    names = table.evaluate("table => [...table.tBodies[0].rows].map(row => row.cells[0].innerText)")
    assert names == sorted(names)
    assert len(names) > 20


@needs_chromium
def test_phone_shows_the_page_without_scrolling_sideways(full: RunDir, browser: Browser) -> None:
    page = _open(browser, full, width=360)
    width, height = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    )
    assert width <= 360
    assert height > 2000
    assert page.evaluate(_VISIBLE_FIGURES) == [["narrow", True]] * 7
    letters = page.evaluate(
        "Math.min(...[...document.querySelectorAll('.narrow text')]"
        ".map(text => text.getBoundingClientRect().height))"
    )
    assert letters > 9  # pixels: drawn for a phone, not shrunk


@needs_chromium
def test_page_and_figures_follow_the_color_scheme(full: RunDir, browser: Browser) -> None:
    script = (
        "(() => { const style = getComputedStyle(document.body);"
        "const texts = [...document.querySelectorAll('.wide svg text')];"
        "return [style.color, style.backgroundColor,"
        "texts.filter(text => getComputedStyle(text).fill === style.color).length] })()"
    )
    *light, light_texts = _open(browser, full).evaluate(script)
    *dark, dark_texts = _open(browser, full, color_scheme="dark").evaluate(script)
    assert light == ["rgb(27, 30, 35)", "rgb(255, 255, 255)"]
    assert dark == ["rgb(228, 230, 234)", "rgb(21, 23, 27)"]
    assert light_texts == dark_texts > 40


@needs_chromium
def test_everything_is_open_on_paper_and_closed_again(full: RunDir, browser: Browser) -> None:
    page = _open(browser, full)
    details = page.locator("details")
    opened = page.locator("details[open]")
    assert opened.count() == 1
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.count() == details.count() > 4
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.count() == 1


@needs_chromium
def test_a_header_is_reached_by_the_keyboard(full: RunDir, browser: Browser) -> None:
    button = _open(browser, full).locator("#by_instruction th button").first
    button.focus()
    assert button.evaluate(
        "b => [document.activeElement === b, b.tabIndex, getComputedStyle(b).outlineStyle]"
    ) == [True, 0, "solid"]


def test_results_are_saved_as_json(full: RunDir) -> None:
    report = json.loads((full.report / "report.json").read_text(encoding="utf-8"))
    about = {"subject", "headline", "warning", "has_chart", "facts"}
    assert report.keys() == {*about, "scores", "conditions", "export"}
    assert report["has_chart"]
    assert report["facts"]["teacher"] == "my-teacher"
    assert report["export"]["merge_trials"]["nf4"] == {"kl_trained": 0.0, "nll": 1.75}
    assert Scores.from_json(json.dumps(report["scores"])) == _scores(full)


def test_the_fidelity_of_each_model_is_a_table_and_a_sentence(full: RunDir, bare: RunDir) -> None:
    rows = _csv(full, "fidelity_by_turn")
    assert [(r["turn"], r["tuned: fidelity"], r["rival: fidelity"]) for r in rows] == [
        ("2", "75%", "0%"),
        ("3", "-25%", "0%"),
    ]
    markdown = (full.report / "report.md").read_text(encoding="utf-8")
    assert (
        "tuned, told once: 25% nearer to the base reminded in every turn than the base told once "
        "is (95 % interval 25 to 25%, 2 dialogues, 40 tokens, turns 2 to 3)."
    ) in markdown
    assert "rival, told once: no nearer to the base reminded in every turn than" in markdown
    assert "Reminder fidelity" not in (bare.report / "report.md").read_text(encoding="utf-8")


def test_fidelity_is_drawn_by_turn_and_what_is_further_away_than_the_base_below_0(
    full: RunDir, bare: RunDir
) -> None:
    svg = _svg(full, "fidelity")
    assert all(f">{text}<" in svg for text in ("GAtt-tuned", "rival", "reminder fidelity", "0%"))
    assert "turn (2 dialogues; dotted: the base)" in svg
    assert not (bare.report / "figures" / "fidelity.svg").exists()
    rows = [replace(row, value=math.nan, low=math.nan) for row in _fidelity().by_turn]
    assert "reminder fidelity" in fidelity_curve(rows).wide_svg  # nothing is determined


def test_other_samplers_and_lengths_stand_beside_the_evaluation(
    full: RunDir, tmp_path: Path
) -> None:
    assert "Other samplers and lengths" not in _page(full)
    shutil.copytree(full.path, tmp_path, dirs_exist_ok=True)
    run_dir = RunDir(tmp_path)
    row = ConditionRow(
        arm="tuned",
        at="turns 36 to 40",
        **asdict(wilson(9, 12)),
        main=wilson(6, 12),
        difference=Difference(0.25, -0.1, 0.5, 4),
    )
    values = SAMPLERS["plain"].values
    scores = ConditionScores(sampler="plain", values=values, turns=40, rows=(row,))
    write_json(run_dir.conditions / "plain-40.json", scores)
    run(_recipe(run_dir), run_dir)
    assert "<h2>Other samplers and lengths</h2>" in _page(run_dir)
    (line,) = _csv(run_dir, "conditions")
    assert line["sampler"].startswith("plain: temperature 0.8, top-k 40, top-p 0.95")
    assert (line["adherence"], line["evaluation"]) == ("0.75", "0.5")
    assert line["points from the evaluation"] == "+25 (-10 to +50)"
    markdown = (run_dir.report / "report.md").read_text(encoding="utf-8")
    assert "| turns 36 to 40 | 75% (9 of 12) | 50% (6 of 12) | +25 (-10 to +50) |" in markdown


def test_marks_side_by_side_are_those_of_the_judge_and_none_where_nothing_checks(
    full: RunDir, tmp_path: Path
) -> None:
    shutil.copytree(full.path, tmp_path, dirs_exist_ok=True)
    run_dir = RunDir(tmp_path)
    judged, blunt = assign_evaluation(
        [Dialogue(f"d{n}", "sea", ("Why?", "And then?", "Who?")) for n in range(2)],
        [Constraint("style", "shout")],
        [CustomInstruction(text="Be blunt.")],
    )
    write_splits(run_dir.assignments, {"train": [], "evaluation": [judged, blunt]})
    finishes: list[FinishReason] = ["stop", "stop", "context"]
    replies = [
        replace(reply, obeys=None if assigned is blunt else True, defect="", finish=finish)
        for arm in ("base", "tuned")
        for assigned in (judged, blunt)
        for reply, finish in zip(_replies(arm, [assigned], 1), finishes, strict=True)
    ]
    write_jsonl(run_dir.replies, replies)

    run(_recipe(run_dir), run_dir)
    shown = _page(run_dir).split("<h2>Side by side</h2>")[1].split("<details")[2]
    strips = re.findall('<i class="(.*?)" title="turn .">(.?)</i>', shown)
    assert strips == [("", "")] * 6
    assert 'data-mark="" class=""' in shown and "✓" not in shown and "✗" not in shown

    key = {"dialogue": "d0", "turn": 1}
    verdicts = [
        {"arm": "base", **key, "verdict": False},
        {"arm": "base", **key, "turn": 2, "verdict": None},
        {"arm": "tuned", **key, "verdict": True},
        {"arm": "tuned", **key, "turn": 2, "verdict": False},
    ]
    write_jsonl(run_dir.judged, verdicts)
    first = read_results(_recipe(run_dir), run_dir).dialogues[0]
    marks = [[reply.adherent for reply in turn.replies] for turn in first.turns[:2]]
    assert marks == [[False, True], [False, False]]


def test_a_baked_prompt_has_its_own_section(full: RunDir, tmp_path: Path) -> None:
    shutil.copytree(full.path, tmp_path, dirs_exist_ok=True)
    run_dir = RunDir(tmp_path)
    leaks = tuple(row for row in _fidelity().overall if row.arm in ("tuned", "rival"))
    fidelity = replace(_fidelity(), baked=True, saved_tokens=120.0, leaks=leaks)
    unchecked = compute_scores([], {"evaluation": []}, ())
    recall = _scores(full).recall
    write_json(run_dir.scores, replace(unchecked, fidelity=fidelity, recall=recall))
    run(_recipe(run_dir), run_dir)
    markdown = (run_dir.report / "report.md").read_text(encoding="utf-8")
    assert "### Baked prompt" in markdown and "### Reminder fidelity" not in markdown
    assert (
        "tuned, without the prompt: 25% nearer to the base with it than the base without the "
        "prompt is (95 % interval 25 to 25%, 2 dialogues, 40 tokens, turns 2 to 3)."
    ) in markdown
    assert "Without the prompt, each request is 120 tokens shorter." in markdown
    assert "a trained trait shows in" not in markdown  # no trait can be checked
    assert (
        "Leakage: under another system message, tuned is 25% nearer to the base with the prompt "
        "than the base is (95 % interval 25 to 25%, 2 dialogues); 0% would be none."
    ) in markdown
    assert "rival is no nearer to the base with the prompt than the base is" in markdown
    assert [row["tuned: fidelity"] for row in _csv(run_dir, "baked_leakage")] == ["25%"]
    assert "does the model give that of the prompt?" in markdown
    assert "so there is no adherence." in markdown
    assert not (run_dir.report / "adherence.svg").exists()  # that of the run before
    assert "No instruction has a check." not in _page(run_dir)
    assert "reminder fidelity" in _page(run_dir)
    assert not json.loads((run_dir.report / "report.json").read_text())["has_chart"]


def test_a_baked_prompt_with_checks_or_a_judge_has_adherence(full: RunDir, tmp_path: Path) -> None:
    shutil.copytree(full.path, tmp_path, dirs_exist_ok=True)
    run_dir = RunDir(tmp_path)
    fidelity = replace(_fidelity(), baked=True, saved_tokens=120.0)
    scores = replace(_scores(full), fidelity=fidelity, primary="last_five")
    write_json(run_dir.scores, scores)
    run(_recipe(run_dir), run_dir)
    markdown = (run_dir.report / "report.md").read_text(encoding="utf-8")
    assert "the tuned model follows the prompt without being given it in" in markdown
    assert "there is no adherence" not in markdown
    assert "Ceiling: the base, with the prompt." in markdown
    assert "a trained trait shows" in markdown
    chart = (run_dir.report / "adherence.svg").read_text(encoding="utf-8")
    assert "base, with the prompt" in chart and "the prompt is not given" in chart
    page = (run_dir.report / "report.html").read_text(encoding="utf-8")
    survival = page.split("dialogues not broken so far", 2)[1]
    assert "base, with the prompt" in survival and "reminded every turn" not in survival
