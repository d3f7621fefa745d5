"""How our checks agree with the verifiers of IFEval (Zhou et al. 2023) and IFBench (Pyatkin et al.
2025) on the same texts.

For the kinds that both have; `pip install "gatt[ifeval]"`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.errors import GattError
from pipeline.gatt.constraints.custom_checks import verifier_passes
from pipeline.gatt.constraints.language import LANGUAGES
from pipeline.gatt.constraints.registry import edit, editable, obeys, prepare
from pipeline.records import Constraint

_MAX_TEXTS = 300
"""Replies for each constraint, evenly over all; language detection takes milliseconds each."""
_OTHER_LANGUAGES = ("Dutch", "Swedish", "Turkish")
"""Languages of ours that IFEval does not ask for."""
_MANY_WORDS = 9999
"""More words than any answer has: IFBench's range needs an end."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often a check of ours and a verifier pass the same texts."""

    kind: str
    verifier: str
    texts: int
    both: int
    only_ours: int
    only_verifier: int

    @property
    def share(self) -> float:
        """Return the share of the texts on which both say the same."""
        return 1 - (self.only_ours + self.only_verifier) / self.texts


def require_verifiers() -> None:
    """Check that the verifiers are installed.

    Raises:
        GattError: they are not.
    """
    prepare(Constraint("ifeval", "punctuation:no_comma"))


def verifiers_of(constraint: Constraint) -> list[Constraint]:
    """Return the checks by IFEval's and IFBench's verifiers that ask for the same; [] if none do.

    A verifier that asks for less or more, such as JSON with any keys, is not the same.
    """
    value = constraint.value
    known: dict[str, dict[str, object]] = {}
    match constraint.kind:
        case "uppercase":
            known = {"change_case:english_capital": {}}
        case "lowercase":
            known = {"change_case:english_lowercase": {}}
        case "title_case":
            known = {"format:title_case": {}}
        case "quotes":
            known = {"startend:quotation": {}}
        case "no_commas":
            known = {"punctuation:no_comma": {}}
        case "postscript":
            known = {"detectable_content:postscript": {"postscript_marker": "P.S."}}
        case "bold":
            known = {"detectable_format:number_highlighted_sections": {"num_highlights": 1}}
        case "closing":
            known = {"startend:end_checker": {"end_phrase": value}}
        case "hashtag":
            known = {"startend:end_checker": {"end_phrase": f"#{value}"}}
        case "language" if value not in _OTHER_LANGUAGES:
            known = {"language:response_language": {"language": LANGUAGES[value]}}
        case "hobby" | "address" | "keyword":
            known = {"keywords:existence": {"keywords": [value]}}
        case "forbidden":
            known = {"keywords:forbidden_words": {"forbidden_words": [value]}}
        case "no_letter":
            least = {"letter": value, "let_frequency": 1, "let_relation": "less than"}
            known = {"keywords:letter_frequency": least}
        case "no_digits":
            known = {"count:numbers": {"N": 0}}
        case "max_words" | "min_words" | "max_sentences" | "one_sentence":
            known = _lengths(constraint.kind, int(value or 1))
    return [
        Constraint("ifeval", f"{name} {json.dumps(arguments)}") for name, arguments in known.items()
    ]


def _lengths(kind: str, number: int) -> dict[str, dict[str, object]]:
    if kind == "min_words":
        return {
            "length_constraints:number_words": {"relation": "at least", "num_words": number},
            "count:word_count_range": {"min_words": number, "max_words": _MANY_WORDS},
        }
    if kind == "max_words":
        return {
            "length_constraints:number_words": {"relation": "less than", "num_words": number + 1},
            "count:word_count_range": {"min_words": 1, "max_words": number},
        }
    return {
        "length_constraints:number_sentences": {
            "relation": "less than",
            "num_sentences": number + 1,
        }
    }


def agreements(
    constraints: Iterable[Constraint], replies: Sequence[str]
) -> tuple[list[Agreement], list[str]]:
    """Return the agreement of each kind over its values, and why some verifiers cannot be used.

    The texts are the replies, and where there is an edit that makes a reply obey, those too.
    """
    step = max(1, len(replies) // _MAX_TEXTS)
    texts = list(dict.fromkeys(text for text in replies[::step] if text.strip()))
    rows: dict[tuple[str, str], Agreement] = {}
    problems: dict[str, str] = {}
    for constraint in dict.fromkeys(constraints):
        obedient = [edit((constraint,), t) for t in texts] if editable((constraint,)) else []
        for verifier in verifiers_of(constraint) if texts else ():
            name = verifier.value.partition(" ")[0]
            try:
                row = _compare(constraint, verifier, [*texts, *obedient])
            except GattError as error:
                problems.setdefault(name, str(error))
                continue
            key = (row.kind, row.verifier)
            rows[key] = _sum(rows[key], row) if key in rows else row
    return list(rows.values()), list(problems.values())


def _compare(constraint: Constraint, verifier: Constraint, texts: Sequence[str]) -> Agreement:
    pairs = [(obeys((constraint,), text), verifier_passes(verifier.value, text)) for text in texts]
    return Agreement(
        constraint.kind,
        verifier.value.partition(" ")[0],
        len(pairs),
        pairs.count((True, True)),
        pairs.count((True, False)),
        pairs.count((False, True)),
    )


def _sum(first: Agreement, second: Agreement) -> Agreement:
    return Agreement(
        first.kind,
        first.verifier,
        first.texts + second.texts,
        first.both + second.both,
        first.only_ours + second.only_ours,
        first.only_verifier + second.only_verifier,
    )


def agreement_table(rows: Sequence[Agreement]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of the table that the command prints."""
    columns = ["kind", "verifier", "texts", "agree", "both", "only ours", "only the verifier"]
    return columns, [
        [
            row.kind,
            row.verifier,
            str(row.texts),
            f"{row.share:.1%}",
            *map(str, (row.both, row.only_ours, row.only_verifier)),
        ]
        for row in rows
    ]
