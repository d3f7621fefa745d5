"""`gatt report`: reads the numbers of a run, renders them. Loads no model."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from jinja2 import Environment

from pipeline.config import Recipe
from pipeline.console import out
from pipeline.figures import adherence_curve, attention_picture, survival_curve
from pipeline.files import read_jsonl, write_json, write_text
from pipeline.pairs import read_pairs
from pipeline.records import Reply
from pipeline.rundir import RunDir

_COUNTS = {
    "obey": "obey, good answer or not", "no_answer": "are no answer (loop, repeat, empty)",
    "cut": "cut at the longest length allowed", "left_out": "left out: turn 1 had left the window",
}  # fmt: skip
_STAGES = ("instructions", "synthesize", "train", "export", "evaluate")


def run(recipe: Recipe, rundir: RunDir) -> None:
    """Write `report/report.html`, `.json` and `.md`, and print the summary."""
    scores = json.loads(rundir.scores.read_text(encoding="utf-8"))
    late = {row["arm"]: row for row in scores["late"]}
    sentence = (
        f"In {late['tuned']['at']}, the tuned model keeps its instruction in {late['tuned']['value']:.0%} of the answers, "
        f"the base in {late['base']['value']:.0%}."
    )
    facts = _facts(recipe, rundir)
    exported = _export(recipe, rundir, late)
    curve = adherence_curve(scores["by_turn"], scores["turns"])
    page = Environment(autoescape=True).from_string(
        (resources.files("pipeline") / "data" / "report.html").read_text(encoding="utf-8")
    )
    html = page.render(
        sentence=sentence, recipe=recipe, scores=scores, curve=curve, turns=scores["turns"], arms=list(late), facts=facts,
        by_instruction=_by_instruction(scores), examples=_examples(rundir), shortened=recipe.evaluate.shortened, counts=_COUNTS,
        attention=attention_picture(json.loads(rundir.attention.read_text(encoding="utf-8"))) if rundir.attention.exists() else "",
        survival=survival_curve(scores["survival"], scores["turns"]),
        acceptance=json.loads(rundir.acceptance.read_text(encoding="utf-8")), export=exported,
    )  # fmt: skip
    write_text(rundir.report / "report.html", html)
    write_text(rundir.report / "adherence.svg", curve)
    write_json(rundir.report / "report.json", {"sentence": sentence, "facts": facts, "scores": scores, "export": exported})
    summary = _markdown(sentence, scores, late)
    write_text(rundir.report / "report.md", summary)
    out(summary)


def _export(recipe: Recipe, rundir: RunDir, late: dict[str, Any]) -> dict[str, Any]:
    """What `gatt export` measured, and beside each format how well it keeps its instruction."""
    table: dict[str, Any] = json.loads(rundir.exported.read_text(encoding="utf-8"))
    first = recipe.export.formats[0]
    for name, row in table["formats"].items():
        row["adherence"] = late.get("tuned" if name == first else f"tuned, {name}")
        row["lowest"] = min(row["retained"].items(), key=lambda kept: kept[1], default=("", 1.0))
    return table


def _by_instruction(scores: dict[str, Any]) -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = {}
    for row in scores["by_instruction"]:
        table.setdefault(row["at"], {})[row["arm"]] = f"{row['value']:.0%} ({row['hits']} of {row['n']})"
    return table


def _examples(rundir: RunDir) -> list[dict[str, Any]]:
    """Three dialogues, base beside tuned, the instruction above them."""
    replies: dict[tuple[str, str, int], Reply] = {}
    for _, row in read_jsonl(rundir.replies):
        replies[row["arm"], row["dialogue"], row["turn"]] = Reply(**row)
    examples = []
    for pair in read_pairs(rundir.pairs, "evaluate")[:6:2]:
        rows = [
            {"turn": turn, "user": user, "base": replies["base", pair.dialogue.id, turn],
             "tuned": replies["tuned", pair.dialogue.id, turn]}
            for turn, user in enumerate(pair.dialogue.turns, 1) if ("tuned", pair.dialogue.id, turn) in replies
        ]  # fmt: skip
        examples.append({"instruction": pair.taught[0], "rows": rows})
    return examples


def _facts(recipe: Recipe, rundir: RunDir) -> dict[str, str]:
    _, example = next(read_jsonl(rundir.examples))
    facts = {"base model": recipe.model, "teacher": example["teacher"], "seed": str(recipe.seed)}
    for stage in _STAGES:
        manifest = rundir.manifest(stage)
        if manifest:
            facts[f"time of {stage}"] = f"{manifest['seconds']:.0f} s"
            facts["versions"] = ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())
            facts["commit"], facts["machine"] = manifest["commit"], manifest["platform"]
    for name in recipe.export.formats:
        path = rundir.tuned(name)
        facts[path.name] = f"{path.stat().st_size / 1e6:.0f} MB"
    return facts


def _markdown(sentence: str, scores: dict[str, Any], late: dict[str, Any]) -> str:
    lines = [f"**{sentence}**", "", "| turn | " + " | ".join(late) + " |", "|---|" + "---|" * len(late)]
    cells = {(row["arm"], row["at"]): row for row in scores["by_turn"]}
    for turn in range(1, scores["turns"] + 1):
        row = [cells.get((arm, turn)) for arm in late]
        shown = [f"{c['value']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" if c else "" for c in row]
        lines.append(f"| {turn} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"
