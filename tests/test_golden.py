"""Outputs that are reviewed as a whole: the help of every command.

The golden files of reports and chats are checked in `test_report` and `test_template`.
"""

from __future__ import annotations

import pytest
from support.golden import Golden
from typer.main import get_command
from typer.testing import CliRunner

from pipeline.cli import app

_COMMANDS = ("", *get_command(app).list_commands(None))  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", _COMMANDS)
def test_help(command: str, golden: Golden) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    shown = CliRunner().invoke(app, arguments, prog_name="gatt", env={"COLUMNS": "100"})
    assert shown.exit_code == 0
    golden(f"help-{command or 'gatt'}.txt", shown.output)
