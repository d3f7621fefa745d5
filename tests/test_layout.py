"""The layout of the code: small rooms, each with a README, and heavy libraries in their places."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "pipeline"
ROOMS = sorted({PACKAGE, *(file.parent for file in PACKAGE.rglob("__init__.py"))})
"""Every package; folders without modules do not count."""
MAX_MODULES = 12
MAX_README_LINES = 80
ROOT_MODULES = {
    *("run", "run_dir", "recipe", "recipe_file", "custom_instructions"),
    *("folders", "files", "gpu", "system", "console", "records", "errors"),
}


class Home(NamedTuple):
    """Where a heavy library may be imported: folders and files of the package."""

    library: str
    places: tuple[str, ...]


HOMES = (
    Home("nicegui", ("server/web",)),
    Home("llama_cpp", ("inference", "gguf")),
    Home("unsloth", ("training/unsloth.py",)),
    Home("inspect_ai", ("exam/inspect_eval",)),
)


def _modules(room: Path) -> list[str]:
    return [file.stem for file in sorted(room.glob("*.py")) if not file.stem.startswith("__")]


def _imports(file: Path) -> Iterator[str]:
    """Yield the top-level packages that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name.partition(".")[0] for alias in aliases)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0]
            case ast.Call(func=ast.Name(id="import_module"), args=[ast.Constant(value=str(name))]):
                yield name.partition(".")[0]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(PACKAGE.parent)))
def test_a_room_is_small_and_explained(room: Path) -> None:
    modules = _modules(room)
    assert len(modules) <= MAX_MODULES, f"{len(modules)} modules: {', '.join(modules)}"
    readme = room / "README.md"
    assert readme.is_file()
    assert 0 < len(readme.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_the_root_is_nearly_empty() -> None:
    assert set(_modules(PACKAGE)) == ROOT_MODULES


@pytest.mark.parametrize("home", HOMES, ids=lambda home: home.library)
def test_a_heavy_library_is_imported_in_its_place_only(home: Home) -> None:
    importers = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if home.library in _imports(file)
    }
    assert importers, f"Nothing imports {home.library}"
    strangers = {
        file
        for file in importers
        if not any(file == place or file.startswith(f"{place}/") for place in home.places)
    }
    assert not strangers
