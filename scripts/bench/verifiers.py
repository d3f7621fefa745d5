"""Our checks and those of IFEval and IFBench on labeled answers: `scripts/bench/verifiers.py`.

The answers are those of tests/data/labeled*.jsonl, which a person has labeled by the wording of the
instruction. For each kind that a verifier asks for, too: how often our check agrees with the label,
how often the verifier does, and how often the two agree. A verifier that lacks data is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import print_result, print_table
from pipeline.errors import GattError
from pipeline.exam.ifeval import verifiers_of
from pipeline.files import read_jsonl
from pipeline.gatt.constraints.custom_checks import verifier_passes
from pipeline.gatt.constraints.registry import obeys
from pipeline.records import Constraint

_DATA = Path(__file__).parents[2] / "tests/data"


@dataclass(slots=True)
class Score:
    """Answers of one kind, and on how many of them two agree."""

    answers: int = 0
    ours_and_label: int = 0
    verifier_and_label: int = 0
    ours_and_verifier: int = 0

    def cells(self) -> list[str]:
        """Return the number of answers, and the three shares."""
        counts = (self.ours_and_label, self.verifier_and_label, self.ours_and_verifier)
        return [str(self.answers), *(f"{count / self.answers:.1%}" for count in counts)]


def labeled() -> Iterator[tuple[Constraint, str, bool]]:
    """Yield constraint, answer and label."""
    for file in sorted(_DATA.glob("labeled*.jsonl")):
        for _, row in read_jsonl(file):
            if "kind" in row:
                yield Constraint(row["kind"], row["value"]), row["answer"], row["obeys"]


def main() -> None:
    """Print the table."""
    scores: dict[tuple[str, str], Score] = {}
    total, problems = Score(), dict[str, str]()
    for constraint, answer, label in labeled():
        ours = obeys((constraint,), answer)
        for verifier in verifiers_of(constraint):
            name = verifier.value.partition(" ")[0]
            try:
                verdict = verifier_passes(verifier.value, answer)
            except GattError as error:
                problems.setdefault(name, str(error))
                continue
            for score in (scores.setdefault((constraint.kind, name), Score()), total):
                score.answers += 1
                score.ours_and_label += ours == label
                score.verifier_and_label += verdict == label
                score.ours_and_verifier += ours == verdict
    columns = ["kind", "verifier", "answers", "ours = label", "verifier = label", "ours = verifier"]
    rows = [[*key, *score.cells()] for key, score in sorted(scores.items())]
    print_table(columns, [*rows, ["all", "", *total.cells()]])
    for problem in problems.values():
        print_result(problem)


if __name__ == "__main__":
    main()
