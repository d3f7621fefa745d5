"""`gatt report`: reads the numbers of a run, renders them. Loads no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.console import print_result
from pipeline.evaluation.rates import wilson
from pipeline.evaluation.suites import PAPER_RECALL, PROBED_TURNS
from pipeline.files import read_jsonl, write_json, write_text
from pipeline.gatt.assignment import read_split
from pipeline.recipe import Recipe
from pipeline.records import Reply
from pipeline.report.figures import (
    adherence_curve,
    attention_picture,
    change_curve,
    loss_curve,
    survival_curve,
)
from pipeline.report.page import ReportPage, ReportSection
from pipeline.report.tables import Table, by_arm, curves, format_cell, markdown, overview
from pipeline.run_dir import STAGES, RunDir

_OTHERS = 4
"""Arms beside base, tuned and ceiling that a curve has room for."""

SECTIONS = ("evaluate",)
"""Sections of the recipe that the result depends on."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Path]:
    """Return the files that the result depends on."""
    return [run_dir.scores, run_dir.exported]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Write `report/report.html`, `.json` and `.md`, the figures and the tables, and print the summary."""
    scores = json.loads(run_dir.scores.read_text(encoding="utf-8"))
    facts = _facts(recipe, run_dir)
    exported = _export(recipe, run_dir, scores)
    sentence = headline(scores)
    arms, drawn = _arms(scores), _drawn(scores)
    curve = adherence_curve(
        [row for arm in drawn for row in scores["by_turn"] if row["arm"] == arm], scores["turns"]
    )
    sections = [*measured(scores, run_dir), *_made(run_dir, exported, facts)]
    warning = (
        f"A shortened run: {recipe.evaluate.dialogues} dialogues of {scores['turns']} turns. Take no figure from it."
        if recipe.evaluate.shortened
        else ""
    )
    how = (
        f"{recipe.evaluate.dialogues} dialogues that training has not seen; bands are 95 % Wilson intervals. A reply counts when "
        "it obeys and is a reply (no loop, no repeat, not empty). Small type in the tables: the 95 % interval, and of how many."
        + (
            f" Curves show {len(drawn)} of {len(arms)} models, tables all."
            if len(drawn) < len(arms)
            else ""
        )
    )
    page = ReportPage(
        f"GAtt report: {_public(recipe.model)}",
        sentence,
        warning,
        curve,
        how,
        sections,
        _dialogues(run_dir),
    )
    further = [
        by_arm("by_turn", "turn", scores["by_turn"], arms),
        *curves(scores, _losses(run_dir)),
    ]
    page.write(run_dir.report / "report.html", further)
    write_text(run_dir.report / "adherence.svg", curve.alone)
    write_json(
        run_dir.report / "report.json",
        {"sentence": sentence, "facts": facts, "scores": scores, "export": exported},
    )
    write_text(run_dir.report / "report.md", _markdown(sentence, sections))
    print_result(
        _markdown(sentence, [s for s in sections if s.title in ("Over several turns", "Recall")])
    )


def headline(scores: dict[str, Any]) -> str:
    """The one sentence, of the figure that the recipe named."""
    primary = scores.get("primary", "last_five")
    table = {"recall": "recall", "unseen": "generalization"}.get(primary)
    if table and scores.get(table):
        rows = scores[table]
        last = max((row["at"] for row in rows), default=0) if primary == "recall" else None
        tuned, base = (
            [r for r in rows if r["arm"] == arm and last in (None, r["at"])]
            for arm in ("tuned", "base")
        )
        what = (
            f"still knows what it was told, asked in turn {last},"
            if last
            else "keeps instructions that were not trained"
        )
        return (
            f"The tuned model {what} in {_share(tuned)} of the answers, the base in {_share(base)}."
        )
    missing = f"What the report was to open with ({primary}) was not measured. " if table else ""
    rows = {row["arm"]: row for row in scores["last_five" if table else primary]}
    return (
        f"{missing}In {rows['tuned']['at']}, the tuned model keeps its instruction in {_share([rows['tuned']])} of the answers, "
        f"the base in {_share([rows['base']])}."
    )


def _share(rows: Sequence[dict[str, Any]]) -> str:
    n = sum(row["n"] for row in rows)
    return f"{sum(row['hits'] for row in rows) / n:.0%}" if n else "an unknown share"


def _arms(scores: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in scores["last_five"]))


def _drawn(scores: dict[str, Any]) -> list[str]:
    """The arms that curves show."""
    arms = _arms(scores)
    others = [arm for arm in arms if arm not in ("base", "tuned", "ceiling")]
    return [arm for arm in arms if arm not in others[_OTHERS:]]


def measured(scores: dict[str, Any], run_dir: RunDir) -> Iterator[ReportSection]:
    """What evaluation found, section by section; those without numbers are left out."""
    arms, drawn = _arms(scores), _drawn(scores)
    yield ReportSection(
        "Over several turns",
        "Strict: a reply obeys and is a reply."
        + (" Ceiling: the base, told in every turn." if "ceiling" in arms else ""),
        [overview(scores, arms)],
        remarks=_difference(scores),
    )
    if scores.get("recall"):
        yield _recall(scores, arms)
    yield ReportSection(
        "How long until the first broken answer",
        "Kaplan–Meier: the share of dialogues without a broken answer so far.",
        [
            Table(
                "survival",
                ["model", "half of the dialogues have broken it by turn"],
                [
                    [arm, scores["survival"][arm]["median"] or f"not by turn {scores['turns']}"]
                    for arm in arms
                ],
            )
        ],
        "survival",
        survival_curve({arm: scores["survival"][arm] for arm in drawn}, scores["turns"]),
    )
    yield ReportSection(
        "By instruction",
        "Instructions that were trained, all turns.",
        [
            by_arm("by_instruction", "instruction", scores["by_instruction"], arms),
            *(
                [by_arm("by_family", "family", scores["by_family"], arms)]
                if scores.get("by_family")
                else []
            ),
        ],
    )
    if scores.get("generalization"):
        names = {row["at"]: f"{row['at']} ({row['group']})" for row in scores["by_unseen"]}
        rows = [{**row, "at": names[row["at"]]} for row in scores["by_unseen"]]
        yield ReportSection(
            "Instructions that were not trained",
            "New values of trained kinds, and kinds that are new altogether.",
            [
                by_arm("generalization", "", scores["generalization"], arms),
                by_arm("by_unseen", "instruction", rows, arms),
            ],
        )
    if scores.get("change"):
        yield _change(scores["change"], drawn)
    if scores.get("leakage"):
        yield _leakage(scores, arms)
    if scores.get("single"):
        yield ReportSection(
            "One question, one instruction",
            "Every kind of instruction once, with the question, as in IFEval: what was lost?",
            [
                by_arm("single", "", scores["single"], arms),
                by_arm("single_by_kind", "kind", scores["single_by_kind"], arms),
            ],
        )
    if scores.get("judge"):
        yield _judged(scores["judge"], arms)
    if run_dir.attention.exists():
        yield ReportSection(
            "What the answers attend to",
            "One dialogue, each model in its own words: the strongest attention over all heads and layers, from each answer "
            "(down) to everything before it (across), in bins of eight tokens, as in Figure 10 of the paper; and the mean share "
            "that falls on the instruction's tokens.",
            figure="attention",
            picture=attention_picture(json.loads(run_dir.attention.read_text(encoding="utf-8"))),
        )


def _difference(scores: dict[str, Any]) -> list[str]:
    found = [
        f"{arm}: {100 * d['difference']:+.0f} points from the base, between {100 * d['low']:+.0f} and {100 * d['high']:+.0f} "
        f"(95 %, paired bootstrap over {d['dialogues']} dialogues)."
        for arm, d in scores["difference"].items()
        if d["difference"] is not None
    ]
    if scores["required_sample_size"]:
        found.append(
            f"To see a difference of 5 points at this rate, {scores['needed']['dialogues']} dialogues an arm are needed."
        )
    return found


def _recall(scores: dict[str, Any], arms: Sequence[str]) -> ReportSection:
    rows = scores["recall"]
    ours = by_arm("recall", "turn", rows, arms)
    paper = dict(zip(PROBED_TURNS, zip(*PAPER_RECALL.values(), strict=True), strict=True))
    beside = [[*row, *(f"{share:.0%}" for share in paper.get(row[0], ()))] for row in ours.rows]
    full = [row + [None] * (len(ours.columns) + len(PAPER_RECALL) - len(row)) for row in beside]
    return ReportSection(
        "Recall",
        "A name and a hobby are given in message 1 and asked for later, in branches that leave no trace. Beside it the "
        "paper's figures (Table 30, Llama 2, judged by people).",
        [
            Table("recall", [*ours.columns, *(f"paper, {name}" for name in PAPER_RECALL)], full),
            by_arm("recall_by_attribute", "attribute", scores["recall_by_attribute"], arms),
        ],
    )


def _change(change: dict[str, Any], drawn: Sequence[str]) -> ReportSection:
    rows = [
        [
            arm,
            c["before"],
            c["after"],
            c["old_after"],
            "never" if c["turns_to_switch"] is None else c["turns_to_switch"],
            f"{c['never']} of {c['dialogues']}",
        ]
        for arm, c in change.items()
    ]
    columns = [
        "",
        "old one, before",
        "new one, after",
        "old one, after",
        "turns to switch (median)",
        "never switched",
    ]
    how = (
        "At the dotted line the user says “From now on: …”. The old one should end, the new begin."
    )
    curve = change_curve({arm: found for arm, found in change.items() if arm in drawn}, drawn)
    return ReportSection(
        "When the instruction changes", how, [Table("change", columns, rows)], "change", curve
    )


def _leakage(scores: dict[str, Any], arms: Sequence[str]) -> ReportSection:
    tables = [by_arm("leakage", "a trained trait shows in", scores["leakage"], arms)]
    remarks = [
        f"{arm}: {name}, {n} times"
        for arm, traits in scores["leaked"].items()
        for name, n in traits.items()
    ]
    damage = scores.get("degradation")
    if damage and damage["perplexity"]:
        base = damage["perplexity"]["base"]
        rows = [
            [arm, value, f"{value / base - 1:+.1%}", damage["kl"][arm]]
            for arm, value in damage["perplexity"].items()
        ]
        tables.append(
            Table(
                "degradation",
                ["", "perplexity", "against the base", "KL from the base, nats a token"],
                rows,
            )
        )
        remarks.append(
            f"Perplexity and divergence on {damage['tokens']} tokens of the base's own answers in plain dialogues."
        )
    return ReportSection(
        "Leakage and damage",
        "Dialogues without any instruction: nothing that was trained should show, and the model "
        "should speak as before.",
        tables,
        remarks=remarks,
    )


def _judged(judge: dict[str, Any], arms: Sequence[str]) -> ReportSection:
    agreement = judge["agreement"]
    agreed = f"Where one can, it agreed in {format_cell(agreement) or 'no'} of replies."
    how = f"{_public(judge['model'])} judged what no program can check. {agreed}"
    remarks = [] if judge["reliable"] else ["Below 80 %: its verdicts are not reliable."]
    return ReportSection(
        "The judge",
        how,
        [by_arm("judge", "instruction", judge["scores"], arms)] if judge["scores"] else [],
        remarks=remarks,
    )


def _made(
    run_dir: RunDir, exported: dict[str, Any], facts: dict[str, str]
) -> Iterator[ReportSection]:
    """How the model was made: data, training, export, and the facts of the run."""
    acceptance = (
        json.loads(run_dir.acceptance.read_text(encoding="utf-8"))
        if run_dir.acceptance.exists()
        else {"answers": []}
    )
    rows = [
        [
            row["instruction"],
            row["way"],
            f"{row['accepted']} of {row['drawn']}",
            row["words"],
            ", ".join(f"{n} {reason}" for reason, n in row["rejected"].items()),
            row["example"],
        ]
        for row in acceptance["answers"]
    ]
    if rows:
        yield ReportSection(
            "Training data",
            "Answers that the teacher drew, and those that were accepted.",
            [
                Table(
                    "synthesis",
                    ["instruction", "way", "accepted", "words", "rejected", "for example"],
                    rows,
                )
            ],
            remarks=[
                f"{acceptance['too_common']} accepted answers were cut: the corpus held the same words often enough."
            ],
        )
    if losses := _losses(run_dir):
        yield _training(run_dir, losses)
    yield _exported(exported)
    yield ReportSection(
        "The run",
        "What it takes to do it again.",
        [Table("facts", ["fact", "value"], list(facts.items()))],
    )


def _training(run_dir: RunDir, losses: list[float]) -> ReportSection:
    """The loss, how often the instruction held at each checkpoint, and what the steps have cost."""
    tables, remarks = [], []
    if run_dir.validation.exists():
        rows = {
            row["step"]: row for _, row in read_jsonl(run_dir.validation)
        }  # an interrupted run measures a step again
        kept = [
            [step, asdict(wilson(row["kept"], row["answers"]))]
            for step, row in sorted(rows.items())
        ]
        tables = (
            [Table("validation", ["step", "held-out answers that keep the instruction"], kept)]
            if kept
            else []
        )
    if run_dir.speed.exists():
        speed = json.loads(run_dir.speed.read_text(encoding="utf-8"))
        learned, computed = (speed[name] / speed["seconds"] for name in ("learned", "computed"))
        padding = speed["padding"] / speed["computed"]
        remarks.append(
            f"{learned:.0f} learned tokens a second of {computed:.0f} that were computed, {padding:.1%} "
            f"of them padding; {speed['memory'] / 1e9:.1f} GB at the peak."
        )
    return ReportSection(
        "Training",
        "The loss of every step.",
        tables,
        remarks=remarks,
        figure="loss",
        picture=loss_curve(losses),
    )


def _losses(run_dir: RunDir) -> list[float]:
    """By step; none where training has left no log of them."""
    return json.loads(run_dir.losses.read_text(encoding="utf-8")) if run_dir.losses.exists() else []


def _exported(exported: dict[str, Any]) -> ReportSection:
    rows = []
    for name, row in exported["formats"].items():
        matrix, kept = row["lowest"]
        rows.append(
            [
                name,
                round(row["bytes"] / 1e6),
                row.get("kl_trained"),
                row.get("kl_f16"),
                f"{kept:.0%} {matrix}".strip(),
                row["adherence"],
            ]
        )
    merges = [
        f"Merged onto {onto} weights: {far:.4f} nats a token from the trained model"
        + (
            f", {exported['nll'][onto]:.4f} for the run's dialogues."
            if exported.get("nll")
            else "."
        )
        for onto, far in exported["merges"].items()
    ]
    warning = [
        f"{name} keeps less than 90 % of the adapter's change in {row['lowest'][0]}. A larger format keeps more."
        for name, row in exported["formats"].items()
        if row["lowest"][1] < 0.9
    ]
    columns = [
        "format",
        "MB",
        "nats a token from the trained model",
        "from F16",
        "adapter's change that is left (worst matrix)",
        "late adherence",
    ]
    return ReportSection(
        "Export",
        f"The adapter was trained on weights rounded to 4 bits, and merged onto the {exported['merge_onto']} ones.",
        [Table("export", columns, rows)],
        remarks=[*merges, *warning],
    )


def _export(recipe: Recipe, run_dir: RunDir, scores: dict[str, Any]) -> dict[str, Any]:
    """What `gatt export` measured, and beside each format how well it keeps its instruction."""
    late = {row["arm"]: row for row in scores["last_five"]}
    table: dict[str, Any] = json.loads(run_dir.exported.read_text(encoding="utf-8"))
    first = recipe.export.formats[0]
    for name, row in table["formats"].items():
        row["adherence"] = late.get("tuned" if name == first else f"tuned, {name}")
        row["lowest"] = min(row["retained"].items(), key=lambda kept: kept[1], default=("", 1.0))
    return table


def _dialogues(run_dir: RunDir) -> list[dict[str, Any]]:
    """Six dialogues, base beside tuned, the instruction above them."""
    replies = {
        (reply.arm, reply.dialogue, reply.turn): reply
        for _, row in read_jsonl(run_dir.replies)
        for reply in [Reply(**row)]
        if not reply.probe
    }
    found = []
    for pair in read_split(run_dir.pairs, "evaluate")[:6]:
        name = pair.dialogue.id
        rows = [
            {
                "turn": turn,
                "user": user,
                "replies": [replies["base", name, turn], replies["tuned", name, turn]],
            }
            for turn, user in enumerate(pair.dialogue.turns, 1)
            if ("tuned", name, turn) in replies
        ]
        found.append({"instruction": pair.student_instructions[0], "rows": rows})
    return found


def _facts(recipe: Recipe, run_dir: RunDir) -> dict[str, str]:
    _, example = next(read_jsonl(run_dir.examples))
    facts = {
        "base model": _public(recipe.model),
        "teacher": _public(example["teacher"]),
        "seed": str(recipe.seed),
        "learned": recipe.train.loss,
    }
    for stage in STAGES[:-1]:
        manifest = run_dir.manifest(stage)
        if manifest:
            facts[f"time of {stage}"] = f"{manifest['seconds']:.0f} s"
            facts["versions"] = ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())
            facts["commit"], facts["machine"] = manifest["commit"], manifest["platform"]
            facts |= {
                f"hash of {Path(name).name}": digest[:16]
                for name, digest in manifest["inputs"].items()
            }
    for name in recipe.export.formats:
        path = run_dir.tuned(name)
        facts[path.name] = f"{path.stat().st_size / 1e6:.0f} MB"
    return facts


def _public(model: str) -> str:
    """A model's name; of a place on this disk, which nobody else has, its last part."""
    return Path(model).name if Path(model).exists() else model


def _markdown(sentence: str, sections: Sequence[ReportSection]) -> str:
    """For a model card: the sentence, and the tables that a reader of it wants."""
    wanted = (
        "overview",
        "recall",
        "by_instruction",
        "generalization",
        "change",
        "leakage",
        "degradation",
        "single",
        "export",
        "facts",
    )
    parts = [f"**{sentence}**\n"]
    for section in sections:
        tables = [table for table in section.tables if table.name in wanted]
        if tables:
            parts += [f"### {section.title}\n", f"{section.how}\n", *map(markdown, tables)]
            parts += [f"{remark}\n" for remark in section.remarks]
    return "\n".join(parts)
