"""JSON schemas and choices as grammars (GBNF), which llama.cpp's sampler follows.

llama-cpp-python converts the schemas, and ignores what it does not know. Here a keyword that would
be ignored is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.errors import GattError

Schema = dict[str, object]
"""A JSON schema."""

ANY_OBJECT: Schema = {"type": "object"}
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_ANY_VALUE: Schema = {
    "anyOf": [{"type": name} for name in _TYPES if name != "integer"],
}
_ANNOTATIONS = frozenset(
    {"$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default"}
    | {"examples", "deprecated", "readOnly", "writeOnly", "discriminator"}
)
"""Keywords that do not restrict a value."""
_KEYWORDS: dict[str, frozenset[str]] = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "string": frozenset(("pattern", "format", "minLength", "maxLength")),
    **{name: frozenset[str]() for name in ("number", "integer", "boolean", "null")},
}
"""The keywords that are supported for each type, besides those of `_COMBINING`."""
_COMBINING = ("$ref", "anyOf", "oneOf", "const", "enum")
_MAX_SIZE = 500
"""The largest number of characters or items that a schema may name."""
_PATTERN_PART = re.compile(
    r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\.|\(\?:|(?:\{[\d,]*\}|[*+?])[+?]?|.", re.DOTALL
)
"""A unit of a regular expression: a class, an escape, a quantifier, a character, ..."""
_CLASS_ESCAPES = {"d": "0-9", "w": "A-Za-z0-9_", "s": " "}
_ESCAPED_IN_JSON = frozenset({'"', "\\", *map(chr, range(32))})
_NOT_ESCAPED = r'"\\\x00-\x1F'
"""What a class of GBNF must not match: a JSON string has an escape sequence there."""
_FORMATS = ("date", "time", "date-time", "uuid", "uuid1", "uuid2", "uuid3", "uuid4", "uuid5")


def choice_grammar(choices: Sequence[str]) -> str:
    """Return the grammar of an answer that is one of `choices`."""
    return f"root ::= {' | '.join(map(_literal, choices))}"


def schema_grammar(schema: object) -> str:
    """Return the grammar of the JSON values that a schema allows.

    Raises:
        GattError: not a schema, or one with a keyword that is not supported.
    """
    from llama_cpp.llama_grammar import SchemaConverter

    class Converter(SchemaConverter):  # type: ignore[misc]
        """Escapes backslashes, too, and gives each definition a rule of its own.

        No string has control characters, which JSON does not allow there.
        """

        def _format_literal(self, literal: str) -> str:
            return _literal(literal)

        def _resolve_ref(self, ref: str) -> str:
            return f"ref-{list(self._refs).index(ref)}"

        def _add_rule(self, name: str, rule: str) -> str:
            if name == "char":  # the converter's allows control characters
                rule = rule.replace(r'[^"\\]', f"[^{_NOT_ESCAPED}]")
            return str(super()._add_rule(name, rule))

    try:
        # References lead into "schema", so that one to all of it is like the others.
        normalized: Schema = {"schema": _normalize(schema, "the schema")}
        normalized["anyOf"] = [{"$ref": "#/schema"}]
        converter = Converter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
        converter.resolve_refs(normalized, "")
        for ref, definition in list(converter._refs.items()):
            name = converter._resolve_ref(ref)
            rule = converter.visit(definition, name)
            if rule != name:  # a type that has one rule in all places
                converter._add_rule(name, rule)
        converter.visit(normalized, "")
        return str(converter.format_grammar())
    except (AssertionError, ValueError) as error:
        reason = str(error)
    except (AttributeError, LookupError, RecursionError, TypeError):
        reason = "a value has another type than expected, or a reference leads nowhere"
    raise GattError(f"The JSON schema is not valid, or not supported: {reason}.")


def _literal(text: str) -> str:
    """Return a text as a literal of GBNF."""
    for char, escape in {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"}.items():
        text = text.replace(char, escape)
    return f'"{text}"'


def _normalize(schema: object, place: str) -> Schema:
    """Return a schema in the form that the converter knows, without what it would ignore."""
    if schema is True or schema == {}:
        return dict(_ANY_VALUE)
    if not isinstance(schema, dict):
        raise GattError(f"Expected a JSON schema, an object, as {place}.")
    merged = _without_single_all_of(schema)
    types = merged.get("type")
    if isinstance(types, list) and {"const", "enum"} & merged.keys():
        del merged["type"]  # the converter would read nothing else
    elif isinstance(types, list) and not any(name in merged for name in _COMBINING):
        return _normalize_union(merged, types, place)
    kind = next((name for name in _COMBINING if name in merged), "") or _infer_type(merged, place)
    allowed = _KEYWORDS.get(kind, frozenset((kind,))) | _ANNOTATIONS | {"type"}
    for name in merged:
        if name not in allowed:
            raise GattError(
                f"The keyword {name!r} in {place} is not supported there. Omit it, or write a "
                "grammar."
            )
    _check_values(merged, place)
    return _normalize_parts(merged, place)


def _without_single_all_of(schema: Schema) -> Schema:
    """Return a copy of the schema with the only element of `allOf` in its place."""
    parts = schema.get("allOf")
    if isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], dict):
        return {**{name: schema[name] for name in schema if name != "allOf"}, **parts[0]}
    return dict(schema)


def _infer_type(schema: Schema, place: str) -> str:
    """Return the type that a schema names, or that its keywords are of."""
    name = schema.get("type")
    if name is None:
        types = [kind for kind, names in _KEYWORDS.items() if names & schema.keys()]
        if len(types) != 1:
            keywords = sorted(schema.keys() - _ANNOTATIONS)
            raise GattError(
                f"Expected a type in {place}, which has {', '.join(keywords) or 'no keyword'}."
            )
        name = schema["type"] = types[0]
    if name not in _TYPES:
        raise GattError(f"The type {name!r} in {place} is unknown; expected {', '.join(_TYPES)}.")
    return str(name)


def _normalize_union(schema: Schema, types: Sequence[object], place: str) -> Schema:
    """Return a schema of several types as alternatives, each with its own keywords."""
    foreign = frozenset(name for names in _KEYWORDS.values() for name in names)
    definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    common: Schema = {
        name: value
        for name, value in schema.items()
        if name not in foreign and name not in _ANNOTATIONS
    }
    alternatives: list[Schema] = []
    for kind in types:
        own = _KEYWORDS.get(str(kind), frozenset[str]())
        keywords = {name: schema[name] for name in schema if name in own}
        alternatives.append(common | keywords | {"type": kind})
    return _normalize(definitions | {"anyOf": alternatives}, place)


def _check_values(schema: Schema, place: str) -> None:
    """Refuse values of keywords that the converter would ignore."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if isinstance(properties, dict) and isinstance(required, list):
        for name in required:
            if name not in properties:
                raise GattError(f"{name!r}, required by {place}, is not among its properties.")
    for name in ("minLength", "maxLength", "minItems", "maxItems"):
        size = schema.get(name, 0)
        if not isinstance(size, int) or not 0 <= size <= _MAX_SIZE:
            raise GattError(f"{name} in {place} is {size!r}; expected 0 to {_MAX_SIZE}.")
    if "pattern" in schema and {"minLength", "maxLength", "format"} & schema.keys():
        raise GattError(f"A pattern with a length or a format in {place} is not supported.")
    if "format" in schema and schema["format"] not in _FORMATS:
        raise GattError(
            f"The format {schema['format']!r} in {place} is not supported; expected one of "
            f"{', '.join(_FORMATS)}."
        )
    if "prefixItems" in schema and {"items", "minItems", "maxItems"} & schema.keys():
        raise GattError(f"prefixItems with another keyword in {place} is not supported.")


