"""MT-Eval's recollection tasks (Kwan et al. 2024, arXiv 2401.16745).

The files are `recollection_multi_global-inst.jsonl` and `recollection_multi_cls.jsonl` (also the
ablations `cls_ablation_*.jsonl`), as `create_data.py` of KwanWaiChung/MT-Eval writes them: a row is
a dialogue, `conv` its turns with `user`, `sys` and `do_inference`; turns without inference have
their answer in `sys`. One instruction (`inst_name`, `inst_args`) holds for all answers, or each
answer is to be the label in `sys`. In the data set wckwan/MT-Eval, arguments of other instructions
are null.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.text_files import Row
from pipeline.errors import GattError
from pipeline.exam.benchmarks.base import (
    BenchmarkTask,
    TurnChecks,
    dialogue_task,
    parsed,
    rows_of,
    verifier,
)
from pipeline.gatt.constraints.style_checks import EMOJI
from pipeline.records import Constraint

_FORM = (
    "a dialogue of MT-Eval's recollection (recollection_multi_global-inst.jsonl or "
    "recollection_multi_cls.jsonl)"
)
_MAX_LABEL = 40
"""Characters of the longest label; MT-Eval's are single words."""
_LANGUAGES = {
    **{"English": "en", "Spanish": "es", "Portuguese": "pt", "Arabic": "ar", "Hindi": "hi"},
    **{"French": "fr", "Russian": "ru", "German": "de", "Japanese": "ja", "Italian": "it"},
    **{"Bengali": "bn", "Ukrainian": "uk", "Thai": "th", "Urdu": "ur", "Tamil": "ta"},
    **{"Telugu": "te", "Bulgarian": "bg", "Korean": "ko", "Polish": "pl", "Hebrew": "he"},
    **{"Persian": "fa", "Vietnamese": "vi", "Nepali": "ne", "Swahili": "sw", "Kannada": "kn"},
    **{"Marathi": "mr", "Gujarati": "gu", "Punjabi": "pa", "Malayalam": "ml", "Finnish": "fi"},
}
"""The languages of the instruction with their ISO 639-1 codes, which IFEval's verifier takes."""

Arguments = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    user: str
    sys: str
    do_inference: bool
    id: str | int = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dialogue:
    id: str | int
    conv: list[_Turn]
    inst_name: str | None = None
    inst_args: dict[str, object] | None = None


def read(path: Path) -> list[BenchmarkTask]:
    """Return the dialogues; their parts are "instruction" and "labels".

    Raises:
        GattError: the file has another form, or an instruction that is not known.
    """
    return [_task(row) for row in rows_of(path)]


def _task(row: Row) -> BenchmarkTask:
    dialogue = parsed(row, _Dialogue, _FORM)
    turns = list(enumerate(dialogue.conv, 1))
    given = {n: turn.sys for n, turn in turns if not turn.do_inference}
    if len(given) == len(turns):
        raise GattError(f"{row.place}: no turn has do_inference = true. Expected {_FORM}.")
    name = dialogue.inst_name
    if name:
        of_all = TurnChecks(_constraints(row, name, dialogue.inst_args or {}), 1)
        checks = {n: of_all for n, _ in turns if n not in given}
    else:
        _require_labels(row, dialogue)
        checks = {n: TurnChecks((_label(turn),), 1) for n, turn in turns if n not in given}
    texts = [turn.user for _, turn in turns]
    part = "instruction" if name else "labels"
    return dialogue_task(f"{part}-{dialogue.id}", part, texts, checks, given=given)


def _require_labels(row: Row, dialogue: _Dialogue) -> None:
    """Check that answers are to be labels; other tasks have a model's own answers in `sys`.

    The instruction stands in a turn of its own, or with the document (`recollection_single_cls`).

    Raises:
        GattError: it is another task.
    """
    first = dialogue.conv[0]
    is_instruction = first.id == "instruction" and not first.do_inference
    labels = [turn.sys.strip() for turn in dialogue.conv if turn.do_inference]
    if not (is_instruction or len(dialogue.conv) == 1) or not all(map(_is_label, labels)):
        raise GattError(
            f"{row.place}: neither inst_name nor an instruction with a label in each sys. "
            f"Expected {_FORM}."
        )


def _is_label(text: str) -> bool:
    return bool(text) and len(text) <= _MAX_LABEL and "\n" not in text


def _label(turn: _Turn) -> Constraint:
    """Return the check that an answer contains the label, as the authors count it."""
    return Constraint("regex", f"(?i){re.escape(turn.sys.strip())}")


def _constraints(row: Row, name: str, arguments: Arguments) -> tuple[Constraint, ...]:
    if name not in _KINDS:
        known = ", ".join(_KINDS)
        raise GattError(f"{row.place}: no instruction {name!r} is known. Expected one of {known}.")
    try:
        return _KINDS[name](arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise GattError(
            f"{row.place}: {name} has the arguments {dict(arguments)!r} ({error}). Expected "
            f"{_FORM}."
        ) from error


def _matches(pattern: str) -> tuple[Constraint, ...]:
    return (Constraint("regex", pattern),)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("expected a text")
    return value


def _texts(value: object) -> list[str]:
    if not isinstance(value, list) or not value:
        raise TypeError("expected a list of texts")
    return [_text(item) for item in value]


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError("expected a number")
    return value


def _bullets(arguments: Arguments) -> tuple[Constraint, ...]:
    """Return the check of the number of bullets; 0 is any number but none."""
    count = _number(arguments["num_bullets"])
    if count:
        return (verifier("detectable_format:number_bullet_lists", {"num_bullets": count}),)
    return _matches(r"(?m)^\s*(?:\*[^*]|-)")


_KINDS: dict[str, Callable[[Arguments], tuple[Constraint, ...]]] = {
    "startend:start_char": lambda a: _matches(rf"(?i)\A\s*{re.escape(_text(a['letter']))}"),
    "startend:start_emoji": lambda a: _matches(rf"\A\s*[{EMOJI}]"),
    "startend:end_phrase": lambda a: _matches(rf"(?i){re.escape(_text(a['end_phrase']))}['\s]*\Z"),
    "language:response_language": lambda a: (
        verifier("language:response_language", {"language": _LANGUAGES[_text(a["lang"])]}),
    ),
    "format:json_format": lambda a: (verifier("detectable_format:json_format", {}),),
    "format:bullet_list": _bullets,
    # "less than n"; counted with gatt's sentences, because NLTK's need data that it fetches.
    "length_constraints:number_sentences": lambda a: (
        Constraint("max_sentences", str(_number(a["num_sentences"]) - 1)),
    ),
    "length_constraints:number_words": lambda a: (
        verifier(
            "length_constraints:number_words",
            {"num_words": _number(a["num_words"]), "relation": "less than"},
        ),
    ),
    "keywords:existence": lambda a: tuple(
        Constraint("regex", f"(?i){re.escape(word)}") for word in _texts(a["keywords"])
    ),
    "change_case:capital_letter": lambda a: (Constraint("uppercase"),),
    "change_case:lowercase": lambda a: (Constraint("lowercase"),),
    "punctuation:no_comma": lambda a: (Constraint("not_regex", ","),),
    "combination:two_responses": lambda a: (verifier("combination:two_responses", {}),),
    "content:placeholder": lambda a: (
        verifier(
            "detectable_content:number_placeholders",
            {"num_placeholders": _number(a["num_placeholder"])},
        ),
    ),
    "format:constrained_response": lambda a: _matches(
        "|".join(map(re.escape, _texts(a["response_options"])))
    ),
}
"""The checks of each instruction, by the names of the benchmark."""
