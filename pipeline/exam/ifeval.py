"""How our checks agree with IFEval's verifiers (Zhou et al. 2023) on the same texts.

For the kinds that both have; `pip install "gatt[ifeval]"`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.exam.tasks import ExamTask
from pipeline.gatt.constraints.language import LANGUAGES
from pipeline.gatt.constraints.registry import edit, editable, obeys, prepare
from pipeline.records import Constraint

_MAX_TEXTS = 300
"""Replies for each constraint, evenly over all; language detection takes milliseconds each."""
_NAMES: dict[str, str] = {
    "uppercase": "change_case:english_capital",
    "lowercase": "change_case:english_lowercase",
    "quotes": "startend:quotation",
    "postscript": "detectable_content:postscript",
    "bold": "detectable_format:number_highlighted_sections",
    "closing": "startend:end_checker",
    "language": "language:response_language",
    "hobby": "keywords:existence",
    "address": "keywords:existence",
}
"""The verifier of each kind of constraint that IFEval has, too."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often a check of ours and IFEval's pass the same texts."""

    kind: str
    verifier: str
    texts: int
    both: int
    only_ours: int
    only_ifeval: int

    @property
    def share(self) -> float:
        """Return the share of the texts on which both say the same."""
        return 1 - (self.only_ours + self.only_ifeval) / self.texts


def require_verifiers() -> None:
    """Check that the verifiers are installed.

    Raises:
        GattError: they are not.
    """
    prepare(Constraint("ifeval", "punctuation:no_comma"))


def agreements(tasks: Iterable[ExamTask], replies: Sequence[str]) -> list[Agreement]:
    """Return the agreement of each kind over its values in the exam.

    The texts are the replies, and where there is an edit that makes a reply obey, those too.
    """
    step = max(1, len(replies) // _MAX_TEXTS)
    texts = list(dict.fromkeys(text for text in replies[::step] if text.strip()))
    constraints = dict.fromkeys(c for task in tasks for c in task.assigned.constraints(0))
    rows: dict[str, Agreement] = {}
    for constraint in constraints:
        if constraint.kind in _NAMES and texts:
            row = _compare(constraint, texts)
            rows[row.kind] = _sum(rows[row.kind], row) if row.kind in rows else row
    return list(rows.values())


def _compare(constraint: Constraint, texts: Sequence[str]) -> Agreement:
    obedient = [edit((constraint,), t) for t in texts] if editable((constraint,)) else []
    verifier = _verifier(constraint)
    pairs = [(obeys((constraint,), text), obeys((verifier,), text)) for text in (*texts, *obedient)]
    return Agreement(
        constraint.kind,
        _NAMES[constraint.kind],
        len(pairs),
        pairs.count((True, True)),
        pairs.count((True, False)),
        pairs.count((False, True)),
    )


def _verifier(constraint: Constraint) -> Constraint:
    """Return the check by IFEval's verifier that asks for the same."""
    arguments: dict[str, object] = {}
    match constraint.kind:
        case "postscript":
            arguments = {"postscript_marker": "P.S."}
        case "bold":
            arguments = {"num_highlights": 1}
        case "closing":
            arguments = {"end_phrase": constraint.value}
        case "language":
            arguments = {"language": LANGUAGES[constraint.value]}
        case "hobby" | "address":
            arguments = {"keywords": [constraint.value]}
    return Constraint("ifeval", f"{_NAMES[constraint.kind]} {json.dumps(arguments)}")


def _sum(first: Agreement, second: Agreement) -> Agreement:
    return Agreement(
        first.kind,
        first.verifier,
        first.texts + second.texts,
        first.both + second.both,
        first.only_ours + second.only_ours,
        first.only_ifeval + second.only_ifeval,
    )


def agreement_table(rows: Sequence[Agreement]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of the table that the command prints."""
    columns = ["kind", "IFEval's verifier", "texts", "agree", "both", "only ours", "only IFEval"]
    return columns, [
        [
            row.kind,
            row.verifier,
            str(row.texts),
            f"{row.share:.1%}",
            *map(str, (row.both, row.only_ours, row.only_ifeval)),
        ]
        for row in rows
    ]
