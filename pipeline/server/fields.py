"""Which fields of a request are accepted: what is not honored is refused by name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from pipeline.errors import GattError, did_you_mean
from pipeline.inference.llama.grammar import ANY_OBJECT, choice_grammar, schema_grammar
from pipeline.server.errors import ApiError

GRAMMAR_FIELDS = (
    "response_format",
    "grammar",
    "json_schema",
    "guided_grammar",
    "guided_json",
    "guided_choice",
)
"""Fields that restrict the answer, in OpenAI's, llama.cpp's and vLLM's words."""
HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "cache_prompt",
)
"""Fields that never change the answer: they are accepted and ignored."""
_NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
}
"""Fields of OpenAI that are not supported, and the values with which they change nothing."""


def check_extra(extra: Mapping[str, object], known: Collection[str]) -> None:
    """Refuse fields that are not `known`, unless they do not change the answer.

    Raises:
        ApiError: the first of them.
    """
    for name, value in extra.items():
        if name in HARMLESS:
            continue
        if name not in _NEUTRAL_VALUES:
            hint = did_you_mean(name, known)
            message = f"Unknown parameter: '{name}'. {hint or 'Omit it.'}"
            raise ApiError(400, message, name, "unknown_parameter")
        neutral = _NEUTRAL_VALUES[name]
        if value is not None and value not in neutral:
            hint = f"Only {' or '.join(map(json.dumps, neutral))} is." if neutral else "Omit it."
            message = f"This value of '{name}' is not supported here. {hint}"
            raise ApiError(400, message, name, "unsupported_parameter")


def grammar_of(sources: Mapping[str, object]) -> str:
    """Return the grammar of the only field of `sources` that restricts the answer, or "".

    Raises:
        ApiError: several of them, or one that is not valid.
    """
    given = {name: value for name, value in sources.items() if not _is_free(name, value)}
    if len(given) > 1:
        message = f"Only one of {', '.join(map(repr, given))} can restrict the answer."
        raise ApiError(400, message, next(iter(given)), "invalid_value")
    for name, value in given.items():
        try:
            return _grammar(name, value)
        except GattError as error:
            raise ApiError(400, str(error), name, "invalid_value") from error
    return ""


def _is_free(name: str, value: object) -> bool:
    """Return whether a field leaves the answer free."""
    is_text = name == "response_format" and isinstance(value, dict) and value.get("type") == "text"
    return value is None or value == "" or is_text


def _grammar(name: str, value: object) -> str:
    if name == "guided_choice" and isinstance(value, list):
        return choice_grammar([str(choice) for choice in value])
    if name in ("grammar", "guided_grammar"):
        return str(value)
    if name == "response_format" and isinstance(value, dict):
        return schema_grammar(_schema_of_format(value))
    if isinstance(value, str):  # vLLM takes a schema as text, too
        try:
            value = json.loads(value)
        except ValueError as error:
            raise GattError(f"The schema in '{name}' is not valid JSON.") from error
    return schema_grammar(value)


def _schema_of_format(value: dict[str, object]) -> object:
    """Return the schema of a `response_format`."""
    kind = value.get("type")
    if kind == "json_object":
        return value.get("schema", ANY_OBJECT)  # llama.cpp takes a schema here
    if kind == "json_schema":
        named = value.get("json_schema", value)
        if isinstance(named, dict) and "schema" in named:
            return named["schema"]
        raise GattError("Expected the schema as response_format.json_schema.schema.")
    raise GattError(
        f"response_format.type is {kind!r}; expected 'text', 'json_object' or 'json_schema'."
    )
