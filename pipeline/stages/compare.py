"""`gatt compare`: several runs in one table and one chart. Loads no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Recipe, load_recipe
from pipeline.console import note, out
from pipeline.errors import GattError
from pipeline.figures import adherence_curve
from pipeline.files import read_jsonl, write_json, write_text
from pipeline.gatt.metrics import adherence, rates, wilson
from pipeline.gatt.statistics import kaplan_meier, lifetimes, paired_bootstrap
from pipeline.page import Page, Section
from pipeline.pairs import read_pairs
from pipeline.records import Reply
from pipeline.rundir import RunDir
from pipeline.tables import Table, markdown

_SAME = ("evaluate.turns", "evaluate.max_tokens", "evaluate.temperature", "dialogues.system", "dialogues.source")
"""Settings that must be equal for a difference between runs to mean something, with the dialogues themselves."""


@dataclass(frozen=True)
class _Run:
    """One run: its recipe by dotted keys, its scores, and the replies on its evaluation dialogues, named with its seed."""

    path: Path
    recipe: Recipe
    keys: dict[str, Any]
    scores: dict[str, Any]
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
        GattError: a folder is no run, or a run that was not evaluated yet.
    """
    runs = [_open(path) for path in paths]
    different = [key for key in runs[0].keys if key != "seed" and len({repr(run.keys[key]) for run in runs}) > 1]
    rows = list(_rows(runs, different))
    warnings = _warnings(runs)
    table = _table(rows, different, paired=not warnings)
    curves = [row for run in rows[:1] for row in _curve("base", [r for r in run.runs[0].replies if r.arm == "base"])]
    for row in rows:
        curves += _curve(row.name, row.replies)
    turns = max(row["at"] for row in curves)
    best = max(rows, key=lambda row: _late(row).value)
    sentence = f"{best.name} keeps its instruction best: in {_late(best).value:.0%} of the answers of the last five turns."
    section = Section("Runs", "Strict adherence: a reply obeys and is a reply. Differences are from the first row, in points.",
                      [table], remarks=warnings)  # fmt: skip
    chart = adherence_curve(curves, turns)
    how = "Evaluation dialogues that training has not seen; bands are 95 % Wilson intervals."
    Page("GAtt: runs compared", sentence, " ".join(warnings), chart, how, [section]).write(folder / "compare.html")
    write_text(folder / "compare.md", f"**{sentence}**\n\n{markdown(table)}")
    write_json(folder / "compare.json", {"columns": table.columns, "rows": table.rows, "warnings": warnings})
    for warning in warnings:
        note(f"compare: {warning}")
    out(markdown(table))
    out(f"{folder / 'compare.html'}")


def _open(path: Path) -> _Run:
    if not (path / "recipe.toml").is_file():
        raise GattError(f"{path} is no run: it has no recipe.toml. Name folders that `gatt run --run FOLDER` has written.")
    rundir = RunDir(path)
    recipe = load_recipe(path / "recipe.toml")
    if not rundir.scores.exists():
        raise GattError(f"{path} was not evaluated yet. `gatt evaluate --run {path}` does it.")
    tested = {pair.dialogue.id for pair in read_pairs(rundir.pairs, "evaluate")}
    replies = [
        replace(reply, dialogue=f"{recipe.seed}:{reply.dialogue}")
        for _, row in read_jsonl(rundir.replies) for reply in [Reply(**row)] if not reply.probe and reply.dialogue in tested
    ]  # fmt: skip
    exported = json.loads(rundir.exported.read_text(encoding="utf-8"))["formats"] if rundir.exported.exists() else {}
    trained = rundir.manifest("train")
    return _Run(
        path, recipe, dict(_flat(recipe.model_dump(mode="json"))), json.loads(rundir.scores.read_text(encoding="utf-8")), replies,
        {name: row["bytes"] for name, row in exported.items()}, trained["seconds"] if trained else None,
    )  # fmt: skip


