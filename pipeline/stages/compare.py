"""`gatt compare`: several runs in one table and one chart. Loads no model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from pipeline.console import log, print_result
from pipeline.errors import GattError
from pipeline.evaluation.rates import Rate, adherence, rates, wilson
from pipeline.evaluation.statistics import Difference, kaplan_meier, lifetimes, paired_bootstrap
from pipeline.files import read_jsonl, write_json, write_text
from pipeline.gatt.assignment import AssignedDialogue, read_split
from pipeline.gatt.constraints.registry import kind_of
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.records import Constraint, Reply
from pipeline.report.figures import adherence_curve
from pipeline.report.page import ReportPage, ReportSection
from pipeline.report.tables import Table, markdown
from pipeline.run_dir import RunDir

_SAME = (
    "evaluate.dialogues",
    "evaluate.turns",
    "evaluate.max_tokens",
    "evaluate.temperature",
    "dialogues.system",
    "dialogues.source",
    "instructions.pool",
)
"""Settings that must be equal for a difference between runs to mean something, with the dialogues themselves."""
_FURTHER = ("evaluate.suite_dialogues", "evaluate.suite_turns")
"""Settings of the further suites, on which adherence to the trained instructions does not depend."""
_CURVES = 8
_NAME = 32
"""Letters of a name that the chart has room for."""
_RESERVED = ("base", "tuned", "ceiling")
"""Names that have a meaning of their own in the chart."""


@dataclass(frozen=True)
class _Run:
    """One run: its recipe by dotted keys, its scores, and the replies on its evaluation dialogues, named with its seed.

    `tasks` are these dialogues with the wording of their instructions.
    """

    path: Path
    recipe: Recipe
    keys: dict[str, Any]
    scores: dict[str, Any]
    tasks: frozenset[Any]
    replies: list[Reply]
    bytes: dict[str, int]
    seconds: float | None


@dataclass(frozen=True)
class _Row:
    """What is compared: one arm of runs that differ in nothing but their seed."""

    name: str
    runs: list[_Run]
    arm: str
    format: str

    @property
    def replies(self) -> list[Reply]:
        """Of all seeds."""
        return [r for run in self.runs for r in run.replies if r.arm == self.arm]


def compare(paths: Sequence[Path], folder: Path) -> None:
    """Write `compare.html`, `.md` and `.json`, the chart and the table to `folder`, and print the table.

    Raises:
        GattError: a folder is no run, was not evaluated yet, lacks a file, or is named twice; or `folder` cannot be written.
    """
    places = Counter(path.resolve() for path in paths)
    if twice := [path for path, count in places.items() if count > 1]:
        raise GattError(f"{twice[0]} is named twice. Name each run once.")
    runs = [_open(path) for path in paths]
    _make(folder)
    different = [
        key
        for key in runs[0].keys
        if key != "seed" and len({repr(run.keys[key]) for run in runs}) > 1
    ]
    rows = list(_rows(runs, different))
    unlike = _unlike(runs)
    warnings = [*unlike, *_unlike_suites(runs), *_unlike_seeds(rows, paired=not unlike)]
    table = _table(rows, different, paired=not unlike)
    first = rows[0].runs[0]
    curves = _curve("base", [r for r in first.replies if r.arm == "base"])
    for row in rows[:_CURVES]:
        curves += _curve(row.name, row.replies)
    sentence = _sentence(rows)
    section = ReportSection(
        "Runs",
        "Strict adherence: a reply obeys and is a reply. Differences are from the first row, in points.",
        [table],
    )
    chart = adherence_curve(curves, max(run.scores["turns"] for run in runs))
    how = "Evaluation dialogues that training has not seen; bands are 95 % Wilson intervals. The base is that of the first run."
    if len(rows) > _CURVES:
        how += f" The chart shows the first {_CURVES} of {len(rows)} rows."
    ReportPage("GAtt: runs compared", sentence, " ".join(warnings), chart, how, [section]).write(
        folder / "compare.html"
    )
    told = "".join(f"> {warning}\n\n" for warning in warnings)
    write_text(folder / "compare.md", f"**{sentence}**\n\n{told}{markdown(table)}")
    write_json(
        folder / "compare.json",
        {"columns": table.columns, "rows": table.rows, "warnings": warnings},
    )
    for warning in warnings:
        log(f"compare: {warning}")
    print_result(markdown(table))
    print_result(f"{folder / 'compare.html'}")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise GattError(
            f"Cannot write in the folder {folder} ({error.strerror}). Choose another with --out."
        ) from error


def _sentence(rows: Sequence[_Row]) -> str:
    """From the lowest to the highest row: which differences mean something is told by the table."""
    lowest, highest = (pick(rows, key=lambda row: _late(row).value) for pick in (min, max))
    if len(rows) == 1:
        return f"In the last five turns, {highest.name} keeps its instruction in {_late(highest).value:.0%} of the answers."
    return (
        f"In the last five turns, between {_late(lowest).value:.0%} ({lowest.name}) and {_late(highest).value:.0%} "
        f"({highest.name}) of the answers keep the instruction."
    )


def _open(path: Path) -> _Run:
    if not (path / "recipe.toml").is_file():
        raise GattError(
            f"{path} is no run: it has no recipe.toml. Name folders that `gatt run --run FOLDER` has written."
        )
    run_dir = RunDir(path)
    recipe = load_recipe(path / "recipe.toml")
    if not run_dir.scores.exists():
        raise GattError(f"{path} was not evaluated yet. `gatt evaluate --run {path}` does it.")
    for file in (run_dir.pairs, run_dir.replies):
        if not file.exists():
            raise GattError(
                f"{path} was evaluated, but {file} is not there. Copy the whole run, or `gatt run --run {path}`."
            )
    pairs = read_split(run_dir.pairs, "evaluate")
    exported = (
        json.loads(run_dir.exported.read_text(encoding="utf-8"))["formats"]
        if run_dir.exported.exists()
        else {}
    )
    trained = run_dir.manifest("train")
    run = _Run(
        path,
        recipe,
        dict(_flat(recipe.model_dump(mode="json"))),
        json.loads(run_dir.scores.read_text(encoding="utf-8")),
        frozenset((pair.dialogue, tuple(pair.student_instructions)) for pair in pairs),
        _replies(run_dir, pairs, recipe.seed),
        {name: row["bytes"] for name, row in exported.items()},
        trained["seconds"] if trained else None,
    )
    if not any(
        r.arm == "tuned" and r.turn > run.scores["turns"] - 5 and r.finish != "context"
        for r in run.replies
    ):
        raise GattError(
            f"{path} has no late reply of a tuned model. `gatt evaluate --run {path}` measures one."
        )
    return run


def _replies(run_dir: RunDir, pairs: Sequence[AssignedDialogue], seed: int) -> list[Reply]:
    """Those on the evaluation dialogues, with the judge's verdict where no program could tell."""
    told = {pair.dialogue.id: pair for pair in pairs}
    log = read_jsonl(run_dir.judged) if run_dir.judged.exists() else ()
    verdicts = {(row["arm"], row["dialogue"], row["turn"]): bool(row["verdict"]) for _, row in log}
    found = []
    for _, row in read_jsonl(run_dir.replies):
        reply = Reply(**row)
        if reply.probe or reply.dialogue not in told:
            continue
        if any(
            kind_of(constraint).judged
            for constraint in told[reply.dialogue].constraints(reply.turn - 1)
        ):
            reply = replace(
                reply, obeys=verdicts.get((reply.arm, reply.dialogue, reply.turn), False)
            )
        found.append(replace(reply, dialogue=f"{seed}:{reply.dialogue}"))
    return found