def _normalize_parts(schema: Schema, place: str) -> Schema:
    """Return the schema with all schemas in it normalized."""
    result = dict(schema)
    if schema.get("type") == "array" and "prefixItems" not in schema and "$ref" not in schema:
        result.setdefault("items", {})
    for name, value in result.items():
        inner = f"{name} of {place}"
        if name in ("properties", "$defs", "definitions") and isinstance(value, dict):
            result[name] = {key: _normalize(part, f"{key!r}") for key, part in value.items()}
        elif name in ("anyOf", "oneOf", "prefixItems") and isinstance(value, list):
            result[name] = [_normalize(part, inner) for part in value]
        elif name == "items" or (name == "additionalProperties" and value is not False):
            result[name] = _normalize(value, inner)
        elif name == "$ref" and isinstance(value, str) and value.startswith("#"):
            result[name] = f"#/schema{value[1:]}"
        elif name == "pattern":
            result[name] = _pattern(value, place)
    return result


def _pattern(pattern: object, place: str) -> str:
    """Return a regular expression for the converter: the text between the quotes of a string.

    Raises:
        GattError: it is none, is not anchored at both ends, or has what a grammar cannot follow.
    """
    try:
        re.compile(str(pattern))
    except re.error as error:
        raise GattError(f"The pattern {pattern!r} in {place} is not valid: {error}.") from error
    if not (isinstance(pattern, str) and len(pattern) > 1 and pattern[0] + pattern[-1] == "^$"):
        raise GattError(f"The pattern {pattern!r} in {place} is not supported; expected '^...$'.")
    try:
        parts = map(_pattern_part, _PATTERN_PART.findall(pattern[1:-1]))
        return f"^({''.join(parts)})$"
    except ValueError as error:
        raise GattError(
            f"The pattern {pattern!r} in {place} is not supported, because of {str(error)!r}. "
            "Expected no quotation marks, backslashes, control characters, look-around, lazy "
            f"quantifiers, or counts above {_MAX_SIZE}. Write a grammar."
        ) from error


