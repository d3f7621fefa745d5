"""Runs in one table: their rows and names, and which differences are computed."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from support.cli import call_gatt
from support.golden import Golden

from pipeline.errors import GattError
from pipeline.evaluation.aggregate import compute_scores
from pipeline.evaluation.rates import Rate
from pipeline.evaluation.scores import Fidelity, FidelityRow, Scores
from pipeline.export.summary import ExportSummary, FormatSummary
from pipeline.files import write_json, write_jsonl, write_text
from pipeline.gatt.assign import assign_evaluation
from pipeline.gatt.assignment import write_splits
from pipeline.recipe import Recipe
from pipeline.recipe_file import recipe_toml
from pipeline.records import Constraint, CustomInstruction, Dialogue, Reply
from pipeline.report.compared.comparison import Comparison, compare_runs
from pipeline.report.compared.fidelity import overall_fidelity, pooled_fidelity
from pipeline.report.compared.runs import read_run
from pipeline.report.tables import Cell
from pipeline.run_dir import RunDir
from pipeline.stages.compare import compare

_POOL = (Constraint("opening", "Ahoy!"), Constraint("closing", "So it goes."))
_STYLE = Constraint("style", "talk like a pirate")
_DEFAULTS = Recipe()


@dataclass(frozen=True)
class Evaluated:
    """A run whose tuned arms obey in `obeyed_turns` of 20 turns.

    Its four dialogues are numbered from `first_dialogue`; `pool` are their instructions, whatever
    the recipe says.
    """

    obeyed_turns: int
    first_dialogue: int = 0
    pool: tuple[Constraint, ...] = _POOL
    recipe: Recipe = _DEFAULTS

    def write(self, folder: Path) -> Path:
        """Write the run to `folder`."""
        run_dir = RunDir(folder)
        write_text(folder / "recipe.toml", recipe_toml(self.recipe))
        dialogues = [
            Dialogue(f"d{self.first_dialogue + n}", "sea", ("Why?",) * 20) for n in range(4)
        ]
        evaluation = assign_evaluation(dialogues, self.pool)
        write_splits(run_dir.assignments, {"train": [], "evaluation": evaluation})
        formats = self.recipe.export.formats
        tuned_arms = ("tuned", *(f"tuned, {name}" for name in formats[1:]))
        replies = _replies(self.first_dialogue, self.obeyed_turns, tuned_arms)
        write_jsonl(run_dir.replies, replies)
        write_json(run_dir.scores, _scores(self.pool, self.first_dialogue, self.obeyed_turns))
        files = {name: FormatSummary(bytes=145_000_000) for name in formats}
        write_json(run_dir.exported, ExportSummary(merge_base="fp16", formats=files))
        return folder


def _replies(first_dialogue: int, obeyed_turns: int, tuned_arms: Sequence[str]) -> list[Reply]:
    """Return replies of which the base obeys none, and turn 20 is a loop."""
    return [
        Reply(
            arm=arm,
            dialogue=f"d{first_dialogue + n}",
            turn=turn,
            text="Words.",
            prompt_tokens=9,
            tokens=9,
            finish="stop",
            obeys=arm != "base" and (turn + n) % 20 < obeyed_turns,
            defect="loop" if turn == 20 else "",
        )
        for arm in ("base", *tuned_arms, "ceiling")
        for n in range(4)
        for turn in range(1, 21)
    ]


@cache
def _scores(pool: tuple[Constraint, ...], first_dialogue: int, obeyed_turns: int) -> Scores:
    dialogues = [Dialogue(f"d{first_dialogue + n}", "sea", ("Why?",) * 20) for n in range(4)]
    replies = _replies(first_dialogue, obeyed_turns, ("tuned",))
    return compute_scores(replies, {"evaluation": assign_evaluation(dialogues, pool)}, pool)


def _recipe(**sections: object) -> Recipe:
    return Recipe.model_validate(sections)


def _compare(*runs: Path) -> Comparison:
    return compare_runs([read_run(run) for run in runs])


def _column(comparison: Comparison, name: str) -> list[Cell]:
    index = comparison.table.columns.index(name)
    return [row[index] for row in comparison.table.rows]


def _rates(comparison: Comparison, name: str) -> list[Rate]:
    return [cell for cell in _column(comparison, name) if isinstance(cell, Rate)]


def _has_differences(comparison: Comparison) -> bool:
    return "difference, points" in comparison.table.columns


def test_rows_are_named_by_what_differs(tmp_path: Path) -> None:
    runs = [
        Evaluated(turns, recipe=_recipe(train={"loss": loss, "rank": 8})).write(tmp_path / loss)
        for loss, turns in (("all_turns", 10), ("distill", 18))
    ]
    comparison = _compare(*runs)
    assert _column(comparison, "run") == ["loss all_turns", "loss distill"]
    assert "train.loss" in comparison.table.columns
    assert "train.rank" not in comparison.table.columns
    assert comparison.table.columns[:2] == ["run", "last five turns"]  # what a phone shows
    assert comparison.warnings == []


def test_rates_and_differences_are_those_of_the_replies(tmp_path: Path) -> None:
    runs = [
        Evaluated(turns, recipe=_recipe(train={"rank": turns})).write(tmp_path / str(turns))
        for turns in (10, 18)
    ]
    comparison = _compare(*runs)
    last_five = _rates(comparison, "last five turns")
    after_first = _rates(comparison, "all turns but the first")
    for row, turns in enumerate((10, 18)):
        tuned = [r for r in _replies(0, turns, ("tuned",)) if r.arm == "tuned"]
        late = [r.adherent for r in tuned if r.turn > 15]
        assert (last_five[row].hits, last_five[row].n) == (sum(late), 20)
        later = [r.adherent for r in tuned if r.turn > 1]
        assert (after_first[row].hits, after_first[row].n) == (sum(later), 76)
    difference = 100 * (last_five[1].value - last_five[0].value)
    assert _column(comparison, "difference, points") == [None, pytest.approx(difference)]
    unfiltered = _rates(comparison, "obeys, valid answer or not")
    assert unfiltered[1].hits > last_five[1].hits  # turn 20 is a loop


def test_runs_that_differ_only_in_their_seed_are_one_row(tmp_path: Path) -> None:
    runs = [
        Evaluated(
            8 + 2 * seed + rank, 10 * seed, recipe=_recipe(seed=seed, train={"rank": rank})
        ).write(tmp_path / f"{rank}-{seed}")
        for rank in (4, 8)
        for seed in (1, 2, 3)
    ]
    comparison = _compare(*runs)
    assert _column(comparison, "run") == ["rank 4", "rank 8"]
    assert _column(comparison, "seeds") == [3, 3]
    last_five = _rates(comparison, "last five turns")
    assert [rate.n for rate in last_five] == [60, 60]
    lowest, highest = str(_column(comparison, "lowest and highest seed")[0]).split(" to ")
    assert float(lowest[:-1]) < 100 * last_five[0].value < float(highest[:-1])
    assert comparison.warnings == []


def test_other_dialogues_and_settings_give_warnings(tmp_path: Path) -> None:
    other = Evaluated(18, first_dialogue=2, recipe=_recipe(evaluate={"max_tokens": 32}))
    compare([Evaluated(10).write(tmp_path / "a"), other.write(tmp_path / "b")], tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    settings, dialogues, _ = saved["warnings"]
    assert "evaluate.max_tokens differs" in settings
    assert "different dialogues" in dialogues
    assert "difference, points" not in saved["columns"]
    for name in ("compare.html", "compare.md"):
        assert "different dialogues" in (tmp_path / "out" / name).read_text(encoding="utf-8")


def test_a_recipe_that_was_edited_after_training_gives_a_warning(tmp_path: Path) -> None:
    runs = [Evaluated(10).write(tmp_path / name) for name in ("a", "b")]
    edited = RunDir(runs[1])
    edited.claim("train", "as it was trained", [])
    edited.finish("train", "as it was trained", [], 60.0)
    done = call_gatt("compare", *runs, "--out", tmp_path / "out")
    assert done.returncode == 0
    warning = f"{runs[1]}: the recipe has changed since `gatt train`, so the settings"
    assert warning in " ".join(done.stderr.split())
    saved = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [text.startswith(warning) for text in saved["warnings"] if "has changed" in text] == [
        True
    ]


def test_same_dialogues_with_other_instructions_are_not_paired(tmp_path: Path) -> None:
    other = Evaluated(18, pool=(_POOL[1], _POOL[0]))
    comparison = _compare(Evaluated(10).write(tmp_path / "a"), other.write(tmp_path / "b"))
    assert any("different dialogues or instructions" in text for text in comparison.warnings)
    assert not _has_differences(comparison)


def test_rows_with_different_seeds_are_compared_over_common_ones(tmp_path: Path) -> None:
    first, second, third = (
        Evaluated(turns, 10 * seed, recipe=_recipe(seed=seed, train={"rank": rank})).write(
            tmp_path / f"{rank}-{seed}"
        )
        for rank, seed, turns in ((4, 1, 10), (4, 2, 2), (8, 1, 18))
    )
    comparison = _compare(first, second, third)
    assert ["seeds" in warning for warning in comparison.warnings] == [True]
    common = _compare(first, third)
    assert common.warnings == []
    difference = _column(common, "difference, points")[1]
    assert isinstance(difference, float)
    assert difference > 0
    assert _column(comparison, "difference, points")[1] == difference
    nothing_common = _compare(second, third)
    assert nothing_common.warnings
    assert not _has_differences(nothing_common)


def test_the_same_recipe_twice_gives_two_rows(tmp_path: Path) -> None:
    runs = [Evaluated(10).write(tmp_path / "a"), Evaluated(18).write(tmp_path / "b")]
    assert _column(_compare(*runs), "run") == ["a", "b"]


def test_a_run_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GattError, match="named twice"):
        compare([tmp_path / "a", tmp_path / "b" / ".." / "a"], tmp_path / "out")


def test_folder_names_replace_long_values(tmp_path: Path) -> None:
    runs = [
        Evaluated(
            10, recipe=_recipe(instructions={"pool": (*_POOL, Constraint("opening", value))})
        ).write(tmp_path / name)
        for name, value in (("base", "Good news:"), ("b", "Good day:"))
    ]
    comparison = _compare(*runs)
    assert _column(comparison, "run") == ["run base", "b"]  # "base" is the base's curve
    assert any("instructions.pool differs" in warning for warning in comparison.warnings)
    cells = map(str, _column(comparison, "instructions.pool"))
    for cell, name in zip(cells, ("opening: Good news:", "opening: Good day:"), strict=True):
        assert cell.endswith(name[-18:])


def test_the_chart_shows_eight_rows_and_says_so(tmp_path: Path) -> None:
    runs = [
        Evaluated(rank, recipe=_recipe(train={"rank": rank})).write(tmp_path / f"m{rank}")
        for rank in range(1, 10)
    ]
    page = tmp_path / "out" / "compare.html"
    compare(runs, tmp_path / "out")
    svg = (tmp_path / "out" / "figures" / "adherence.svg").read_text(encoding="utf-8")
    assert [rank for rank in range(1, 10) if f">rank {rank}<" in svg] == list(range(1, 9))
    assert "the first 8 of 9 rows" in page.read_text(encoding="utf-8")
    compare(runs[:8], tmp_path / "out")
    assert "the first 8" not in page.read_text(encoding="utf-8")


def test_every_measured_format_is_a_row_and_a_curve(tmp_path: Path) -> None:
    both = _recipe(export={"formats": ["Q8_0", "Q4_K_M"]})
    run = Evaluated(10, recipe=both).write(tmp_path / "a")
    assert _column(_compare(run), "run") == ["a, Q8_0", "a, Q4_K_M"]
    compare([run], tmp_path / "out")
    svg = (tmp_path / "out" / "figures" / "adherence.svg").read_text(encoding="utf-8")
    assert all(f">{name}<" in svg for name in ("base", "a, Q8_0", "a, Q4_K_M"))


def test_a_format_that_was_not_measured_has_no_row(tmp_path: Path) -> None:
    formats = {"formats": ["Q8_0", "Q4_K_M"]}
    adapter = _recipe(evaluate={"adapter": "a.gguf"}, export=formats)
    run = Evaluated(10, recipe=adapter).write(tmp_path / "a")
    assert _column(_compare(run), "run") == ["a"]
    run = Evaluated(10, recipe=_recipe(export=formats)).write(tmp_path / "b")
    replies = RunDir(run).replies
    lines = replies.read_text(encoding="utf-8").splitlines(keepends=True)
    write_text(replies, "".join(line for line in lines if "tuned, " not in line))
    assert _column(_compare(run), "run") == ["b, Q8_0"]
    compare([run], tmp_path / "out")
    assert "NaN" not in (tmp_path / "out" / "compare.json").read_text(encoding="utf-8")


def test_verdicts_of_the_judge_replace_checks(tmp_path: Path) -> None:
    run = Evaluated(10, pool=(_STYLE,)).write(tmp_path / "a")
    verdicts = [
        {"arm": "tuned", "dialogue": f"d{n}", "turn": turn, "verdict": turn == 17 or None}
        for n in range(4)
        for turn in range(16, 20)  # turn 20 is a loop
    ]
    write_jsonl(RunDir(run).judged, verdicts)
    [rate] = _rates(_compare(run), "last five turns")
    assert (rate.hits, rate.n) == (4, 20)


def test_runs_judged_by_different_models_are_not_compared(tmp_path: Path) -> None:
    runs = [
        Evaluated(
            10,
            pool=(_STYLE,),
            recipe=_recipe(
                train={"rank": rank}, instructions={"pool": [_STYLE]}, evaluate={"judge": judge}
            ),
        ).write(tmp_path / judge)
        for judge, rank in (("one", 4), ("two", 8))
    ]
    comparison = _compare(*runs)
    assert comparison.warnings[0] == "The runs were judged by different models."
    assert not _has_differences(comparison)


def test_different_suites_give_a_warning_and_adherence_is_still_paired(tmp_path: Path) -> None:
    other = Evaluated(18, recipe=_recipe(evaluate={"suite_dialogues": 2}))
    comparison = _compare(Evaluated(10).write(tmp_path / "a"), other.write(tmp_path / "b"))
    [warning] = comparison.warnings
    assert "evaluate.suite_dialogues" in warning
    assert "recall" in warning
    assert _has_differences(comparison)


def test_warnings_do_not_contradict_each_other(tmp_path: Path) -> None:
    changes = _recipe(seed=2, evaluate={"max_tokens": 32}, train={"rank": 4})
    other = Evaluated(18, 10, recipe=changes)
    comparison = _compare(Evaluated(10).write(tmp_path / "a"), other.write(tmp_path / "b"))
    warnings = " ".join(comparison.warnings)
    assert "No differences between the runs are computed" in warnings
    assert "same seeds" in warnings
    assert "common seeds only" not in warnings


def test_the_csv_is_the_table(tmp_path: Path) -> None:
    runs = [
        Evaluated(10).write(tmp_path / "a"),
        Evaluated(18, recipe=_recipe(train={"rank": 4})).write(tmp_path / "b"),
    ]
    comparison = _compare(*runs)
    compare(runs, tmp_path / "out")
    with (tmp_path / "out" / "tables" / "compare.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in ("last five turns", "all turns but the first"):
        values = [rate.value for rate in _rates(comparison, name)]
        assert [float(row[name]) for row in rows] == values
    assert [row["MB"] for row in rows] == ["145", "145"]
    difference = _column(comparison, "difference, points")[1]
    assert [row["difference, points"] for row in rows] == ["", str(difference)]


def test_markdown_of_a_comparison(tmp_path: Path, golden: Golden) -> None:
    runs = [
        Evaluated(turns, 10 * seed, recipe=_recipe(seed=seed, train={"rank": rank})).write(
            tmp_path / f"{rank}-{seed}"
        )
        for rank, seed, turns in ((4, 1, 10), (4, 2, 2), (8, 1, 18))
    ]
    compare(runs, tmp_path / "out")
    golden("compare.md", (tmp_path / "out" / "compare.md").read_text(encoding="utf-8"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    run = Evaluated(10).write(tmp_path / "a")
    write_text(tmp_path / "file", "content")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            GattError, match=r"Cannot write in the folder .*Choose another with --out"
        ):
            compare([run], folder)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "content"


def test_a_folder_that_is_not_an_evaluated_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GattError, match="is not a run"):
        compare([tmp_path / "nothing"], tmp_path / "out")
    run = Evaluated(10).write(tmp_path / "a")
    RunDir(run).scores.unlink()
    with pytest.raises(GattError, match=r"Run `gatt evaluate --run .*a` first"):
        compare([run], tmp_path / "out")
    for name in ("assignments", "replies"):
        run = Evaluated(10).write(tmp_path / name)
        getattr(RunDir(run), name).unlink()
        with pytest.raises(GattError, match=rf"{name}\.jsonl? is missing"):
            compare([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_late_replies_is_refused(tmp_path: Path) -> None:
    run = Evaluated(10).write(tmp_path / "a")
    lost = [
        replace(reply, finish="context") if reply.turn > 15 else reply
        for reply in _replies(0, 10, ("tuned",))
    ]
    write_jsonl(RunDir(run).replies, lost)
    with pytest.raises(GattError, match="no reply of a tuned model in the last five turns"):
        read_run(run)


def test_comparing_writes_nothing_into_the_runs(tmp_path: Path) -> None:
    runs = [
        Evaluated(10).write(tmp_path / "a"),
        Evaluated(12, recipe=_recipe(train={"rank": 8})).write(tmp_path / "b"),
    ]
    before = sorted((tmp_path / "a").rglob("*"))
    compare(runs, tmp_path / "out")
    assert sorted((tmp_path / "a").rglob("*")) == before
    assert not RunDir(tmp_path / "nothing").path.exists()


def _fidelity_row(
    at: int | str, kl: float, interval: tuple[float, float], base_kl: float = 0.4, tokens: int = 100
) -> FidelityRow:
    return FidelityRow(
        arm="tuned",
        at=at,
        kl=kl,
        base_kl=base_kl,
        value=1 - kl / base_kl if base_kl else math.nan,
        low=interval[0],
        high=interval[1],
        tokens=tokens,
        dialogues=8,
    )


def _with_fidelity(run: Path, *by_turn: FidelityRow, overall: FidelityRow) -> Path:
    rival = replace(overall, arm="rival", kl=0.0, value=1.0)
    fidelity = Fidelity((overall, rival), by_turn, ())
    run_dir = RunDir(run)
    scores = Scores.from_json(run_dir.scores.read_text(encoding="utf-8"))
    write_json(run_dir.scores, replace(scores, fidelity=fidelity))
    return run


def test_reminder_fidelity_stands_beside_adherence_and_by_turn(tmp_path: Path) -> None:
    other = Evaluated(18, recipe=_recipe(train={"rank": 4}))
    runs = [
        _with_fidelity(
            Evaluated(10).write(tmp_path / "a"),
            _fidelity_row(2, 0.1, (0.6, 0.9)),
            _fidelity_row(3, 0.6, (-0.8, 0.1)),
            overall=_fidelity_row("turns 2 to 3", 0.3, (0.1, 0.5)),
        ),
        _with_fidelity(
            other.write(tmp_path / "b"),
            _fidelity_row(2, 0.3, (math.nan, math.nan), base_kl=0.3),
            overall=_fidelity_row("turns 2 to 3", 0.2, (math.nan, math.nan)),
        ),
        replace(other, recipe=_recipe(train={"rank": 2})).write(tmp_path / "c"),
    ]
    comparison = _compare(*runs)
    assert _column(comparison, "reminder fidelity") == ["25%", "50%", None]
    assert _column(comparison, "fidelity between (95 %)") == ["10 to 50%", None, None]
    names = [str(name) for name in _column(comparison, "run")]
    assert comparison.fidelity.columns[:2] == ["turn", "run"]
    assert comparison.fidelity.rows == [
        [2, names[0], 0.4, 0.1, "75%", "60 to 90%"],
        [2, names[1], 0.3, 0.3, "0%", ""],
        [3, names[0], 0.4, 0.6, "-50%", "-80 to 10%"],
    ]
    compare(runs, tmp_path / "out")
    text = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert "Reminder fidelity: how much nearer" in text and f"| 3 | {names[0]} | 0.4 |" in text
    saved = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert saved["fidelity"]["rows"][2][4:] == ["-50%", "-80 to 10%"]
    svg = (tmp_path / "out" / "figures" / "fidelity.svg").read_text(encoding="utf-8")
    assert f">{names[0]}<" in svg and f">{names[1]}<" in svg and f">{names[2]}<" not in svg


def test_fidelity_of_seeds_is_that_of_all_answers_with_a_combined_interval(tmp_path: Path) -> None:
    rows = [
        _fidelity_row("all", 0.1, (0.65, 0.85)),
        _fidelity_row("all", 0.6, (0.2, 0.5), base_kl=1.0, tokens=300),
    ]
    runs = [
        _with_fidelity(
            Evaluated(10, 10 * seed, recipe=_recipe(seed=seed)).write(tmp_path / str(seed)),
            overall=row,
        )
        for seed, row in enumerate(rows)
    ]
    pooled = overall_fidelity("both", [read_run(run) for run in runs], "tuned")
    assert pooled and (pooled.arm, pooled.tokens, pooled.dialogues) == ("both", 400, 16)
    # 40 and 300 nats of the base, 10 and 180 of the model.
    assert pooled.value == pytest.approx(1 - 190 / 340)
    assert pooled.base_kl == pytest.approx(340 / 400)
    assert pooled.kl == pytest.approx(190 / 400)
    small, large = 40 / 340, 300 / 340
    below = math.hypot(small * (0.75 - 0.65), large * (0.4 - 0.2))
    above = math.hypot(small * (0.85 - 0.75), large * (0.5 - 0.4))
    assert pooled.low == pytest.approx(pooled.value - below)
    assert pooled.high == pytest.approx(pooled.value + above)
    unknown = replace(rows[1], low=math.nan, high=math.nan)
    assert math.isnan(pooled_fidelity("both", [rows[0], unknown]).low)
    assert math.isnan(pooled_fidelity("both", [_fidelity_row("a", 0.1, (0, 1), 0.0)] * 2).value)


def _unchecked(folder: Path, kl: float, rank: int) -> Path:
    """Write a run in which nothing checks any instruction."""
    run = Evaluated(10, recipe=_recipe(train={"rank": rank})).write(folder)
    run_dir = RunDir(run)
    dialogues = [Dialogue(f"d{n}", "sea", ("Why?",) * 20) for n in range(4)]
    evaluation = assign_evaluation(dialogues, [], [CustomInstruction(text="Be blunt.")])
    write_splits(run_dir.assignments, {"train": [], "evaluation": evaluation})
    replies = [replace(reply, obeys=None) for reply in _replies(0, 10, ("tuned",))]
    write_jsonl(run_dir.replies, replies)
    write_json(run_dir.scores, compute_scores(replies, {"evaluation": evaluation}, ()))
    if kl:
        by_turn = _fidelity_row(2, kl, (0, 1))
        _with_fidelity(run, by_turn, overall=_fidelity_row("turns 2 to 3", kl, (0.1, 0.9)))
    return run


def test_runs_without_a_check_are_compared_by_fidelity_alone(tmp_path: Path) -> None:
    runs = [_unchecked(tmp_path / str(rank), kl, rank) for rank, kl in ((4, 0.1), (8, 0.2))]
    comparison = _compare(*runs)
    assert (
        comparison.table.columns[0] == "run" and "last five turns" not in comparison.table.columns
    )
    assert _column(comparison, "reminder fidelity") == ["75%", "50%"]
    assert "half broken by turn" not in comparison.table.columns
    compare(runs, tmp_path / "out")
    text = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    headline = "No instruction has a check. Reminder fidelity: rank 4 75%, rank 8 50%."
    assert text.startswith(f"**{headline}**")
    assert "NaN" not in (tmp_path / "out" / "compare.json").read_text(encoding="utf-8")
    with pytest.raises(GattError, match="no instruction with a check and no reminder fidelity"):
        read_run(_unchecked(tmp_path / "none", 0.0, 4))


def test_checked_and_unchecked_runs_stand_in_one_table(tmp_path: Path) -> None:
    runs = [_unchecked(tmp_path / "a", 0.1, 4), Evaluated(10).write(tmp_path / "b")]
    comparison = _compare(*runs)
    first, second = _column(comparison, "last five turns")
    assert first is None and isinstance(second, Rate)
    assert _column(comparison, "half broken by turn")[0] is None
    compare(runs, tmp_path / "out")
    assert "keeps its instruction in" in (tmp_path / "out" / "compare.md").read_text("utf-8")


def test_runs_with_another_baked_prompt_are_not_paired(tmp_path: Path) -> None:
    runs = [
        Evaluated(10, recipe=_recipe(instructions={"bake": bake})).write(tmp_path / bake)
        for bake in ("a.txt", "b.txt")
    ]
    comparison = _compare(*runs)
    assert any("instructions.bake differs" in text for text in comparison.warnings)
    assert not _has_differences(comparison)
