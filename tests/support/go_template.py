"""An interpreter of the part of Go's text/template that Ollama's TEMPLATE uses here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.records import Message

Scope = dict[str, Any]
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "not": lambda a: not a,
    "len": len,
    "slice": lambda items, start: items[start:],
}


class GoTemplate:
    """A Go template with `range` over an index and an item, `if` / `else if` and `:=`."""

    def __init__(self, source: str) -> None:
        pieces = re.split(r"\{\{ (.*?) \}\}", source)
        self._nodes, end = self._parse(iter([*zip(pieces[::2], [*pieces[1::2], ""], strict=True)]))
        assert end == ""

    def execute(self, messages: Sequence[Message]) -> str:
        """Render as Ollama does: `.System` has the system messages, `.Messages` has all."""
        items = [{name.capitalize(): value for name, value in m.items()} for m in messages]
        systems = [m["content"] for m in messages if m["role"] == "system"]
        root = {"Messages": items, "System": "\n\n".join(systems)}
        return self._execute(self._nodes, {"": root, "$": root})

    def _parse(self, pieces: Iterator[tuple[str, str]]) -> tuple[list[Any], str]:
        """Return nodes up to an `else` or `end`, and that action."""
        nodes: list[Any] = []
        for text, action in pieces:
            nodes.append(text)
            if action in ("", "end") or action.startswith("else"):
                return nodes, action
            if not action.startswith(("if ", "range ")):
                nodes.append((action,))
                continue
            branches = []
            while action != "end":
                body, following = self._parse(pieces)
                branches.append((action, body))
                action = following
            nodes.append(branches)
        raise AssertionError("a block does not end")

    def _execute(self, nodes: Sequence[Any], scope: Scope) -> str:
        text = ""
        for node in nodes:
            if isinstance(node, str):
                text += node
            elif isinstance(node, tuple):
                text += self._act(node[0], scope)
            elif node[0][0].startswith("range "):
                action, body = node[0]
                text += self._loop(action, body, scope)
            else:
                conditions = ((re.sub(r"^(else )?if ", "", c), body) for c, body in node)
                bodies = (body for c, body in conditions if self._value(c, scope))
                text += self._execute(next(bodies, []), dict(scope))
        return text

    def _loop(self, action: str, body: Sequence[Any], scope: Scope) -> str:
        match = re.fullmatch(r"range (\$\w+), (\$\w+) := (.+)", action)
        assert match
        index, item, items = match.groups()
        return "".join(
            self._execute(body, {**scope, "": value, index: n, item: value})
            for n, value in enumerate(self._value(items, scope))
        )

    def _act(self, action: str, scope: Scope) -> str:
        name, assigned, value = action.partition(" := ")
        if not assigned:
            return str(self._value(action, scope))
        scope[name] = self._value(value, scope)
        return ""

    def _value(self, expression: str, scope: Scope) -> Any:
        """Evaluate a value, or a function applied to values and expressions in parentheses."""
        while inner := re.search(r"\(([^()]*)\)", expression):
            scope = {**scope, f"$#{len(scope)}": self._value(inner[1], scope)}
            expression = expression.replace(inner[0], list(scope)[-1])
        function, *arguments = re.findall(r'"[^"]*"|\S+', expression)
        if function in _FUNCTIONS:
            return _FUNCTIONS[function](*(self._value(a, scope) for a in arguments))
        if function.startswith('"'):
            return function.strip('"')
        if function.isdigit():
            return int(function)
        if function in scope:
            return scope[function]
        name, _, field = function.partition(".")
        return scope[name][field]