def _pattern_part(part: str) -> str:
    """Return a unit of a regular expression as the converter copies it into a grammar.

    Raises:
        ValueError: it is not supported.
    """
    if part == ".":
        return f"[^{_NOT_ESCAPED}]"
    if part == "(?:":
        return "("
    if part.startswith("[") and len(part) > 1:
        return _pattern_class(part)
    if part.startswith("\\"):
        return _pattern_class(f"[{part}]")
    lazy = len(part) > 1 and part[-1] in "+?"
    if lazy or part in _ESCAPED_IN_JSON or part in "^$":
        raise ValueError(part)
    if any(int(count) > _MAX_SIZE for count in re.findall(r"\d+", part if part[0] == "{" else "")):
        raise ValueError(part)
    return part


def _pattern_class(part: str) -> str:
    """Return a class of characters in the syntax of GBNF, without what a JSON string escapes.

    Raises:
        ValueError: it has an escape sequence that is not supported, or leaves no character.
    """
    negated = part.startswith("[^")
    if not negated and any(map(re.compile(part.replace(r"\s", " ")).match, _ESCAPED_IN_JSON)):
        raise ValueError(part)
    content = _NOT_ESCAPED if negated else ""
    for char in re.findall(r"\\.|.", part[2 if negated else 1 : -1], re.DOTALL):
        last = char[-1]
        if char in (r"\d", r"\w", r"\s"):
            content += _CLASS_ESCAPES[last]
        elif len(char) > 1 and last.isalnum() and not (negated and last in "fnrtv"):
            raise ValueError(part)
        elif char == "-" or (len(char) == 1 and (last.isalnum() or not last.isascii())):
            content += last
        elif not last.isalnum():
            content += f"\\x{ord(last):02X}"
    return f"[{'^' * negated}{content}]"
