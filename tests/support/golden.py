"""Golden files: reviewed outputs in `tests/golden/`.

`pytest --update-golden` writes them anew; read the diff before committing it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Golden = Callable[[str, str], None]
"""Compare a text with the golden file of this name."""

FOLDER = Path(__file__).parents[1] / "golden"


def write_golden(name: str, text: str) -> None:
    """Write the golden file `name`."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")


def check_golden(name: str, text: str) -> None:
    """Fail with a diff unless `text` is the content of the golden file `name`."""
    file = FOLDER / name
    if not file.is_file():
        pytest.fail(f"{file} is missing. Write it with `pytest --update-golden`, and review it.")
    expected = file.read_text(encoding="utf-8")
    assert text == expected, f"differs from {file.name}; if intended, run pytest --update-golden"
