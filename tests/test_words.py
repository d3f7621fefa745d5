"""Names say what a thing is: participles and pronouns are not used as names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "scripts", "tests")
FORBIDDEN = frozenset({"found", "its", "told", "said", "asked", "kept", "whole", "theirs"})


class Binding(NamedTuple):
    """A name that code assigns, and the line where it does."""

    name: str
    line: int


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those of TypedDicts, whose fields are the keys of a file."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.ClassDef(bases=[ast.Name(id="TypedDict")]):
                continue
        yield from _walk(node)


def _bindings(tree: ast.AST) -> Iterator[Binding]:
    """Yield variables, parameters, loop, with, walrus and except names, and assigned attributes."""
    for node in _walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()):
                yield Binding(name, node.lineno)
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield Binding(name, node.lineno)
            case ast.arg(arg=name):
                yield Binding(name, node.lineno)
            case ast.ExceptHandler(name=str(name)):
                yield Binding(name, node.lineno)
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield Binding(name, node.lineno)


def _forbidden(source: str) -> list[Binding]:
    return [binding for binding in _bindings(ast.parse(source)) if binding.name in FORBIDDEN]


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "its: int = 1",
        "a, (told, *b) = c",
        "def f(said): pass",
        "def f(*, asked=1): pass",
        "lambda kept: 1",
        "for whole in a: pass",
        "[1 for theirs in a]",
        "with a as found: pass",
        "(its := 1)",
        "self.told = 1",
        "try: pass\nexcept E as said: pass",
    ],
)
def test_every_way_to_assign_a_name_is_seen(source: str) -> None:
    assert len(_forbidden(source)) == 1


def test_uses_and_words_in_texts_are_allowed() -> None:
    assert not _forbidden("print(found, a.said, f(told=1), 'its'); founded = 1")
    assert not _forbidden("class Row(TypedDict):\n    asked: str")


def test_no_file_uses_a_forbidden_name() -> None:
    places = [
        f"{file.relative_to(ROOT)}:{binding.line} {binding.name}"
        for folder in FOLDERS
        for file in sorted((ROOT / folder).rglob("*.py"))
        for binding in _forbidden(file.read_text(encoding="utf-8"))
    ]
    assert not places, f"{len(places)} names say nothing about the thing:\n" + "\n".join(places)
