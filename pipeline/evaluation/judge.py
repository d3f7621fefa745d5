"""Asks a judge (a model here or a server) about replies, and first about some whose exact check is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.console import Progress, log, progress
from pipeline.evaluation.judge_prompts import RELIABLE, balanced, question, verdict
from pipeline.evaluation.rates import adherence, wilson
from pipeline.evaluation.scores import table
from pipeline.files import JsonlLog
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import kind_of
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.openai_client import OpenAIClient
from pipeline.records import Reply, Request, Task

_CALIBRATION = 200
_CONTEXT = 2048

Verdicts = dict[tuple[str, str, int], bool | None]
"""By arm, dialogue and turn."""


def judge(
    name: str, replies: Sequence[Reply], pairs: Iterable[AssignedDialogue], log_file: Path
) -> tuple[list[Reply], dict[str, Any]]:
    """The replies, those that only a judge can tell with its verdict for `obeys`; and what is known of the judge.

    Verdicts of an earlier attempt stand in `log_file` and are kept.

    Raises:
        GattError: no such model, or nobody answers at that address.
    """
    told = {p.dialogue.id: p for p in pairs if p.instruction and p.constraints(0)}
    known = [r for r in replies if r.dialogue in told and not r.probe and r.finish != "context"]
    open_ones = [r for r in known if _judged(told[r.dialogue], r)]
    exact = [r for r in known if not _judged(told[r.dialogue], r)]
    tried = balanced([r for r in exact if r.obeys], [r for r in exact if not r.obeys], _CALIBRATION)
    verdicts = _ask(name, [*tried, *open_ones], told, log_file)
    agreement = wilson(sum(verdicts[_key(r)] == r.obeys for r in tried), len(tried))
    judged = set(open_ones)
    settled = [replace(r, obeys=bool(verdicts[_key(r)])) if r in judged else r for r in replies]
    log(
        f"evaluate: the judge agrees with the exact checks in {agreement.hits} of {agreement.n} replies"
    )
    theirs = [after for before, after in zip(replies, settled, strict=True) if before in judged]
    by_instruction = adherence(theirs, lambda r: (r.arm, told[r.dialogue].name))
    reliable = agreement.value >= RELIABLE
    return settled, {
        "model": name,
        "agreement": asdict(agreement),
        "reliable": reliable,
        "scores": table(by_instruction),
    }


def _judged(pair: AssignedDialogue, reply: Reply) -> bool:
    return any(kind_of(c).judged for c in pair.constraints(reply.turn - 1))


def _key(reply: Reply) -> tuple[str, str, int]:
    return reply.arm, reply.dialogue, reply.turn


def _ask(
    name: str, replies: Sequence[Reply], told: Mapping[str, AssignedDialogue], log_file: Path
) -> Verdicts:
    with JsonlLog(log_file) as log:
        verdicts: Verdicts = {
            (r["arm"], r["dialogue"], r["turn"]): r["verdict"] for r in log.records
        }
        missing = [r for r in replies if _key(r) not in verdicts]
        with progress("evaluate: verdicts", len(replies), len(replies) - len(missing)) as bar:
            if missing:
                with _open(name, len(missing)) as model:
                    model.run(_question(r, told[r.dialogue], verdicts, log, bar) for r in missing)
    return verdicts


def _question(
    reply: Reply, pair: AssignedDialogue, verdicts: Verdicts, log: JsonlLog, bar: Progress
) -> Task:
    told, user = pair.student_instructions[reply.turn - 1], pair.dialogue.turns[reply.turn - 1]
    done = yield Request(question(told, user, reply.text), 0, 4, 0.0)
    verdicts[_key(reply)] = verdict(done.text)
    log.append(
        {
            "arm": reply.arm,
            "dialogue": reply.dialogue,
            "turn": reply.turn,
            "verdict": verdict(done.text),
        }
    )
    bar.advance()


def _open(name: str, questions: int) -> BatchEngine | OpenAIClient:
    if name.startswith(("http://", "https://")):
        url, _, served = name.partition("#")
        return OpenAIClient(url, served)
    model = find_model(name)
    return BatchEngine(
        model.path if model.is_gguf else cached_gguf(model, "Q8_0"), questions, _CONTEXT
    )
