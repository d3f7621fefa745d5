"""`gatt report`: reads the numbers of a run, renders them. Loads no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.console import out
from pipeline.evaluation.rates import wilson
from pipeline.evaluation.suites import PAPER_RECALL, PROBED_TURNS
from pipeline.files import read_jsonl, write_json, write_text
from pipeline.gatt.assignment import read_pairs
from pipeline.recipe import Recipe
from pipeline.records import Reply
from pipeline.report.figures import (
    adherence_curve,
    attention_picture,
    change_curve,
    loss_curve,
    survival_curve,
)
from pipeline.report.page import Page, Section
from pipeline.report.tables import Table, by_arm, curves, markdown, overview, shown
from pipeline.run_dir import RunDir

_OTHERS = 4
"""Arms beside base, tuned and ceiling that a curve has room for."""
_STAGES = ("instructions", "synthesize", "train", "export", "evaluate")


def run(recipe: Recipe, rundir: RunDir) -> None:
    """Write `report/report.html`, `.json` and `.md`, the figures and the tables, and print the summary."""
    scores = json.loads(rundir.scores.read_text(encoding="utf-8"))
    facts = _facts(recipe, rundir)
    exported = _export(recipe, rundir, scores)
    sentence = headline(scores)
    arms, drawn = _arms(scores), _drawn(scores)
    curve = adherence_curve(
        [row for arm in drawn for row in scores["by_turn"] if row["arm"] == arm], scores["turns"]
    )
    sections = [*measured(scores, rundir), *_made(rundir, exported, facts)]
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
    page = Page(
        f"GAtt report: {_public(recipe.model)}",
        sentence,
        warning,
        curve,
        how,
        sections,
        _dialogues(rundir),
    )
    further = [by_arm("by_turn", "turn", scores["by_turn"], arms), *curves(scores, _losses(rundir))]
    page.write(rundir.report / "report.html", further)
    write_text(rundir.report / "adherence.svg", curve.alone)
    write_json(
        rundir.report / "report.json",
        {"sentence": sentence, "facts": facts, "scores": scores, "export": exported},
    )
    write_text(rundir.report / "report.md", _markdown(sentence, sections))
    out(_markdown(sentence, [s for s in sections if s.title in ("Over several turns", "Recall")]))


def headline(scores: dict[str, Any]) -> str:
    """The one sentence, of the figure that the recipe named."""
    primary = scores.get("primary", "late")
    table = {"recall": "recall", "unseen": "generalisation"}.get(primary)
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
    rows = {row["arm"]: row for row in scores["late" if table else primary]}
    return (
        f"{missing}In {rows['tuned']['at']}, the tuned model keeps its instruction in {_share([rows['tuned']])} of the answers, "
        f"the base in {_share([rows['base']])}."
    )


def _share(rows: Sequence[dict[str, Any]]) -> str:
    n = sum(row["n"] for row in rows)
    return f"{sum(row['hits'] for row in rows) / n:.0%}" if n else "an unknown share"


def _arms(scores: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in scores["late"]))


def _drawn(scores: dict[str, Any]) -> list[str]:
    """The arms that curves show."""
    arms = _arms(scores)
    others = [arm for arm in arms if arm not in ("base", "tuned", "ceiling")]
    return [arm for arm in arms if arm not in others[_OTHERS:]]


def measured(scores: dict[str, Any], rundir: RunDir) -> Iterator[Section]:
    """What evaluation found, section by section; those without numbers are left out."""
    arms, drawn = _arms(scores), _drawn(scores)
    yield Section(
        "Over several turns",
        "Strict: a reply obeys and is a reply."
        + (" Ceiling: the base, told in every turn." if "ceiling" in arms else ""),
        [overview(scores, arms)],
        remarks=_difference(scores),
    )
    if scores.get("recall"):
        yield _recall(scores, arms)
    yield Section(
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
    yield Section(
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
    if scores.get("generalisation"):
        names = {row["at"]: f"{row['at']} ({row['group']})" for row in scores["by_unseen"]}
        rows = [{**row, "at": names[row["at"]]} for row in scores["by_unseen"]]
        yield Section(
            "Instructions that were not trained",
            "New values of trained kinds, and kinds that are new altogether.",
            [
                by_arm("generalisation", "", scores["generalisation"], arms),
                by_arm("by_unseen", "instruction", rows, arms),
            ],
        )
    if scores.get("change"):
        yield _change(scores["change"], drawn)
    if scores.get("leakage"):
        yield _leakage(scores, arms)
    if scores.get("single"):
        yield Section(
            "One question, one instruction",
            "Every kind of instruction once, with the question, as in IFEval: what was lost?",
            [
                by_arm("single", "", scores["single"], arms),
                by_arm("single_by_kind", "kind", scores["single_by_kind"], arms),
            ],
        )
    if scores.get("judge"):
        yield _judged(scores["judge"], arms)
    if rundir.attention.exists():
        yield Section(
            "What the answers attend to",
            "One dialogue, each model in its own words: the strongest attention over all heads and layers, from each answer "
            "(down) to everything before it (across), in bins of eight tokens, as in Figure 10 of the paper; and the mean share "
            "that falls on the instruction's tokens.",
            figure="attention",
            picture=attention_picture(json.loads(rundir.attention.read_text(encoding="utf-8"))),
        )


def _difference(scores: dict[str, Any]) -> list[str]:
    found = [
        f"{arm}: {100 * d['difference']:+.0f} points from the base, between {100 * d['low']:+.0f} and {100 * d['high']:+.0f} "
        f"(95 %, paired bootstrap over {d['dialogues']} dialogues)."
        for arm, d in scores["difference"].items()
        if d["difference"] is not None
    ]
    if scores["needed"]:
        found.append(
            f"To see a difference of 5 points at this rate, {scores['needed']['dialogues']} dialogues an arm are needed."
        )
    return found


def _recall(scores: dict[str, Any], arms: Sequence[str]) -> Section:
    rows = scores["recall"]
    ours = by_arm("recall", "turn", rows, arms)
    paper = dict(zip(PROBED_TURNS, zip(*PAPER_RECALL.values(), strict=True), strict=True))
    beside = [[*row, *(f"{share:.0%}" for share in paper.get(row[0], ()))] for row in ours.rows]
    full = [row + [None] * (len(ours.columns) + len(PAPER_RECALL) - len(row)) for row in beside]
    return Section(
        "Recall",
        "A name and a hobby are given in message 1 and asked for later, in branches that leave no trace. Beside it the "
        "paper's figures (Table 30, Llama 2, judged by people).",
        [
            Table("recall", [*ours.columns, *(f"paper, {name}" for name in PAPER_RECALL)], full),
            by_arm("recall_by_attribute", "attribute", scores["recall_by_attribute"], arms),
        ],
    )


def _change(change: dict[str, Any], drawn: Sequence[str]) -> Section:
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
    return Section(
        "When the instruction changes", how, [Table("change", columns, rows)], "change", curve
    )


def _leakage(scores: dict[str, Any], arms: Sequence[str]) -> Section:
    tables = [by_arm("leakage", "a trained trait shows in", scores["leakage"], arms)]
    remarks = [
        f"{arm}: {name}, {n} times"
        for arm, traits in scores["leaked"].items()
        for name, n in traits.items()
    ]
    damage = scores.get("damage")
    if damage and damage["perplexity"]:
        base = damage["perplexity"]["base"]
        rows = [
            [arm, value, f"{value / base - 1:+.1%}", damage["kl"][arm]]
            for arm, value in damage["perplexity"].items()
        ]
        tables.append(
            Table(
                "damage",
                ["", "perplexity", "against the base", "KL from the base, nats a token"],
                rows,
            )
        )
        remarks.append(
            f"Perplexity and divergence on {damage['tokens']} tokens of the base's own answers in plain dialogues."
        )
    return Section(
        "Leakage and damage",
        "Dialogues without any instruction: nothing that was trained should show, and the model "
        "should speak as before.",
        tables,
        remarks=remarks,
    )


def _judged(judge: dict[str, Any], arms: Sequence[str]) -> Section:
    agreement = judge["agreement"]
    agreed = f"Where one can, it agreed in {shown(agreement) or 'no'} of replies."
    how = f"{_public(judge['model'])} judged what no program can check. {agreed}"
    remarks = [] if judge["reliable"] else ["Below 80 %: its verdicts are not reliable."]
    return Section(
        "The judge",
        how,
        [by_arm("judge", "instruction", judge["scores"], arms)] if judge["scores"] else [],
        remarks=remarks,
    )


def _made(rundir: RunDir, exported: dict[str, Any], facts: dict[str, str]) -> Iterator[Section]:
    """How the model was made: data, training, export, and the facts of the run."""
    acceptance = (
        json.loads(rundir.acceptance.read_text(encoding="utf-8"))
        if rundir.acceptance.exists()
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
        yield Section(
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
    if losses := _losses(rundir):
        yield _training(rundir, losses)
    yield _exported(exported)
    yield Section(
        "The run",
        "What it takes to do it again.",
        [Table("facts", ["fact", "value"], list(facts.items()))],
    )


def _training(rundir: RunDir, losses: list[float]) -> Section:
    """The loss, how often the instruction held at each checkpoint, and what the steps have cost."""
    tables, remarks = [], []
    if rundir.validation.exists():
        rows = {
            row["step"]: row for _, row in read_jsonl(rundir.validation)
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
    if rundir.speed.exists():
        speed = json.loads(rundir.speed.read_text(encoding="utf-8"))
        learned, computed = (speed[name] / speed["seconds"] for name in ("learned", "computed"))
        padding = speed["padding"] / speed["computed"]
        remarks.append(
            f"{learned:.0f} learned tokens a second of {computed:.0f} that were computed, {padding:.1%} "
            f"of them padding; {speed['memory'] / 1e9:.1f} GB at the peak."
        )
    return Section(
        "Training",
        "The loss of every step.",
        tables,
        remarks=remarks,
        figure="loss",
        picture=loss_curve(losses),
    )


def _losses(rundir: RunDir) -> list[float]:
    """By step; none where training has left no log of them."""
    return json.loads(rundir.losses.read_text(encoding="utf-8")) if rundir.losses.exists() else []


def _exported(exported: dict[str, Any]) -> Section:
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
            f", {exported['surprise'][onto]:.4f} for the run's dialogues."
            if exported.get("surprise")
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
    return Section(
        "Export",
        f"The adapter was trained on weights rounded to 4 bits, and merged onto the {exported['merge_onto']} ones.",
        [Table("export", columns, rows)],
        remarks=[*merges, *warning],
    )


def _export(recipe: Recipe, rundir: RunDir, scores: dict[str, Any]) -> dict[str, Any]:
    """What `gatt export` measured, and beside each format how well it keeps its instruction."""
    late = {row["arm"]: row for row in scores["late"]}
    table: dict[str, Any] = json.loads(rundir.exported.read_text(encoding="utf-8"))
    first = recipe.export.formats[0]
    for name, row in table["formats"].items():
        row["adherence"] = late.get("tuned" if name == first else f"tuned, {name}")
        row["lowest"] = min(row["retained"].items(), key=lambda kept: kept[1], default=("", 1.0))
    return table


def _dialogues(rundir: RunDir) -> list[dict[str, Any]]:
    """Six dialogues, base beside tuned, the instruction above them."""
    replies = {
        (reply.arm, reply.dialogue, reply.turn): reply
        for _, row in read_jsonl(rundir.replies)
        for reply in [Reply(**row)]
        if not reply.probe
    }
    found = []
    for pair in read_pairs(rundir.pairs, "evaluate")[:6]:
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
        found.append({"instruction": pair.taught[0], "rows": rows})
    return found


def _facts(recipe: Recipe, rundir: RunDir) -> dict[str, str]:
    _, example = next(read_jsonl(rundir.examples))
    facts = {
        "base model": _public(recipe.model),
        "teacher": _public(example["teacher"]),
        "seed": str(recipe.seed),
        "learned": recipe.train.loss,
    }
    for stage in _STAGES:
        manifest = rundir.manifest(stage)
        if manifest:
            facts[f"time of {stage}"] = f"{manifest['seconds']:.0f} s"
            facts["versions"] = ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())
            facts["commit"], facts["machine"] = manifest["commit"], manifest["platform"]
            facts |= {
                f"hash of {Path(name).name}": digest[:16]
                for name, digest in manifest["inputs"].items()
            }
    for name in recipe.export.formats:
        path = rundir.tuned(name)
        facts[path.name] = f"{path.stat().st_size / 1e6:.0f} MB"
    return facts


def _public(model: str) -> str:
    """A model's name; of a place on this disk, which nobody else has, its last part."""
    return Path(model).name if Path(model).exists() else model


def _markdown(sentence: str, sections: Sequence[Section]) -> str:
    """For a model card: the sentence, and the tables that a reader of it wants."""
    wanted = (
        "overview",
        "recall",
        "by_instruction",
        "generalisation",
        "change",
        "leakage",
        "damage",
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
