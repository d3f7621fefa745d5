"""What the READMEs promise: commands and flags exist, recipe keys exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from pipeline.cli import app
from pipeline.recipe import Recipe

ROOT = Path(__file__).parent.parent
FOLDERS = ("pipeline", "models", "scripts", "tests", ".github")
NAMES = ("README.md", "LOG.md", "CONTRIBUTING.md")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
PAGES += sorted(page for f in FOLDERS for name in NAMES for page in (ROOT / f).rglob(name))
COMMANDS = typer.main.get_command(app)
SECTIONS = {name: getattr(Recipe(), name) for name in Recipe.model_fields}


def _code(page: Path) -> list[str]:
    """Return the lines of fenced blocks without comments, and the inline code."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    lines = [line for block in fenced for line in block.splitlines()]
    return [re.sub(r"\s+#\s.*", "", line).strip() for line in [*lines, *inline]]


def _gatt_lines(page: Path) -> list[list[str]]:
    """Return the words of every command line that calls gatt."""
    lines = [re.sub(r"^\S*\.venv/bin/gatt ", "gatt ", line) for line in _code(page)]
    return [shlex.split(line) for line in lines if line.startswith("gatt ")]


def _pages_with(kind: str) -> list[Path]:
    return [page for page in PAGES if kind in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", _pages_with("gatt "), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_flag_exists(page: Path) -> None:
    assert isinstance(COMMANDS, TyperGroup)
    for line in _gatt_lines(page):
        name = line[1]
        if name in ("COMMAND", "--help"):
            continue
        assert name in COMMANDS.commands, f"{page.name}: gatt {name}"
        options = {
            flag for p in COMMANDS.commands[name].params for flag in (*p.opts, *p.secondary_opts)
        }
        flags = {word.partition("=")[0] for word in line if word.startswith("--")} - {"--help"}
        assert flags <= options, f"{page.name}: {' '.join(line)}: {flags - options}"


def test_the_readme_shows_every_command() -> None:
    assert isinstance(COMMANDS, TyperGroup)
    shown = {line[1] for line in _gatt_lines(ROOT / "README.md")}
    assert set(COMMANDS.commands) <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_recipe_key_exists(page: Path) -> None:
    text = "\n".join(_code(page))
    for section, key in re.findall(r"(?<![\w./])([a-z]+)\.([a-z_]+)(?=\s*=|$|[\s,)])", text, re.M):
        if section in SECTIONS and key not in ("py", "json", "jsonl", "md", "toml", "html"):
            assert hasattr(SECTIONS[section], key), f"{page.name}: {section}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_is_one_screen() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1000
    prose = re.sub(r"^```.*?^```|^\|.*$", "", text, flags=re.S | re.M)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    sentences = re.split(r"(?<=[.!?:])\s+|\n\s*\n|\n- |\*\*", prose)
    longest = max(sentences, key=lambda sentence: len(sentence.split()))
    assert len(longest.split()) <= 30, longest
