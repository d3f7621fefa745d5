"""JSON schemas as grammars: what llama-cpp-python's converter gets wrong is right or refused."""

from __future__ import annotations

import re

import pytest

from pipeline.errors import GattError
from pipeline.inference.llama.grammar import Schema, schema_grammar


def _rules(schema: Schema) -> dict[str, str]:
    """Return the rules of a schema's grammar, which llama.cpp accepts."""
    import llama_cpp

    grammar = schema_grammar(schema)
    sampler = llama_cpp.llama_sampler_init_grammar(None, grammar.encode(), b"root")
    assert sampler, grammar
    llama_cpp.llama_sampler_free(sampler)
    return dict(line.split(" ::= ", 1) for line in grammar.splitlines())


def _object(**properties: object) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


@pytest.mark.parametrize("keyword", [{"enum": ["C", None]}, {"const": "C"}])
def test_a_nullable_enumeration_stays_one(keyword: Schema) -> None:
    rules = _rules({"type": ["string", "null"], **keyword})
    assert rules["ref-0"].split(" | ")[0] == r'"\"C\""'
    assert "string" not in rules


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        ("^yes|no$", '("ye" "s" | "n" "o")'),
        (r"^\$\d+(?:\.\d\d)?$", r"([\x24] [0-9]+ ([\x2E] [0-9] [0-9])?)"),
        (r"^[\w.-]+$", r"([A-Za-z0-9_\x2E-]+)"),
        ("^.$", r'([^"\\\x00-\x1F])'),
        (r"^[^@\n]$", r'([^"\\\x00-\x1F\x40])'),
        ("^[]à-ü]$", r"([\x5Dà-ü])"),
    ],
)
def test_a_pattern_matches_within_the_quotes_of_a_string(pattern: str, rule: str) -> None:
    rules = _rules({"type": "string", "pattern": pattern})
    assert rules["ref-0"] == rf'"\"" {rule} "\"" space'


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("yes", "expected '^...$'"),
        ("^[$", "is not valid"),
        ('^a"$', "because of '\"'"),
        ("^[ -~]$", "because of '[ -~]'"),
        (r"^\bx$", r"because of '[\\b]'"),
        ("^a+?$", "because of '+?'"),
        ("^a{1,9999}$", "because of '{1,9999}'"),
        ("^a$|^b$", "because of '$'"),
        ("^(?=a)a$", "Unsupported pattern syntax"),
        (3, "The pattern 3"),
    ],
)
def test_a_pattern_that_no_grammar_follows_is_refused(pattern: object, problem: str) -> None:
    with pytest.raises(GattError, match=re.escape(problem)):
        schema_grammar({"type": "string", "pattern": pattern})


def test_a_recursive_definition_has_a_rule_of_its_own() -> None:
    node = _object(next={"anyOf": [{"$ref": "#/$defs/list_node"}, {"type": "null"}]})
    rules = _rules({"$ref": "#/$defs/list_node", "$defs": {"list_node": node}})
    assert rules["ref-1"] == "ref-0"
    assert rules["ref-0-next-0"] == "ref-0"
    assert _rules(_object(next={"anyOf": [{"$ref": "#"}, {"type": "null"}]}))["ref-0"]


def test_a_definition_is_not_taken_for_a_property_of_its_name() -> None:
    schema = _object(item=_object(a={"type": "string"}), other={"$ref": "#/$defs/item"})
    rules = _rules({**schema, "$defs": {"item": {"type": "integer"}}})
    assert rules[rules["ref-1-other"]] == "integer"


def test_a_string_has_no_control_characters() -> None:
    assert _rules({"type": "string"})["char"].startswith(r'[^"\\\x00-\x1F] |')
