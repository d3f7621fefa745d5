"""The checks against answers that were labeled by hand, from the wording of the instruction alone (data/labeled.jsonl)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.gatt.constraints.registry import KINDS, obeys
from pipeline.gatt.instructions import render_instruction
from pipeline.gatt.quality import find_defect
from pipeline.records import Constraint

LOWEST_AGREEMENT = 0.98
ROWS: list[dict[str, Any]] = [
    json.loads(line)
    for line in (Path(__file__).parent / "data/labeled.jsonl").read_text().splitlines()
]
OF_KINDS = [row for row in ROWS if "kind" in row]
OF_FLAWS = [row for row in ROWS if "kind" not in row]


def _disagreement(row: dict[str, Any]) -> str:
    """What is wrong with the check, or ""."""
    if "kind" in row:
        asked = (Constraint(row["kind"], row["value"]),)
        return (
            ""
            if obeys(asked, row["answer"]) == row["obeys"]
            else f"{render_instruction(asked).text} obeys is {row['obeys']}"
        )
    found = find_defect(row["answer"], row["earlier"], row["demanded"])
    return "" if (not found) == row["good"] else f"flaw is {found!r}, good is {row['good']}"


def test_the_checks_agree_with_the_labels() -> None:
    wrong = [
        f"{said} ({row['why']}): {row['answer']!r}" for row in ROWS if (said := _disagreement(row))
    ]
    agreement = 1 - len(wrong) / len(ROWS)
    assert agreement >= LOWEST_AGREEMENT, (
        f"Agreement {agreement:.4f} over {len(ROWS)} answers. Not agreed:\n" + "\n".join(wrong)
    )


def test_every_kind_is_labeled_both_ways() -> None:
    count = Counter(row["kind"] for row in OF_KINDS)
    checked = {name for name, kind in KINDS.items() if not kind.judged}
    assert set(count) == checked
    assert min(count.values()) >= 5
    assert {(row["kind"], row["obeys"]) for row in OF_KINDS} == {
        (name, label) for name in checked for label in (True, False)
    }
    assert len(OF_KINDS) >= 240
    assert len(OF_FLAWS) >= 30
