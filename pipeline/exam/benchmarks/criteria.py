"""Criteria in plain English that say exactly what is to be counted, as constraints.

A criterion is recognized only if one of the patterns matches all of it; any other needs a judge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from pipeline.exam.benchmarks.base import TurnChecks
from pipeline.gatt.constraints.language import LANGUAGES
from pipeline.records import Constraint

Constraints = tuple[Constraint, ...]
_Make = Callable[[re.Match[str]], Constraints]

_NUMBERS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_N = rf"(?P<n>\d{{1,4}}|{'|'.join(_NUMBERS)}|a single|a|single)"
_UNIT = r"(?P<unit>words?|sentences?|characters?)"
_MOST = (
    r"(?:no more than|not more than|at most|a maximum of|maximum of|maximum|max|up to|within"
    r"|not exceeding|no longer than)"
)
_BELOW = r"(?:less than|fewer than|under|below)"
_LEAST = r"(?:at least|a minimum of|no fewer than|no less than|not less than)"
_TAIL = r"(?: long| in length| in total)?"
_QUOTED = r"[\"'](?P<phrase>[^\"']+(?:'[a-z]+[^\"']*)*)[\"']"
_LIST = r"(?P<phrases>[\"'][^\"']+[\"'](?:(?:,| and| or|, and|, or) ?[\"'][^\"']+[\"'])*)"
_IN_QUOTES = r"[\"']([^\"']+)[\"']"
_ANSWER = (
    r"(?:(?:the|your|all|every|each|any) )?"
    r"(?:answers?|reply|replies|responses?|output|text|message)"
)
_STRAIGHT = str.maketrans("‘’“”–", "''\"\"-")


def checks_of_requests(texts: Sequence[str]) -> TurnChecks:
    """Return the checks of requests such as "Keep the word count under 200 words"."""
    return _checks([_first(_REQUESTS, text) for text in texts])


def checks_of_questions(texts: Sequence[str]) -> TurnChecks:
    """Return the checks of questions such as "Is the response limited to 150 words?"."""
    return _checks([_first(_QUESTIONS, text) for text in texts])


def _checks(recognized: Sequence[Constraints]) -> TurnChecks:
    constraints = tuple(c for constraints in recognized for c in constraints)
    checked = sum(map(bool, recognized))
    return TurnChecks(constraints, checked, len(recognized) - checked)


def _first(patterns: Sequence[tuple[re.Pattern[str], _Make]], text: str) -> Constraints:
    plain = " ".join(text.translate(_STRAIGHT).split()).rstrip(" .!?")
    for pattern, make in patterns:
        match = pattern.fullmatch(plain)
        if match:
            return make(match)
    return ()


def _number(match: re.Match[str]) -> int:
    text = match["n"].lower()
    if text in _NUMBERS:
        return _NUMBERS.index(text) + 1
    return int(text) if text.isdecimal() else 1


def _at_most(match: re.Match[str], less: int = 0) -> Constraints:
    number = _number(match) - less
    if number < 1:
        return ()
    match match["unit"].rstrip("s"):
        case "word":
            return (Constraint("max_words", str(number)),)
        case "sentence":
            return (Constraint("max_sentences", str(number)),)
        case _:
            return (Constraint("regex", rf"(?s)\A\s*\S.{{0,{number - 1}}}\Z"),)


def _below(match: re.Match[str]) -> Constraints:
    return _at_most(match, 1)


def _at_least(match: re.Match[str]) -> Constraints:
    number, unit = str(_number(match)), match["unit"].rstrip("s")
    return (Constraint("min_words", number),) if unit == "word" else ()


def _more_than(match: re.Match[str]) -> Constraints:
    return (Constraint("min_words", str(_number(match) + 1)),)


def _exactly(match: re.Match[str]) -> Constraints:
    number, unit = str(_number(match)), match["unit"].rstrip("s")
    if unit == "word":
        return (Constraint("min_words", number), Constraint("max_words", number))
    return (Constraint("sentences", number),) if unit == "sentence" else ()


def _between(match: re.Match[str]) -> Constraints:
    return (Constraint("min_words", match["low"]), Constraint("max_words", match["high"]))


def _blocks(match: re.Match[str]) -> Constraints:
    return (Constraint(f"{match['block'].rstrip('s')}s", str(_number(match))),)


def _phrases(kind: str) -> _Make:
    def make(match: re.Match[str]) -> Constraints:
        return tuple(Constraint(kind, p) for p in re.findall(_IN_QUOTES, match["phrases"]))

    return make


def _all_phrases(kind: str) -> _Make:
    """Return what makes a check of each phrase; of one phrase or another there is none."""
    make = _phrases(kind)

    def make_all(match: re.Match[str]) -> Constraints:
        between = re.sub(_IN_QUOTES, "", match["phrases"].lower())
        return () if "or" in between else make(match)

    return make_all


def _phrase(kind: str) -> _Make:
    return lambda match: (Constraint(kind, match["phrase"].strip()),)


def _language(match: re.Match[str]) -> Constraints:
    name = match["language"].capitalize()
    return (Constraint("language", name),) if name in LANGUAGES else ()


def _fixed(kind: str) -> _Make:
    return lambda match: (Constraint(kind),)


def _compiled(table: dict[str, _Make]) -> list[tuple[re.Pattern[str], _Make]]:
    return [(re.compile(pattern, re.IGNORECASE), make) for pattern, make in table.items()]


_IS = r"(?:is the (?:entire )?(?:response|summary|explanation) )"
_LIMITED = r"(?:limited to|kept to|kept) "
_QUESTIONS = _compiled(
    {
        rf"{_IS}(?:{_LIMITED})?(?:a paragraph that does )?{_MOST} {_N} {_UNIT}{_TAIL}": _at_most,
        rf"{_IS}{_LIMITED}{_N} {_UNIT}(?: or (?:less|fewer)| maximum)?": _at_most,
        rf"{_IS}(?:{_LIMITED})?{_BELOW} {_N} {_UNIT}": _below,
        rf"{_IS}{_LEAST} {_N} {_UNIT}{_TAIL}": _at_least,
        rf"{_IS}(?:{_LIMITED})?(?:structured in |provided in )?exactly {_N} {_UNIT}{_TAIL}": (
            _exactly
        ),
        rf"{_IS}structured in {_N} (?P<unit>sentences?)": _exactly,
        rf"{_IS}(?:{_LIMITED}|provided in |structured (?:in|into) )?exactly {_N} "
        rf"(?P<block>paragraphs?|lines?){_TAIL}": _blocks,
        rf"{_IS}(?:{_LIMITED}|provided in |structured (?:in|into) )"
        rf"(?P<n>one|a single) (?P<block>paragraph)": _blocks,
        rf"does the response include the (?:keywords?|words?|terms?) {_LIST}": (
            _all_phrases("keyword")
        ),
        rf"does the response (?:avoid (?:explicitly )?(?:using|mentioning|including)|refrain from "
        rf"(?:using|mentioning)) (?:the (?:words?|terms?) )?{_LIST}": _phrases("forbidden"),
    }
)
_SAY = (
    r"(?:use|write|generate|give|provide|select|include|summarize (?:in|to|with|into)|answer (?:in"
    r"|with)|keep it to|reply with|limit (?:to|it to)|rephrase in|explain in) "
)
_REQUESTS = _compiled(
    {
        rf"(?:{_SAY})?(?:exactly |only |just )?{_N} (?P<unit>sentences?)(?: only)?": _exactly,
        rf"(?:must be |answer (?:each|every) question (?:in|with) )(?:only |exactly )?{_N} "
        rf"(?P<unit>sentences?)": _exactly,
        rf"(?:answer|reply|respond|write|keep (?:it|{_ANSWER})|limit (?:it|{_ANSWER})(?: to)?)? ?"
        rf"(?:a text of )?{_MOST} {_N} {_UNIT}{_TAIL}": _at_most,
        rf"(?:do not exceed|limit (?:the |your )?(?:{_ANSWER}|words|result|generated text)? ?to|"
        rf"fit within) {_N} {_UNIT}": _at_most,
        rf"{_N}[- ](?P<unit>character)s?(?: limit| or (?:less|fewer))": _at_most,
        rf"make (?:{_ANSWER}) (?:be )?{_N} {_UNIT} or (?:less|fewer)": _at_most,
        rf"(?:keep |use |write |be |make )?(?:it |the word count |{_ANSWER} )?"
        rf"{_BELOW} {_N} {_UNIT}": _below,
        rf"(?:use |write )?{_LEAST} {_N} (?P<unit>words)": _at_least,
        rf"(?:use |write )?more than {_N} words": _more_than,
        r"use a minimum of (?P<low>\d+) words and a maximum of (?P<high>\d+) words": _between,
        rf"(?:have|write|use) (?:exactly )?{_N} (?P<block>paragraphs|lines)": _blocks,
        rf"(?:begin|start|open|prefix) {_ANSWER} with (?:the (?:phrase|word|sentence|string):? )?"
        rf"{_QUOTED}": _phrase("opening"),
        rf"(?:always )?(?:begin|start|respond starting|answer starting) with (?:the (?:phrase|word)"
        rf" )?{_QUOTED}": _phrase("opening"),
        rf"(?:end|finish|close|conclude) {_ANSWER} (?:with|by saying) {_QUOTED}": _phrase(
            "closing"
        ),
        r"(?:always )?(?:answer|answer queries|reply|respond|speak|talk|write|write all output|"
        r"generate responses|give answers only|give the answer entirely|use|provide information|"
        r"tell the story)(?: only)?(?: in)? (?P<language>[a-z]+)(?: language)?": _language,
        rf"(?:do not|don't|never) use the words? {_LIST}": _phrases("forbidden"),
        r"(?:include|use)(?: an| some)? emojis?(?: in (?:your|all) (?:answers?|responses?))?": (
            _fixed("emoji")
        ),
        r"do not (?:use line breaks|include any newline characters in the output)": (
            _fixed("one_paragraph")
        ),
    }
)
