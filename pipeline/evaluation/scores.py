"""The numbers of an evaluation as typed values; `evaluate/scores.json` holds them.

Fields are JSON keys. A number that the replies do not determine is nan here and null in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import GattError
from pipeline.evaluation.rates import JsonFloat, Rate
from pipeline.evaluation.statistics import Difference, SampleSize, Survival
from pipeline.records import SamplerName


@dataclass(frozen=True, slots=True, kw_only=True)
class RateRow(Rate):
    """The rate of one arm `at` a turn, instruction or other value that replies are grouped by."""

    arm: str
    at: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnseenRow(RateRow):
    """The rate of an instruction that was not trained; `group` is its row of `generalization`."""

    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TraitRow(RateRow):
    """How often one arm shows a trait unasked, and the `difference` from the base."""

    difference: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Leakage:
    """How often plain replies show what was trained: `traits`, which programs can check.

    `new` are the shares of replies with any of the `never_in_base` traits, which no reply of the
    base shows. `by_trait` has the traits that the arms do not show equally often.
    """

    traits: int
    never_in_base: int
    new: tuple[RateRow, ...]
    by_trait: tuple[TraitRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyCounts:
    """Replies of one arm by what they are; they overlap.

    `left_out` counts those whose turn 1 had left the context window, `all` the others. Of these,
    `obey` counts answers that obey, good or not, `no_answer` loops, repeats and empty ones, `cut`
    those at `max_tokens`, and `unchecked` those whose instruction nothing checks.
    """

    all: int
    obey: int
    no_answer: int
    cut: int
    left_out: int
    unchecked: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeTurn:
    """Shares of replies in one turn that obey the old and the new instruction, of `n` dialogues."""

    turn: int
    old: float
    new: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeScores:
    """Adherence of one arm around a change of instruction in `change_turn` (from 1).

    `before` is that to the old instruction until then, `after` that to the new one from then on.
    `old_after` is that to the old one, which should have ended. `turns_to_switch` is the median
    number of turns until the first answer that obeys the new instruction (0: at once). Dialogues
    without one are left out; `never_switched` counts those that do not.
    """

    change_turn: int
    before: Rate
    after: Rate
    old_after: Rate
    dialogues: int
    never_switched: int
    turns_to_switch: float | None
    by_turn: tuple[ChangeTurn, ...]


@dataclass(frozen=True, slots=True)
class EventScores:
    """Adherence of one arm to an instruction before and after the user speaks against it."""

    before: Rate
    after: Rate


@dataclass(frozen=True, slots=True)
class EventArms:
    """What the user does halfway, by arm; empty where it was not measured.

    After a `change` another instruction holds, after a `stop` none, and after a `contradiction` of
    the system message that one still.
    """

    change: Mapping[str, ChangeScores] = field(default_factory=dict)
    stop: Mapping[str, EventScores] = field(default_factory=dict)
    contradiction: Mapping[str, EventScores] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Degradation:
    """Perplexity of each arm on the base's plain answers, and KL(base‖arm) in nats per token."""

    tokens: int
    perplexity: Mapping[str, JsonFloat]
    kl: Mapping[str, JsonFloat]


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityRow:
    """Reminder fidelity of one arm `at` a turn or an instruction, over `tokens` of answers.

    `kl` is KL(reminded base‖arm told once), `base_kl` that of the base told once, in nats per
    token. `value` is 1 - kl / base_kl with its 95 % interval over the `dialogues`; nan for less
    than two.
    """

    arm: str
    at: int | str
    kl: float
    base_kl: float
    value: JsonFloat
    low: JsonFloat
    high: JsonFloat
    tokens: int
    dialogues: int


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near each arm that is told once comes to the base that is reminded in every turn.

    A turn in which both see the same chat does not count, such as turn 1. `saved_tokens` is by how
    many tokens the last prompt of a dialogue is shorter without reminders. Where a prompt is
    `baked`, it is the reminder, and without it nothing is told; `leaks` is the same under another
    system message, where an arm should be no nearer than the base.
    """

    overall: tuple[FidelityRow, ...]
    by_turn: tuple[FidelityRow, ...]
    by_instruction: tuple[FidelityRow, ...]
    saved_tokens: float = 0.0
    baked: bool = False
    leaks: tuple[FidelityRow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionRow(RateRow):
    """Adherence of one arm `at` some turns, and that of the `main` evaluation in its last five.

    The `difference` is positive where adherence is higher than in the main evaluation.
    """

    main: Rate
    difference: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionScores:
    """The result of one condition: `evaluate/conditions/SAMPLER-TURNS.json`.

    `values` are those of the sampler by llama.cpp's names. With another sampler, there is a row for
    the last five turns of the main evaluation, and with more turns one for the last five of these.
    """

    sampler: SamplerName
    values: Mapping[str, float]
    turns: int
    rows: tuple[ConditionRow, ...]


@dataclass(frozen=True, slots=True)
class Judgment:
    """The judge `model`, how often it agrees with exact checks, and the rates by its verdicts."""

    model: str
    agreement: Rate
    reliable: bool
    scores: tuple[RateRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """All numbers of an evaluation; what was not measured is empty or None.

    Mappings are by arm. `turns` is the last turn that was measured. `by_length` is adherence after
    turn 1 `at` up to so many tokens of prompt, a power of two. `last_five_unfiltered` is
    `last_five` whether or not a reply has a defect; `after_first` leaves turn 1 out. `difference`
    is that of `last_five` from the base. `generalization` has rows for new values of trained kinds
    and for new kinds; `by_unseen` has one for each kind. `combined` has rows for two and for three
    constraints at once. After a `stop` the instruction should not be obeyed any more, after a
    `contradiction` of the system message it should. `recall` is by turn; `recall_known` is that of
    what the same arm answers in turn 1. `obey_no_answer` are by kind the replies that obey and have
    a defect, such as nothing but the phrase that was asked for, `cut_before_obeying` those cut at
    `max_tokens` that do not obey so far. `coverage` counts by kind the constraints of training that
    were measured, and all of them. `unchecked` names the instructions of training that nothing
    checks: no rate includes them. `custom_events` are `change`, `stop` and `contradiction` of the
    instructions in the user's own words alone, where there are others, too.
    """

    turns: int
    by_turn: tuple[RateRow, ...]
    by_instruction: tuple[RateRow, ...]
    by_family: tuple[RateRow, ...]
    last_five: tuple[RateRow, ...]
    last_five_unfiltered: tuple[RateRow, ...]
    after_first: tuple[RateRow, ...]
    replies: Mapping[str, ReplyCounts]
    difference: Mapping[str, Difference]
    survival: Mapping[str, Survival]
    distinct_2: Mapping[str, JsonFloat]
    required_sample_size: SampleSize | None
    primary: Literal["last_five", "after_first", "recall", "unseen"] = "last_five"
    generalization: tuple[RateRow, ...] = ()
    by_unseen: tuple[UnseenRow, ...] = ()
    unseen_by_turn: tuple[UnseenRow, ...] = ()
    combined: tuple[RateRow, ...] = ()
    change: Mapping[str, ChangeScores] = field(default_factory=dict)
    stop: Mapping[str, EventScores] = field(default_factory=dict)
    contradiction: Mapping[str, EventScores] = field(default_factory=dict)
    custom_events: EventArms = EventArms()
    recall: tuple[RateRow, ...] = ()
    recall_known: tuple[RateRow, ...] = ()
    by_length: tuple[RateRow, ...] = ()
    recall_by_attribute: tuple[RateRow, ...] = ()
    obey_no_answer: tuple[RateRow, ...] = ()
    cut_before_obeying: tuple[RateRow, ...] = ()
    leaks: Leakage | None = None
    coverage: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()
    single: tuple[RateRow, ...] = ()
    single_by_kind: tuple[RateRow, ...] = ()
    degradation: Degradation | None = None
    fidelity: Fidelity | None = None
    judge: Judgment | None = None

    @property
    def is_baked(self) -> bool:
        """Return whether a prompt was baked in, and the tuned model measured without it."""
        return self.fidelity is not None and self.fidelity.baked

    @classmethod
    def from_json(cls, text: str) -> Scores:
        """Read the text of a `scores.json`.

        Raises:
            GattError: fields are missing, as in a file of another version.
        """
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise GattError(
                "evaluate/scores.json does not have the fields that this version of gatt reads "
                f"({error.error_count()} differ). Delete the folder `evaluate` of the run and "
                "measure it again with `gatt evaluate`."
            ) from error