def _flat(section: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _rows(runs: Sequence[_Run], different: Sequence[str]) -> Iterator[_Row]:
    """Runs that differ in their seed only are one row; each exported format of them is one."""
    alike: dict[str, list[_Run]] = {}
    for run in runs:
        alike.setdefault(repr([run.keys[key] for key in different]), []).append(run)
    for group in alike.values():
        first = group[0]
        name = ", ".join(f"{key.rpartition('.')[2]} {_short(first.keys[key])}" for key in different) or first.path.name
        formats = first.recipe.export.formats
        for n, format_name in enumerate(formats):
            arm = "tuned" if n == 0 else f"tuned, {format_name}"
            yield _Row(f"{name}, {format_name}" if len(formats) > 1 else name, group, arm, format_name)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def _warnings(runs: Sequence[_Run]) -> list[str]:
    """Why the figures may not be of the same thing."""
    found = [f"{key} differs between the runs: their figures are not of the same task." for key in _SAME
             if len({repr(run.keys[key]) for run in runs}) > 1]  # fmt: skip
    by_seed: dict[int, set[frozenset[str]]] = {}
    for run in runs:
        by_seed.setdefault(run.recipe.seed, set()).add(frozenset(r.dialogue for r in run.replies))
    if any(len(sets) > 1 for sets in by_seed.values()):
        found.append("The runs were evaluated on different dialogues: no difference between them is reckoned.")
    return found


def _table(rows: Sequence[_Row], different: Sequence[str], paired: bool) -> Table:
    columns: dict[str, list[Any]] = {"run": [row.name for row in rows]}
    if any(len(row.runs) > 1 for row in rows):
        columns["seeds"] = [len(row.runs) for row in rows]
        columns["lowest and highest seed"] = [_spread(row) for row in rows]
    columns |= {key: [_short(row.runs[0].keys[key]) for row in rows] for key in different}
    columns["last five turns"] = [asdict(_late(row)) for row in rows]
    if paired:
        columns["difference"] = ["", *(_difference(rows[0], row) for row in rows[1:])]
    columns["obeys, good answer or not"] = [asdict(_late(row, raw=True)) for row in rows]
    columns["half broken by turn"] = [kaplan_meier(lifetimes(row.replies).values()).median or "never" for row in rows]
    columns["recall, last probe"] = [_recall(row) for row in rows]
    columns["leakage"] = [_pooled(row, "leakage") for row in rows]
    columns["perplexity"] = [_damage(row) for row in rows]
    columns["MB"] = [round(row.runs[0].bytes[row.format] / 1e6) if row.format in row.runs[0].bytes else None for row in rows]
    seconds = [[run.seconds for run in row.runs if run.seconds is not None] for row in rows]
    columns["training, s"] = [round(sum(its) / len(its)) if its else None for its in seconds]
    kept = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    return Table("compare", list(kept), [list(cells) for cells in zip(*kept.values(), strict=True)])


def _curve(name: str, replies: Sequence[Reply]) -> list[dict[str, Any]]:
    found = adherence(sorted(replies, key=lambda r: r.turn), lambda r: r.turn)
    return [{"arm": name, "at": turn, **asdict(rate)} for turn, rate in found.items()]


def _late(row: _Row, raw: bool = False, runs: Sequence[_Run] = ()) -> Any:
    """Adherence in the last five turns, over all seeds or those of `runs`."""
    late = [r for run in runs or row.runs for r in _last_five(run, row.arm)]
    return rates(late, lambda r: "", lambda r: r.obeys if raw else r.adherent).get("") or wilson(0, 0)


def _last_five(run: _Run, arm: str) -> list[Reply]:
    return [r for r in run.replies if r.arm == arm and r.turn > run.scores["turns"] - 5]


def _spread(row: _Row) -> str:
    found = [_late(row, runs=[run]).value for run in row.runs]
    return f"{min(found):.0%} to {max(found):.0%}"


def _difference(first: _Row, row: _Row) -> str:
    ours, theirs = ([r for run in it.runs for r in _last_five(run, it.arm)] for it in (row, first))
    found = paired_bootstrap(theirs, ours)
    if not found.dialogues:
        return "no common dialogue"
    return f"{100 * found.difference:+.0f} ({100 * found.low:+.0f} to {100 * found.high:+.0f})"


def _pooled(row: _Row, table: str, at: Any = None) -> dict[str, Any] | None:
    """A rate of the scores over all seeds."""
    found = [r for run in row.runs for r in run.scores.get(table) or () if r["arm"] == row.arm and at in (None, r["at"])]
    return asdict(wilson(sum(r["hits"] for r in found), sum(r["n"] for r in found))) if found else None


def _recall(row: _Row) -> dict[str, Any] | None:
    probed = [r["at"] for run in row.runs for r in run.scores.get("recall") or ()]
    return _pooled(row, "recall", max(probed)) if probed else None


def _damage(row: _Row) -> str | None:
    found = [run.scores["damage"]["perplexity"] for run in row.runs if run.scores.get("damage")]
    shares = [its[row.arm] / its["base"] - 1 for its in found if row.arm in its]
    return f"{sum(shares) / len(shares):+.1%}" if shares else None
