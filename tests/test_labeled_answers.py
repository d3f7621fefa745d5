"""The checks against answers that were labeled by hand.

The labels follow the wording of the instruction alone, not the code of its check. The answers of
data/labeled.jsonl were written for their difficulty. Those of data/labeled_replies.jsonl are of a
model of 0.5 billion parameters (Qwen2.5-Coder), one or two turns after the instruction, or after
two turns in which it was kept; they were labeled twice, in different orders.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.gatt.constraints.registry import KINDS, obeys
from pipeline.gatt.instructions import render_instruction
from pipeline.gatt.quality import find_defect
from pipeline.records import Constraint

MIN_AGREEMENT = 0.98


@dataclass(frozen=True, kw_only=True)
class ObeysLabel:
    """Whether an answer meets a constraint, and why."""

    kind: str
    value: str
    answer: str
    obeys: bool
    why: str

    @property
    def disagreement(self) -> str:
        """Return what the check says to the contrary, or ""."""
        constraints = (Constraint(self.kind, self.value),)
        if obeys(constraints, self.answer) == self.obeys:
            return ""
        instruction = render_instruction(constraints).text
        return f"{instruction} obeys is {self.obeys} ({self.why}): {self.answer!r}"


@dataclass(frozen=True, kw_only=True)
class DefectLabel:
    """Whether an answer is valid after the `earlier` ones, and why."""

    check: str
    earlier: list[str]
    required_words: str
    answer: str
    good: bool
    why: str

    @property
    def disagreement(self) -> str:
        """Return what `find_defect` says to the contrary, or ""."""
        defect = find_defect(self.answer, self.earlier, self.required_words)
        if (not defect) == self.good:
            return ""
        return f"defect is {defect!r}, good is {self.good} ({self.why}): {self.answer!r}"


def _rows(name: str) -> list[dict[str, Any]]:
    file = Path(__file__).parent / "data" / name
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


ROWS = _rows("labeled.jsonl")
REPLY_LABELS = [ObeysLabel(**row) for row in _rows("labeled_replies.jsonl")]
OBEYS_LABELS = [ObeysLabel(**row) for row in ROWS if "kind" in row]
DEFECT_LABELS = [DefectLabel(**row) for row in ROWS if "kind" not in row]


def test_the_checks_agree_with_the_labels() -> None:
    wrong = [label.disagreement for label in OBEYS_LABELS if label.disagreement]
    wrong += [label.disagreement for label in DEFECT_LABELS if label.disagreement]
    agreement = 1 - len(wrong) / len(ROWS)
    assert agreement >= MIN_AGREEMENT, (
        f"Agreement {agreement:.4f} over {len(ROWS)} answers. Disagreements:\n" + "\n".join(wrong)
    )


def test_the_checks_agree_with_the_labels_of_a_models_answers() -> None:
    wrong = [label.disagreement for label in REPLY_LABELS if label.disagreement]
    agreement = 1 - len(wrong) / len(REPLY_LABELS)
    assert agreement >= MIN_AGREEMENT, (
        f"Agreement {agreement:.4f} over {len(REPLY_LABELS)} answers:\n" + "\n".join(wrong)
    )
    assert len(REPLY_LABELS) >= 200
    assert {label.kind for label in REPLY_LABELS} == {n for n, k in KINDS.items() if not k.judged}
    assert min(Counter(label.obeys for label in REPLY_LABELS).values()) >= 75


def test_every_kind_is_labeled_both_ways() -> None:
    counts = Counter(label.kind for label in OBEYS_LABELS)
    checked = {name for name, kind in KINDS.items() if not kind.judged}
    assert set(counts) == checked
    assert min(counts.values()) >= 5
    assert {(label.kind, label.obeys) for label in OBEYS_LABELS} == {
        (name, obeys_it) for name in checked for obeys_it in (True, False)
    }
    assert len(OBEYS_LABELS) >= 240
    assert len(DEFECT_LABELS) >= 30
