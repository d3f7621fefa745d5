"""A run through the command line: real model, real training, real GGUF."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.cli import TINY_RECIPE, call_gatt
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.evaluation.scores import ConditionScores, Scores
from pipeline.export.summary import ExportSummary
from pipeline.files import read_json, read_jsonl
from pipeline.gatt.assignment import read_splits
from pipeline.gguf.reader import open_gguf
from pipeline.records import Reply
from pipeline.run import open_run, run_stages
from pipeline.run_dir import STAGES, RunDir


def _copy(run_dir: RunDir, folder: Path, *ignored: str) -> RunDir:
    shutil.copytree(
        run_dir.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*ignored)
    )
    return RunDir(folder)


def _scores(run_dir: RunDir) -> Scores:
    return Scores.from_json(run_dir.scores.read_text(encoding="utf-8"))


def _replies(run_dir: RunDir) -> list[Reply]:
    return [Reply(**row) for _, row in read_jsonl(run_dir.replies)]


def _dialogue_ids(run_dir: RunDir) -> dict[str, set[str]]:
    """Return the ids of each split without what copies of a dialogue have after "@"."""
    splits = read_splits(run_dir.assignments)
    return {
        name: {assigned.dialogue.id.split("@")[0] for assigned in split}
        for name, split in splits.items()
    }


def test_the_report_has_every_arm_and_needs_no_network(finished: RunDir) -> None:
    scores = _scores(finished)
    assert {row.arm for row in scores.by_turn} == {"base", "tuned", "ceiling"}
    assert [counts.all for counts in scores.replies.values()] == [9, 9, 9]
    page = (finished.report / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "A shortened run" in page
    assert not re.search(r"(src|href)=.http|url\(.?http|@import", page)


def test_the_export_predicts_what_the_trained_model_did(finished: RunDir) -> None:
    """Merged into the 4-bit weights of training it is the trained model; into fp16 ones, better."""
    summary = ExportSummary.from_json(finished.exported.read_text(encoding="utf-8"))
    fp16, nf4 = summary.merge_trials["fp16"], summary.merge_trials["nf4"]
    assert nf4.kl_trained < 0.005 < 0.05 < fp16.kl_trained
    assert fp16.nll < nf4.nll
    assert summary.merge_base == "fp16"
    q8_0 = summary.formats["Q8_0"]
    assert q8_0.kl_trained == pytest.approx(fp16.kl_trained, abs=0.05)
    assert q8_0.kl_f16 is not None and q8_0.kl_f16 < 0.02
    _, retained = q8_0.least_retained
    assert retained > 0.5


def test_the_export_has_a_file_for_each_program(finished: RunDir) -> None:
    folder = finished.exported.parent
    files = {path.name for path in folder.iterdir()} - {"manifest.json", "started.json"}
    assert files == {"Modelfile", "adapter.gguf", "export.json", "lmstudio", "tuned-Q8_0.gguf"}
    model = f"{finished.path.name}-Q8_0"  # copies of several runs lie side by side
    link = folder / "lmstudio" / "gatt" / model / "tuned-Q8_0.gguf"
    assert link.samefile(finished.tuned("Q8_0"))


def test_held_out_answers_are_measured_at_each_checkpoint(finished: RunDir) -> None:
    rows = [row for _, row in read_jsonl(finished.validation)]
    assert [(row["step"], row["answers"]) for row in rows] == [(1, 3), (2, 3)]


def test_no_dialogue_is_in_two_splits(finished: RunDir) -> None:
    ids = _dialogue_ids(finished)
    assert len(ids["validation"]) == 1
    assert sum(map(len, ids.values())) == len(set.union(*ids.values()))


def test_the_file_states_where_it_comes_from(finished: RunDir, base: Path) -> None:
    tuned, original = open_gguf(finished.tuned("Q8_0")), open_gguf(base)
    assert tuned.field("general.license") == original.field("general.license") == "apache-2.0"
    assert tuned.field("general.name") == original.field("general.name")
    assert tuned.field("general.finetune") == "GAtt"
    repository = tuned.field("general.base_model.0.repo_url")
    assert repository == "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"
    assert tuned.field("general.dataset.0.description") == "user turns: seed"
    assert tuned.chat_template == original.chat_template


def test_every_arm_answers(finished: RunDir) -> None:
    replies = _replies(finished)
    assert {r.arm for r in replies} == {"base", "tuned", "ceiling"}
    assert all(r.tokens and r.text for r in replies)


def test_every_suite_is_measured(finished: RunDir) -> None:
    scores = _scores(finished)
    assert {row.at for row in scores.recall} == {1, 2, 3}
    assert {row.arm for row in scores.recall} == {"base", "tuned", "ceiling"}
    assert {row.at for row in scores.recall_by_attribute} == {"name", "hobby", "town"}
    assert {row.arm for row in scores.single} == {"base", "tuned"}
    assert scores.change["base"].change_turn == 2
    assert scores.leaks and scores.leaks.traits
    assert all(row.n == 3 for row in (*scores.leaks.new, *scores.leaks.by_trait))
    measured, trained = (sum(row[n] for row in scores.coverage.values()) for n in (0, 1))
    assert 1 <= measured == min(3, trained)  # three dialogues
    assert scores.degradation and scores.degradation.tokens > 20
    assert scores.fidelity
    assert [(row.arm, row.dialogues) for row in scores.fidelity.overall] == [("tuned", 3)]
    assert {row.at for row in scores.fidelity.by_turn} == {2, 3}
    assert "<h2>Reminder fidelity</h2>" in (finished.report / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_another_sampler_and_more_turns_stand_beside_the_evaluation(
    finished: RunDir, tmp_path: Path
) -> None:
    run_dir = _copy(finished, tmp_path)
    condition = ["--sampler", "plain", "--turns", "4"]
    for words in (["evaluate", *condition], ["report"]):
        done = CliRunner().invoke(app, [*words, "--run", str(tmp_path)], catch_exceptions=False)
        assert done.exit_code == 0
    assert run_dir.scores.read_bytes() == finished.scores.read_bytes()
    scores = read_json(run_dir.conditions / "plain-4.json", ConditionScores, "evaluate")
    assert [(row.arm, row.at, row.n, row.main.n) for row in scores.rows] == [
        ("base", "turns 1 to 3", 9, 9),
        ("base", "turns 1 to 4", 12, 9),
        ("tuned", "turns 1 to 3", 9, 9),
        ("tuned", "turns 1 to 4", 12, 9),
    ]
    page = (run_dir.report / "report.html").read_text(encoding="utf-8")
    assert "<h2>Other samplers and lengths</h2>" in page


def test_the_instruction_is_in_turn_one_only(finished: RunDir) -> None:
    assigned = {a.dialogue.id: a for a in read_splits(finished.assignments)["train"]}
    for _, row in read_jsonl(finished.examples):
        users = [m["content"] for m in row["messages"] if m["role"] == "user"]
        dialogue = assigned[row["dialogue"]]
        plain = dialogue.dialogue.turns[: len(users)]
        assert all(map(str.startswith, users, plain))
        later = [user for user, turn in zip(users[1:], plain[1:], strict=True) if user != turn]
        events = dialogue.next_instruction is not None or bool(dialogue.contradiction)
        assert len(later) <= events


def test_labels_cover_answers_and_their_end_of_turn_only(finished: RunDir) -> None:
    flags = ["train", "--run", str(finished.path), "--show-labels"]
    shown = CliRunner().invoke(app, flags, catch_exceptions=False).stdout
    _, example = next(read_jsonl(finished.examples))
    learned = [piece.split("]")[0] for piece in shown.split("[")[1:]]
    answers = [m["content"] + "<|im_end|>" for m in example["messages"] if m["role"] == "assistant"]
    assert learned == answers


def test_a_second_run_repeats_nothing(
    finished: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = _copy(finished, tmp_path)
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    run_stages(*open_run(None, run_dir.path, TINY_RECIPE))
    assert capsys.readouterr().err.count("done already") == len(STAGES) - 1  # all but the report
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")} == logs


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--adapter", "a.gguf"), "evaluate.adapter: no file at a.gguf. Expected a GGUF adapter."),
        (("--compare-with", "a.gguf"), "evaluate.extra_models: no file at a.gguf."),
        (("--judge", "nobody"), "nobody"),
        (("--set", "evaluate.dialogues=9"), "evaluate.dialogues has changed, and the dialogues"),
        (("--set", "evaluate.suite_turns=2"), "evaluate.suite_turns has changed"),
    ],
)
def test_an_evaluation_that_cannot_begin_changes_nothing(
    finished: RunDir, tmp_path: Path, flags: tuple[str, ...], problem: str
) -> None:
    run_dir = _copy(finished, tmp_path, "train", "export")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = call_gatt("evaluate", "--run", tmp_path, *flags)
    assert done.returncode == 1 and problem in done.stderr
    locks = {run_dir.path / ".lock", run_dir.path / ".lock.json"}
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p not in locks} == {
        p: t for p, t in before.items() if p not in locks
    }


def test_the_report_says_that_the_exported_file_was_not_measured(
    finished: RunDir, tmp_path: Path
) -> None:
    run_dir = _copy(finished, tmp_path, "train")

    def report() -> tuple[str, str]:
        assert call_gatt("report", "--run", tmp_path).returncode == 0
        page = json.loads((run_dir.report / "report.json").read_text(encoding="utf-8"))
        row = (run_dir.report / "tables" / "export.csv").read_text(encoding="utf-8").splitlines()[1]
        return page["warning"], row.rsplit(",", 1)[1]

    warning, adherence = report()
    assert warning.startswith("A shortened run: 3 dialogues of 3 turns.") and adherence
    assert "not the one" not in warning
    with run_dir.tuned("Q8_0").open("ab") as file:
        file.write(b"another export")
    warning, adherence = report()
    assert "The exported file is not the one that was measured." in warning and not adherence


@pytest.mark.slow
def test_adapters_are_measured_over_the_base(finished: RunDir, tmp_path: Path) -> None:
    run_dir = _copy(finished, tmp_path, "evaluate", "train")
    adapter = tmp_path / "export" / "adapter.gguf"
    rival = shutil.copyfile(adapter, tmp_path / "rival.gguf")
    flags = ["--adapter", adapter, "--adapter-scale", "16", "--compare-with", rival]
    arguments = ["evaluate", "--run", tmp_path, *flags]
    CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    replies, expected = (
        {(r.arm, r.dialogue, r.turn, r.recall_attribute): r.text for r in _replies(run)}
        for run in (run_dir, finished)
    )
    assert {key[0] for key in replies} == {"base", "tuned", "rival", "ceiling"}
    assert {key for key in replies if key[0] != "rival"} == expected.keys()
    different = {key[0] for key, text in expected.items() if replies[key] != text}
    assert different == {"tuned"}  # the base's contexts do not use the adapter
    degradation = _scores(run_dir).degradation
    assert degradation
    assert degradation.perplexity.keys() == {"base", "tuned", "rival"}
    # 16 times the scale moves the model further; after two steps less would be lost in rounding.
    assert degradation.kl["tuned"] > 2 * degradation.kl["rival"] > 0
