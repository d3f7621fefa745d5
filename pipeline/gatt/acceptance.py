"""Which candidates of synthesis are accepted, and the statistics of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.language import language_of
from pipeline.gatt.constraints.registry import (
    edit,
    is_judged,
    kind_of,
    obeys,
    prefix_fails,
    shows_obedience,
)
from pipeline.gatt.quality import (
    find_defect,
    has_repeated_items,
    has_repeated_ngrams,
    is_on_topic,
)
from pipeline.gatt.text import first_sentences, words
from pipeline.records import Answer, Completion, Constraint, Message, SynthesisMethod

ACCEPTED = "accepted"
"""The verdict on a candidate that becomes the answer of its turn."""
UNFINISHED_THOUGHTS = "unfinished thoughts"
"""The verdict on a candidate that a reasoning teacher did not come to: it was cut in its thoughts.
"""
OBEYS_OLD = "obeys the old instruction"
"""The verdict on a candidate that follows an instruction which the user has ended or replaced."""
SEVERAL = "several at once"
"""The kind of an instruction that combines constraints."""
MAX_COPIES = 3
"""Accepted answers with the same words that the training data may hold."""
_MAX_SIMILARITY = 0.3
"""Stricter than in evaluation: a model that is trained on similar answers repeats itself."""


class CandidateKey(NamedTuple):
    """What identifies a candidate; `turn` and `candidate` are counted from 0."""

    dialogue: str
    turn: int
    candidate: int


def judge_candidate(
    assigned: AssignedDialogue,
    key: CandidateKey,
    completion: Completion,
    accepted: Sequence[Answer],
    *,
    max_sentences: int,
) -> Answer:
    """Return a candidate with its text as it would be used, and the verdict on it.

    Only a sampled answer keeps all its sentences; an edited one is cut first, then edited unless it
    has a defect: edits expect a few words. The exact answer to a recall question takes the place of
    any. `accepted` are the answers to the turns before.
    """
    written = completion.text.strip()
    raw = written
    if assigned.method != "sampled":
        raw = first_sentences(written, max_sentences)
    if exact := assigned.exact_answers.get(key.turn):
        return Answer(
            dialogue=key.dialogue,
            turn=key.turn,
            candidate=key.candidate,
            raw=raw or written or exact,  # "Chloe" has no end of a sentence
            text=exact,
            tokens=completion.tokens,
            verdict=ACCEPTED,
        )
    text = raw
    verdict = _answer_verdict(assigned, key.turn, completion, raw, [a.raw for a in accepted])
    if verdict == ACCEPTED:
        if assigned.method == "edited":
            text = edit(assigned.constraints(key.turn), raw)
        dialogue = assigned.student_prompt([a.text for a in accepted], "")
        if not obeys(assigned.constraints(key.turn), text, dialogue):
            verdict = "disobeys"
        elif _obeys_old(assigned, key.turn, text, dialogue):
            verdict = OBEYS_OLD
    return Answer(
        dialogue=key.dialogue,
        turn=key.turn,
        candidate=key.candidate,
        raw=raw,
        text=text,
        tokens=completion.tokens,
        verdict=verdict,
        thoughts=completion.thoughts,
    )


def _answer_verdict(
    assigned: AssignedDialogue, turn: int, completion: Completion, raw: str, earlier: list[str]
) -> str:
    """Return `ACCEPTED`, or the first reason why it is not, of an answer that may not obey."""
    sampled = assigned.method == "sampled"
    if completion.finish == "context":
        return "context"
    if completion.finish == "thinking":
        return UNFINISHED_THOUGHTS
    if _loops(words(raw), raw.splitlines()):
        return "loop"
    # Sampling stopped early: not for a loop, so the check cannot be passed.
    if sampled and completion.finish == "stop_when":
        return "disobeys"
    defect = find_defect(
        raw,
        [] if assigned.is_fixed(turn, raw) else earlier,
        assigned.required_words,
        require_ending=not sampled,
        max_similarity=_MAX_SIMILARITY,
    )
    if defect:
        return defect
    if not _keeps_to_topic(assigned, turn, raw, earlier):
        return "off topic"
    return "unfinished" if sampled and completion.finish == "length" else ACCEPTED


def _keeps_to_topic(assigned: AssignedDialogue, turn: int, raw: str, earlier: list[str]) -> bool:
    """Return whether an answer has to do with the dialogue, as far as that can be told.

    It cannot of an answer in another language than the question. An instruction in the user's own
    words may change the topic, as by a refusal.
    """
    turns, instruction = assigned.dialogue.turns[: turn + 1], assigned.active_instruction(turn)
    if any(kind_of(c).family == "language" for c in assigned.constraints(turn)):
        return True
    if instruction is None or not instruction.label:
        return is_on_topic(raw, [*turns, *earlier])
    if language_of(raw) != language_of(turns[-1]):
        return True
    return is_on_topic(raw, [*turns, *earlier, instruction.text])


def _obeys_old(
    assigned: AssignedDialogue, turn: int, text: str, dialogue: Sequence[Message]
) -> bool:
    """Return whether an answer still follows a part of the instruction that no longer holds.

    A teacher that has obeyed in all earlier answers goes on by itself. Only checks that a plain
    answer does not pass can tell.
    """
    if assigned.active_instruction(turn) is assigned.instruction:
        return False
    new = assigned.constraints(turn)
    old = [c for c in assigned.constraints(0) if c not in new and not is_judged((c,))]
    return any(shows_obedience(c) and obeys((c,), text, dialogue) for c in old)


def cannot_be_accepted(constraints: tuple[Constraint, ...], prefix: str) -> bool:
    """Return whether a sampled candidate that begins with `prefix` fails, whatever follows."""
    # The last word may be incomplete, so it is not part of a loop yet, nor is the last line.
    return prefix_fails(constraints, prefix) or _loops(words(prefix)[:-1], prefix.split("\n")[:-1])


def _loops(text_words: Sequence[str], lines: Sequence[str]) -> bool:
    """Return whether an answer repeats itself, even where that would not count in evaluation.

    A model that is trained on lists with the same item twice writes lists of one item.
    """
    return has_repeated_ngrams(text_words) or has_repeated_items(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceRow:
    """The candidates for one instruction and method.

    `rejected` counts verdicts. `words` is the mean length of accepted answers; None without one.
    `kind` is that of the first instruction's constraint, `SEVERAL`, "recall" or "none".
    """

    instruction: str
    method: SynthesisMethod
    candidates: int
    accepted: int
    rejected: dict[str, int]
    words: float | None
    example: str
    kind: str = ""

    @property
    def rejections(self) -> str:
        """Return the counts of `rejected` as text: "disobeys: 3, loop: 1"."""
        return ", ".join(f"{verdict}: {count}" for verdict, count in self.rejected.items())


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The statistics of a synthesis: `synthesize/acceptance.json`.

    `too_common` accepted answers were removed, as `MAX_COPIES` with their words came before. Of the
    `answers` that are trained on, `edited` differ from what the teacher wrote; None: not known.
    """

    rows: list[AcceptanceRow]
    too_common: int
    answers: int | None = None
    edited: int | None = None