def _flat(section: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _rows(runs: Sequence[_Run], different: Sequence[str]) -> Iterator[_Row]:
    """Runs that differ in their seed only are one row; each format of them that was measured is one.

    The same recipe and seed once more is a row of its own.
    """
    alike: dict[tuple[str, int], list[_Run]] = {}
    times: Counter[tuple[str, int]] = Counter()
    for run in runs:
        values = repr([run.keys[key] for key in different])
        times[values, run.recipe.seed] += 1
        alike.setdefault((values, times[values, run.recipe.seed]), []).append(run)
    groups = list(alike.values())
    for name, group in zip(_names(groups, different), groups, strict=True):
        settings = group[0].recipe
        # An adapter was measured in place of the files.
        formats = ("",) if settings.evaluate.adapter else settings.export.formats
        for n, format_name in enumerate(formats):
            arm = "tuned" if n == 0 else f"tuned, {format_name}"
            row = _Row(
                f"{name}, {format_name}" if len(formats) > 1 else name, group, arm, format_name
            )
            if _late(row).n:
                yield row


def _names(groups: Sequence[Sequence[_Run]], different: Sequence[str]) -> list[str]:
    """What differs, where that is short and tells the rows apart; else the names of the folders, else their paths."""
    firsts = [group[0] for group in groups]
    values = [
        ", ".join(f"{key.rpartition('.')[2]} {run.keys[key]}" for key in different)
        for run in firsts
    ]
    if all(0 < len(name) <= _NAME for name in values) and len(set(values)) == len(values):
        return values
    folders = [run.path.resolve().name for run in firsts]
    names = folders if len(set(folders)) == len(folders) else [str(run.path) for run in firsts]
    return [f"run {name}" if name in _RESERVED else name for name in names]


def _short(value: Any) -> str:
    """A value for a cell: constraints by their names, a long text by both of its ends."""
    if isinstance(value, list):
        value = ", ".join(
            Constraint(**its).name if isinstance(its, dict) else str(its) for its in value
        )
    text = str(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


def _unlike(runs: Sequence[_Run]) -> list[str]:
    """Why the figures are not of the same thing."""
    found = [
        f"{key} differs between the runs: their figures are not of the same task."
        for key in _SAME
        if len({repr(run.keys[key]) for run in runs}) > 1
    ]
    if (
        any(kind_of(c).judged for c in runs[0].recipe.instructions.pool)
        and len({run.recipe.evaluate.judge for run in runs}) > 1
    ):
        found.append("The runs were judged by different models.")
    by_seed: dict[int, set[frozenset[Any]]] = {}
    for run in runs:
        by_seed.setdefault(run.recipe.seed, set()).add(run.tasks)
    if any(len(sets) > 1 for sets in by_seed.values()):
        found.append("The runs were evaluated on different dialogues or instructions.")
    if found:
        found.append("No difference between them is reckoned.")
    return found


def _unlike_suites(runs: Sequence[_Run]) -> list[str]:
    """A warning where recall, leakage and perplexity are of other dialogues."""
    differ = [key for key in _FURTHER if len({run.keys[key] for run in runs}) > 1]
    return [
        f"{key} differs between the runs: recall, leakage and perplexity are not of the same dialogues."
        for key in differ
    ]


def _unlike_seeds(rows: Sequence[_Row], paired: bool) -> list[str]:
    """A warning where rows have other seeds: each seed holds out dialogues of its own."""
    if len({frozenset(run.recipe.seed for run in row.runs) for row in rows}) == 1:
        return []
    warning = "Not all rows have the same seeds, and each seed has dialogues of its own"
    return [f"{warning}: differences are over common seeds only." if paired else f"{warning}."]


def _table(rows: Sequence[_Row], different: Sequence[str], paired: bool) -> Table:
    # Beside the name, so that a phone shows both.
    columns: dict[str, list[Any]] = {
        "run": [row.name for row in rows],
        "last five turns": [asdict(_late(row)) for row in rows],
    }
    if any(len(row.runs) > 1 for row in rows):
        columns["seeds"] = [len(row.runs) for row in rows]
        columns["lowest and highest seed"] = [
            _spread(row) if len(row.runs) > 1 else None for row in rows
        ]
    columns |= {key: [_short(row.runs[0].keys[key]) for row in rows] for key in different}
    if paired:
        apart = [None, *(_difference(rows[0], row) for row in rows[1:])]
        columns["difference, points"] = [
            round(100 * its.difference, 1) if its else None for its in apart
        ]
        columns["difference between (95 %)"] = [
            f"{100 * d.low:+.0f} to {100 * d.high:+.0f}" if d else None for d in apart
        ]
    columns["all turns but the first"] = [
        asdict(_rate([r for r in row.replies if r.turn > 1])) for row in rows
    ]
    columns["obeys, good answer or not"] = [asdict(_late(row, raw=True)) for row in rows]
    columns["half broken by turn"] = [
        kaplan_meier(lifetimes(row.replies).values()).median or "never" for row in rows
    ]
    columns["recall, last probe"] = [_recall(row) for row in rows]
    columns["leakage"] = [_pooled(row, "leakage") for row in rows]
    columns["perplexity, % above the base"] = [_damage(row) for row in rows]
    columns["MB"] = [
        round(row.runs[0].bytes[row.format] / 1e6) if row.format in row.runs[0].bytes else None
        for row in rows
    ]
    seconds = [[run.seconds for run in row.runs if run.seconds is not None] for row in rows]
    columns["training, s"] = [round(sum(its) / len(its)) if its else None for its in seconds]
    kept = {
        name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)
    }
    return Table("compare", list(kept), [list(cells) for cells in zip(*kept.values(), strict=True)])


def _curve(name: str, replies: Sequence[Reply]) -> list[dict[str, Any]]:
    found = adherence(sorted(replies, key=lambda r: r.turn), lambda r: r.turn)
    return [{"arm": name, "at": turn, **asdict(rate)} for turn, rate in found.items()]


def _rate(replies: Sequence[Reply], raw: bool = False) -> Rate:
    return rates(replies, lambda r: "", lambda r: r.obeys if raw else r.adherent).get("") or wilson(
        0, 0
    )


def _late(row: _Row, raw: bool = False, runs: Sequence[_Run] = ()) -> Rate:
    """Adherence in the last five turns, over all seeds or those of `runs`."""
    return _rate([r for run in runs or row.runs for r in _last_five(run, row.arm)], raw)


def _last_five(run: _Run, arm: str) -> list[Reply]:
    return [r for r in run.replies if r.arm == arm and r.turn > run.scores["turns"] - 5]


def _spread(row: _Row) -> str:
    found = [_late(row, runs=[run]).value for run in row.runs]
    return f"{min(found):.0%} to {max(found):.0%}"


def _difference(first: _Row, row: _Row) -> Difference | None:
    """From the first row, over the dialogues that both have; None where there is none."""
    ours, theirs = ([r for run in it.runs for r in _last_five(run, it.arm)] for it in (row, first))
    found = paired_bootstrap(theirs, ours)
    return found if found.dialogues else None


def _pooled(row: _Row, table: str, at: Any = None) -> dict[str, Any] | None:
    """A rate of the scores over all seeds."""
    found = [
        r
        for run in row.runs
        for r in run.scores.get(table) or ()
        if r["arm"] == row.arm and at in (None, r["at"])
    ]
    return (
        asdict(wilson(sum(r["hits"] for r in found), sum(r["n"] for r in found))) if found else None
    )


def _recall(row: _Row) -> dict[str, Any] | None:
    probed = [r["at"] for run in row.runs for r in run.scores.get("recall") or ()]
    return _pooled(row, "recall", max(probed)) if probed else None


def _damage(row: _Row) -> float | None:
    found = [
        run.scores["degradation"]["perplexity"] for run in row.runs if run.scores.get("degradation")
    ]
    shares = [its[row.arm] / its["base"] - 1 for its in found if row.arm in its]
    return round(100 * sum(shares) / len(shares), 1) if shares else None
