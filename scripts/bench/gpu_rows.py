"""Rows of the GPU bench: one JSON object a line, written as soon as it is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NOT_A_RESULT = "cpu, not a result"
"""The name of the device where there is no card."""


def append_row(out: Path, **row: object) -> None:
    """Append a row to the file `out`; it is there even if the process is killed next."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(out: Path, offset: int = 0) -> Iterator[Row]:
    """Yield the rows of `out` from byte `offset` on; a line that was cut is left out."""
    if not out.exists():
        return
    for line in out.read_bytes()[offset:].splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