def measure_acceptance(
    dialogues: Iterable[AssignedDialogue], answers: Iterable[Answer], too_common: int
) -> Acceptance:
    """Return the statistics of all candidates, by instruction and method."""
    groups = {d.dialogue.id: (d.name, d.method) for d in dialogues}
    kinds = {d.name: _kind(d) for d in dialogues}
    candidates: dict[tuple[str, SynthesisMethod], list[Answer]] = {}
    for answer in sorted(answers, key=lambda a: (a.dialogue, a.turn, a.candidate)):
        candidates.setdefault(groups[answer.dialogue], []).append(answer)
    rows = [
        replace(_row(name, method, group), kind=kinds[name])
        for (name, method), group in sorted(candidates.items())
    ]
    return Acceptance(rows, too_common)


def _kind(assigned: AssignedDialogue) -> str:
    """Return the kind of the constraint that the first answer is checked for, or "recall"."""
    if assigned.recall_questions:
        return "recall"
    kinds = [constraint.kind for constraint in assigned.constraints(0)]
    return SEVERAL if len(kinds) > 1 else next(iter(kinds), "none")


def by_kind(rows: Iterable[AcceptanceRow]) -> list[AcceptanceRow]:
    """Return the sums of the rows of each kind and method, without examples."""
    groups: dict[tuple[str, SynthesisMethod], list[AcceptanceRow]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.method), []).append(row)
    return [_sum(kind, method, group) for (kind, method), group in sorted(groups.items())]


def _sum(kind: str, method: SynthesisMethod, rows: list[AcceptanceRow]) -> AcceptanceRow:
    rejected = sum((Counter(row.rejected) for row in rows), Counter[str]())
    accepted = sum(row.accepted for row in rows)
    total_words = sum(row.accepted * (row.words or 0) for row in rows)
    return AcceptanceRow(
        instruction=kind,
        method=method,
        candidates=sum(row.candidates for row in rows),
        accepted=accepted,
        rejected=dict(rejected.most_common()),
        words=round(total_words / accepted, 1) if accepted else None,
        example="",
        kind=kind,
    )


def _row(instruction: str, method: SynthesisMethod, candidates: list[Answer]) -> AcceptanceRow:
    accepted = [a for a in candidates if a.verdict == ACCEPTED]
    rejected = Counter(a.verdict for a in candidates if a.verdict != ACCEPTED)
    lengths = [len(words(a.text)) for a in accepted]
    return AcceptanceRow(
        instruction=instruction,
        method=method,
        candidates=len(candidates),
        accepted=len(accepted),
        rejected=dict(rejected.most_common()),
        words=round(sum(lengths) / len(lengths), 1) if lengths else None,
        example=accepted[0].text if accepted else "",
    )
