"""RealGuardrails and S-IFEval (Mu et al. 2025, arXiv 2502.12197): system messages under attack.

The files are `handwritten.jsonl` and `distractors.jsonl` of `evals/realguardrails/inputs`, and
`sys_ifeval.jsonl` of `evals/ifeval/inputs`, in normster/RealGuardrails. A row is a chat
(`messages`) up to the answer. `guardrails` are for a judge; `banlist` are words that the answer may
not have; `instruction_id_list` and `kwargs` are IFEval's.
"""

from __future__ import annotations

import re
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
    verifiers,
)
from pipeline.records import Constraint

_FORM = "a row of RealGuardrails (handwritten.jsonl, distractors.jsonl) or sys_ifeval.jsonl"
_IFEVAL = "s-ifeval"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    messages: list[_Message]
    guardrails: tuple[str, ...] = ()
    banlist: tuple[str, ...] = ()
    distractor_task: str = ""
    instruction_id_list: tuple[str, ...] = ()
    kwargs: tuple[dict[str, object], ...] = ()


def read(path: Path) -> list[BenchmarkTask]:
    """Return the chats; their parts are "handwritten", "distractors" and "s-ifeval".

    Raises:
        GattError: the file has another form.
    """
    return [_task(row) for row in rows_of(path)]


def _task(row: Row) -> BenchmarkTask:
    fields = parsed(row, _Row, _FORM)
    messages = fields.messages
    system = messages[0].content if messages and messages[0].role == "system" else ""
    chat = messages[1:] if system else messages
    roles = [message.role for message in chat]
    if not chat or roles != ["user", "assistant"] * (len(chat) // 2) + ["user"]:
        raise GattError(
            f"{row.place}: the roles are {', '.join(m.role for m in messages) or 'none'}. "
            "Expected a system message, and user and assistant in turn up to a user message."
        )
    users = [message.content for message in chat[::2]]
    given = {n: message.content for n, message in enumerate(chat[1::2], 1)}
    part, checks = _checks(row, fields)
    if part == _IFEVAL and not system:
        raise GattError(
            f"{row.place}: instruction_id_list without a system message, as in ifeval.jsonl. "
            f"Expected {_FORM}."
        )
    name = f"{part}-{row.number:03}"
    return dialogue_task(name, part, users, {len(users): checks}, system=system, given=given)


def _checks(row: Row, fields: _Row) -> tuple[str, TurnChecks]:
    names, arguments = fields.instruction_id_list, fields.kwargs
    if names and len(names) == len(arguments):
        return _IFEVAL, verifiers(names, arguments)
    if not fields.guardrails:
        raise GattError(
            f"{row.place}: neither guardrails nor instruction_id_list with as many kwargs. "
            f"Expected {_FORM}."
        )
    part = "distractors" if fields.distractor_task else "handwritten"
    # The authors split an answer at white space, so that "value." is another word than "value".
    words = "|".join(re.escape(word) for word in fields.banlist)
    constraints = (Constraint("not_regex", rf"(?i)(?<!\S)(?:{words})(?!\S)"),) if words else ()
    return part, TurnChecks(constraints, len(constraints), len(fields.guardrails))
