"""Multi-IF (He et al. 2024, arXiv 2410.15553): instructions that pile up over three turns.

The file is `multiIF_20241018.csv` of the data set facebook/Multi-IF. Each row has, for turn k,
`turn_k_prompt` (a message as JSON), `turn_k_instruction_id_list` and `turn_k_kwargs` (a list of
JSON texts); an empty prompt, or "None", is no turn. The instructions are IFEval's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from pipeline.data.text_files import Row
from pipeline.errors import GattError
from pipeline.exam.benchmarks.base import (
    BenchmarkTask,
    TurnChecks,
    dialogue_task,
    rows_of,
    validated,
    verifiers,
)

T = TypeVar("T")

_FORM = "a row of Multi-IF (multiIF_20241018.csv)"
_TURNS = (1, 2, 3)
_OWN_COUNTS = {
    "length_constraints:number_words": ("Chinese", "Thai", "Japanese"),
    "length_constraints:number_sentences": ("Chinese", "Thai", "Japanese", "Hindi"),
}
"""Instructions that Multi-IF counts with other tokenizers than IFEval in some languages."""


def read(path: Path) -> list[BenchmarkTask]:
    """Return the dialogues; their parts are the languages.

    Raises:
        GattError: the file has another form.
    """
    return [_task(row) for row in rows_of(path)]


def _task(row: Row) -> BenchmarkTask:
    if not isinstance(row.value, Mapping) or "turn_1_prompt" not in row.value:
        raise GattError(f"{row.place}: no turn_1_prompt. Expected {_FORM}.")
    fields = {str(key): value for key, value in row.value.items()}
    language = str(fields.get("language") or "no language")
    turns: list[str] = []
    checks: dict[int, TurnChecks] = {}
    for number in _TURNS:
        prompt = fields.get(f"turn_{number}_prompt")
        if prompt in (None, "", "None"):
            break
        turns.append(_content(row, f"turn_{number}_prompt", prompt))
        checks[number] = _checks(row, fields, number, language)
    key = str(fields.get("key") or row.number)
    return dialogue_task(key, language, turns, checks)


def _checks(row: Row, fields: Mapping[str, object], number: int, language: str) -> TurnChecks:
    """Return the checks of turn `number`; counts in another script are left to its authors."""
    names = _cell(row, f"turn_{number}_instruction_id_list", fields, list[str])
    texts = _cell(row, f"turn_{number}_kwargs", fields, list[str | dict[str, object]])
    if len(names) != len(texts):
        raise GattError(
            f"{row.place}: {len(names)} instructions and {len(texts)} arguments in turn {number}. "
            f"Expected {_FORM}."
        )
    arguments = [t if isinstance(t, dict) else _object(row, number, t) for t in texts]
    chosen = [n for n, name in enumerate(names) if language not in _OWN_COUNTS.get(name, ())]
    checks = verifiers([names[n] for n in chosen], [arguments[n] for n in chosen])
    return checks._replace(unchecked=len(names) - len(chosen))


def _content(row: Row, name: str, cell: object) -> str:
    message = _parsed_cell(cell)
    if isinstance(message, Mapping) and isinstance(message.get("content"), str):
        return str(message["content"])
    raise GattError(f"{row.place}: {name} is no message with a content. Expected {_FORM}.")


def _parsed_cell(cell: object) -> object:
    """Return the JSON value that a cell is the text of, or the cell itself."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _object(row: Row, number: int, text: str) -> dict[str, object]:
    value = _parsed_cell(text)
    if not isinstance(value, dict):
        raise GattError(f"{row.place}: turn_{number}_kwargs: {text!r}. Expected {_FORM}.")
    return value


def _cell(row: Row, name: str, fields: Mapping[str, object], form: type[T]) -> T:
    cell = fields.get(name)
    try:
        return validated(_parsed_cell(cell), form)
    except ValidationError as error:
        raise GattError(f"{row.place}: {name} is {cell!r}. Expected {_FORM}.") from error
