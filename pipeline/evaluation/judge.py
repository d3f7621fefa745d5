"""Ask a judge, a model or a server, about replies that no program can check.

It is calibrated first on replies whose exact check is known.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from pipeline.console import log, progress
from pipeline.evaluation.rates import adherence, wilson
from pipeline.evaluation.replies import Note
from pipeline.evaluation.scores import Judgment
from pipeline.evaluation.scoring.rows import rate_rows
from pipeline.files import JsonlLog
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.text import words
from pipeline.inference.generator import open_generator
from pipeline.records import MAX_THOUGHT_TOKENS, Message, Reply, Request, Task

T = TypeVar("T")

_CONTEXT, _QUESTION_TOKENS = 2048, 1500
"""Tokens of a judge's context, and of a question that it has room for."""
_BYTES_PER_TOKEN = 3
"""Of a text; few tokens have less."""
RELIABLE_AGREEMENT = 0.8
"""Agreement with the exact checks below which verdicts are marked as not reliable."""
_RUBRIC = """A user gave an assistant this instruction at the beginning of a chat:
{instruction}

Later in the chat the user wrote:
{user}

The assistant replied:
{reply}

Judge only whether this reply keeps the instruction, not whether it is right or good. A reply that \
keeps it in part does not
keep it. Answer with one word, yes or no."""
_CALIBRATION_REPLIES = 200
_MAX_TOKENS = 4
"""Tokens of a verdict."""


class _Key(NamedTuple):
    """The reply that a verdict is about."""

    arm: str
    dialogue: str
    turn: int

    @classmethod
    def of(cls, reply: Reply) -> _Key:
        return cls(reply.arm, reply.dialogue, reply.turn)


def judge(
    name: str,
    replies: Sequence[Reply],
    dialogues: Iterable[AssignedDialogue],
    log_file: Path,
    max_thought_tokens: int = MAX_THOUGHT_TOKENS,
    note: Note = lambda model, changes: None,
) -> tuple[list[Reply], Judgment]:
    """Return the replies, with `obeys` set by the judge where needed, and its calibration.

    Verdicts of an earlier attempt are read from `log_file`. A judge may think before its verdict;
    what stands only in its thoughts is none. `note` is as for `generate_replies`.

    Raises:
        GattError: no such model, or nobody answers at that address.
    """
    by_id = {d.dialogue.id: d for d in dialogues if d.constraints(0) or d.needs_judge(0)}
    measured = [
        r
        for r in replies
        if r.dialogue in by_id and not r.recall_attribute and r.finish != "context"
    ]
    unchecked = [r for r in measured if by_id[r.dialogue].needs_judge(r.turn - 1)]
    checked = [r for r in measured if not by_id[r.dialogue].needs_judge(r.turn - 1)]
    good, bad = ([r for r in checked if r.obeys is obeys] for obeys in (True, False))
    calibration = balanced(good, bad, _CALIBRATION_REPLIES)
    verdicts = _verdicts(
        name,
        [*calibration, *unchecked],
        by_id,
        log_file,
        max_thought_tokens=max_thought_tokens,
        note=note,
    )
    agreed = sum(verdicts[_Key.of(r)] == r.obeys for r in calibration)
    agreement = wilson(agreed, len(calibration))
    log(
        f"evaluate: the judge agrees with the exact checks in {agreement.hits} of {agreement.n} "
        "replies"
        if calibration
        else "evaluate: no replies, some that obey and some that do not, by which a program could "
        "tell how far the judge can be trusted"
    )
    if missing := sum(verdicts[_Key.of(r)] is None for r in unchecked):
        log(
            f"evaluate: the judge gave no verdict on {missing} of {len(unchecked)} replies, which "
            "count as not adherent."
        )
    judged = {r: by_id[r.dialogue].with_verdict(r, verdict=verdicts[_Key.of(r)]) for r in unchecked}
    by_instruction = adherence(judged.values(), lambda r: (r.arm, by_id[r.dialogue].name))
    return [judged.get(r, r) for r in replies], Judgment(
        model=name,
        agreement=agreement,
        reliable=agreement.value >= RELIABLE_AGREEMENT,
        scores=rate_rows(by_instruction),
    )


def _verdicts(
    name: str,
    replies: Sequence[Reply],
    dialogues: Mapping[str, AssignedDialogue],
    log_file: Path,
    *,
    max_thought_tokens: int,
    note: Note,
) -> dict[_Key, bool | None]:
    """Return a verdict on each reply; the model is opened only if some are missing."""
    with JsonlLog(log_file) as verdict_log:
        verdicts: dict[_Key, bool | None] = {
            _Key(r["arm"], r["dialogue"], r["turn"]): r["verdict"] for r in verdict_log.records
        }
        missing = [r for r in replies if _Key.of(r) not in verdicts]
        prompts = {_Key.of(r): _question_about(r, dialogues[r.dialogue]) for r in missing}
        with progress("evaluate: verdicts", len(replies), len(replies) - len(missing)) as bar:

            def ask(reply: Reply) -> Task:
                key = _Key.of(reply)
                completion = yield Request(
                    messages=prompts[key],
                    seed=0,
                    max_tokens=_MAX_TOKENS,
                    temperature=0.0,
                    max_thought_tokens=max_thought_tokens,
                )
                unfinished = completion.finish == "thinking"
                verdicts[key] = None if unfinished else verdict(completion.text)
                thoughts = {"thoughts": completion.thoughts} if completion.thoughts else {}
                verdict_log.append({**key._asdict(), "verdict": verdicts[key], **thoughts})
                bar.advance()

            if missing:
                with open_generator(
                    name,
                    dialogues=len(missing),
                    context=judge_context(prompts.values()),
                    max_thought_tokens=max_thought_tokens,
                ) as model:
                    model.run(map(ask, missing))
                note(model.name, model.changes)
    return verdicts


def _question_about(reply: Reply, dialogue: AssignedDialogue) -> tuple[Message, ...]:
    turn = reply.turn - 1
    return question(dialogue.criterion(turn), dialogue.dialogue.turns[turn], reply.text)


def judge_context(questions: Iterable[Sequence[Message]], further_tokens: int = 0) -> int:
    """Return the tokens of a context for each of `questions` and its verdict, without thoughts.

    Each may grow by `further_tokens`.
    """
    sizes = (sum(len(message["content"].encode()) for message in q) for q in questions)
    longest = max(sizes, default=0) // _BYTES_PER_TOKEN + further_tokens
    return _CONTEXT + max(0, longest - _QUESTION_TOKENS)


def question(instruction: str, user: str, reply: str) -> tuple[Message, ...]:
    """Return the chat that asks the judge about one reply."""
    return (
        {
            "role": "user",
            "content": _RUBRIC.format(instruction=instruction, user=user, reply=reply),
        },
    )


def verdict(text: str) -> bool | None:
    """Return whether the judge's first word is yes or no; None if it is neither."""
    first = words(text)[:1]
    return {"yes": True, "no": False}.get(first[0]) if first else None


def balanced(good: Sequence[T], bad: Sequence[T], limit: int) -> list[T]:
    """Return up to `limit` items, as many good as bad ones, drawn by a fixed seed.

    Otherwise a judge that always says yes could look good.
    """
    draw = random.Random("calibration")
    size = min(len(good), len(bad), limit // 2)
    return [*draw.sample(list(good), size), *draw.sample(list(bad), size)]
