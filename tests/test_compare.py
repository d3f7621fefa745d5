"""Runs side by side: what differs, which seeds are one row, and which differences may be reckoned."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import GattError
from pipeline.evaluation.scores import scores
from pipeline.files import write_json, write_jsonl, write_text
from pipeline.gatt.assignment import read_split
from pipeline.gatt.instructions import assign_evaluation
from pipeline.recipe import Recipe
from pipeline.recipe_file import recipe_toml
from pipeline.records import Constraint, Dialogue, Reply
from pipeline.run_dir import RunDir
from pipeline.stages.compare import compare
from pipeline.stages.instructions import written

_POOL = (Constraint("opening", "Ahoy!"), Constraint("closing", "So it goes."))


def _run(
    folder: Path, good: int, first: int = 0, pool: tuple[Constraint, ...] = _POOL, **changes: Any
) -> Path:
    """A run whose tuned arms keep one of `pool` in `good` of 20 turns; its dialogues are named from `first` on."""
    recipe, run_dir = Recipe.model_validate(changes), RunDir(folder)
    write_text(folder / "recipe.toml", recipe_toml(recipe))
    dialogues = [Dialogue(f"d{first + n}", "sea", ("Why?",) * 20) for n in range(4)]
    made, pairs = assign_evaluation(dialogues, pool)
    write_json(
        run_dir.pairs,
        written(made, {"train": [], "evaluate": list(zip(dialogues, pairs, strict=True))}),
    )
    arms = ["base", "tuned", *(f"tuned, {name}" for name in recipe.export.formats[1:]), "ceiling"]
    replies = [
        Reply(
            arm,
            d.id,
            turn,
            "Words.",
            9,
            9,
            "stop",
            arm != "base" and (turn + n) % 20 < good,
            "loop" if turn == 20 else "",
        )
        for arm in arms
        for n, d in enumerate(dialogues)
        for turn in range(1, 21)
    ]
    write_jsonl(run_dir.replies, replies)
    write_json(
        run_dir.scores, scores(replies, {"evaluate": read_split(run_dir.pairs, "evaluate")}, pool)
    )
    write_json(
        run_dir.exported,
        {"formats": {name: {"bytes": 145_000_000} for name in recipe.export.formats}},
    )
    return folder


def _compared(folder: Path, *runs: Path) -> dict[str, Any]:
    compare(runs, folder / "out")
    found: dict[str, Any] = json.loads(
        (folder / "out" / "compare.json").read_text(encoding="utf-8")
    )
    return found


def test_the_rows_are_named_by_what_differs(tmp_path: Path) -> None:
    one = _run(tmp_path / "a", 10, train={"loss": "all_turns", "rank": 8})
    other = _run(tmp_path / "b", 18, train={"loss": "distill", "rank": 8})
    found = _compared(tmp_path, one, other)
    assert [row[0] for row in found["rows"]] == ["loss all_turns", "loss distill"]
    assert "train.loss" in found["columns"] and "train.rank" not in found["columns"]
    assert found["warnings"] == []
    assert found["columns"][:2] == ["run", "last five turns"]  # what a phone shows
    late = found["columns"].index("last five turns")
    later = found["columns"].index("all turns but the first")
    replies = {
        name: [Reply(**json.loads(line)) for line in RunDir(run).replies.read_text().splitlines()]
        for name, run in (("one", one), ("other", other))
    }
    for row, name in zip(found["rows"], ("one", "other"), strict=True):
        mine = [r.adherent for r in replies[name] if r.arm == "tuned" and r.turn > 15]
        assert (row[late]["hits"], row[late]["n"]) == (sum(mine), 20)
        after = [r.adherent for r in replies[name] if r.arm == "tuned" and r.turn > 1]
        assert (row[later]["hits"], row[later]["n"]) == (sum(after), 76)
    gap = 100 * (found["rows"][1][late]["value"] - found["rows"][0][late]["value"])
    apart = found["columns"].index("difference, points")
    assert [row[apart] for row in found["rows"]] == [None, pytest.approx(gap)]
    raw = found["columns"].index("obeys, good answer or not")
    assert found["rows"][1][raw]["hits"] > found["rows"][1][late]["hits"]  # turn 20 is a loop


def test_runs_that_differ_in_their_seed_only_are_one_row(tmp_path: Path) -> None:
    runs = [
        _run(
            tmp_path / f"{rank}-{seed}",
            8 + 2 * seed + rank,
            10 * seed,
            seed=seed,
            train={"rank": rank},
        )
        for rank in (4, 8)
        for seed in (1, 2, 3)
    ]
    found = _compared(tmp_path, *runs)
    assert [row[0] for row in found["rows"]] == ["rank 4", "rank 8"]
    assert [row[found["columns"].index("seeds")] for row in found["rows"]] == [3, 3]
    late = [row[found["columns"].index("last five turns")] for row in found["rows"]]
    assert [rate["n"] for rate in late] == [60, 60]
    lowest, highest = found["rows"][0][found["columns"].index("lowest and highest seed")].split(
        " to "
    )
    assert float(lowest[:-1]) < 100 * late[0]["value"] < float(highest[:-1])
    assert found["warnings"] == []


def test_every_exported_format_is_a_row_and_a_curve(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", 10, export={"formats": ["Q8_0", "Q4_K_M"]})
    found = _compared(tmp_path, run)
    assert [row[0] for row in found["rows"]] == ["a, Q8_0", "a, Q4_K_M"]
    curve = (tmp_path / "out" / "figures" / "adherence.svg").read_text(encoding="utf-8")
    assert all(f">{name}<" in curve for name in ("base", "a, Q8_0", "a, Q4_K_M"))


def test_other_dialogues_and_other_settings_are_told(tmp_path: Path) -> None:
    one = _run(tmp_path / "a", 10)
    other = _run(tmp_path / "b", 18, first=2, evaluate={"max_tokens": 32})
    found = _compared(tmp_path, one, other)
    assert len(found["warnings"]) == 3
    assert (
        "evaluate.max_tokens differs" in found["warnings"][0]
        and "different dialogues" in found["warnings"][1]
    )
    assert "difference, points" not in found["columns"]
    for name in ("compare.html", "compare.md"):
        assert "different dialogues" in (tmp_path / "out" / name).read_text(encoding="utf-8")


def test_the_same_dialogues_with_other_instructions_are_not_paired(tmp_path: Path) -> None:
    one, other = _run(tmp_path / "a", 10), _run(tmp_path / "b", 18, pool=(_POOL[1], _POOL[0]))
    found = _compared(tmp_path, one, other)
    assert any("different dialogues or instructions" in warning for warning in found["warnings"])
    assert "difference, points" not in found["columns"]


def test_rows_with_other_seeds_are_told_and_compared_over_common_ones(tmp_path: Path) -> None:
    apart = [
        _run(tmp_path / f"{rank}-{seed}", good, 10 * seed, seed=seed, train={"rank": rank})
        for rank, seed, good in ((4, 1, 10), (4, 2, 2), (8, 1, 18))
    ]
    found = _compared(tmp_path, *apart)
    assert ["seeds" in warning for warning in found["warnings"]] == [True]
    points = found["columns"].index("difference, points")
    alone = _compared(tmp_path, apart[0], apart[2])  # seed 1 only
    assert alone["warnings"] == []
    assert (
        found["rows"][1][points]
        == alone["rows"][1][alone["columns"].index("difference, points")]
        > 0
    )
    found = _compared(tmp_path, apart[1], apart[2])
    assert found["warnings"] and "difference, points" not in found["columns"]


def test_the_same_recipe_once_more_is_a_row_of_its_own(tmp_path: Path) -> None:
    found = _compared(tmp_path, _run(tmp_path / "a", 10), _run(tmp_path / "b", 18))
    assert [row[0] for row in found["rows"]] == ["a", "b"]
    with pytest.raises(GattError, match="named twice"):
        compare([tmp_path / "a", tmp_path / "b" / ".." / "a"], tmp_path / "out")


def test_long_values_give_way_to_the_folders_names(tmp_path: Path) -> None:
    pools = [(*_POOL, Constraint("opening", value)) for value in ("Good news:", "Good day:")]
    runs = [
        _run(tmp_path / name, 10, instructions={"pool": pool})
        for name, pool in zip(("base", "b"), pools, strict=True)
    ]
    found = _compared(tmp_path, *runs)
    assert [row[0] for row in found["rows"]] == ["run base", "b"]  # "base" is the curve of the base
    assert any("instructions.pool differs" in warning for warning in found["warnings"])
    cells = [row[found["columns"].index("instructions.pool")] for row in found["rows"]]
    assert cells[0].endswith("opening: Good news:"[-18:]) and cells[1].endswith(
        "opening: Good day:"[-18:]
    )


def test_the_chart_has_room_for_eight_and_says_so(tmp_path: Path) -> None:
    runs = [_run(tmp_path / f"m{rank}", rank, train={"rank": rank}) for rank in range(1, 10)]
    found = _compared(tmp_path, *runs)
    curve = (tmp_path / "out" / "figures" / "adherence.svg").read_text(encoding="utf-8")
    drawn = [rank for rank in range(1, 10) if f">rank {rank}<" in curve]
    assert (len(found["rows"]), drawn) == (9, list(range(1, 9)))
    assert "the first 8 of 9 rows" in (tmp_path / "out" / "compare.html").read_text(
        encoding="utf-8"
    )
    compare(runs[:8], tmp_path / "out")
    assert "the first 8" not in (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")


def test_a_format_that_was_not_measured_has_no_row(tmp_path: Path) -> None:
    run = _run(
        tmp_path / "a", 10, evaluate={"adapter": "a.gguf"}, export={"formats": ["Q8_0", "Q4_K_M"]}
    )
    assert [row[0] for row in _compared(tmp_path, run)["rows"]] == ["a"]
    files = _run(tmp_path / "b", 10, export={"formats": ["Q8_0", "Q4_K_M"]})
    replies = RunDir(files).replies
    kept = [
        line for line in replies.read_text(encoding="utf-8").splitlines() if "tuned, " not in line
    ]
    write_text(replies, "\n".join(kept) + "\n")
    assert [row[0] for row in _compared(tmp_path, files)["rows"]] == ["b, Q8_0"]
    assert "NaN" not in (tmp_path / "out" / "compare.json").read_text(encoding="utf-8")


def test_what_only_a_judge_can_tell_is_as_it_said(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", 10, pool=(Constraint("style", "talk like a pirate"),))
    late = [
        ("tuned", f"d{n}", turn) for n in range(4) for turn in range(16, 20)
    ]  # turn 20 is a loop
    rows = [
        {"arm": arm, "dialogue": name, "turn": turn, "verdict": turn == 17 or None}
        for arm, name, turn in late
    ]
    write_jsonl(RunDir(run).judged, rows)
    found = _compared(tmp_path, run)
    rate = found["rows"][0][found["columns"].index("last five turns")]
    assert (rate["hits"], rate["n"]) == (4, 20)


def test_the_csv_is_the_table(tmp_path: Path) -> None:
    found = _compared(
        tmp_path, _run(tmp_path / "a", 10), _run(tmp_path / "b", 18, train={"rank": 4})
    )
    with (tmp_path / "out" / "tables" / "compare.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    late = found["columns"].index("last five turns")
    assert [float(row["last five turns"]) for row in rows] == [
        row[late]["value"] for row in found["rows"]
    ]
    assert [row["MB"] for row in rows] == ["145", "145"]
    points = found["columns"].index("difference, points")
    assert [row["difference, points"] for row in rows] == ["", str(found["rows"][1][points])]
    assert [float(row["all turns but the first"]) for row in rows] == [
        row[found["columns"].index("all turns but the first")]["value"] for row in found["rows"]
    ]


def test_other_further_suites_are_told_and_adherence_is_still_paired(tmp_path: Path) -> None:
    found = _compared(
        tmp_path, _run(tmp_path / "a", 10), _run(tmp_path / "b", 18, evaluate={"more": 2})
    )
    assert [
        "evaluate.suite_dialogues" in warning and "recall" in warning
        for warning in found["warnings"]
    ] == [True]
    assert "difference, points" in found["columns"]


def test_warnings_do_not_contradict_each_other(tmp_path: Path) -> None:
    runs = [
        _run(tmp_path / "a", 10),
        _run(tmp_path / "b", 18, 10, seed=2, evaluate={"max_tokens": 32}, train={"rank": 4}),
    ]
    warnings = " ".join(_compared(tmp_path, *runs)["warnings"])
    assert "No difference between them is reckoned" in warnings and "same seeds" in warnings
    assert "common seeds only" not in warnings


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", 10)
    write_text(tmp_path / "file", "kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            GattError, match=r"Cannot write in the folder .*Choose another with --out"
        ):
            compare([run], folder)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


def test_what_is_no_run_or_not_evaluated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GattError, match="is no run"):
        compare([tmp_path / "nothing"], tmp_path / "out")
    run = _run(tmp_path / "a", 10)
    RunDir(run).scores.unlink()
    with pytest.raises(GattError, match=r"`gatt evaluate --run .*a` does it"):
        compare([run], tmp_path / "out")
    for name, missing in (("b", "pairs"), ("c", "replies")):
        part = _run(tmp_path / name, 10)
        getattr(RunDir(part), missing).unlink()
        with pytest.raises(GattError, match=f"{missing}.jsonl? is not there"):
            compare([part], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_judged_by_different_models_are_not_compared(tmp_path: Path) -> None:
    style = (Constraint("style", "talk like a pirate"),)
    pool = [{"kind": "style", "value": "talk like a pirate"}]
    runs = [
        _run(
            tmp_path / name,
            10,
            pool=style,
            train={"rank": rank},
            instructions={"pool": pool},
            evaluate={"judge": name},
        )
        for name, rank in (("one", 4), ("two", 8))
    ]
    found = _compared(tmp_path, *runs)
    assert found["warnings"][0] == "The runs were judged by different models."
    assert "difference, points" not in found["columns"]


def test_a_run_that_can_only_be_read_is_compared(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", 10)
    before = sorted(run.rglob("*"))
    _compared(tmp_path, run, _run(tmp_path / "b", 12, train={"rank": 8}))
    assert sorted(run.rglob("*")) == before
    assert not RunDir(tmp_path / "nothing").path.exists()
