"""The result of an exam: a JSON file that others can cite, submit and compare.

`result.schema.json` is its JSON schema; a test keeps both equal. The verdicts of all answers are in
it, so that every number can be computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.errors import GattError
from pipeline.evaluation.rates import JsonFloat, Rate
from pipeline.exam.settings import ExamSettings
from pipeline.exam.tasks import EXAM_NAME
from pipeline.records import SAMPLERS, Reply, SamplerName

T = TypeVar("T")

RESULT_VERSION = 1
KEPT, BROKEN, KEPT_FULL, BROKEN_FULL, UNMEASURED = "10+-."
"""Marks of an answer: kept or not; the same after the first messages had left the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExaminedModel:
    """What was examined: SHA-256 of the model and the adapter as they were named, or a server.

    `training_minutes` is what its training took; None if it was not said.
    """

    name: str
    sha256: str
    adapter_sha256: str
    server: str
    training_minutes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamSet:
    """What it was examined on: the frozen set, and how much of it.

    `turns` is the length, 0 until the context was full. `complete` if nothing of the set was left
    out: all regimes, all dialogues, 20 turns or more, or each until its context was full. Of the
    `criteria` of a benchmark, `unchecked` need a judge or its authors' measure, and are not
    measured; 0 in the exam.
    """

    name: str
    version: int
    sha256: str
    turns: int
    regimes: tuple[str, ...]
    dialogues: int
    complete: bool
    criteria: int = 0
    unchecked: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogueVerdicts:
    """The answers of one dialogue, a mark for each turn: "1101.".

    "1" kept, "0" not kept, "+" and "-" the same after the first messages had left the context, "."
    nothing measured. They count from turn `first_counted` on. `attribute` is what was asked for in
    place of the user's own messages, or "".
    """

    id: str
    regime: str
    attribute: str
    first_counted: int
    marks: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegimeScore:
    """The counted answers of one regime."""

    regime: str
    adherence: Rate
    words: JsonFloat
    cut: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnScore:
    """The answers of one turn in the regime "first"."""

    turn: int
    adherence: Rate
    words: JsonFloat


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnCost:
    """The time of all answers of one turn, with that for their prompts, per generated token."""

    turn: int
    tokens: int
    milliseconds_per_token: JsonFloat


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """One arm. Rates are over counted answers in the context; intervals allow for dialogues.

    `last_five` is over the last five turns of the dialogues whose context is not full there.
    `full_window` is over the answers after the first messages had left the context. `words` is the
    mean length of an answer, `cut` the share that ended at the limit of tokens or within a thought,
    `loops` the share that looped and was ended there, which is not among them (a benchmark ends
    none), `invalid` the share of loops, repeats and empty answers.
    `half_broken` is the turn (regime "first") after which half of the dialogues have had a broken
    answer, None if never. `reminder_tokens` are those that the arm added to a prompt, in the mean;
    those per kept answer divide by the share that is kept. None: no answer was kept.
    """

    name: str
    answers: int
    adherence: Rate
    last_five: Rate
    full_window: Rate
    words: JsonFloat
    cut: Rate
    loops: Rate
    invalid: Rate
    half_broken: int | None
    prompt_tokens: JsonFloat
    answer_tokens: JsonFloat
    reminder_tokens: JsonFloat
    reminder_tokens_per_kept: float | None
    seconds: float
    milliseconds_per_answer: JsonFloat
    milliseconds_per_kept: float | None
    regimes: tuple[RegimeScore, ...]
    by_turn: tuple[TurnScore, ...]
    dialogues: tuple[DialogueVerdicts, ...]
    cost_by_turn: tuple[TurnCost, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamResult:
    """One model's exam; `notes` are what a server refused, `machine` is where it was timed.

    `gatt` is the version whose checks the verdicts are from; several versions stand with commas,
    several machines with semicolons. `sampler` has what the model was asked for; of a server, the
    rest is its own.
    """

    format: int
    gatt: str
    exam: ExamSet
    model: ExaminedModel
    settings: ExamSettings
    sampler: dict[str, float]
    machine: str
    date: str
    notes: dict[str, str]
    replies_sha256: str
    arms: tuple[ArmResult, ...]

    def arm(self, name: str) -> ArmResult | None:
        """Return the arm called `name`, or None."""
        return next((arm for arm in self.arms if arm.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """What every version of a result file has: the version of the format, and who wrote it."""

    format: int
    gatt: str


def sampler_values(
    name: SamplerName, *, is_server: bool, refused: Collection[str] = ()
) -> dict[str, float]:
    """Return the sampler by llama.cpp's names, as far as the exam decides it.

    A server gets the temperature and a top-p below 1, but for what it has `refused`.
    """
    choice = SAMPLERS[name]
    if not is_server:
        return choice.values
    sent = {"temperature": choice.temperature}
    if choice.top_p < 1:
        sent["top_p"] = choice.top_p
    return {key: value for key, value in sent.items() if key not in refused}


def read_result(path: Path) -> ExamResult:
    """Read a result file.

    Raises:
        GattError: there is none, it is another JSON file, or one of a later version.
    """
    if not path.is_file():
        raise GattError(f"No file at {path}. Name a result that `gatt exam` has written.")
    content = path.read_bytes()
    # Before the other fields, which another version may have changed.
    version = _validated(path, content, _Version)
    if version.format != RESULT_VERSION:
        raise GattError(
            f"{path} has version {version.format} of the format, written by gatt {version.gatt}. "
            f"Expected version {RESULT_VERSION}: take the gatt that wrote it."
        )
    return _validated(path, content, ExamResult)


def _validated(path: Path, content: bytes, form: type[T]) -> T:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(form).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise GattError(
            f"{path} is not a result of {EXAM_NAME} that this version reads ({place}: "
            f"{first['msg']}). Name a file that `gatt exam` has written."
        ) from error


def json_schema() -> dict[str, object]:
    """Return the JSON schema of a result file."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(ExamResult).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def counted_replies(
    dialogues: Sequence[DialogueVerdicts], *, from_turn_1: bool = False, full: bool = False
) -> list[Reply]:
    """Return the counted answers in the context as replies, for statistics.

    With `full`, those in a full context. With `from_turn_1`, those that `is_measured_from_turn_1`,
    from there on. They have no text; an attribute is a dialogue of its own.
    """
    marks = (KEPT_FULL, BROKEN_FULL) if full else (KEPT, BROKEN)
    return [
        verdict_reply(f"{row.id} {row.attribute}".strip(), turn, is_kept=mark == marks[0])
        for row in dialogues
        if not from_turn_1 or is_measured_from_turn_1(row.regime, row.first_counted)
        for turn, mark in enumerate(row.marks, 1)
        if mark in marks and (from_turn_1 or turn >= row.first_counted)
    ]


def is_measured_from_turn_1(regime: str, first_counted: int) -> bool:
    """Return whether the curve by turn has a dialogue: the regime "first", and benchmarks."""
    return regime == "first" or first_counted == 1


def verdict_reply(dialogue: str, turn: int, *, is_kept: bool) -> Reply:
    """Return a verdict as a reply without a text."""
    return Reply(
        arm="",
        dialogue=dialogue,
        turn=turn,
        text="",
        prompt_tokens=0,
        tokens=0,
        finish="stop",
        obeys=is_kept,
        defect="",
    )
