"""Kinds of check that only an instruction in the user's own words can have.

They have no wording, so that they are not drawn, combined, or recognized in a text. Whether plain
answers meet them unasked is not known.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.gatt.constraints import custom_checks
from pipeline.gatt.constraints.base import Kind, avoids, never

_CUSTOM = Kind(
    family="custom", slot="custom", wordings=(), short="", often_met=True, check=lambda v, t: True
)

CUSTOM_KINDS: dict[str, Kind] = {
    "regex": replace(
        _CUSTOM,
        values=("^Ziggy:",),
        accepts="pattern",
        check=custom_checks.has_match,
        prepare=custom_checks.pattern,
    ),
    "not_regex": replace(
        _CUSTOM,
        values=("(?i)price",),
        accepts="pattern",
        check=avoids(custom_checks.has_match),
        prepare=custom_checks.pattern,
    ),
    "function": replace(
        _CUSTOM,
        values=("checks:is_polite",),
        check=never,
        dialogue_check=custom_checks.passes_function,
        prepare=custom_checks.load_function,
    ),
    "ifeval": replace(
        _CUSTOM,
        values=("punctuation:no_comma",),
        check=custom_checks.passes_verifier,
        prepare=custom_checks.load_verifier,
    ),
    "rubric": replace(_CUSTOM, values=("The reply speaks as Ziggy.",), judged=True),
}
